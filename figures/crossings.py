"""From which length on one backend is faster than another, and how sure that is. Arithmetic only.

Reads the records of bench/crossover.py. A condition is everything but the length: direction, dtype,
mask, head dim, batch and heads. In each the backends took turns at every length, on up to three
clocks.

The crossing. r(N) is the rival's time over the backend's; the crossing is the length from which on
r > 1 at every longer measured length. It lies between the last length with r <= 1 and the next one,
where the straight line through the two points (log N, log r) passes 1. EVERYWHERE where r > 1 at
every measured length, NEVER where r <= 1 at the longest one: both are answers.

The interval. The turns are drawn again with replacement, the same ones of both backends, since turn
i of one ran beside turn i of the other; each such draw has a crossing, EVERYWHERE and NEVER
included, and the interval holds the middle 95 % of them. It covers the noise within a run, not
another day, driver or GPU.
"""

import hashlib
import math
import zlib
from typing import NamedTuple

import numpy as np
from flashstudy.figures import grid, records

STUDY = "crossover"
CLOCKS = {"time_ms": "GPU time", "graph_ms": "graph replay", "host_ms": "wall clock"}
RIVALS = ("naive", "naive-compiled", "sdpa")
EVERYWHERE, NEVER = 0.0, math.inf
DRAWS = 1000
LEVEL = 0.95


# Conditions


class Condition(NamedTuple):
    """What the lengths of one sweep share."""

    direction: str
    dtype: str
    causal: bool
    head_dim: int
    batch: int
    heads: int

    @property
    def fill(self):
        """B·H: independent problems, and with them blocks to fill the GPU with."""
        return self.batch * self.heads

    def __str__(self):
        mask = "causal" if self.causal else "full"
        return (
            f"{self.direction}, {self.dtype}, {mask}, batch {self.batch}, {self.heads} heads of"
            f" {self.head_dim}"
        )


class Sweep:
    """One condition: {clock: {backend: {length: row}}}, every cell from one run."""

    def __init__(self, condition):
        self.condition = condition
        self.clocks = {}

    def add(self, metric, length, of_cell):
        for backend, row in of_cell.items():
            self.clocks.setdefault(metric, {}).setdefault(backend, {})[length] = row

    def backends(self, metric=None):
        """Those with a time somewhere, in the order of the table."""
        metrics = self.clocks if metric is None else {metric} & set(self.clocks)
        seen = {
            b
            for m in metrics
            for b, found in self.clocks[m].items()
            if any(r["status"] == "ok" for r in found.values())
        }
        return [b for b in records.table() if b in seen]

    def lengths(self):
        found = {n for of_clock in self.clocks.values() for f in of_clock.values() for n in f}
        return sorted(found)

    def turns(self, metric, backend):
        """{length: array of the turns' medians, ms}."""
        found = self.clocks.get(metric, {}).get(backend, {})
        return {n: np.array(r["turns"]) for n, r in sorted(found.items()) if r["status"] == "ok"}

    def row(self):
        """The newest row: it says on what and with what this was measured."""
        found = (r for c in self.clocks.values() for f in c.values() for r in f.values())
        return max(found, key=lambda r: r["utc"])

    def kernel(self):
        """The backend that is the one kernel that SDPA ran at every length, or None."""
        found = [r for clock in self.clocks.values() for r in clock.get("sdpa", {}).values()]
        kernels = {r.get("sdpa_kernel") for r in found if r["status"] == "ok"}
        return f"sdpa-{kernels.pop()}" if len(kernels) == 1 else None


def sweeps(rows):
    """A Sweep per condition, from the newest machine and software on record."""
    rows = grid.newest([r for r in rows if r.get("study") == STUDY])
    found = {}
    for dtype in dict.fromkeys(r["dtype"] for r in rows):
        for metric in CLOCKS:
            for cell, of_cell in grid.by_cell(rows, list(records.table()), dtype, metric).items():
                condition = Condition(
                    cell.direction, dtype, cell.causal, cell.head_dim, cell.batch, cell.heads
                )
                sweep = found.setdefault(condition, Sweep(condition))
                sweep.add(metric, cell.length, of_cell)
    return list(found.values())


