"""Why each implementation is as fast as it is, from the records of bench/roofline.py alone.

    python figures/roofline.py results/roofline-nvidia-h200.jsonl --out figures

Writes, as PNG and SVG: roofline (FLOP/s over FLOPs per byte of device memory, the lengths of an
implementation joined, under the ceilings measured in the same run), roofline-traffic (bytes through
device memory and L2 over the length, beside what was counted) and roofline-head-dims (shares of the
ceilings of matrix products and exponentials over the head dim). `paragraphs` explains them, its
numbers from the records.

A call's share of a ceiling is the time that the resource alone would need for it, at the rate that
this GPU reached in the same run, over the time that the call took.
"""

import hashlib
import itertools
import math
import re
import sys
from typing import NamedTuple

from flashstudy.figures import answers, cli, records, style

TILE = 128  # queries and keys of a tile, as counted
BINDS = 0.5  # share of the time from which a unit is called the limit
HEAVY = 2.0  # times as long as the products that moving bytes takes where memory binds naive
SLOW = 0.6  # of a copy's rate, below which a kernel that only moves bytes is called slow
CACHED = 0.5  # scores fit in L2 as long as less than this share of the counted bytes leaves it
RESOURCES = {
    "products": ("flops", "matmul", "matrix products"),
    "exps": ("exps", "exp", "exponentials"),
    "memory": ("dram", "copy", "device memory"),
    "L2": ("l2", "l2", "L2 cache"),
}
CEILINGS = {  # name -> (what, factor, unit)
    "matmul": ("matrix product, 8192³", 1e-12, "TFLOP/s"),
    "copy": ("copy in device memory, read and write", 1e-12, "TB/s"),
    "l2": ("copy inside L2, read and write", 1e-12, "TB/s"),
    "exp": ("exponentials in registers", 1e-12, "10¹² a second"),
}
STAGES = {  # of kernels that store the scores: pattern -> what it does; products in their order
    r"softmax": "softmax",
    r"masked|elementwise|where": "mask",
    r"_scores_kernel": "S = Q Kᵀ",
    r"_weighted_sum": "O = P V",
}


class Call(NamedTuple):
    """One call: what was counted (flops, exps, bytes, scores) and measured (the rest; None: not).

    seconds: with a cold L2 cache. dram, l2: bytes. kernels: [(what, seconds, dram bytes)].
    """

    backend: str
    n: int
    batch: int
    heads: int
    head_dim: int
    causal: bool
    seconds: float
    flops: float
    exps: float
    bytes: float
    scores: float
    dram: float | None
    l2: float | None
    issued: float | None  # instructions of the unit that does exponentials, a thread each
    tensor: float | None  # share of the cycles in which the matrix units worked
    graph_us: float | None
    host_us: float | None
    kernels: tuple

    @property
    def moved(self):
        """Bytes through device memory: measured, else counted."""
        return self.bytes if self.dram is None else self.dram

    @property
    def tiles(self):
        """Of queries, over all heads: what a flash kernel deals to the SMs."""
        return self.batch * self.heads * math.ceil(self.n / TILE)


def stages(names):
    """What each of a call's kernels does, from its name; matrix products in their order."""
    found, products = [], iter(("S = Q Kᵀ", "O = P V"))
    for name in names:
        known = (what for pattern, what in STAGES.items() if re.search(pattern, name, re.I))
        found.append(next(known, None) or next(products, name))
    return found


