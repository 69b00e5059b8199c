"""Where flash attention begins to win, from the records of bench/crossover.py alone.

    python figures/crossover.py results/crossover-nvidia-h200.jsonl --out figures

Writes, as PNG and SVG:

    crossover-RIVAL        for Naive, Naive compiled and SDPA: the length from which each backend is
                           faster, with its interval, on every clock; forward, and with backward
    crossover-conditions   the same against Naive under every condition that was measured, for the
                           quickest of a library's backends and of ours
    crossover-map          how many times as fast as Naive the quickest backend is, over length and
                           B·H, and the line along which both are equally fast

A mark in the left margin means faster at every measured length, in the right one nowhere.
"""

import sys

import numpy as np
from flashstudy.figures import cli, crossings, grid, records, style
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

CLOCKS = {  # shapes and shades differ, not colours alone
    "time_ms": {"marker": "o", "color": style.BLACK, "markerfacecolor": style.BLACK},
    "graph_ms": {"marker": "D", "color": style.BLUE, "markerfacecolor": "white"},
    "host_ms": {"marker": "s", "color": style.ORANGE, "markerfacecolor": style.ORANGE},
}
OUTSIDE = 2.0  # the margins' marks stand this factor beyond the measured lengths
SHADES = "YlGnBu"  # of the map: the faster, the darker, also in grey
TITLE = {"fontsize": 11.5, "pad": 4}  # of a panel


def panel(ax, rows, metrics):
    """Rows of crossings, from top to bottom; rows: [{clock: Crossing or None}]."""
    every = [c for row in rows for c in row.values() if c is not None]
    first, last = min(c.first for c in every), max(c.last for c in every)
    left, right = first / OUTSIDE, last * OUTSIDE

    def place(length, clamp=False):
        if length == crossings.EVERYWHERE:
            return left
        return right if length == crossings.NEVER else length

    for y, row in enumerate(rows):
        for i, metric in enumerate(metrics):
            c = row.get(metric)
            if c is None:
                continue
            at = y + 0.25 * (i - (len(metrics) - 1) / 2)
            look = CLOCKS[metric]
            ax.plot(
                [place(c.low), place(c.high)], [at, at], color=look["color"], linewidth=1.6,
                solid_capstyle="butt",
            )  # fmt: skip
            ax.plot(place(c.start), at, markersize=6, markeredgewidth=1.3, **look)
    ax.set_xscale("log", base=2)
    edges = first / OUTSIDE**0.5, last * OUTSIDE**0.5
    ax.set_xlim(first / OUTSIDE**1.5, last * OUTSIDE**1.5)
    for a, b in ((ax.get_xlim()[0], edges[0]), (edges[1], ax.get_xlim()[1])):
        ax.axvspan(a, b, color="#EBEBEB", zorder=0, linewidth=0)
    ticks = [2**k for k in range(40) if first <= 2**k <= last]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: style.tokens(round(x))))
    ax.tick_params(axis="x", labelsize=10.5)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    for y in range(1, len(rows)):
        ax.axhline(y - 0.5, color="#DDDDDD", linewidth=0.6)
    for x, text in ((left, "all"), (right, "none")):
        ax.annotate(
            text, (x, 0), xycoords=("data", "axes fraction"), xytext=(0, -5), fontsize=10,
            textcoords="offset points", ha="center", va="top", style="italic",
        )  # fmt: skip


