"""Charts of a sweep over sequence lengths, from its records alone.

    python figures/seqlen.py results/seqlen-nvidia-h200.jsonl --out figures

Writes, as PNG and SVG: SCOPE-runtime, SCOPE-memory, block-throughput, attention-tflops and
SCOPE-speedup (over Naive), with SCOPE block or attention, and -backward, -float16 and so on where
the records hold more than one. A cell that ran out of memory, failed or was wrong is marked in a
strip above the axes; in the memory chart a hollow mark stands at the size it would have needed.
"""

import sys

from flashstudy.figures import answers, cli, records, style

MARKS = {"oom": "out of memory", "failed": "failed", "wrong": "wrong result"}
WHERE = {"block": "Transformer block", "attention": "Attention alone"}


def names(found):
    """{id of sweep: suffix} that tells the sweeps of one scope apart, empty where there is one."""
    suffixes = {}
    for one in found:
        twins = [s for s in found if s.scope == one.scope]
        parts = []
        for k, text in (
            ("direction", "{}"), ("dtype", "{}"), ("causal", "causal={}"), ("B", "b{}"),
            ("E", "e{}"), ("H", "h{}"), ("H_KV", "kv{}"), ("D", "d{}"),
        ):  # fmt: skip
            plain = k == "direction" and one.direction == "forward"
            if len({s.about[k] for s in twins}) > 1 and not plain:
                parts.append(text.format(one.about[k]))
        suffixes[id(one)] = "".join(f"-{p}" for p in parts)
    return suffixes


def strip(ax, one):
    """One thin row per backend that has no number somewhere: where, and why."""
    shown = one.backends("oom", "failed", "wrong")
    for y, backend in enumerate(reversed(shown)):
        look = style.look(backend)
        gone = [n for n in one.lengths if one.status(backend, n) in MARKS]
        ax.plot(
            gone, [y] * len(gone), linestyle="none", marker=look.marker, color=look.color,
            markerfacecolor="none", clip_on=False,
        )  # fmt: skip
        what = " / ".join(dict.fromkeys(MARKS[one.status(backend, n)] for n in gone))
        ax.annotate(
            f"{records.label(backend)}: {what}", (gone[0], y), xytext=(-9, 0),
            textcoords="offset points", ha="right", va="center", fontsize=10, color=look.color,
        ) if gone[0] > one.lengths[len(one.lengths) // 2] else ax.annotate(
            f"{records.label(backend)}: {what}", (gone[-1], y), xytext=(9, 0),
            textcoords="offset points", ha="left", va="center", fontsize=10, color=look.color,
        )  # fmt: skip
    ax.set_ylim(-0.5, len(shown) - 0.5)
    ax.set_yticks([])
    ax.grid(False)
    ax.tick_params(axis="x", which="both", length=0, labelbottom=False)
    for side in ax.spines.values():
        side.set_visible(False)
    ax.set_facecolor("#F4F4F4")