def call_of(sweep, backend, n):
    """The Call of a cell, None where it was not timed."""
    row = sweep.at(backend, n, "time_ms")
    if row is None or "counted_flops" not in row:
        return None

    def value(metric, factor=1.0):
        r = sweep.at(backend, n, metric)
        return None if r is None else r["p50"] * factor

    read, written = value("dram_read_bytes"), value("dram_write_bytes")
    kernels = ()
    rows = [sweep.at(backend, n, m) for m in ("ncu_ms", "dram_read_bytes", "dram_write_bytes")]
    if all(rows):
        names = [name for name, _ in rows[0]["kernels"]]
        names = stages(names) if row["scores_bytes"] else names
        times, reads, writes = ([v for _, v in r["kernels"]] for r in rows)
        kernels = tuple(
            (what, ms / 1e3, r + w)
            for what, ms, r, w in zip(names, times, reads, writes, strict=True)
        )
    return Call(
        backend, n, row["B"], row["H"], row["D"], row["causal"], row["p50"] / 1e3,
        row["counted_flops"], row["counted_exps"], row["counted_bytes"], row["scores_bytes"],
        None if read is None or written is None else read + written, value("l2_bytes"),
        value("xu_threads"), value("tensor_share", 0.01), value("graph_ms", 1e3),
        value("host_ms", 1e3), kernels,
    )  # fmt: skip