def base(found):
    """The sweep that the others vary, as its records say: the newest of several, or None."""
    return max(
        (s for s in found if s.row().get("slice") == "base"),
        key=lambda s: s.row()["utc"],
        default=None,
    )


def training(found):
    """The base condition with the backward in the same call, or None."""
    first = base(found)
    if first is None:
        return None
    wanted = first.condition._replace(direction=grid.BOTH)
    return next((s for s in found if s.condition == wanted), None)


def fillings(found):
    """The sweeps that differ from the base in batch and heads alone, itself included, by B·H."""
    first = base(found)
    same = [s for s in found if s.condition[:4] == first.condition[:4]] if first else []
    return sorted(same, key=lambda s: s.condition.fill)


def variations(found):
    """[(what differs from the base, sweep)]: the base itself, then every other condition."""
    first = base(found)
    if first is None:
        return []
    made = []
    for s in found:
        at, zero = s.condition, first.condition
        differs = [
            (at.direction != zero.direction, at.direction),
            (at.causal != zero.causal, "causal" if at.causal else "not causal"),
            (at.head_dim != zero.head_dim, f"D = {at.head_dim}"),
            (at.dtype != zero.dtype, at.dtype),
            (at.fill != zero.fill, f"B·H = {at.fill:,}"),
        ]
        parts = [text for is_other, text in differs if is_other]
        kind = [is_other for is_other, _ in differs[::-1]]
        made.append(((sum(kind), kind, at.fill, at.head_dim), ", ".join(parts) or "base", s))
    return [(text, s) for _, text, s in sorted(made, key=lambda item: item[0])]


# Crossings


class Crossing(NamedTuple):
    """start: the length from which the backend is faster, or EVERYWHERE or NEVER; [low, high] its
    interval. first, last: the range of common lengths. ratio: the rival's time over the backend's
    at `last`. same: the two are one kernel by two names."""

    backend: str
    rival: str
    metric: str
    start: float
    low: float
    high: float
    first: int
    last: int
    ratio: float
    same: bool = False

    def words(self):
        """≤ 16 · 143 (131 to 160) · > 1024: as tables have it."""
        if self.same:
            return "same kernel"
        middle = self.bound(self.start)
        if self.low == self.high or self.bound(self.low) == self.bound(self.high):
            return middle
        return f"{middle} ({self.bound(self.low)} to {self.bound(self.high)})"

    def bound(self, length):
        if length == EVERYWHERE:
            return f"≤ {self.first}"
        return f"> {self.last}" if length == NEVER else f"{length:.0f}"


def starts(lengths, ratios):
    """The crossing of every row of `ratios` [draws, lengths]; lengths ascend."""
    x, y = np.log(np.asarray(lengths, dtype=float)), np.log(np.asarray(ratios, dtype=float))
    behind = y <= 0  # [draws, lengths]
    last = len(lengths) - 1 - np.argmax(behind[:, ::-1], axis=1)  # where it is behind last
    left, right = last, np.minimum(last + 1, len(lengths) - 1)
    rows = np.arange(len(y))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = -y[rows, left] / (y[rows, right] - y[rows, left])
        found = np.exp(x[left] + share * (x[right] - x[left]))
    found = np.where(behind[:, -1], NEVER, found)
    return np.where(behind.any(axis=1), found, EVERYWHERE)


def redraw(backend, rival, draws, rng):
    """Ratios [draws] of medians over turns drawn again; the same turns of both, being adjacent."""
    pick = rng.integers(len(backend), size=(draws, len(backend)))
    if len(rival) == len(backend):
        other = pick
    else:  # one of them lost a turn: nothing says which belong together
        other = rng.integers(len(rival), size=(draws, len(rival)))
    return np.median(rival[other], axis=1) / np.median(backend[pick], axis=1)