def chart(one, title, unit, values, log, memory=False):
    """One chart of a sweep; values(backend) gives [(length, middle, low, high)]."""
    lines = {b: v for b in one.backends() if (v := values(b))}
    marked = one.backends("oom", "failed", "wrong")
    if not lines:
        return None
    fig, ax, top = style.axes(len(marked))
    for backend, points in lines.items():
        x, y, low, high = zip(*points, strict=True)
        look = style.look(backend)
        ax.plot(x, y, label=records.label(backend), **look.line())
        if not memory:
            ax.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0)
    notes, ahead_of = [], []
    if memory:
        for backend in one.backends("oom"):
            known = lines.get(backend, [])
            ahead = [
                (n, mib) for n in one.lengths if one.status(backend, n) == "oom"
                if (mib := one.predicted_mib(backend, n)[0]) is not None
            ]  # fmt: skip
            if not ahead:
                continue
            look = style.look(backend)
            path = [*((n, y) for n, y, *_ in known[-1:]), *ahead]
            ax.plot(*zip(*path, strict=True), color=look.color, linestyle=":", linewidth=1.2)
            ax.plot(
                *zip(*ahead, strict=True), linestyle="none", marker=look.marker, color=look.color,
                markerfacecolor="white", alpha=0.7,
            )  # fmt: skip
            ahead_of.append(records.label(backend))
        if ahead_of:
            notes.append(f"Dotted, pale: what {', '.join(ahead_of)} would have needed.")
        together = one_line(lines)
        if len(together) > 2:
            n, y = lines[together[0]][-1][:2]
            ax.annotate(
                f"{len(together)} backends on one line", (n, y), xytext=(8, -64),
                textcoords="offset points", ha="right", fontsize=10.5,
                arrowprops={"arrowstyle": "-", "color": style.GREY, "shrinkB": 6},
            )  # fmt: skip
            notes.append("On one line: " + ", ".join(map(records.label, together)) + ".")
        total = one.row.get("memory_mib")
        if total and ax.get_ylim()[1] > total / 30:
            ax.axhline(total, color=style.GREY, linewidth=1, linestyle=(0, (1, 1)))
            ax.annotate(
                f"all of its memory, {answers.size(total)}", (one.lengths[0], total),
                xytext=(0, 3), textcoords="offset points", fontsize=10, color=style.GREY,
            )  # fmt: skip
    style.length_axis(ax, one.lengths)
    if memory:
        style.memory_axis(ax, unit)
    else:
        style.value_axis(ax, unit, log)
    absent = one.backends("unsupported")
    if absent:
        notes.append("Not run here: " + ", ".join(records.label(b) for b in absent) + ".")
    if not memory:
        notes.append("Shaded: 20th to 80th percentile.")
    if top is not None:
        strip(top, one)
    title = f"{WHERE[one.scope]}: {title}"
    subtitle = f"{one.title()}. {one.provenance()}"
    if top is not None:  # the title goes above the strip
        style.finish(fig, top, title, subtitle, notes, handles=ax.get_legend_handles_labels()[0])
    else:
        style.finish(fig, ax, title, subtitle, notes)
    return fig


def one_line(lines):
    """Backends other than standard ones whose longest cells lie within 5 % of their median."""
    last = {b: v[-1] for b, v in lines.items() if records.family(b) != "standard"}
    longest = max((n for n, *_ in last.values()), default=0)
    ends = {b: y for b, (n, y, *_) in last.items() if n == longest}
    if not ends:
        return []
    middle = sorted(ends.values())[len(ends) // 2]
    return [b for b, y in ends.items() if abs(y - middle) <= 0.05 * middle]


def measured(one, metric):
    factor, _ = records.scale(one, metric)
    return lambda b: [
        (n, *(r[p] * factor for p in ("p50", "p20", "p80"))) for n, r in one.series(b, metric)
    ]


def speedups(one, rival="naive"):
    theirs = dict(one.series(rival, "time_ms"))

    def values(backend):
        return [
            (n, t["p50"] / r["p50"], t["p20"] / r["p80"], t["p80"] / r["p20"])
            for n, r in one.series(backend, "time_ms")
            if (t := theirs.get(n)) is not None
        ]

    return values if theirs else lambda backend: []


def draw(found, directory):
    """Write every chart of some sweeps; returns the paths."""
    paths, suffixes = [], names(found)
    for one in found:
        direction = "" if one.direction == "forward" else " (backward)"
        charts = {
            "runtime": (f"runtime{direction}", "ms", measured(one, "time_ms"), True),
            "memory": (
                "peak memory that a call adds"
                + ("" if one.direction == "forward" else " (forward and backward)"),
                "memory added", measured(one, "peak_delta_mib"), True, True,
            ),
            "throughput": (
                f"throughput{direction}", records.scale(one, "tokens_per_s")[1],
                measured(one, "tokens_per_s"), False,
            ),
            "tflops": (
                f"throughput{direction}", records.scale(one, "tflops")[1],
                measured(one, "tflops"), False,
            ),
            "speedup": (
                f"times as fast as {records.label('naive')}{direction}", "speed-up",
                speedups(one), True,
            ),
        }  # fmt: skip
        for name, arguments in charts.items():
            fig = chart(one, *arguments)
            if fig is not None:
                paths += style.save(
                    fig, directory, f"{one.scope}-{name}{suffixes[id(one)]}", one.digest()
                )
    return paths


def main(argv=None):
    return cli.main(
        argv, __doc__, "bench/seqlen.py", lambda found, args: draw(found, args.out), records.sweeps
    )


if __name__ == "__main__":
    sys.exit(main())