class Study:
    """What a record file holds of this study, newest measurements first; may be incomplete."""

    def __init__(self, rows):
        rows = [r for r in rows if r.get("study") == "roofline"]
        self.ceilings = {}
        for row in sorted((r for r in rows if r.get("metric") == "ceiling"), key=utc):
            self.ceilings[row["ceiling"]] = row
        chip = next(iter(self.ceilings.values()), {})
        self.sms, self.l2_bytes = chip.get("sms"), chip.get("l2_cache_bytes")
        found = records.sweeps([r for r in rows if "backend" in r])
        self.sweeps = [s for s in found if s.direction == "forward"]
        full = [s for s in self.sweeps if not s.about["causal"]]
        self.base = max(full, key=lambda s: (len(s.lengths), s.about["D"] == 128), default=None)
        self.causal = self._like_base(causal=True)
        self.head_dims = sorted(
            (s for s in full if s.about["B"] == self.base.about["B"]), key=lambda s: s.about["D"]
        )

    def _like_base(self, **but):
        same = ("B", "H", "H_KV", "D", "E", "dtype")
        return next(
            (s for s in self.sweeps if self.base is not None
             and all(s.about[k] == self.base.about[k] for k in same)
             and all(s.about[k] == v for k, v in but.items())),
            None,
        )  # fmt: skip

    def calls(self, backend, sweep=None):
        """The calls of a backend, by length."""
        sweep = self.base if sweep is None else sweep
        if sweep is None:
            return []
        return [c for n in sweep.lengths if (c := call_of(sweep, backend, n)) is not None]

    def backends(self):
        return [] if self.base is None else self.base.backends("ok")

    def flash(self):
        return [b for b in self.backends() if records.family(b) == "flash"]

    def champion(self):
        """The flash backend with the least time over the lengths that all finished."""
        of_each = {b: {c.n: c.seconds for c in self.calls(b)} for b in self.flash()}
        common = set.intersection(*map(set, of_each.values())) if of_each else set()
        if not common:
            return None
        return min(of_each, key=lambda b: sum(math.log(of_each[b][n]) for n in common))

    def rate(self, ceiling):
        row = self.ceilings.get(ceiling)
        return None if row is None else row["best"]

    def shares(self, call):
        """{resource: share of the call's time that it alone would need}."""
        found = {}
        for name, (field, ceiling, _) in RESOURCES.items():
            amount = call.moved if field == "dram" else getattr(call, field)
            if amount is not None and self.rate(ceiling):
                found[name] = amount / self.rate(ceiling) / call.seconds
        return found

    def bound(self, call):
        """(resource, share) of what alone would need the largest share of a call's time."""
        shares = self.shares(call)
        name = max(shares, key=shares.get, default=None)
        return (None, None) if name is None else (name, shares[name])

    def edge(self):
        """Length at which one matrix of scores (2 bytes each) is as large as L2."""
        return math.sqrt(self.l2_bytes / (2 * self.base.about["B"] * self.base.about["H"]))

    def passes(self):
        """The most passes that ncu needed for a kernel's traffic."""
        found = (self.base.at(b, n, "dram_read_bytes") for b in self.backends()
                 for n in self.base.lengths)  # fmt: skip
        return max((r.get("ncu_passes") or 1 for r in found if r), default=1)

    def provenance(self):
        return self.base.provenance()

    def counted_only(self):
        """Whether no call has hardware counters."""
        return not any(c.dram is not None for b in self.backends() for c in self.calls(b))

    def digests(self):
        """Fingerprints of what is shown, the same before and after trimming."""
        rates = [f"{name} {row['best']:.6g}" for name, row in sorted(self.ceilings.items())]
        whole = hashlib.sha256("\n".join(rates).encode()).hexdigest()[:16]
        return [whole, *(s.digest() for s in self.sweeps)]

    # Tables, as (title, header, rows)

    def ceilings_table(self):
        lines = []
        for name, (what, factor, unit) in CEILINGS.items():
            if (row := self.ceilings.get(name)) is not None:
                best, p20, p80 = (digits(row[k] * factor) for k in ("best", "p20", "p80"))
                lines.append([what, f"{best} {unit}", f"{p20} to {p80}"])
        return "This GPU's ceilings", ["", "best turn", "p20 to p80 of all"], lines

    def limits_table(self):
        """Backends down, lengths across: the resource with the largest share."""
        lengths = [n for n in self.base.lengths if any(self.base.at(b, n, "time_ms")
                   for b in self.flash())]  # fmt: skip
        lines = []
        for backend in self.backends():
            of_n = {c.n: c for c in self.calls(backend)}
            line = [records.label(backend)]
            for n in lengths:
                name, share = self.bound(of_n[n]) if n in of_n else (None, None)
                line.append("" if name is None else f"{name} {share:.0%}")
            lines.append(line)
        head = ["", *(style.tokens(n) for n in lengths)]
        title = "The resource that alone would need the largest share of the time"
        return title, head, lines

    def head_dims_table(self):
        """Flash backends down, head dims across: TFLOP/s, and shares of products + exponentials."""
        lines, dims = [], [s.about["D"] for s in self.head_dims]
        for backend in self.flash():
            line = [records.label(backend)]
            for sweep in self.head_dims:
                call = self.at_head_dim(backend, sweep)
                if call is None:
                    line.append("–")
                    continue
                shares = self.shares(call)
                rate = call.flops / call.seconds / 1e12
                line.append(
                    f"{rate:.0f}: {shares.get('products', math.nan):.0%}"
                    f" + {shares.get('exps', math.nan):.0%}"
                )
            lines.append(line)
        one = self.head_dims[0].about
        title = (
            f"TFLOP/s: shares of the products' and the exponentials' ceilings; full,"
            f" {self.common_length():,} tokens, batch {one['B']}, heads times D = {one['E']}"
        )
        return title, ["", *(f"D = {d}" for d in dims)], lines

    def tables(self):
        if self.base is None:
            return []
        return [self.ceilings_table(), self.limits_table(), self.head_dims_table()]

    def common_length(self):
        """The length at which most head dims were measured, the longest of those."""
        every = [n for s in self.head_dims for n in s.lengths]
        return max(set(every), key=lambda n: (every.count(n), n), default=None)

    def at_head_dim(self, backend, sweep):
        return call_of(sweep, backend, self.common_length())


def utc(row):
    return row.get("utc") or ""


# Words


