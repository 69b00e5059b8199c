"""Records: JSON lines, one number a line, each with everything that it depends on.

A row is a dict. Rows of one cell (a backend at one size) differ in `metric`; the row of metric
`time_ms` is written last and carries the cell's status, so a cell is complete where it has one:

    ok            measured                       oom       the device's memory did not suffice
    unsupported   cannot run here, see reason    failed    raised, see reason
    wrong         its result is outside the error budget; it was not timed

`value` is `p50`, the median of `samples`; `p20` and `p80` are percentiles. A line {"defaults": …}
gives fields to the rows after it: the committed reference records are shortened so.
"""

import hashlib
import json
from pathlib import Path

# What makes two measurements of a cell the same one: machine, software, how long was measured.
ENVIRONMENT = (
    "device", "threads", "cuda", "cudnn", "torch", "triton", "flash_attn", "flash_attn_4",
    "float32_matmul", "source", "effort",
)  # fmt: skip
CELL = (
    "backend",
    "scope",
    "direction",
    "dtype",
    "causal",
    "B",
    "E",
    "H",
    "H_KV",
    "N_Q",
    "N_K",
    "D",
)
STATUSES = ("ok", "oom", "unsupported", "failed", "wrong")


class RecordError(ValueError):
    """A file that is not a file of records; says which line and why."""


def parse(data, name):
    """(rows, length) of the bytes of a record file: `length` bytes hold whole lines.

    What is left after them is the partial last line of a run that was killed while writing.
    Raises RecordError where an earlier line is not a record.
    """
    rows, defaults, length = [], {}, 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        whole = line.endswith(b"\n")
        try:
            row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
        except ValueError as e:
            if not whole:
                return rows, length
            raise RecordError(f"{name}:{number}: not a record: {e}") from None
        if not whole:  # it parses, but nobody can tell whether it lost digits at its end
            return rows, length
        length += len(line)
        if "defaults" in row:
            defaults = row["defaults"]
        elif row:
            rows.append(defaults | row)
    return rows, length


def read(*paths):
    """The rows of record files, a partial last line left out."""
    return [row for path in paths for row in parse(Path(path).read_bytes(), path)[0]]


def key(row):
    """Identifies a cell together with what it was measured on and with."""
    return tuple(row.get(k) for k in CELL + ENVIRONMENT)


def gather(rows):
    """{cell key: {metric: row}}, complete cells only; a later row replaces an earlier one."""
    cells = {}
    for row in rows:
        if "backend" in row:
            cells.setdefault(key(row), {})[row["metric"]] = row
    return {k: metrics for k, metrics in cells.items() if "time_ms" in metrics}