def crossing(sweep, backend, rival, metric, draws=DRAWS):
    """The Crossing of a backend against a rival on one clock, None without two common lengths."""
    mine, theirs = sweep.turns(metric, backend), sweep.turns(metric, rival)
    lengths = [n for n in mine if n in theirs]
    if len(lengths) < 2:
        return None
    # Its own stream of random numbers: what else is asked changes no answer.
    rng = np.random.default_rng(
        zlib.crc32(f"{sweep.condition} {backend} {rival} {metric}".encode())
    )
    ratios = [np.median(theirs[n]) / np.median(mine[n]) for n in lengths]
    drawn = np.stack([redraw(mine[n], theirs[n], draws, rng) for n in lengths], axis=1)
    (start,) = starts(lengths, [ratios])
    ordered = np.sort(starts(lengths, drawn))  # EVERYWHERE sorts first and NEVER last
    tail = (1 - LEVEL) / 2
    low, high = ordered[int(tail * draws)], ordered[min(draws - 1, int((1 - tail) * draws))]
    same = rival == "sdpa" and backend == sweep.kernel()
    return Crossing(
        backend, rival, metric, float(start), float(low), float(high), lengths[0], lengths[-1],
        float(ratios[-1]), same,
    )  # fmt: skip


def challengers(sweep, rival):
    """The flash backends, and torch's own pick where it is not the rival."""
    return [b for b in sweep.backends() if b != rival and records.family(b) in ("flash", "auto")]


def crossings(sweep, rival, metric):
    """[Crossing] of every challenger that has one, in the order of the table."""
    found = (crossing(sweep, b, rival, metric) for b in challengers(sweep, rival))
    return [c for c in found if c is not None]


def clocks(found):
    """The clocks on which anything was timed."""
    return [m for m in CLOCKS if any(s.backends(m) for s in found)]