def micro(seconds):
    """41 µs, 3.2 ms."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms"


def digits(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def amount(size):
    """Bytes as MiB or GiB."""
    return answers.size(size / 2**20)


def joined(parts):
    parts = list(parts)
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def why_memory(study):
    """Why naive attention is memory-bound, and from where."""
    calls = [c for c in study.calls("naive") if c.dram is not None] or study.calls("naive")
    if not calls or not (study.rate("matmul") and study.rate("copy")):
        return None
    last = calls[-1]
    shares, source = study.shares(last), "measured" if last.dram is not None else "counted"
    ridge = study.rate("matmul") / study.rate("copy")
    text = (
        f"Naive attention writes every score to device memory and reads it back, twice: as S, then"
        f" as P. Its FLOPs per byte therefore do not grow with the length:"
        f" {last.flops / last.moved:.0f} at {last.n:,} tokens ({source} bytes), where this GPU"
        f" needs {ridge:.0f} before its matrix units can be the limit. There a call moves"
        f" {amount(last.moved)} in {micro(last.seconds)}. A copy of as many bytes would take"
        f" {shares['memory']:.0%} of that time, the matrix products at full rate"
        f" {shares['products']:.0%}."
    )
    if last.kernels:
        whole = sum(seconds for _, seconds, _ in last.kernels)
        parts = [
            f"{what} {seconds / whole:.0%} of the time at {moved / seconds / 1e12:.2g} TB/s"
            for what, seconds, moved in last.kernels
        ]
        text += f" By kernel: {joined(parts)}."
        what, seconds, moved = max(last.kernels, key=lambda k: k[1])
        reached = moved / seconds / study.rate("copy")
        if reached < SLOW:
            text += (
                f" Nor does it use what it is bound by: the longest of them, the {what}, moves its"
                f" bytes at {reached:.0%} of a copy's rate."
            )
    start = None
    for c in reversed(calls):
        if not heavy(study, c):
            break
        start = c
    if start is None:
        text += " By that measure, no length here is bound by memory."
    else:
        text += (
            f" Moving bytes costs more than {HEAVY:g} times what the products cost"
            f" from {start.n:,} tokens on"
        )
        if start is not calls[0]:
            before = study.shares(calls[calls.index(start) - 1])
            text += (
                f" (at {calls[calls.index(start) - 1].n:,} it is"
                f" {before['memory'] / before['products']:.1f} times: the scores are in L2)"
            )
        text += "."
    return text


def heavy(study, call):
    """Whether moving a call's bytes takes clearly longer than its matrix products."""
    shares = study.shares(call)
    return shares["memory"] > HEAVY * shares["products"]


def leaves_cache(calls):
    """(last call whose scores stay in L2, first whose do not); None where there is neither."""
    for small, large in itertools.pairwise(calls):
        if small.dram / small.bytes < CACHED <= large.dram / large.bytes:
            return small, large
    return None


def why_cache(study):
    """When the scores of what stores them stop fitting L2."""
    said = []
    for backend in study.backends():
        calls = [c for c in study.calls(backend) if c.scores and c.dram is not None]
        if len(calls) < 2 or (edge := leaves_cache(calls)) is None:
            continue
        small, large = edge
        said.append(
            f"of {records.label(backend)}'s counted bytes {small.dram / small.bytes:.0%} went"
            f" through device memory at {small.n:,} tokens (each matrix of scores"
            f" {amount(small.scores)}) and {large.dram / large.bytes:.0%} at {large.n:,}"
            f" ({amount(large.scores)})"
        )
    if not said or not study.l2_bytes:
        return None
    about = study.base.about
    heads = about["B"] * about["H"]
    text = (
        f"As long as the scores fit in the L2 cache ({amount(study.l2_bytes)}), the next kernel"
        f" finds them there, and device memory hardly sees them. A matrix of B·H·N² scores of 2"
        f" bytes outgrows it at {study.edge():.0f} tokens for {heads} heads in all, at half that"
        f" length for four times as many. Measured: {'; '.join(said)}."
    )
    flash = study.champion()
    calls = [c for c in study.calls(flash) if c.dram is not None and c.l2] if flash else []
    if calls:
        c = calls[-1]
        text += (
            f" A flash kernel has no such edge: at {c.n:,} tokens {records.label(flash)} moves"
            f" {amount(c.dram)} through device memory, {c.dram / c.bytes:.2g} times its q, k, v and"
            f" o, and the {amount(c.l2)} that its tiles ask for come from L2."
        )
    return text


