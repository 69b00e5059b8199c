"""Did anything get faster or slower between two runs of a study? A verdict a cell.

    python bench/compare.py before.jsonl after.jsonl
    python bench/compare.py before.jsonl after.jsonl --metric peak_delta_mib
    python bench/compare.py figures/reference/seqlen.jsonl results/seqlen-nvidia-h200.jsonl --all
    python bench/compare.py before.jsonl after.jsonl --fail-above 5     # in a script: exit code 1

A and B are record files of bench/seqlen.py, bench/ladder.py or bench/peers.py, both of one study.
To make them, give each run its own --out. Nothing is measured here, and no GPU is needed.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from flashstudy.bench.cells import text
from flashstudy.bench.common import summary
from flashstudy.figures import answers, grid, records

# What is told of a difference between the runs, besides the sources: each may be the cause.
ENVIRONMENT = {
    "device": "device",
    "memory_mib": "its memory, MiB",
    "power_limit_w": "its power limit, W",
    "threads": "threads",
    "driver": "driver",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "python": "Python",
    "torch": "torch",
    "triton": "Triton",
    "flash_attn": "flash-attn",
    "flash_attn_4": "flash-attn-4",
    "float32_matmul": "fp32 products",
    "effort": "effort",
    "protocol": "protocol",
    "seed": "seed",
    "commit": "commit",
}
RATES = ("tokens_per_s", "tflops")  # the metrics of which more is better
ROUNDING = 1e-5  # figures/trim.py keeps six digits: a file and its trimmed copy are the same
FEWEST_CONTROLS = 5  # cells that say what two runs differ by without a cause
BOTH = ("better", "worse", "same")  # verdicts on cells that have a number in both files
VERDICTS = (*BOTH, "changed", "only in A", "only in B")
IDENTITY = ("study", *records.CELL)


class Pair(NamedTuple):
    """A cell's row in A and in B, None where it has none, and the verdict on B."""

    a: dict | None
    b: dict | None
    verdict: str
    ratio: float | None = None  # median of B over that of A, where both have one above 0
    low: float | None = None  # and the range of it that is noise, within the runs and between
    high: float | None = None
    cost: float | None = None  # what became worse, as a ratio: that of rates upside down

    @property
    def row(self):
        return self.b if self.a is None else self.a


# Reading


def cells(rows):
    """{identity: {metric: row}}: every cell as it was measured last, all of it with one set-up."""
    found = {}
    for row in sorted((r for r in rows if "backend" in r), key=lambda r: r.get("utc") or ""):
        at, setup = tuple(row.get(k) for k in IDENTITY), grid.environment(row)
        if at not in found or found[at][0] != setup:
            found[at] = setup, {}
        found[at][1][row["metric"]] = row
    return {at: metrics for at, (_, metrics) in found.items()}


def load(path):
    """The rows of a record file. Raises OSError or records.RecordError."""
    rows = records.read(path)
    measured = [r for r in rows if "backend" in r]
    if not measured:
        raise records.RecordError(f"{path}: no record of a backend in it")
    for r in measured:
        lacks = [k for k in (*IDENTITY, "metric", "unit", "status") if r.get(k) is None]
        if r.get("status") == "ok":
            lacks += [k for k in ("p20", "p50", "p80") if r.get(k) is None]
        if lacks:
            raise records.RecordError(f"{path}: a record without {', '.join(lacks)}")
    return rows


def number(metrics, metric):
    """A cell's row of a metric; of a cell that was not measured, the row that says why."""
    row = metrics.get(metric)
    if row is None and (time := metrics.get("time_ms", {})).get("status", "ok") != "ok":
        row = time
    return row


# Judging


def judge(a, b, metric, between=1.0):
    """The Pair of two rows of one cell, either of which may be None.

    between: the factor by which two runs differ without a cause, beside the noise of each.
    """
    if a is None or b is None:
        return Pair(a, b, "only in B" if a is None else "only in A")
    if a["status"] != b["status"]:
        return Pair(a, b, "changed")
    if a["status"] != "ok":
        return Pair(a, b, "same")
    verdict = "same"
    if abs(b["p50"] - a["p50"]) > ROUNDING * abs(a["p50"]):
        less, more = answers.faster(b, a, between), answers.faster(a, b, between)
        if less or more:
            verdict = "better" if more == (metric in RATES) else "worse"
    if min(a["p20"], b["p20"]) <= 0:
        return Pair(a, b, verdict)
    ratio = b["p50"] / a["p50"]
    return Pair(
        a, b, verdict, ratio, b["p20"] / a["p80"] / between, b["p80"] / a["p20"] * between,
        1 / ratio if metric in RATES else ratio,
    )  # fmt: skip