class Sweep:
    """The cells that differ in backend and length alone: what one chart shows."""

    # All of the environment but the sources, which each backend has its own of.
    SETUP = tuple(k for k in ENVIRONMENT if k != "source")
    SHARED = ("scope", "direction", "dtype", "causal", "B", "E", "H", "H_KV", "D", *SETUP)

    def __init__(self, cells):
        cells = sorted(cells, key=lambda m: m["time_ms"].get("utc") or "")  # the newest one stays
        self.cells = {(m["time_ms"]["backend"], m["time_ms"]["N_Q"]): m for m in cells}
        first = cells[0]["time_ms"]
        self.about = {k: first.get(k) for k in self.SHARED}
        self.row = cells[-1]["time_ms"]
        self.newest = self.row.get("utc") or ""
        self.days = sorted({(m["time_ms"].get("utc") or "")[:10] for m in self.cells.values()})
        self.lengths = sorted({n for _, n in self.cells})
        self.scope, self.direction = self.about["scope"], self.about["direction"]
        self.dtype = self.about["dtype"]

    def backends(self, *statuses):
        """Names in the order of the table, those of no table last; all, or with such a status."""
        names = {b for (b, n) in self.cells if not statuses or self.status(b, n) in statuses}
        order = list(table())
        return sorted(names, key=lambda b: (order.index(b) if b in order else len(order), b))

    def status(self, backend, n):
        cell = self.cells.get((backend, n))
        return cell["time_ms"]["status"] if cell else None

    def at(self, backend, n, metric):
        """The row of one number, or None where it was not measured."""
        row = self.cells.get((backend, n), {}).get(metric)
        return row if row and row["status"] == "ok" and row.get("value") is not None else None

    def series(self, backend, metric):
        """[(length, row)] of what was measured, by length."""
        return [(n, r) for n in self.lengths if (r := self.at(backend, n, metric)) is not None]

    def predicted_mib(self, backend, n):
        """The delta peak that a cell out of memory would have needed, and whether it is scaled.

        From the record where the implementation's allocations are known, else its largest measured
        cell times the square of the ratio of the lengths. (None, False) where there is neither.
        """
        row = self.cells.get((backend, n), {}).get("time_ms", {})
        if row.get("predicted_mib") is not None:
            return row["predicted_mib"], False
        if known := [(m, r["value"]) for m, r in self.series(backend, "peak_delta_mib") if m < n]:
            m, mib = known[-1]
            return mib * (n / m) ** 2, True
        return None, False

    def digest(self):
        """Fingerprint of every number and status, the same before and after trimming."""
        parts = []
        for (backend, n), metrics in sorted(self.cells.items()):
            for metric, r in sorted(metrics.items()):
                numbers = [f"{r[p]:.6g}" for p in ("p50", "p20", "p80") if r.get(p) is not None]
                parts.append(f"{backend} {n} {metric} {r['status']} {' '.join(numbers)}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]

    def title(self):
        """What the numbers were measured on, in a line for people."""
        a = self.about
        kv = "" if a["H_KV"] == a["H"] else f", {a['H_KV']} KV heads"
        return (
            f"{self.direction}, {a['dtype']}, {'causal' if a['causal'] else 'full'},"
            f" batch {a['B']}, {a['H']} heads{kv} of {a['D']}"
        )

    def provenance(self):
        a, r = self.about, self.row
        versions = [("torch", a["torch"]), ("CUDA", a["cuda"]), ("Triton", a["triton"])]
        versions += [("flash-attn", a["flash_attn"]), ("flash-attn-4", a["flash_attn_4"])]
        text = ", ".join(f"{n} {v}" for n, v in versions if v)
        threads = "" if r.get("gpu") else f", {a['threads']} threads"
        return f"{a['device']}{threads}; {text}; {' and '.join(self.days)}"


def sweeps(rows):
    """A Sweep per scope, direction, dtype and shape; of several environments the newest."""
    groups = {}
    for cell in gather(rows).values():
        groups.setdefault(tuple(cell["time_ms"].get(k) for k in Sweep.SHARED), []).append(cell)
    newest = {}
    for sweep in map(Sweep, groups.values()):
        what = tuple(v for k, v in sweep.about.items() if k not in Sweep.SETUP)
        if what not in newest or newest[what].newest < sweep.newest:
            newest[what] = sweep
    order = ("block", "attention"), ("forward", "backward")
    return sorted(
        newest.values(),
        key=lambda s: (order[0].index(s.scope), order[1].index(s.direction), str(s.about)),
    )


def scale(sweep, metric):
    """(factor, unit) that make the numbers of a metric readable: a CPU's are a thousandth."""
    plain = {"time_ms": "ms", "graph_ms": "ms", "host_ms": "ms"}
    if metric not in ("tokens_per_s", "tflops"):
        return 1.0, plain.get(metric, "MiB")
    values = [r["p50"] for b in sweep.backends("ok") for _, r in sweep.series(b, metric)]
    highest = max(values, default=0.0)
    if metric == "tflops":
        return (1.0, "TFLOP/s") if highest >= 1 else (1e3, "GFLOP/s")
    return (1e-6, "million tokens/s") if highest >= 1e6 else (1e-3, "thousand tokens/s")


def table():
    """The table of backends; imported late, since it imports torch."""
    from flashstudy.backends import BACKENDS

    return BACKENDS


def label(backend):
    return table()[backend].label if backend in table() else backend


def family(backend):
    """standard, flash or auto; records of a backend that no longer exists count as flash."""
    return table()[backend].family if backend in table() else "flash"