def why_exponentials(study):
    """What exponentials cost flash at small head dims."""
    best, matmul, exp = study.champion(), study.rate("matmul"), study.rate("exp")
    if best is None or not (matmul and exp):
        return None
    calls = {s.about["D"]: c for s in study.head_dims if (c := study.at_head_dim(best, s))}
    if not {64, 128} <= calls.keys():
        return None
    even = matmul / (4 * exp)  # head dim at which products and exponentials need equally long
    shares = {d: study.shares(c) for d, c in calls.items()}
    each = joined(
        f"{c.flops / c.seconds / 1e12:.0f} TFLOP/s at D = {d} ({shares[d]['products']:.0%} of the"
        f" products' ceiling, {shares[d]['exps']:.0%} of the exponentials')"
        for d, c in calls.items()
    )
    small, large = calls[64], calls[128]
    per = {d: c.seconds / c.exps for d, c in calls.items()}  # a score
    fixed = max(2 * per[64] - per[128], 0.0)  # what of it does not grow with D
    text = (
        f"A score costs 4·D FLOPs of matrix products and one exponential, whatever D is. At this"
        f" GPU's ceilings, {matmul / 1e12:.0f} TFLOP/s and {exp / 1e12:.2g}·10¹² exponentials a"
        f" second, the exponentials need {matmul / (4 * 128 * exp):.0%} of the products' time at D"
        f" = 128 and {matmul / (4 * 64 * exp):.0%} at D = 64; below D = {even:.0f} they need more"
        f" than it. Measured at {small.n:,} tokens, {records.label(best)} reaches {each}. From D ="
        f" 128 to 64 the products halve, yet a score still takes {per[64] / per[128]:.0%} of the"
        f" time: by these two, {fixed / per[64]:.0%} of it at D = 64 does not depend on D, which is"
        f" {fixed * exp:.2g} times what its exponential alone would take."
    )
    a, b = shares[64]["products"], shares[64]["exps"]
    if b >= max(a, BINDS):
        text += " So at D = 64 the exponentials bind."
    elif a + b > 1:
        text += (
            f" So at D = 64 neither unit is the limit alone. One after the other they would need"
            f" {a + b:.0%} of the time: part of the softmax already hides behind the products, and"
            f" what does not hide is what D = 64 loses."
        )
    else:
        text += (
            f" So at D = 64 neither unit is full: one after the other they would need {a + b:.0%}"
            f" of the time, and the rest goes to what surrounds the exponential (scaling, maxima,"
            f" sums, conversions) and to waiting."
        )
    if large.issued and small.issued and large.tensor and small.tensor:
        text += (
            f" (Counted by ncu: the matrix units worked in {small.tensor:.0%} of the cycles at"
            f" D = 64 and in {large.tensor:.0%} at 128, and the unit of the exponentials issued"
            f" {small.issued / small.exps:.2f} and {large.issued / large.exps:.2f} instructions a"
            f" score.)"
        )
    return text


def why_causal(study):
    """Why leaving out half of the scores gains less than a factor of two."""
    best = study.champion()
    if best is None or study.causal is None:
        return None
    full = {c.n: c for c in study.calls(best)}
    pairs = [(full[c.n], c) for c in study.calls(best, study.causal) if c.n in full]
    if not pairs:
        return None

    def gain(pair):
        return pair[0].seconds / pair[1].seconds

    def allowed(pair):
        return pair[0].flops / pair[1].flops

    lines = joined(
        f"{gain(p):.2f} at {p[1].n:,} tokens (its tiles allow {allowed(p):.2f})" for p in pairs
    )
    first, last = pairs[0], pairs[-1]
    c = first[1]
    dealt = f" ({c.tiles} tiles of queries for {study.sms} SMs)" if study.sms else ""
    text = (
        f"Causal attention needs half of the scores. {records.label(best)} gains a factor of"
        f" {lines}. One loss is arithmetic: a tile on the diagonal is computed in full and half of"
        f" it thrown away, so n tiles of queries visit n(n+1)/2 tiles of keys instead of n², at"
        f" most a factor of 2n/(n+1), with tiles of {TILE}. The others are imbalance and what does"
        f" not shrink. The last tile of queries has n tiles of keys to visit, the first has one:"
        f" where there are few for each SM, some wait for the longest. And every tile still loads"
        f" its queries, masks its diagonal and stores its output. Together they leave causal at"
        f" {gain(first) / allowed(first):.0%} of the full mask's speed per FLOP at {c.n:,}"
        f" tokens{dealt}"
    )
    if last is not first:
        text += (
            f" and at {gain(last) / allowed(last):.0%} at {last[1].n:,} ({last[1].tiles:,} tiles)"
        )
    return text + "."


