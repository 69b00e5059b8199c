"""Our fastest kernels beside everybody else's, from the records of bench/peers.py alone.

    python figures/peers.py results/peers-nvidia-h200.jsonl --out figures

Writes peers-forward and peers-backward as PNG and SVG: a panel for each head dim and mask, a group
of bars for each length, ours dark. The number above a group is the speed of our last step that ran
there over that of the best peer; bold where it is at least 1. The dotted line is the 8192³ matrix
product of the same run. -long is added where the lengths begin at 32k, -float16 for that dtype.
"""

import sys

from flashstudy.figures import cli, grid, records, style
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

TITLE = {"fontsize": 11.5, "pad": 4}  # of a panel
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "||||")  # of the peers: a grey print tells them


def split(found):
    """(ours, peers) among the backends that have a time somewhere, in the order of the table."""
    seen = {n for of_cell in found.values() for n, r in of_cell.items() if r["status"] == "ok"}
    names = [n for n in records.table() if n in seen]
    ours = [n for n in names if n in grid.steps()]
    return ours, [n for n in names if n not in ours]


def faces(ours, peers):
    """{backend: keyword arguments of its bars}: ours filled dark, peers light and hatched."""
    dark = ["#8A8A8A", "#000000"][-len(ours) :] if len(ours) <= 2 else None
    made = {}
    for i, name in enumerate(peers):
        look = style.look(name)
        made[name] = {
            "facecolor": tint(look.color, 0.62),
            "hatch": HATCHES[i % len(HATCHES)],
            "edgecolor": look.color,
            "linewidth": 0.6,
        }
    for i, name in enumerate(ours):
        shade = dark[i] if dark else str(0.6 * (1 - (i + 1) / len(ours)))
        made[name] = {"facecolor": shade, "edgecolor": "black", "linewidth": 0.6}
    return made


def tint(color, share):
    """The colour mixed with a share of white."""
    return tuple(c + (1 - c) * share for c in to_rgb(color))


def panel(ax, found, d, causal, lengths, order, looks, ours, peers):
    """The bars of one head dim and mask; order: backends from left to right."""
    width = 0.84 / len(order)
    highest = 0.0
    for at, n in enumerate(lengths):
        of_cell = next((f for c, f in found.items() if c[1:4] == (d, causal, n)), None)
        if of_cell is None:
            continue
        tallest = 0.0
        for i, name in enumerate(order):
            x = at + (i - (len(order) - 1) / 2) * width
            row = of_cell.get(name)
            if row is None or row["status"] == "unsupported":
                continue
            if row["status"] != "ok":  # it should be here: a cross where its bar would stand
                ax.plot(x, 12, marker="x", color=style.RED, markersize=5, linestyle="none")
                continue
            speed = grid.tflops(row)
            ax.bar(x, speed, width, **looks[name])
            tallest = max(tallest, speed)
        last = [n for n in ours if n in of_cell and of_cell[n]["status"] == "ok"][-1:]
        ratio = grid.ratio(of_cell, last[0], peers) if last else None
        if ratio is not None:
            ax.annotate(
                f"{ratio:.2f}", (at, tallest), xytext=(0, 4.5), textcoords="offset points",
                ha="center", fontsize=9, fontweight="bold" if ratio >= 1 else "normal",
                color=style.BLACK if ratio >= 1 else style.RED,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
        if grid.MATMUL in of_cell and of_cell[grid.MATMUL]["status"] == "ok":
            ceiling = grid.tflops(of_cell[grid.MATMUL])
            ax.plot([at - 0.46, at + 0.46], [ceiling] * 2, color=style.GREY, linestyle=":")
            tallest = max(tallest, ceiling)
        highest = max(highest, tallest)
    ax.set_xticks(range(len(lengths)), [style.tokens(n) for n in lengths])
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="x", visible=False)
    ax.set_axisbelow(True)
    ax.set_title(f"D = {d}, {'causal' if causal else 'full'}", **TITLE)
    return highest


def draw_one(found, direction, dtype):
    """The picture of one direction."""
    ours, peers = split(found)
    order, looks = [*peers, *ours], faces(ours, peers)
    head_dims = sorted({c.head_dim for c in found})
    masks = sorted({c.causal for c in found})
    lengths = sorted({c.length for c in found})
    fig, axes = style.plt.subplots(
        len(head_dims), len(masks), figsize=(8, 0.75 + 2.25 * len(head_dims)), squeeze=False,
        sharey=True,
    )  # fmt: skip
    high = 0.75 + 2.25 * len(head_dims)
    fig.subplots_adjust(
        left=0.085, right=0.99, top=1 - 0.72 / high, bottom=0.4 / high, wspace=0.05, hspace=0.42
    )
    highest = max(
        panel(axes[i][j], found, d, causal, lengths, order, looks, ours, peers)
        for i, d in enumerate(head_dims)
        for j, causal in enumerate(masks)
    )
    axes[0][0].set_ylim(0, highest * 1.15)
    for row in axes:
        row[0].set_ylabel("TFLOP/s")
        for ax in row[1:]:
            ax.tick_params(axis="y", length=0)
    for ax in axes[-1]:
        ax.set_xlabel("sequence length (tokens)", fontsize=11)

    row = max((r for of_cell in found.values() for r in of_cell.values()), key=lambda r: r["utc"])
    tokens = {c.batch * c.length for c in found}
    size = f"{min(tokens):,} tokens a cell" if len(tokens) == 1 else "batch 1"
    handles = [Patch(label=records.label(n), **looks[n]) for n in order]
    handles.append(
        style.plt.Line2D([], [], color=style.GREY, linestyle=":", label="matrix product, 8192³")
    )
    notes = ["× failed, out of memory or wrong."]
    if ours:
        notes.insert(0, (
            f"Number above a group: {records.label(ours[-1])}, or our last step that runs there,"
            " over the best peer; bold from 1 on."
        ))  # fmt: skip
    subtitle = f"{direction}, {dtype}, {size}, {row['E']} = heads × D. {grid.provenance(row)}"
    fig.text(0.02, 1 - 0.3 / high, f"Attention {direction}: ours and its peers", fontsize=14,
             fontweight="bold")  # fmt: skip
    first = axes[0][0]
    style.finish(fig, first, title := first.get_title(loc="left"), subtitle, notes, 4, handles)
    first.set_title(title, **TITLE)  # a panel's, not the picture's
    return fig


def draw(rows, directory):
    """Write every picture that the rows allow; returns the paths."""
    paths = []
    rows = grid.newest([r for r in rows if r.get("study") == "peers"])
    names = [*records.table(), grid.MATMUL]
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        cells = grid.by_cell(rows, names, dtype)
        for direction in grid.DIRECTIONS:
            for long in (False, True):
                found = {
                    c: f
                    for c, f in cells.items()
                    if c.direction == direction and (c.length >= grid.LONG_LENGTHS[0]) == long
                }
                if any(r["status"] == "ok" for f in found.values() for r in f.values()):
                    suffix = "-long" * long + f"-{dtype}" * (dtype != "bfloat16")
                    fig = draw_one(found, direction, dtype)
                    name = f"peers-{direction}{suffix}"
                    paths += style.save(fig, directory, name, grid.digest(found))
    return paths


def main(argv=None):
    return cli.main(argv, __doc__, "bench/peers.py", lambda rows, args: draw(rows, args.out))


if __name__ == "__main__":
    sys.exit(main())