def controls(pairs, before, after):
    """B/A of the cells in which nothing changed: the same code, device, versions and power limit.

    None where they are too few to say what two runs differ by without a cause. The matrix product
    is none of our code, though its row, as all of the ladder's and the peers', names all sources.
    """

    def set_up(row):
        free = {"source": None} if row["backend"] == grid.MATMUL else {}
        return grid.environment(row | free), row.get("driver")

    limits = [environment(rows)["power_limit_w"] for rows in (before, after)]
    same = [
        p.ratio
        for p in pairs
        if p.ratio is not None and limits[0] == limits[1] and set_up(p.a) == set_up(p.b)
    ]
    return same if len(same) >= FEWEST_CONTROLS else None


def between_runs(ratios):
    """The factor within which four fifths of the ratios lie around their median."""
    if ratios is None:
        return 1.0
    median = statistics.median(ratios)
    return summary([max(r / median, median / r) for r in ratios])["p80"]


def compare(before, after, metric):
    """A Pair for every cell of the rows of A and B: by backend as tables are, then by size.

    Also the ratios of the cells that are the control, None where there are too few.
    """
    a, b = cells(before), cells(after)
    order = [*records.table(), grid.MATMUL]

    def place(at):
        about = dict(zip(IDENTITY, at, strict=True))
        name = about.pop("backend")
        sizes = [about.pop(k) for k in ("D", "N_Q", "N_K", "B")]  # B last: it may shrink as N grows
        return order.index(name) if name in order else len(order), name, str(about), sizes

    rows = []
    for at in sorted(a.keys() | b.keys(), key=place):
        of_cell = [number(x.get(at, {}), metric) for x in (a, b)]
        if any(r is not None and r["status"] != "unsupported" for r in of_cell):
            rows.append(of_cell)
    control = controls([judge(*r, metric) for r in rows], before, after)
    return [judge(*r, metric, between_runs(control)) for r in rows], control


def lost(pair):
    """Whether A has a number where B says why it has none."""
    return pair.verdict == "changed" and pair.a["status"] == "ok"


def beyond(pairs, percent):
    """The cells that are worse beyond the noise by more than so many per cent, or lost."""
    limit = 1 + percent / 100
    worse = [p for p in pairs if p.verdict == "worse" and (p.cost is None or p.cost > limit)]
    return worse + [p for p in pairs if lost(p)]


# Telling


def words(verdict, metric):
    memory = metric.endswith("_mib")
    return {
        "better": "less" if memory else "faster",
        "worse": "more" if memory else "slower",
        "changed": "status changed",
    }.get(verdict, verdict)


def environment(rows):
    """{field: its values in these rows, in order of appearance}."""
    found = {field: {} for field in ENVIRONMENT}
    for row in rows:
        state = row.get("gpu_after") or row  # of seqlen, the rows of the machine hold the limit
        for field in ENVIRONMENT:
            value = (state if field == "power_limit_w" else row).get(field)
            if value is not None:
                found[field][str(value)] = None
    return {field: list(values) for field, values in found.items()}


def differences(before, after):
    """[[what, in A, in B]] of what the environments of the rows of A and B do not share."""
    a, b = environment(before), environment(after)
    return [
        [name, ", ".join(a[field]) or "–", ", ".join(b[field]) or "–"]
        for field, name in ENVIRONMENT.items()
        if sorted(a[field]) != sorted(b[field])
    ]


def sources(pairs):
    """{backend: whether its sources are other ones in B}, of the cells in both files."""
    found = {}
    for p in (p for p in pairs if p.a is not None and p.b is not None):
        name = p.a["backend"]
        found[name] = found.get(name, False) or p.a.get("source") != p.b.get("source")
    return found


def source_words(changed):
    """A sentence on the sources, None where none changed."""
    names = [records.label(n) for n, is_other in changed.items() if is_other]
    if not names:
        return None
    if len(names) == len(changed):
        return (
            "Sources changed of every backend: the fingerprint covers block.py and what measures,"
            " that of the ladder and the peers every kernel."
        )
    return f"Sources changed of {', '.join(names)}; not of the other {len(changed) - len(names)}."


def control_words(pairs, control):
    """What the cells in which nothing changed say of the noise between the runs."""
    if control is None:
        return (
            "No control: in too few cells nothing changed, so how much two runs differ without a"
            " cause is not known, and the verdicts do not allow for it."
        )
    able = sum(p.ratio is not None for p in pairs)
    return (
        f"Control: {len(control)} of {able} cells ran the same code on the same device and versions"
        f" in both. B/A ×{grid.geometric_mean(control):.3f} in the geometric mean, four fifths of"
        f" them within {between_runs(control) - 1:.1%} of their median; the verdicts allow for it."
    )


