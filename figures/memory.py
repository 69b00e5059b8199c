"""Memory up to a million tokens, from the records of bench/memory.py alone.

    python figures/memory.py results/memory-nvidia-h200.jsonl --out figures

Writes memory-forward and memory-backward (forward and backward together) as PNG and SVG: lines are
what was known before, points what was measured, a cross where the GPU's memory ended. `words` says
the same in sentences, and whether naive's end came where it was predicted.
"""

import sys
from typing import NamedTuple

from flashstudy.figures import answers, cli, records, style

WITHIN = 0.05  # a prediction of memory is kept where it is off by at most this share
WORDS = {"forward": "forward", "backward": "forward and backward"}


class End(NamedTuple):
    """Where naive's memory ends: predicted, and what became of the two lengths tried."""

    backend: str
    direction: str
    predicted: int  # the longest length that fits
    under: int
    under_status: str
    over: int
    over_status: str
    free_mib: float
    need: tuple  # MiB that the call adds, predicted, at (under, over)

    @property
    def as_predicted(self):
        return (self.under_status, self.over_status) == ("ok", "oom")

    @property
    def bracket(self):
        """Share of the bytes by which the two tried lengths differ."""
        return (self.over / self.under) ** 2 - 1


class Line(NamedTuple):
    """A backend's delta peaks against what was known before."""

    backend: str
    direction: str
    longest: int
    mib: float
    expected: float
    floor: float  # what any flash kernel must hold
    slope: float | None  # measured bytes a token, between the two longest lengths
    worst: float  # largest |measured / expected - 1|

    @property
    def ratio(self):
        return self.mib / self.expected


class Study:
    """What a record file holds of this study."""

    def __init__(self, rows):
        rows = [r for r in rows if r.get("study") == "memory" and "backend" in r]
        # A peak is the same whatever lies beside it: a run without flash-attn goes on one with it.
        for package in ("flash_attn", "flash_attn_4"):
            found = {r[package] for r in rows if r.get(package)}
            if len(found) == 1:
                rows = [r | {package: next(iter(found))} for r in rows]
        self.sweeps = records.sweeps(rows)

    def lines(self):
        """A Line per direction and backend, in the order of tables."""
        return [
            line for s in self.sweeps for b in s.backends("ok") if (line := line_of(s, b))
        ]  # fmt: skip

    def ends(self):
        return [e for s in self.sweeps for b in s.backends("ok", "oom") if (e := end_of(s, b))]

    def table(self):
        """(header, rows): how far each backend's memory is from what was expected."""
        header = ["", "", "longest N", "measured", "expected", "measured ÷ expected", "bytes/token"]
        lines = []
        for x in self.lines():
            slope = "–" if x.slope is None or stored(x.backend) else f"{x.slope:,.0f}"
            lines.append([
                records.label(x.backend), WORDS[x.direction], f"{x.longest:,}",
                answers.size(x.mib), answers.size(x.expected), f"{x.ratio:.3f}", slope,
            ])  # fmt: skip
        return header, lines

    def words(self):
        """The answer in sentences, one paragraph a direction."""
        return [text for s in self.sweeps if (text := " ".join(sentences(s)))]


def stored(backend):
    return records.family(backend) == "standard"


def line_of(sweep, backend):
    found = [
        (n, r["p50"], r["predicted_mib"], r["floor_mib"])
        for n, r in sweep.series(backend, "peak_delta_mib") if r.get("predicted_mib")
    ]  # fmt: skip
    if not found:
        return None
    n, mib, expected, floor = found[-1]
    slope = None
    if len(found) > 1:
        before = found[-2]
        slope = (mib - before[1]) * 2**20 / (n - before[0]) / sweep.row["B"]
    worst = max(abs(m / e - 1) for _, m, e, _ in found)
    return Line(backend, sweep.direction, n, mib, expected, floor, slope, worst)


def end_of(sweep, backend):
    """The End of a backend, None where not both lengths were tried."""
    tried = {}
    for n in sweep.lengths:
        row = sweep.cells.get((backend, n), {}).get("time_ms")
        if row is not None and row.get("role"):
            tried[row["role"]] = row
    if not {"under", "over"} <= tried.keys():
        return None
    under, over = tried["under"], tried["over"]
    return End(
        backend, sweep.direction, under["predicted_end"], under["N_Q"], under["status"],
        over["N_Q"], over["status"], under["free_mib"],
        (under["predicted_mib"], over["predicted_mib"]),
    )  # fmt: skip


