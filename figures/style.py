"""One style for every picture: who has which colour, marker and line, and how a chart is finished.

Colours are Okabe and Ito's, which colour-blind readers tell apart. Nothing depends on them alone:
markers differ between backends and lines between families, so that a grey print can be read.
Standard attention is dashed with open shapes, library kernels are solid, and a step of the ladder
is dash-dotted and marked with its own number.
"""

import re
import textwrap
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from flashstudy.figures import records
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PURPLE, GREY = "#B8A800", "#0072B2", "#D55E00", "#CC79A7", "#666666"
DASHES = {"standard": "--", "auto": "-", "flash": "-", "ladder": "-."}
FIXED = {
    "naive": (RED, "s"),
    "sdpa": (BLACK, "o"),
    "sdpa-math": (ORANGE, "D"),
    "sdpa-efficient": (PURPLE, "v"),
    "sdpa-flash": (SKY, "^"),
    "sdpa-cudnn": (GREEN, "P"),
    "flex": (YELLOW, "X"),
    "flash-attn": (BLUE, "<"),
    "flash-attn-4": ("#332288", "*"),
}
LADDER = ["#8C510A", "#A6611A", "#7B3294", "#C2185B", "#00796B", "#6B8E23", "#5D4037", "#455A64"]
SPARE = [("#7F7F7F", m) for m in ("h", "p", "d", "H", "8", ">")]

plt.rcParams.update(
    {
        "figure.dpi": 100,
        "savefig.dpi": 200,
        "font.size": 12,
        "axes.titlesize": 14,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 12,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#DDDDDD",
        "grid.linewidth": 0.8,
        "lines.linewidth": 1.8,
        "lines.markersize": 7,
        "legend.frameon": False,
        "legend.fontsize": 11,
        "svg.hashsalt": "flashstudy",  # the same records give the same file
        "svg.fonttype": "path",
    }
)


class Look(NamedTuple):
    color: str
    marker: str
    dash: str
    open: bool  # marker not filled

    def line(self):
        """Keyword arguments of Axes.plot."""
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": self.dash,
            "markerfacecolor": "white" if self.open else self.color,
            "markeredgecolor": self.color,
            "markeredgewidth": 1.4 if self.open else 0.8,
        }


def look(backend):
    """How a backend looks in every picture; by name and place in the table, never by chance."""
    family = records.family(backend)
    if step := re.match(r"v(\d+)_", backend):
        n = int(step[1])
        return Look(LADDER[n % len(LADDER)], f"${n}$", DASHES["ladder"], False)
    if backend in FIXED:
        color, marker = FIXED[backend]
    else:
        others = [b for b in records.table() if b not in FIXED and not re.match(r"v\d+_", b)]
        place = others.index(backend) if backend in others else len(others)
        color, marker = SPARE[place % len(SPARE)]
    return Look(color, marker, DASHES[family], family == "standard")


def tokens(n):
    """128, 2k, 64k, 1M: how a length is written on an axis."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if n >= size and n % size == 0:
            return f"{n // size}{unit}"
    return str(n)


def length_axis(ax, lengths):
    """Base-2 logarithmic, every measured length labelled unless they crowd."""
    ax.set_xscale("log", base=2)
    shown = lengths if len(lengths) <= 12 else lengths[:: -(-len(lengths) // 12)]
    ax.xaxis.set_major_locator(FixedLocator(shown))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens(round(x))))
    ax.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)
    ax.set_xlabel("sequence length (tokens)")


def plain(x, _=None):
    """1,000 · 20 · 0.5 · 2.5M: tick labels without powers of ten."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if abs(x) >= size:
            return f"{x / size:g}{unit}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:g}"


def memory_axis(ax, name):
    """MiB on a logarithmic axis of powers of four, with units at the ticks."""
    ax.set_yscale("log", base=4)
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1024:g} GiB" if x >= 1024 else f"{x:g} MiB")
    )
    ax.set_ylabel(name)


def value_axis(ax, name, log=True):
    if log:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        wide = high / low > 200
        ax.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5), numticks=20))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(FuncFormatter(plain))
    ax.set_ylabel(name)


def finish(fig, ax, title, subtitle, notes=(), columns=3, handles=None):
    """Title above, legend under the axes, then notes and provenance in small print."""
    heading = textwrap.wrap(title, 58)
    ax.set_title("\n".join(heading), pad=8)
    if handles is None:
        handles, labels = ax.get_legend_handles_labels()
    else:
        labels = [h.get_label() for h in handles]
    width, height = fig.get_size_inches()
    lines = [line for text in (subtitle, *notes) for line in textwrap.wrap(text, 104)]
    legend_rows = -(-len(labels) // columns)
    legend_inches, note_inches = 0.26 * legend_rows + 0.1, 0.17 * len(lines) + 0.1
    extra = legend_inches + note_inches
    axes = fig.get_axes()
    boxes = [a.get_position() for a in axes]
    total = height + extra + 0.25 * (len(heading) - 1)  # the axes leave room for one line
    fig.set_size_inches(width, total)
    for a, box in zip(axes, boxes, strict=True):
        a.set_position(
            (box.x0, (box.y0 * height + extra) / total, box.width, box.height * height / total)
        )
    fig.legend(
        handles, labels, ncols=columns, loc="upper center", columnspacing=1.4, handlelength=2.6,
        bbox_to_anchor=(0.5, (extra + 0.02) / total),
    )  # fmt: skip
    fig.text(
        0.03, (note_inches - 0.02) / total, "\n".join(lines), fontsize=8.5, color=GREY, va="top"
    )


def axes(strips=0):
    """(figure, main axes, strip axes or None): 8 inches wide, a thin row on top for each mark."""
    high = 0.3 * strips
    fig = plt.figure(figsize=(8, 5 + high))
    total = 5 + high
    left, width, bottom = 0.13, 0.84, 0.66
    ax = fig.add_axes([left, bottom / total, width, (5 - bottom - 0.5) / total])
    if not strips:
        return fig, ax, None
    top = fig.add_axes([left, (4.58) / total, width, (high - 0.02) / total], sharex=ax)
    return fig, ax, top


def save(fig, directory, name, *digests):
    """Write PNG and SVG; returns the paths.

    digests: of the records shown (Sweep.digest). They go into the files' description, by which a
    test tells whether a committed picture still shows its records.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        # No date in the file: an unchanged picture is an unchanged file.
        meta = {"Software": None} if path.suffix == ".png" else {"Date": None}
        if digests:
            meta["Description"] = "records " + " ".join(digests)
        fig.savefig(path, metadata=meta)
    plt.close(fig)
    return paths