def why_small(study):
    """Why small N is launch-bound."""
    best = study.champion()
    calls = [c for c in study.calls(best) if c.graph_us and c.host_us] if best else []
    if not calls:
        return None
    first = calls[0]
    every = {
        b: c for b in study.backends() for c in study.calls(b)
        if c.n == first.n and c.graph_us and c.host_us
    }  # fmt: skip
    low, high = (f(every, key=lambda b: every[b].host_us) for f in (min, max))
    quick = [b for b, c in every.items() if c.graph_us > c.host_us]
    gpu = [c.graph_us for c in every.values()]
    text = (
        f"At {first.n:,} tokens the GPU is busy for {first.graph_us:.1f} µs with a call of"
        f" {records.label(best)} (replayed from a CUDA graph), and the host for"
        f" {first.host_us:.0f} µs to launch it; over the {len(every)} implementations it is"
        f" {min(gpu):.1f} to {max(gpu):.1f} µs against {every[low].host_us:.0f}"
        f" ({records.label(low)}) to {every[high].host_us:.0f} ({records.label(high)})."
    )
    if first.graph_us < first.host_us:
        text += (
            f" Called back to back, it leaves the GPU idle"
            f" {1 - first.graph_us / first.host_us:.0%} of the time"
        )
        text += "." if quick else ": the quickest launcher wins, not the quickest kernel."
    if study.sms and study.rate("matmul"):
        text += (
            f" Nor can such a call fill the GPU: {first.tiles} tiles of {TILE} queries for"
            f" {study.sms} SMs are {first.tiles / study.sms:.2g} for each, and at full rate its"
            f" products would take {first.flops / study.rate('matmul') * 1e6:.2g} µs."
        )
    busy = [c for c in calls if c.graph_us >= c.host_us]
    c = busy[0] if busy else calls[-1]
    if busy:
        text += f" From {c.n:,} tokens on its GPU time exceeds the host's"
    else:
        text += (
            f" At {c.n:,} tokens, its longest call timed so, it still does not exceed the host's"
        )
    return text + f" ({c.graph_us:.0f} and {c.host_us:.0f} µs)."


WHY = {
    "Why naive attention is memory-bound": why_memory,
    "When its scores stop fitting in L2": why_cache,
    "What exponentials cost at small head dims": why_exponentials,
    "Why causal gains less than twice": why_causal,
    "Why short calls are launch-bound": why_small,
}


def paragraphs(study):
    """{title: paragraph} of what the records can explain."""
    if study.base is None:
        return {}
    return {title: text for title, make in WHY.items() if (text := make(study)) is not None}


def measured_on(study):
    a = study.base.about
    shape = f"{a['dtype']}, full, forward, batch {a['B']}, {a['H']} heads of {a['D']}"
    return f"{shape}. {study.provenance()}"


def source_note(study):
    if study.counted_only():
        return "No hardware counters on record: bytes are the counted ones."
    again = f", in {study.passes()} passes" if study.passes() > 1 else ""
    return f"Bytes through device memory are measured (ncu{again}) where it could, else counted."