def sentences(sweep):
    """What one direction's records say."""
    what = WORDS[sweep.direction]
    flash = [x for b in sweep.backends("ok") if not stored(b) and (x := line_of(sweep, b))]
    if flash:
        on = [x for x in flash if abs(x.ratio - 1) <= WITHIN]
        off = [x for x in flash if x not in on]
        a = sweep.about
        yield (
            f"Memory of one call, {what} ({a['dtype']}, {'causal' if a['causal'] else 'full'},"
            f" batch {a['B']}, {a['H']} heads of {a['D']})."
        )
        for per_token in dict.fromkeys(round(x.expected * 2**20 / x.longest) for x in on):
            same = [x for x in on if round(x.expected * 2**20 / x.longest) == per_token]
            worst = max(abs(x.ratio - 1) for x in same)
            own = "what any flash kernel must hold"
            if same[0].expected > same[0].floor:
                own = "that and its fp32 sums of dQ"
            yield (
                f"{_names(same)} add{'s' * (len(same) == 1)} {_sizes(same)} at {same[0].longest:,}"
                f" tokens, within {_share(worst)} of {own}: {per_token:,} bytes a token."
            )
        for x in off:
            linear = x.slope is not None
            linear = linear and abs(x.slope * x.longest / 2**20 / x.mib - 1) <= WITHIN
            yield (
                f"{records.label(x.backend)} adds {answers.size(x.mib)} at {x.longest:,} tokens,"
                f" {x.ratio:.2f} times its line: "
                + ("linear too, with buffers of its own."
                   if linear else "not in proportion to the length.")
            )  # fmt: skip
    for backend in (b for b in sweep.backends("ok", "oom") if stored(b)):
        line, end = line_of(sweep, backend), end_of(sweep, backend)
        name = records.label(backend)
        if line is not None:
            yield (
                f"{name} adds {answers.size(line.mib)} at {line.longest:,} tokens; its measured"
                f" peaks are within {_share(line.worst)} of the prediction."
            )
        if end is not None:
            kept = "as predicted" if end.as_predicted else "NOT as predicted"
            if end.under_status == "oom":  # with the memory there: what a peak does not count
                kept += " (a peak counts no gaps that the allocator cannot fill)"
            yield (
                f"With {answers.size(end.free_mib)} free it was predicted to end at"
                f" {end.predicted:,} tokens: {end.under:,} {_became(end.under_status)},"
                f" {end.over:,} {_became(end.over_status)}, {kept}; these two lengths are"
                f" {end.bracket:.1%} of the bytes apart."
            )


def _became(status):
    return {"ok": "ran", "oom": "ran out of memory"}.get(status, status)


def _share(x):
    return f"{x:.1%}" if x >= 0.001 else "0.1%"


def _sizes(lines):
    low, high = (answers.size(f(x.mib for x in lines)) for f in (min, max))
    return low if low == high else f"{low} to {high}"


def _names(lines):
    labels = [records.label(x.backend) for x in lines]
    return labels[0] if len(labels) == 1 else ", ".join(labels[:-1]) + " and " + labels[-1]


# Pictures


def chart(sweep):
    """Delta peaks of one direction over the length, with what was expected as lines."""
    shown = sweep.backends("ok", "oom")
    fig, ax, _ = style.axes()
    # Most points lie on each other: those drawn later are smaller.
    sizes = [max(14 - 2 * i, 8) for i in range(len(shown))]
    notes, known = [], {}
    for i, backend in enumerate(shown):
        look = style.look(backend)
        rows = {
            n: m["time_ms"] for n in sweep.lengths
            if (m := sweep.cells.get((backend, n))) and m["time_ms"].get("predicted_mib")
        }  # fmt: skip
        what, line_of_it = (
            ("stored", "predicted_mib") if stored(backend) else ("flash", "floor_mib")
        )
        line = [(n, r[line_of_it]) for n, r in rows.items()]
        known[what] = sorted({*known.get(what, ()), *line})
        points = [(n, r["p50"]) for n, r in sweep.series(backend, "peak_delta_mib")]
        ax.plot(
            *zip(*points, strict=True), label=records.label(backend),
            **(look.line() | {"linestyle": "none", "markersize": sizes[i]}),
        )  # fmt: skip
        gone = [(n, r["predicted_mib"]) for n, r in rows.items() if r["status"] == "oom"]
        if gone:
            ax.plot(*zip(*gone, strict=True), linestyle="none", marker="x", color=look.color,
                    markersize=10, markeredgewidth=2.4)  # fmt: skip
            n, mib = gone[0]
            ax.annotate(
                f"out of memory\nat {n:,} tokens", (n, mib), xytext=(12, -4),
                textcoords="offset points", fontsize=10.5, va="top",
            )  # fmt: skip
    for what, line in known.items():
        line = [*line]
        longest = max(sweep.lengths)
        if what == "stored" and line and line[-1][0] < longest:  # where it would lead
            n, mib = line[-1]
            line.append((longest, mib * (longest / n) ** 2))
        ax.plot(*zip(*line, strict=True), color="black", linewidth=1.1, zorder=1,
                linestyle="--" if what == "stored" else "-",
                label="expected: S and P" if what == "stored" else "expected: flash")  # fmt: skip
    total = sweep.row.get("memory_mib")
    if total:
        ax.axhline(total, color=style.GREY, linewidth=1.2, linestyle=(0, (1, 1)))
        ax.annotate(
            f"all of its memory, {answers.size(total)}", (sweep.lengths[0], total), xytext=(0, 4),
            textcoords="offset points", fontsize=10.5, color=style.GREY,
        )  # fmt: skip
    ticks = [n for n in sweep.lengths if n & (n - 1) == 0]
    style.length_axis(ax, ticks or sweep.lengths)
    style.memory_axis(ax, "memory that a call adds")
    least = min(mib for line in known.values() for _, mib in line)
    most = max(mib for line in known.values() for _, mib in line)
    ax.set_ylim(least / 3, max(most, total or 0) * 6)
    if any(end_of(sweep, b) for b in shown):
        notes.append("Cross: ran out of memory there, at the size it would have needed.")
    style.finish(
        fig, ax, f"Memory of one call, {WORDS[sweep.direction]}",
        f"{sweep.title().split(', ', 1)[1]}. {sweep.provenance()}", notes,
    )  # fmt: skip
    return fig


def draw(rows, directory):
    """Write a picture a direction; returns the paths."""
    paths = []
    for sweep in Study(rows).sweeps:
        if sweep.backends("ok"):
            fig = chart(sweep)
            paths += style.save(fig, directory, f"memory-{sweep.direction}", sweep.digest())
    return paths


def main(argv=None):
    return cli.main(argv, __doc__, "bench/memory.py", lambda rows, args: draw(rows, args.out))


if __name__ == "__main__":
    sys.exit(main())