def digest(found):
    """Fingerprint of every number that is shown, the same before and after trimming."""
    parts = []
    for s in sorted(found, key=lambda s: s.condition):
        for metric, backends in sorted(s.clocks.items()):
            for backend, rows in sorted(backends.items()):
                for n, r in sorted(rows.items()):
                    numbers = [f"{t:.6g}" for t in r["turns"]] or [r["status"]]
                    parts.append(f"{s.condition} {metric} {backend} {n} {' '.join(numbers)}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# Tables, as (header, rows of text), and words


def table(found, rival):
    """A row a backend: from which length it beats the rival, by direction and clock."""
    shown = [(s, s.condition.direction) for s in (base(found), training(found)) if s is not None]
    shown = [(s, name) for s, name in shown if rival in s.backends()]
    header = ["backend"]
    columns = []
    for s, name in shown:
        for metric in clocks([s]):
            header.append(f"{name}: {CLOCKS[metric]}")
            columns.append({c.backend: c.words() for c in crossings(s, rival, metric)})
    names = [b for b in records.table() if any(b in column for column in columns)]
    return header, [[records.label(b), *(c.get(b, "–") for c in columns)] for b in names]


def conditions_table(found, rival="naive"):
    """A row a condition and clock, a column a backend that was measured under several of them."""
    varied = variations(found)
    first = base(found)
    names = [
        b
        for b in (challengers(first, rival) if first else [])
        if sum(b in s.backends() for _, s in varied if s.condition.direction == "forward") > 1
    ]
    rows = []
    for text, s in varied:
        for i, metric in enumerate(clocks([s])):
            by_name = {c.backend: c.words() for c in crossings(s, rival, metric)}
            if by_name:
                cells = [by_name.get(b, "–") for b in names]
                rows.append([text if i == 0 else "", CLOCKS[metric], *cells])
    return ["", "clock", *map(records.label, names)], rows


def heat(found, backend, rival, metric):
    """(B·H ascending, lengths, speed-ups [B·H, lengths], NaN where there is none)."""
    some = [s for s in fillings(found) if {backend, rival} <= set(s.backends(metric))]
    seen = [n for s in some for n in s.turns(metric, backend)]
    lengths = sorted({n for n in seen if seen.count(n) > len(some) / 2})  # the base has more
    values = np.full((len(some), len(lengths)), math.nan)
    for i, s in enumerate(some):
        mine, theirs = s.turns(metric, backend), s.turns(metric, rival)
        for j, n in enumerate(lengths):
            if n in mine and n in theirs:
                values[i, j] = np.median(theirs[n]) / np.median(mine[n])
    return [s.condition.fill for s in some], lengths, values


def mapped(found, rival="naive"):
    """The flash backends with a map of two or more B·H, the quickest on the GPU first."""
    names = []
    for b in records.table():
        if records.family(b) not in ("flash", "auto") or b == rival:
            continue
        metric = clocks(found)[0]
        sizes, _, values = heat(found, b, rival, metric)
        if len(sizes) > 1 and np.isfinite(values).any():
            names.append((-np.exp(np.nanmean(np.log(values))), b))
    return [b for _, b in sorted(names)]


def span(found):
    """From which lengths on some crossings' backends are faster, in words."""
    order = sorted(found, key=lambda c: c.start)
    low, high = order[0], order[-1]
    if low.start == high.start == EVERYWHERE:
        return f"at every length from {low.first} tokens"
    if low.start == high.start == NEVER:
        return f"at no length up to {high.last} tokens"
    if low.start == EVERYWHERE:
        return f"from {high.bound(high.start)} tokens on at the latest"
    if low.bound(low.start) == high.bound(high.start):
        return f"from {low.bound(low.start)} tokens on"
    return f"from {low.bound(low.start)} to {high.bound(high.start)} tokens on"


def _names(found):
    return ", ".join(records.label(c.backend) for c in found)


def against(sweep, rival):
    """The sentence on every challenger against one rival, None where there is nothing to say."""
    parts = []
    for metric in clocks([sweep]):
        found = [c for c in crossings(sweep, rival, metric) if not c.same]
        never = [c for c in found if c.start == NEVER]
        ahead = [c for c in found if c.start != NEVER]
        if not found:
            continue
        part = f"by {CLOCKS[metric]} "
        if not never:
            part += f"all {span(found)}"
        elif not ahead:
            part += f"none up to {never[0].last} tokens"
        elif len(ahead) < len(never):
            part += f"only {_names(ahead)}, {span(ahead)}"
        else:
            part += f"all but {_names(never)} {span(ahead)}"
        parts.append(part)
    if not parts:
        return None
    return f"Faster than {records.label(rival)}: {'; '.join(parts)}."


def filling(found, rival="naive"):
    """The sentence on what B·H changes for the backend with the quickest map, or None."""
    for backend in mapped(found, rival)[:1]:
        parts = []
        for metric in clocks(found):
            some = [
                (s.condition.fill, c)
                for s in fillings(found)
                if (c := crossing(s, backend, rival, metric)) is not None
            ]
            if len(some) > 1:
                (least, a), (most, b) = some[0], some[-1]
                if span([a]) == span([b]):
                    text = f"{span([a])} at B·H = {least:,} as at {most:,}"
                else:
                    text = f"{span([a])} at B·H = {least:,} and {span([b])} at {most:,}"
                parts.append(f"by {CLOCKS[metric]} {text}")
        if parts:
            return (
                f"With how much there is to fill the machine: {records.label(backend)} beats"
                f" {records.label(rival)}"
                f" {'; '.join(parts)}."
            )
    return None


def words(found):
    """The answer, a list of sentences; the first says what was measured."""
    first = base(found)
    if first is None:
        return []
    said = [f"{str(first.condition).capitalize()}; {first.row()['device']}."]
    for s in (first, training(found)):
        if s is None:
            continue
        if s is not first:
            said.append("Forward and backward in one call.")
        said += [against(s, rival) for rival in RIVALS if rival in s.backends()]
        if (same := s.kernel()) in s.backends():
            said.append(f"SDPA ran the kernel of {records.label(same)} at every length.")
    return [text for text in [*said, filling(found)] if text is not None]


def provenance(found):
    return grid.provenance(max((s.row() for s in found), key=lambda r: r["utc"]))