def near(ax, text, xy, offset, **more):
    ax.annotate(
        text, xy, xytext=offset, textcoords="offset points",
        **({"fontsize": 10.5, "color": style.GREY} | more),
    )  # fmt: skip


# Pictures


def draw_roofline(study):
    """FLOP/s over FLOPs per byte of device memory, under the measured ceilings."""
    matmul, copy = study.rate("matmul"), study.rate("copy")
    if not (matmul and copy):
        return None
    fig, ax, _ = style.axes()
    points = {
        b: [(c.flops / c.moved, c.flops / c.seconds / 1e12, c.n) for c in study.calls(b)]
        for b in study.backends()
    }
    for backend, found in points.items():
        x, y, _ = zip(*found, strict=True)
        ax.plot(x, y, label=records.label(backend), **style.look(backend).line())
    every = [p for found in points.values() for p in found]
    ridge, top = matmul / copy, matmul / 1e12
    low = min(x for x, _, _ in every) / 1.6
    high = max(*(x for x, _, _ in every), 2 * ridge) * 1.8
    ax.plot([low, ridge, high], [low * copy / 1e12, top, top], color="black", linewidth=2.2)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.set_ylim(min(y for _, y, _ in every) / 1.8, top * 2)
    style.value_axis(ax, "TFLOP/s")
    ax.xaxis.set_major_formatter(style.FuncFormatter(style.plain))
    ax.set_xlabel("FLOPs per byte through device memory")
    near(ax, f"matrix product, {top:.0f} TFLOP/s", (high, top), (-4, 5), ha="right")
    near(ax, f"copy, {copy / 1e12:.2f} TB/s", (ridge, top), (-8, 5), ha="right")
    for backend, at, offset, ha in (
        ("naive", 0, (0, -18), "center"), ("naive", -1, (8, 3), "left"),
        (study.champion(), 0, (-9, -4), "right"), (study.champion(), -1, (0, -18), "center"),
    ):  # fmt: skip
        if points.get(backend):
            x, y, n = points[backend][at]
            if backend != "naive":  # below all that end there, not between their lines
                y = min(v for b in study.flash() for _, v, m in points.get(b, ()) if m == n)
            text = f"N = {style.tokens(n)}"
            near(ax, text, (x, y), offset, color="black", ha=ha)
    lengths = sorted({n for _, _, n in every})
    over = any(y * 1e12 > 1.02 * copy * x for x, y, _ in every)
    beyond = "What only reads can pass the roof of a copy." if over else ""
    style.finish(
        fig, ax, "Roofline: what device memory and the matrix units allow", measured_on(study),
        [f"Lengths {style.tokens(lengths[0])} to {style.tokens(lengths[-1])}, joined; ceilings"
         f" measured in the same run. {source_note(study)} {beyond}".rstrip()],
    )  # fmt: skip
    return fig


def draw_traffic(study):
    """Bytes through device memory and L2 over the length, beside what was counted."""
    counted = {b: [c for c in study.calls(b) if c.dram is not None] for b in study.backends()}
    names = ("naive", "v0_naive", study.champion())
    shown = {b: counted[b] for b in names if counted.get(b)}
    if not shown:
        return None
    fig, ax, _ = style.axes()
    lengths = sorted({c.n for calls in shown.values() for c in calls})
    for backend, calls in shown.items():
        look, n = style.look(backend), [c.n for c in calls]
        name = records.label(backend)
        ax.plot(n, [c.dram / 2**20 for c in calls], label=f"{name}: device memory", **look.line())
        dots = {"color": look.color, "linestyle": (0, (1, 1.5)), "linewidth": 1.4}
        ax.plot(n, [c.bytes / 2**20 for c in calls], **dots)
        through = [(c.n, c.l2 / 2**20) for c in calls if c.l2]
        if through:
            thin = look.line() | {"linewidth": 0.9, "markersize": 4.5, "linestyle": "-"}
            ax.plot(*zip(*through, strict=True), label=f"{name}: L2", alpha=0.6, **thin)
    style.length_axis(ax, [n for n in lengths if n & (n - 1) == 0] or lengths)
    style.memory_axis(ax, "bytes moved by a call")
    if study.l2_bytes:
        size, grey = study.l2_bytes / 2**20, {"color": style.GREY, "linewidth": 1.2}
        ax.axhline(size, **grey)
        near(ax, f"size of L2, {amount(study.l2_bytes)}", (lengths[-1], size), (0, -13), ha="right")
        ax.axvline(study.edge(), linestyle="--", **grey)
        text = f"one matrix of scores\nfills L2: {study.edge():.0f} tokens"
        near(ax, text, (study.edge(), ax.get_ylim()[1]), (-6, -4), ha="right", va="top")
    style.finish(
        fig, ax, "When the scores leave the cache", measured_on(study),
        ["Dotted: counted bytes, every score through device memory. Lines: measured (ncu), each"
         " call with none of its tensors in L2 at its start; what still lies there at its end is"
         " missing."],
        columns=2,
    )  # fmt: skip
    return fig


