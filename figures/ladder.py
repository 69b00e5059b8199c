"""What each step of the ladder reaches, from the records of bench/ladder.py alone.

    python figures/ladder.py results/ladder-nvidia-h200.jsonl --out figures
    python figures/ladder.py results/ladder-nvidia-h200.jsonl --length 512

Writes ladder as PNG and SVG: forward on the left, backward on the right, a row for each head dim;
a pair of bars for each step, full and causal, and the 8192³ matrix product of the same run as the
ceiling. The number above a pair is the gain over the step before, with the full mask. --length is
the longest on record unless given; it is added to the name then.
"""

import sys

from flashstudy.figures import cli, grid, records, style
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

TITLE = {"fontsize": 11.5, "pad": 4}  # of a panel
BARS = {  # causal? -> looks of the bars
    False: {"facecolor": "#1F4E79", "edgecolor": "#1F4E79", "linewidth": 0.6},
    True: {"facecolor": "#CFE3F5", "edgecolor": "#1F4E79", "linewidth": 0.6, "hatch": "////"},
}


def panel(ax, found, direction, d, names):
    """The bars of one direction and head dim."""
    width, highest = 0.4, 0.0
    masks = sorted({c.causal for c in found})
    of_mask = {c.causal: f for c, f in found.items() if (c.direction, c.head_dim) == (direction, d)}
    ceilings = [r for f in of_mask.values() if (r := grid.best(f, [grid.MATMUL])) is not None]
    for at, name in enumerate(names):
        if direction == "forward" and name not in grid.forward_steps(names):
            continue
        tallest = 0.0
        for causal, of_cell in of_mask.items():
            x = at + (masks.index(causal) - (len(masks) - 1) / 2) * width
            row = of_cell.get(name)
            if row is None or row["status"] == "unsupported":
                continue
            if row["status"] != "ok":
                ax.annotate(
                    row["status"], (x, 0), xytext=(0, 3), textcoords="offset points", fontsize=8,
                    rotation=90, ha="center", va="bottom", color=style.RED,
                )  # fmt: skip
                continue
            ax.bar(x, speed := grid.tflops(row), width, **BARS[causal])
            tallest = max(tallest, speed)
        first = of_mask.get(masks[0], {})
        gained = grid.gain(first, name, names)
        if gained is not None:
            ax.annotate(
                f"×{gained:.2f}", (at, tallest), xytext=(0, 2), textcoords="offset points",
                ha="center", fontsize=8.5, color=style.BLACK if gained >= 1 else style.RED,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
        highest = max(highest, tallest)
    if ceilings:
        ceiling = max(speed for _, speed in ceilings)
        ax.axhline(ceiling, color=style.GREY, linestyle=":", linewidth=1.6)
        highest = max(highest, ceiling)
    ax.set_xticks(range(len(names)), [n.split("_")[0] for n in names])
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="x", visible=False)
    ax.set_axisbelow(True)
    ax.set_title(f"{direction}, D = {d}", **TITLE)
    return highest


def draw_one(found, names, length, dtype):
    """The picture of one length."""
    directions = [x for x in grid.DIRECTIONS if any(c.direction == x for c in found)]
    head_dims = sorted({c.head_dim for c in found})
    high = 0.75 + 2.25 * len(head_dims)
    fig, axes = style.plt.subplots(
        len(head_dims), len(directions), figsize=(8, high), squeeze=False, sharey=True
    )
    fig.subplots_adjust(
        left=0.085, right=0.99, top=1 - 0.72 / high, bottom=0.3 / high, wspace=0.05, hspace=0.38
    )
    highest = max(
        panel(axes[i][j], found, direction, d, names)
        for i, d in enumerate(head_dims)
        for j, direction in enumerate(directions)
    )
    axes[0][0].set_ylim(0, highest * 1.1)
    for row in axes:
        row[0].set_ylabel("TFLOP/s")
        for ax in row[1:]:
            ax.tick_params(axis="y", length=0)

    masks = sorted({c.causal for c in found})
    handles = [Patch(label="causal" if m else "full", **BARS[m]) for m in masks]
    handles.append(
        style.plt.Line2D([], [], color=style.GREY, linestyle=":", label="matrix product, 8192³")
    )
    cell = next(iter(found))
    row = max((r for of_cell in found.values() for r in of_cell.values()), key=lambda r: r["utc"])
    subtitle = (
        f"N = {length}, batch {cell.batch}, {row['E']} = heads × D, {dtype}. {grid.provenance(row)}"
    )
    notes = [
        "Steps: " + ", ".join(records.label(n) for n in names) + ".",
        f"Number above a pair: speed over the step before that runs there"
        f" ({'causal' if masks[0] else 'full'}).",
    ]
    fig.text(0.02, 1 - 0.3 / high, f"The ladder at {length:,} tokens", fontsize=14,
             fontweight="bold")  # fmt: skip
    first = axes[0][0]
    style.finish(fig, first, title := first.get_title(loc="left"), subtitle, notes, 3, handles)
    first.set_title(title, **TITLE)  # a panel's, not the picture's
    return fig


def draw(rows, directory, length=None):
    """Write the picture of a length, the longest on record unless given; returns the paths."""
    paths = []
    rows = grid.newest([r for r in rows if r.get("study") == "ladder"])
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        cells = grid.by_cell(rows, [*grid.steps(), grid.MATMUL], dtype)
        n = max((c.length for c in cells), default=0) if length is None else length
        found = {c: f for c, f in cells.items() if c.length == n}
        seen = {b for f in found.values() for b, r in f.items() if r["status"] != "unsupported"}
        names = [n for n in grid.steps() if n in seen]
        if names:
            suffix = f"-{n}" * (length is not None) + f"-{dtype}" * (dtype != "bfloat16")
            fig = draw_one(found, names, n, dtype)
            paths += style.save(fig, directory, f"ladder{suffix}", grid.digest(found))
    return paths


def main(argv=None):
    def options(parser):
        parser.add_argument("--length", type=int, metavar="N", help="default: the longest there is")

    return cli.main(
        argv, __doc__, "bench/ladder.py", lambda rows, args: draw(rows, args.out, args.length),
        options=options, nothing="nothing to draw, or nothing at that --length,",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