def dots(title, panels, labels, found, subtitle, notes):
    """A chart of one or two panels side by side; panels: [(title, rows)]."""
    metrics = crossings.clocks(found)
    size = 0.14 + 0.13 * max(len(metrics), 2)
    high = 1.2 + size * len(labels)
    longest = max(len(text) for text in labels)
    fig, axes = style.plt.subplots(1, len(panels), figsize=(8, high), sharey=True, squeeze=False)
    fig.subplots_adjust(
        left=min(0.34, 0.035 + 0.0125 * longest), right=0.985, top=1 - 0.66 / high,
        bottom=0.5 / high, wspace=0.06,
    )  # fmt: skip
    for ax, (name, rows) in zip(axes[0], panels, strict=True):
        panel(ax, rows, metrics)
        ax.set_title(name, **TITLE)
        ax.set_xlabel("faster from this length on (tokens)", fontsize=11)
        ax.tick_params(axis="y", length=0)
    axes[0][0].set_yticks(range(len(labels)), labels)
    handles = [
        style.plt.Line2D([], [], label=crossings.CLOCKS[m], linewidth=1.6, **CLOCKS[m])
        for m in metrics
    ]
    fig.text(0.02, 1 - 0.28 / high, title, fontsize=14, fontweight="bold")
    notes = [
        *notes,
        "all: faster at every measured length. none: not at the longest. Bar: 95 % interval.",
    ]
    style.finish(fig, axes[0][0], panels[0][0], subtitle, notes, len(handles), handles)
    axes[0][0].set_title(panels[0][0], **TITLE)  # a panel's, not the picture's
    return fig


def about(found):
    first = crossings.base(found)
    return f"{first.condition}. {crossings.provenance(found)}"


def against(found, rival):
    """The crossings of every backend with one rival; None where there are none."""
    shown = [crossings.base(found), crossings.training(found)]
    shown = [s for s in shown if s is not None and rival in s.backends()]
    columns, same = [], set()
    for s in shown:
        column = {}
        for metric in crossings.clocks([s]):
            for c in crossings.crossings(s, rival, metric):
                if c.same:
                    same.add(c.backend)
                else:
                    column.setdefault(c.backend, {})[metric] = c
        columns.append((s.condition.direction, column))
    columns = [(name, column) for name, column in columns if column]
    names = [b for b in records.table() if any(b in column for _, column in columns)]
    if not names:
        return None
    notes = []
    if same:
        who = ", ".join(map(records.label, sorted(same)))
        notes.append(f"{who}: the kernel that {records.label(rival)} ran.")
    panels = [(name, [column.get(b, {}) for b in names]) for name, column in columns]
    condition = str(crossings.base(found).condition).split(", ", 1)[1]
    return dots(
        f"Faster than {records.label(rival)} from which length?", panels,
        list(map(records.label, names)), found,
        f"{condition}. {crossings.provenance(found)}", notes,
    )  # fmt: skip


def conditions(found, rival="naive"):
    """The quickest of theirs and of ours under every condition; None where there is but one."""
    varied = crossings.variations(found)
    quick = crossings.mapped(found, rival)
    ours, theirs = grid.sides(quick)
    names = [b for b in quick if b in (*ours[:1], *theirs[:1])]
    if len(varied) < 2 or not names:
        return None
    panels = []
    for b in names:
        rows = [
            {m: crossings.crossing(s, b, rival, m) for m in crossings.clocks([s])}
            for _, s in varied
        ]
        panels.append((records.label(b), rows))
    return dots(
        f"Faster than {records.label(rival)} from which length, by condition", panels,
        [text for text, _ in varied],
        found, f"Base: {about(found)}", ["Each row changes one thing of the base."],
    )  # fmt: skip


def borders(ratio):
    """The edges (xs, ys) between cells in which the one and the other is faster."""
    ahead = np.where(np.isfinite(ratio), (ratio > 1).astype(float), np.nan)
    for i, j in np.argwhere(np.abs(np.diff(ahead, axis=1)) == 1):
        yield (j + 1, j + 1), (i, i + 1)
    for i, j in np.argwhere(np.abs(np.diff(ahead, axis=0)) == 1):
        yield (j, j + 1), (i + 1, i + 1)


def dark(share):
    """Whether a shade of the map needs white text: its luminance is under a half."""
    red, green, blue, _ = style.plt.get_cmap(SHADES)(share)
    return 0.299 * red + 0.587 * green + 0.114 * blue < 0.5