def draw_head_dims(study):
    """Shares of the two ceilings over the head dim."""
    shown = [
        b for b in study.flash()
        if sum(study.at_head_dim(b, s) is not None for s in study.head_dims) > 1
    ]  # fmt: skip
    if not shown or not (study.rate("matmul") and study.rate("exp")):
        return None
    fig, ax, _ = style.axes()
    width = 0.84 / len(shown)
    for i, backend in enumerate(shown):
        look = style.look(backend)
        for at, sweep in enumerate(study.head_dims):
            if (call := study.at_head_dim(backend, sweep)) is None:
                continue
            shares, x = study.shares(call), at + (i - (len(shown) - 1) / 2) * width
            low, more = 100 * shares["products"], 100 * shares["exps"]
            ax.bar(x, low, width * 0.9, color=look.color, edgecolor="black", linewidth=0.7)
            ax.bar(x, more, width * 0.9, bottom=low, color="white", edgecolor=look.color,
                   hatch="////", linewidth=0.9)  # fmt: skip
            near(ax, str(i + 1), (x, low + more), (0, 2), ha="center", color="black")
    ax.axhline(100, color="black", linewidth=1.4)
    ax.set_xticks(range(len(study.head_dims)), [f"D = {s.about['D']}" for s in study.head_dims])
    ax.grid(axis="x", visible=False)
    ax.set_ylabel("of the call's time, %")
    box, edges = style.plt.Rectangle, {"edgecolor": "black"}
    handles = [
        box((0, 0), 1, 1, facecolor=style.look(b).color, label=f"{i}: {records.label(b)}", **edges)
        for i, b in enumerate(shown, 1)
    ]
    handles.append(
        box((0, 0), 1, 1, facecolor="white", hatch="////", label="the exponentials", **edges)
    )
    one = study.head_dims[0].about
    style.finish(
        fig, ax, "What products and exponentials alone would need",
        f"{one['dtype']}, full, forward, {study.common_length():,} tokens, batch {one['B']}, heads"
        f" times D = {one['E']}. {study.provenance()}",
        ["Solid: time that the matrix products alone would need at the measured ceiling, hatched:"
         " the exponentials. Above 100 %, the two overlap; below, something else takes time too."],
        handles=handles,
    )  # fmt: skip
    return fig


PICTURES = {
    "roofline": draw_roofline,
    "roofline-traffic": draw_traffic,
    "roofline-head-dims": draw_head_dims,
}


def draw(rows, directory):
    """Write every picture that the records allow; returns the paths."""
    study, paths = Study(rows), []
    for name, make in PICTURES.items() if study.backends() else ():
        if (fig := make(study)) is not None:
            paths += style.save(fig, directory, name, *study.digests())
    return paths


def main(argv=None):
    return cli.main(argv, __doc__, "bench/roofline.py", lambda rows, args: draw(rows, args.out))


if __name__ == "__main__":
    sys.exit(main())