def by_backend(pairs, metric):
    """(header, rows): a backend a row, the mean ratio and how many cells got which verdict."""
    changed = sources(pairs)
    lines = []
    for name in dict.fromkeys(p.row["backend"] for p in pairs):
        own = [p for p in pairs if p.row["backend"] == name]
        mean = grid.geometric_mean([p.ratio for p in own if p.ratio is not None])
        counts = [sum(p.verdict == v for p in own) for v in VERDICTS]
        line = [records.label(name), "–" if mean is None else f"×{mean:.3f}", *counts]
        lines.append([*line, {True: "changed", False: "same"}.get(changed.get(name), "–")])
    heads = [words(v, metric) for v in VERDICTS]
    return ["backend", "mean B/A", *heads, "sources"], lines


def told(row):
    """A number, or the status in its place."""
    if row is None:
        return "–"
    return f"{row['p50']:.4g}" if row["status"] == "ok" else row["status"]


FIELDS = {  # column: of a row
    "study": lambda r: r["study"],
    "scope": lambda r: r["scope"],
    "direction": lambda r: r["direction"],
    "dtype": lambda r: r["dtype"],
    "mask": lambda r: "causal" if r["causal"] else "full",
    "batch": lambda r: str(r["B"]),  # B is a file here
    "H": lambda r: str(r["H"]) + f"/{r['H_KV']}" * (r["H_KV"] != r["H"]),
    "D": lambda r: str(r["D"]),
}


def length(row):
    return str(row["N_Q"]) + f"×{row['N_K']}" * (row["N_K"] != row["N_Q"])


def table(pairs, metric, everything=False):
    """(header, rows, what all cells share) of the cells that differ; or of all.

    The worst first: lost cells, slower ones, faster ones; each by backend and size. Cells of one
    file alone come last, the lengths of a backend in one row.
    """
    values = {name: {of(p.row) for p in pairs} for name, of in FIELDS.items()}
    shared = [name for name in FIELDS if len(values[name]) == 1]
    columns = [name for name in FIELDS if name not in shared]
    order = {v: i for i, v in enumerate(("changed", "worse", "better", "same"))}
    shown = [p for p in pairs if p.verdict in order and (everything or p.verdict != "same")]
    shown.sort(key=lambda p: (order[p.verdict], not lost(p)))

    def start(p):
        return [records.label(p.row["backend"]), *(FIELDS[name](p.row) for name in columns)]

    lines = []
    for p in shown:
        ratio = "–" if p.ratio is None else f"×{p.ratio:.3f}"
        band = "–" if p.ratio is None else f"{p.low:.3f} to {p.high:.3f}"
        lines.append(
            [*start(p), length(p.row), told(p.a), told(p.b), ratio, band, words(p.verdict, metric)]
        )
    alone = {}
    for p in pairs:
        if p.verdict.startswith("only"):
            alone.setdefault((p.verdict, *start(p)), []).append(length(p.row))
    for (verdict, *begin), lengths in sorted(alone.items(), key=lambda item: item[0][0]):
        lines.append([*begin, " ".join(lengths), "", "", "", "", verdict])
    about = ", ".join(
        f"{name} " * (name in ("batch", "H", "D")) + FIELDS[name](pairs[0].row) for name in shared
    )
    head = ["backend", *columns, "N", "A", "B", "B/A", "noise", "verdict"]
    return head, lines, about


def reasons(pairs):
    """A sentence for every reason why a cell lost or gained a number."""
    found = {}
    for p in (p for p in pairs if p.verdict == "changed"):
        for name, row in (("A", p.a), ("B", p.b)):
            if row["status"] != "ok":
                key = records.label(row["backend"]), f"{row['status']} in {name}", row.get("reason")
                found.setdefault(key, []).append(length(row))
    return [
        f"{backend}, {what} at N = {', '.join(dict.fromkeys(at))}: {reason}"
        for (backend, what, reason), at in found.items()
    ]