def heat_map(found, rival="naive"):
    """Speed-up of the quickest mapped backend over length and B·H, a panel a clock, or None."""
    names = crossings.mapped(found, rival)
    if not names:
        return None
    backend, metrics = names[0], crossings.clocks(found)
    maps = {m: crossings.heat(found, backend, rival, m) for m in metrics}
    values = np.concatenate([v[np.isfinite(v)] for _, _, v in maps.values()])
    norm = LogNorm(min(0.5, values.min()), max(2.0, values.max()))
    tall = 0.45 + 0.34 * len(next(iter(maps.values()))[0])
    high = 0.75 + tall * len(metrics)
    fig, axes = style.plt.subplots(len(metrics), 1, figsize=(8, high), squeeze=False, sharex=True)
    fig.subplots_adjust(
        left=0.1, right=0.99, top=1 - 0.68 / high, bottom=0.42 / high,
        hspace=0.32 / (tall - 0.32) + 0.06,
    )  # fmt: skip
    for ax, metric in zip(axes[:, 0], metrics, strict=True):
        sizes, lengths, ratio = maps[metric]
        ax.pcolormesh(ratio, norm=norm, cmap=SHADES, edgecolors="white", linewidth=0.5)
        for (i, j), r in np.ndenumerate(ratio):
            if np.isfinite(r):
                text = f"{r:.1f}" if r < 9.95 else f"{r:.0f}"
                if 0.95 <= r < 1 or r < 0.095:  # 1.0 would look like a win, 0.0 like nothing
                    text = f"{min(r, 0.99):.2f}"
                ax.text(
                    j + 0.5, i + 0.5, text, ha="center", va="center",
                    fontsize=9.5, color="white" if dark(norm(r)) else "black",
                    fontweight="normal" if r >= 1 else "bold",
                )  # fmt: skip
        for color, width in (("white", 5.5), ("black", 3.2)):
            for edge in borders(ratio):
                ax.plot(*edge, color=color, linewidth=width, solid_capstyle="round")
        ax.set_xlim(0, len(lengths))
        ax.set_ylim(0, len(sizes))
        ax.set_yticks(np.arange(len(sizes)) + 0.5, [f"{n:,}" for n in sizes], fontsize=10)
        ax.set_xticks(
            np.arange(len(lengths)) + 0.5, [style.tokens(n) for n in lengths], fontsize=10
        )
        ax.tick_params(length=0)
        ax.grid(False)
        ax.set_ylabel("B·H", fontsize=11)
        for side in ax.spines.values():
            side.set_visible(False)
        ax.set_title(crossings.CLOCKS[metric], **TITLE)
    axes[-1, 0].set_xlabel("sequence length (tokens)", fontsize=11)
    label, other = records.label(backend), records.label(rival)
    fig.text(
        0.02, 1 - 0.3 / high, f"How many times as fast as {other} is {label}?", fontsize=14,
        fontweight="bold",
    )  # fmt: skip
    handles = [
        style.plt.Line2D([], [], color="black", linewidth=2.2, label="equally fast along this line")
    ]
    first = axes[0, 0]
    title = first.get_title(loc="left")
    condition = crossings.base(found).condition
    subtitle = (
        f"{condition.direction}, {condition.dtype}, {'causal' if condition.causal else 'full'},"
        f" heads of {condition.head_dim}. {crossings.provenance(found)}"
    )
    style.finish(fig, first, title, subtitle, ["Bold: slower. Darker: faster."], 1, handles)
    first.set_title(title, **TITLE)
    return fig


def draw(rows, directory):
    """Write every picture that the rows allow; returns the paths."""
    found = crossings.sweeps(rows)
    if crossings.base(found) is None:
        return []
    made = {f"crossover-{rival}": against(found, rival) for rival in crossings.RIVALS}
    made |= {"crossover-conditions": conditions(found), "crossover-map": heat_map(found)}
    paths = []
    for name, fig in made.items():
        if fig is not None:
            paths += style.save(fig, directory, name, crossings.digest(found))
    return paths


def main(argv=None):
    return cli.main(argv, __doc__, "bench/crossover.py", lambda rows, args: draw(rows, args.out))


if __name__ == "__main__":
    sys.exit(main())