def report(args, before, after, pairs, control):
    """Print it all: what was different, then what came of it."""
    metric = args.metric
    # The environment of the cells in both files, and of the machine's own rows.
    common = [p for p in pairs if p.a is not None and p.b is not None]
    machine = [[r for r in rows if "backend" not in r] for rows in (before, after)]
    rows = [[p.a for p in common] + machine[0], [p.b for p in common] + machine[1]]
    for name, path, of in zip("AB", (args.a, args.b), rows, strict=True):
        dates = sorted({r["utc"][:10] for r in of if r.get("utc")})
        when = " to ".join(dict.fromkeys(dates[:1] + dates[-1:]))
        print(f"{name}: {path}, {', '.join(environment(of)['device'])}, {when}")
    found = differences(*rows)
    if found:
        print("\nWhat differs between the runs, before any number:")
        print(text(["", "A", "B"], found, 3))
    said = source_words(sources(pairs))
    if not found and said is None:
        print("Device, versions, commit and sources are the same.")
    for sentence in (said, control_words(pairs, control)):
        if sentence is not None:
            print(sentence)

    head, lines, about = table(pairs, metric, args.all)
    units = {r["unit"] for rows in (before, after) for r in rows if r.get("metric") == metric}
    title = "Cells" if args.all else "Cells that differ"
    if lines:
        print(f"\n{title}, {metric} in {' and '.join(sorted(units))}: {about}")
        print(text(head, lines, len(head) - 6))
        for sentence in reasons(pairs):
            print(sentence)
    else:
        print(f"\nNo cell differs beyond the noise in {metric}: {about}")
    head, lines = by_backend(pairs, metric)
    print("\nAll cells, by backend")
    print(text(head, lines, 1))


def percentage(value):
    """argparse type: a number from 0 up."""
    try:
        x = float(value)
    except ValueError:
        x = -1.0
    if not 0 <= x < float("inf"):
        raise argparse.ArgumentTypeError(f"expected per cent, a number from 0 up, got {value!r}")
    return x


def parser():
    p = argparse.ArgumentParser(
        prog="compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""
How it judges. A cell is a backend at one size, dtype, mask and direction; what it was measured on
and with is no part of it. B is faster where its 80th percentile lies under A's 20th and its slowest
round under A's quickest, slower the other way round, else the same: within the noise. Where a file
holds a cell more than once, the latest counts.

Backends take turns within a run, and two runs do not: one code, run twice, differs by more than the
percentiles of either. So cells in which nothing changed, neither sources nor device, versions,
driver or power limit, are the control: how far four fifths of their ratios lie from their median is
added to the noise of every cell. A run in which everything changed has no control; measure backends
that did not change (naive, sdpa) in both. B/A is the ratio of the medians, "noise" the range of it
that all this allows. Memory has no noise: any other number is more or less.

In records of the ladder and the peers, whose sources are all kernels at once, the matrix product is
the control.

How to read it. First what differs between the runs, since it is usually the cause: another GPU,
power limit, version or commit. Then the control's mean: a warmer or a shared GPU slows all cells of
a run, and a change of yours counts from there. Compare runs of one machine, one after the other.

Exit codes: 0 compared; 1 with --fail-above, where it says so; 2 bad arguments: files that are
missing, no records, of different studies, or without a common cell.""",
    )
    add = p.add_argument
    add("a", metavar="A.jsonl", type=Path, help="record file of the run to compare with")
    add("b", metavar="B.jsonl", type=Path, help="record file of the run to judge")
    add("--metric", default="time_ms", metavar="NAME",
        help="what to compare: time_ms (the default), graph_ms, host_ms, peak_delta_mib,"
             " peak_abs_mib, tflops, tokens_per_s, or whatever the records hold")  # fmt: skip
    add("--all", action="store_true", help="list the cells that are the same, too")
    add("--fail-above", type=percentage, metavar="PERCENT",
        help="exit with 1 where a cell is slower (of memory: more) beyond the noise by more than"
             " this, or was measured in A and, says its record, could not be in B (out of"
             " memory, failed, wrong, unsupported); cells that B lacks do not count")  # fmt: skip
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    rows = []
    for path in (args.a, args.b):
        try:
            rows.append(load(path))
        except (OSError, records.RecordError) as e:
            p.error(f"cannot compare: {e}")
    studies, metrics = (
        [{r[k] for r in of if "backend" in r} for of in rows] for k in ("study", "metric")
    )
    if not studies[0] & studies[1]:
        a, b = (" and ".join(sorted(map(str, s))) for s in studies)
        p.error(f"cannot compare: {args.a} is of the study {a}, {args.b} of {b}")
    if args.metric not in metrics[0] | metrics[1]:
        have = ", ".join(sorted(metrics[0] | metrics[1]))
        p.error(f"argument --metric: no {args.metric!r} on record; there are {have}")
    pairs, control = compare(*rows, args.metric)
    if not any(p.a is not None and p.b is not None for p in pairs):
        p.error(f"cannot compare: {args.a} and {args.b} have no cell of {args.metric} in common")
    report(args, *rows, pairs, control)
    if args.fail_above is None:
        return 0
    bad = beyond(pairs, args.fail_above)
    kind, gone = words("worse", args.metric), sum(map(lost, bad))
    print(
        f"\n--fail-above {args.fail_above:g}: {len(bad) - gone} cells are {kind} beyond the noise"
        f" by more than that, {gone} were measured in A and could not be in B"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
