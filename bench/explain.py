"""What will attention cost for a shape, and why? Predicted from formulas; nothing is run.

    python bench/explain.py --length 4096                     # this machine's GPU, or an H200
    python bench/explain.py --length 8192 --batch 1 --heads 32 --kv-heads 8 --head-dim 64 --gpu h200
    python bench/explain.py --length 2048 --measure           # predicted beside measured (GPU)
    python bench/explain.py --check figures/reference/seqlen.jsonl figures/reference/mixed.jsonl

For naive attention and for one flash kernel: operations, bytes, memory, time, each with the formula
it came from; what binds; which wins and by how much; and where naive runs out of memory.
"""

import argparse
import math
import statistics
import sys
import textwrap
from typing import NamedTuple

import torch
from flashstudy import backends
from flashstudy.bench import common, seqlen
from flashstudy.figures import answers, records
from tabulate import tabulate

# The GPUs


class Gpu(NamedTuple):
    """Ceilings of a GPU, in operations or bytes a second, and where each number comes from."""

    name: str  # as torch.cuda.get_device_name() says it
    sms: int
    hz: float  # clock under load
    half: float  # matrix products in fp16 and bf16, FLOP/s
    single: float  # matrix products in fp32 without TF32, FLOP/s
    copy: float  # bytes read and written by a copy in device memory
    exps_per_clock: int  # of one SM's special function units
    memory_mib: int
    sources: str

    @property
    def exps(self):
        """Exponentials a second."""
        return self.exps_per_clock * self.sms * self.hz

    def products(self, dtype):
        """FLOP/s that a good matrix product reaches."""
        return self.single * FP32_REACH if dtype == "float32" else self.half


GPUS = {
    "h200": Gpu(
        "NVIDIA H200", 132, 1.9e9, 745e12, 67e12, 4.26e12, 16, 143156,
        "measured on an H200 on 2026-11-22: matrix product in bf16 (8192³: 708 to 781 TFLOP/s over"
        " five runs, 745 taken), copy 4.26 TB/s, memory 143,156 MiB, clock 1.9 GHz (1.92 at the end"
        " of a sweep); datasheet: 132 SMs, fp32 67 TFLOP/s; CUDA's guide: 16 exponentials a clock"
        " and SM",
    ),
}  # fmt: skip

# What the ceilings do not tell: fitted to figures/reference/*.jsonl (H200, forward, causal,
# batch 4, 16 heads of 128), but for the two of the backward.

FP32_REACH = 0.72  # of the datasheet's fp32: SDPA's efficient kernel reaches it at 32,768
# Share of the copy rate that naive's passes over S and P see, by bytes an element and what passes.
# Matrix products nearly reach it; torch's softmax and masking move single elements, not whole cache
# lines, and two bytes cost them nearly as much time as four. Products and softmax as measured by
# bench/roofline.py (full mask, its counters), the mask as what the records of causal calls leave.
PASS_SHARES = {
    2: {"products": 0.9, "softmax": 0.45, "mask": 0.3},
    4: dict.fromkeys(("products", "softmax", "mask"), 0.83),
}
LAUNCH_US = 2.5  # a kernel on the GPU: start, first loads, drain
EVENT_US = 4.0  # that an event around an eager call sees more than a graph's replay
TILE = 128  # queries and keys of a flash tile; an SM works at one tile of queries at a time
TILE_US = 1.3  # per tile of queries: load Q, wait for the first K, write O
# What a flash kernel's softmax (scale, maximum, exponential, sum, conversion) adds to the matrix
# products because it does not run beside them; in units of the time of its exponentials alone.
# hopper: dedicated load warps, two consumers; portable: one kind of warp; legacy: the products of
# older GPUs, a quarter of this GPU's rate.
EXPOSED = {"hopper": 0.6, "portable": 2.0, "legacy": 8.0}
# The backward of a tile also needs dP - delta, dS and a second conversion; and around its main
# kernel, one clears fp32 sums of dQ and reads O and dO (2 + 2 passes over a tensor like q), another
# turns the sums into dQ (2 + 1). From an earlier run of the ladder, not from the records.
BACKWARD_SOFTMAX = 3.5
BACKWARD_PASSES = 7
# Host µs of one eager call: host_ms of figures/reference/seqlen.jsonl at N = 128, not fitted.
HOST_US = {
    "sdpa": 20, "sdpa-efficient": 34, "sdpa-flash": 38, "sdpa-cudnn": 41, "flex": 75,
    "flash-attn": 62, "flash-attn-4": 103, "v1_flash": 46, "v2_lean": 49, "v3_tma": 51,
    "v4_warp_specialized": 63, "v5_pingpong": 63, "v6_persistent": 71,
}  # fmt: skip
HOST_UNKNOWN_US = 50  # of a backend that is not among them
HOST_OP_US = 13  # of one torch operation: naive's four take 64 alone, its eight in the block ~100
HOST_BLOCK_US = 100  # of the block around attention
# Of memory_mib that tensors may fill: 133,400 MiB ran in the records, 135,500 did not.
USABLE = 0.94

KINDS = {
    "sdpa-efficient": "legacy", "sdpa-cudnn": "hopper", "flash-attn-4": "hopper",
    "v4_warp_specialized": "hopper", "v5_pingpong": "hopper", "v6_persistent": "hopper",
    "v7_hopper_backward": "hopper",
}  # fmt: skip
SORTS = {
    "hopper": "loads, products and softmax overlap",
    "portable": "one kind of warp does all in turn",
    "legacy": "matrix instructions of older GPUs",
}
PROMISE = {"winner": 0.95, "time": 0.25, "memory": 0.05}
METRICS = {  # of records -> what people read
    "time_ms": "time", "graph_ms": "graph replay", "host_ms": "host, back to back",
    "peak_delta_mib": "memory",
}  # fmt: skip
SIZES = {"float16": 2, "bfloat16": 2, "float32": 4}


# The model


class Estimate(NamedTuple):
    """What one call costs. Times in ms; `parts` are times that each resource alone would take."""

    flops: float
    exps: float
    bytes: float  # moved through device memory
    memory: float  # bytes that a call adds at its peak
    parts: dict  # matrix products, exponentials, memory bandwidth, launches
    gpu_ms: float  # as a graph's replay shows it
    host_ms: float  # of one eager call
    time_ms: float  # as bench/seqlen.py times it: events on the GPU, whose idling hides the host
    how: dict  # number -> its formula
    note: str = ""

    @property
    def bound(self):
        """The resource of the GPU that needs longest."""
        return max(self.parts, key=self.parts.get)

    @property
    def waits(self):
        """Whether an eager call waits for the host: the GPU is done before the next launch."""
        return self.host_ms > self.time_ms


def around(cell):
    """(FLOPs, bytes, kernels) of the block around the attention: norm, projections, residual."""
    if cell.scope == "attention":
        return 0, 0, 0
    tokens, share = cell.B * cell.N, cell.H_KV / cell.H
    flops = 2 * tokens * cell.E**2 * (1 + 2 * share) + 2 * tokens * cell.E**2
    tensors = 9 + 2 * share  # norm 2, projections 1 + (1 + 2 H_KV/H) and 2, residual 3
    times = 1 if cell.direction == "forward" else 2
    return times * flops, times * tensors * tokens * cell.E * SIZES[cell.dtype], times * 4


def finish(cell, gpu_ms, host_us):
    """(GPU, host, event) ms."""
    host_ms = (host_us + (HOST_BLOCK_US if cell.scope == "block" else 0)) / 1e3
    if cell.direction == "backward":
        host_ms *= 2
    return gpu_ms, host_ms, gpu_ms + EVENT_US / 1e3


def naive(cell, gpu):
    """Estimate of backends/naive.py: every kernel after the other, each at its own ceiling."""
    size, d, forward = SIZES[cell.dtype], cell.head_dim, cell.direction == "forward"
    scores = cell.B * cell.H * cell.N**2
    # S written, P read; softmax read and written; mask read and written.
    # Backward: P read for dV, dP written, dS read for dQ and dK; softmax 2 read 1 written; mask.
    by_kind = {
        "products": 2 if forward else 4, "softmax": 2 if forward else 3, "mask": 2 * cell.causal
    }  # fmt: skip
    passes = sum(by_kind.values())
    slowed = sum(n / PASS_SHARES[size][what] for what, n in by_kind.items())
    kernels = (3 if forward else 5) + cell.causal
    flops, how_flops = 4 * scores * d, "4·B·H·N²·D"  # the masked half is computed too
    if not forward:
        flops, how_flops = 2 * flops, "8·B·H·N²·D: four products"
    tensors = cell.B * cell.N * d * (2 * cell.H + 2 * cell.H_KV) * size * (1 if forward else 2)
    if cell.H_KV < cell.H:  # shared heads are copied out
        tensors += 2 * cell.B * cell.N * d * (cell.H + cell.H_KV) * size
        kernels += 2
    if cell.scope == "block":  # q, k and v out of the fused projection, o into the next one
        tensors += 2 * 4 * cell.B * cell.N * cell.E * size
        kernels += 4
    more_flops, more_bytes, more_kernels = around(cell)
    parts = {
        "matrix products": (flops + more_flops) / gpu.products(cell.dtype) * 1e3,
        "exponentials": scores / gpu.exps * 1e3 * forward,
        "memory bandwidth": (
            scores * size * slowed + tensors + more_bytes
        ) / gpu.copy * 1e3,
        "launches": (kernels + more_kernels) * LAUNCH_US / 1e3,
    }  # fmt: skip
    gpu_ms = parts["matrix products"] + parts["memory bandwidth"] + parts["launches"]
    return Estimate(
        flops + more_flops, scores * forward, scores * size * passes + tensors + more_bytes,
        naive_bytes(cell), parts, *finish(cell, gpu_ms, kernels * HOST_OP_US),
        {
            "flops": how_flops, "exps": "B·H·N²" if forward else "0: P was kept",
            "bytes": f"{passes} passes over B·H·N² scores of {size} bytes, and q, k, v, o",
            "time": "products + memory + launches: one kernel after the other",
            "memory": "S, P and o (the allocations of backends/naive.py)" if forward
                      else "P, dP, dS and more (the allocations of autograd)",
        },
    )  # fmt: skip


def kind(backend, dtype):
    """hopper, portable or legacy: how a backend's kernel overlaps softmax and products."""
    if backend == "sdpa":
        backend = "sdpa-efficient" if dtype == "float32" else "sdpa-cudnn"
    return KINDS.get(backend, "portable")


def flash(cell, gpu):
    """Estimate of the flash kernel cell.backend: tiles of queries, dealt to the SMs."""
    size, d, forward = SIZES[cell.dtype], cell.head_dim, cell.direction == "forward"
    tiles = math.ceil(cell.N / TILE)  # of queries, per head
    visits = tiles * (tiles + 1) / 2 if cell.causal else tiles**2  # of keys, per head
    heads = cell.B * cell.H
    per_sm = gpu.products(cell.dtype) / gpu.sms
    products = 4 * TILE**2 * d * (1 if forward else 2.5) / per_sm  # s, of one visit
    exps = TILE**2 / (gpu.exps / gpu.sms)
    exposed = EXPOSED[kind(cell.backend, cell.dtype)] * (1 if forward else BACKWARD_SOFTMAX)
    if cell.dtype == "float32":
        exposed = 0  # products at a tenth of the rate: the softmax is lost beside them
    visit, start = products + exposed * exps, TILE_US * 1e-6 * (1 if forward else 2)
    # No schedule is shorter than the mean load of an SM, nor than the longest tile.
    busiest = max((visits * visit + tiles * start) * heads / gpu.sms, tiles * visit + start)
    moved = cell.B * cell.N * size * d * (2 * cell.H + 2 * cell.H_KV)
    moved = moved * (1 if forward else 2) + heads * cell.N * 4
    more_flops, more_bytes, more_kernels = around(cell)
    kernels = 1 if forward else 3
    others = more_flops / gpu.products(cell.dtype) + more_bytes / gpu.copy
    if not forward:
        extra = BACKWARD_PASSES * cell.B * cell.H * cell.N * d * size
        moved, others = moved + extra, others + extra / gpu.copy
    launches = (kernels + more_kernels) * LAUNCH_US / 1e3
    ideal = visits * heads / gpu.sms
    parts = {
        "matrix products": (products * ideal + more_flops / gpu.products(cell.dtype)) * 1e3,
        "exponentials": exps * ideal * 1e3,
        "memory bandwidth": (moved + more_bytes) / gpu.copy * 1e3,
        "launches": launches + start * 1e3,
    }
    gpu_ms = max(busiest, moved / gpu.copy) * 1e3 + others * 1e3 + launches
    work = heads * visits * TILE**2
    many = heads * tiles
    note = f"{many:,} tiles of {TILE} queries for {gpu.sms} SMs"
    if many < gpu.sms:
        note += f" ({gpu.sms - many} have nothing to do)"
    note += f"; the exponentials take {exps / products:.0%} of the products' time, and the softmax"
    note += f" around them adds {exposed * exps / products:.0%} to it in a kernel of this kind"
    if cell.dtype == "float32":
        note += " (fp32 products run outside of the matrix units)"
    else:
        note += f" ({SORTS[kind(cell.backend, cell.dtype)]})"
    shape = "n(n+1)/2" if cell.causal else "n²"
    return Estimate(
        4 * work * d * (1 if forward else 2.5) + more_flops, work, moved + more_bytes,
        flash_bytes(cell), parts,
        *finish(cell, gpu_ms, HOST_US.get(cell.backend, HOST_UNKNOWN_US)),
        {
            "flops": f"{'4' if forward else '10'}·{TILE}²·D · B·H·{shape} tiles, n = ⌈N/{TILE}⌉",
            "exps": f"{TILE}² · B·H·{shape} tiles",
            "bytes": "q, k, v, o once, and lse" if forward
                     else f"twice q, k, v, o; lse; {BACKWARD_PASSES} q-sized passes beside",
            "time": f"busiest SM: per tile products + {exposed:.2g} × exponentials,"
                    f" {start * 1e6:.1f} µs a start; launches",
            "memory": "o and 4·B·H·N of lse" if forward
                      else "at least o, lse, delta, dq, dk, dv",
        },
        note,
    )  # fmt: skip


# Memory, from the code's own allocations


def naive_bytes(cell):
    """Bytes that a call adds at its peak: backends/naive.py run on tensors without memory.

    Backward, torch's softmax on a GPU makes the product of P and dP first, out of sight of a run
    without memory: one matrix of scores more.
    """
    held = seqlen.predict(cell._replace(backend="naive"))[0]
    extra = cell.B * cell.H * cell.N**2 * SIZES[cell.dtype]
    return held + (extra if cell.direction == "backward" else 0)


def flash_bytes(cell):
    """Bytes that a call of any flash kernel must add: its output, lse, and gradients."""
    return seqlen.predict(cell._replace(backend="sdpa-flash"))[1]


def resident(cell):
    """Bytes that lie in memory before a call: inputs, parameters and naive's causal mask."""
    size, kv = SIZES[cell.dtype], cell.H_KV / cell.H
    tokens = cell.B * cell.N * cell.E * size
    held = tokens * (1 + 2 * kv)
    if cell.scope == "block":
        held = tokens + cell.E**2 * (2 + 2 * kv) * size
    if cell.direction == "backward":
        held += tokens  # the gradient that arrives
    return held + cell.N**2 * cell.causal


def fits(cell, gpu):
    """Whether naive's call fits the GPU's memory."""
    return naive_bytes(cell) + resident(cell) <= USABLE * gpu.memory_mib * common.MIB


def last_length(cell, gpu):
    """The longest length at which naive still fits; 0 where none does."""
    low, high = 0, 1
    while fits(cell._replace(N=high), gpu):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if fits(cell._replace(N=middle), gpu):
            low = middle
        else:
            high = middle
    return low


# The page


def amount(value, unit):
    """12.3 GFLOP; bytes in GiB."""
    if unit == "B":
        return answers.size(value / common.MIB)
    for prefix, factor in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:,.0f} {unit}"


def ms(value):
    """Milliseconds for people: 7.53 ms, 41 µs, 6.7 s."""
    for unit, factor in (("s", 1e3), ("ms", 1.0)):
        if value >= factor:
            return f"{seqlen.number(value / factor)} {unit}"
    return f"{value * 1e3:.3g} µs"


def titled(cell):
    where = "inside the block" if cell.scope == "block" else "attention alone"
    kv = "" if cell.H_KV == cell.H else f", {cell.H_KV} KV heads"
    return (
        f"{cell.N:,} tokens, batch {cell.B}, {cell.H} heads{kv} of {cell.head_dim},"
        f" {common.short(cell.dtype)}, {'causal' if cell.causal else 'full'}, {cell.direction},"
        f" {where}"
    )


def verdict(cell, gpu, slow, quick):
    """The expected winner in a sentence or two."""
    name = records.label(cell.backend)
    if not fits(cell, gpu):
        return f"{name} wins: naive attention does not fit."
    ratio = slow.time_ms / quick.time_ms
    winner, times = (name, ratio) if ratio >= 1 else ("naive", 1 / ratio)
    said = f"{winner} wins, {times:.2g} times as fast."
    if times < 1 + PROMISE["time"]:
        said = f"Too close to call: {winner} is ahead by {times - 1:.0%}, within the model's error."
    if slow.waits or quick.waits:
        wall = max(slow.host_ms, slow.gpu_ms) / max(quick.host_ms, quick.gpu_ms)
        said += (
            f" That is the GPU's clock. Eager calls wait for the host that launches them: {name}"
        )
        said += f" takes {1 / wall:.2g} times naive's wall time."
    return said


def outside(cell):
    """What of the shape the constants were not fitted on."""
    far = [
        text
        for text, is_far in (
            ("the backward", cell.direction == "backward"),
            ("full attention", not cell.causal),
            (f"head dim {cell.head_dim}", cell.head_dim != 128),
            (f"{cell.H_KV} KV heads", cell.H_KV != cell.H),
            (f"B·H = {cell.B * cell.H}", cell.B * cell.H != 64),
        )
        if is_far
    ]
    return f"Extrapolated, no record backs it: {', '.join(far)}." if far else ""


def page(cell, gpu):
    """The page for a shape, as text."""
    slow, quick = naive(cell, gpu), flash(cell, gpu)
    name = records.label(cell.backend)
    block = " + block's" if cell.scope == "block" else ""

    def row(what, field, unit, how):
        both = [amount(getattr(e, field), unit) for e in (slow, quick)]
        extra = block if how != "exps" else ""
        return [what, *both, slow.how[how] + extra, quick.how[how] + extra]

    shares = ", ".join(
        f"{share:.0%} of it in its {what}"
        for what, share in PASS_SHARES[SIZES[cell.dtype]].items()
        if what != "mask" or cell.causal
    )
    per = {
        "matrix products": f"FLOPs / {gpu.products(cell.dtype) / 1e12:.3g} TFLOP/s",
        "exponentials": f"exponentials / {gpu.exps / 1e12:.2g}·10¹² a second; naive's run beside"
        " its memory traffic",
        "memory bandwidth": f"bytes / {gpu.copy / 1e12:.3g} TB/s; naive reaches {shares}",
        "launches": f"{LAUNCH_US} µs a kernel; flash also {TILE_US} µs for a tile's start",
    }
    counts = [
        row("operations", "flops", "FLOP", "flops"),
        row("exponentials", "exps", "exp", "exps"),
        row("bytes moved", "bytes", "B", "bytes"),
        row("memory added", "memory", "B", "memory"),
    ]
    times = [[p, ms(slow.parts[p]), ms(quick.parts[p]), per[p]] for p in slow.parts]
    times += [
        ["what binds", slow.bound, quick.bound, "the largest of the above"],
        ["GPU time", ms(slow.gpu_ms), ms(quick.gpu_ms),
         f"naive: {slow.how['time']}; flash: {quick.how['time']}"],
        ["host, eager call", ms(slow.host_ms), ms(quick.host_ms),
         f"naive: {HOST_OP_US} µs an operation; flash: measured at N = 128"],
        ["predicted time", ms(slow.time_ms), ms(quick.time_ms),
         f"GPU + {EVENT_US:g} µs: events around a call, the cache flushed before it"],
    ]  # fmt: skip
    if not fits(cell, gpu):
        for line in (times[-3], times[-1]):
            line[1] += " (if it fitted)"
    ceiling = USABLE * gpu.memory_mib * common.MIB
    last = last_length(cell, gpu)
    wide = {"tablefmt": "simple", "disable_numparse": True}
    said = [
        f"{titled(cell)}; {gpu.name}",
        "",
        tabulate(counts, ["", "naive", name, "naive's formula", "flash's formula"], **wide,
                 maxcolwidths=[None, None, None, 34, 34]),
        "",
        tabulate(times, ["time", "naive", name, "how"], **wide,
                 maxcolwidths=[None, None, None, 60]),
        "",
        verdict(cell, gpu, slow, quick),
        f"Naive fits up to {last:,} tokens: inputs, mask and the memory above in"
        f" {answers.size(ceiling / common.MIB)}, {USABLE:.0%} of the GPU's; "
        f"{'S and P grow with N².' if last else 'not even one token fits.'}",
        f"Flash: {quick.note}.",
    ]  # fmt: skip
    if cell.scope == "block":
        said.append(
            "Block's: 4·B·N·E²·(1 + H_KV/H) FLOPs of the two projections, 9 + 2·H_KV/H passes over"
            " B·N·E elements for them, the norm and the residual; naive also copies q, k, v, o"
            + (". Twice of it all backward." if cell.direction == "backward" else ".")
        )
    said += [t for t in (outside(cell), f"Ceilings: {gpu.sources}.") if t]
    lines = [textwrap.fill(t, 110) if "\n" not in t and len(t) > 110 else t for t in said]
    return "\n".join(lines)


# Against measurements


class Compared(NamedTuple):
    cell: seqlen.Cell
    metric: str  # of a record
    predicted: float  # ms, MiB
    measured: float

    @property
    def error(self):
        return abs(self.predicted / self.measured - 1)


def is_flash(row):
    """Whether the scores of a record's backend stayed on chip."""
    if row["backend"] == "sdpa":
        return row.get("sdpa_kernel") not in (None, "math")
    return records.family(row["backend"]) == "flash"


def estimate(cell, gpu):
    return naive(cell, gpu) if cell.backend == "naive" else flash(cell, gpu)


def compare(rows, gpu):
    """(times and memories against predictions, [(flash cell, right?)], [(naive cell, right?)]).

    The last one: whether it was known that the cell does, or does not, fit in memory.
    """
    found, winners, room, status, took = [], [], [], {}, {}
    for metrics in records.gather(rows).values():
        row = metrics["time_ms"]
        if row["status"] not in ("ok", "oom") or row["N_Q"] != row["N_K"]:
            continue
        if row["dtype"] not in SIZES:  # tf32, of whose products the model has no rate
            continue
        if row["backend"] != "naive" and (row["status"] == "oom" or not is_flash(row)):
            continue
        cell = seqlen.Cell(*(row[k] for k in seqlen.Cell._fields[:-1]), row["N_Q"])
        status[cell] = row["status"]
        if cell.backend == "naive":
            room.append((cell, fits(cell, gpu) == (row["status"] == "ok")))
        if row["status"] != "ok":
            continue
        guess = estimate(cell, gpu)
        took[cell] = row["value"]
        guesses = {
            "time_ms": guess.time_ms, "graph_ms": guess.gpu_ms,
            "host_ms": max(guess.host_ms, guess.gpu_ms),  # called back to back
            "peak_delta_mib": guess.memory / common.MIB,
        }  # fmt: skip
        for metric, predicted in guesses.items():
            if metric in metrics and metrics[metric]["status"] == "ok":
                found.append(Compared(cell, metric, predicted, metrics[metric]["value"]))
    for cell in took:
        rival = cell._replace(backend="naive")
        if cell.backend == "naive" or rival not in status:
            continue
        measured = status[rival] == "oom" or took[cell] < took[rival]
        quicker = estimate(cell, gpu).time_ms < estimate(rival, gpu).time_ms
        winners.append((cell, measured, not fits(rival, gpu) or quicker))
    return found, winners, room


def to_check(paths, gpu):
    """What compare() finds in record files; of the GPU that they name unless given."""
    rows = [r for r in records.read(*paths) if r.get("study") == "seqlen" and "backend" in r]
    if gpu is None:
        names = sorted({str(r.get("gpu") or r.get("device")) for r in rows})
        if len(names) != 1:
            raise LookupError(f"expected records of one GPU, found {', '.join(names) or 'none'}")
        gpu = of_device(names[0])
    compared = compare(rows, gpu)
    if not compared[1]:
        raise LookupError("no record pairs naive attention with a flash backend")
    return compared


def accuracy(found, winners, room):
    """(header, table, sentences, {promise: kept?}) of how the predictions did."""
    header = ["clock or memory", "of", "cells", "median error", "worst", "worst at"]
    table, errors = [], {}
    for metric in ("time_ms", "graph_ms", "host_ms", "peak_delta_mib"):
        for who in ("naive", "flash"):
            some = [
                c
                for c in found
                if c.metric == metric and (c.cell.backend == "naive") == (who == "naive")
            ]
            if not some:
                continue
            errors[metric, who] = [c.error for c in some]
            worst = max(some, key=lambda c: c.error)
            table.append([
                METRICS[metric], who, len(some), f"{statistics.median(errors[metric, who]):.1%}",
                f"{worst.error:.1%}", f"{records.label(worst.cell.backend)}, {worst.cell.scope},"
                f" {common.short(worst.cell.dtype)}, N = {worst.cell.N}",
            ])  # fmt: skip
    missed = [c for c, truth, guess in winners if truth != guess]
    always = sum(truth for _, truth, _ in winners) / len(winners)
    winner = 1 - len(missed) / len(winners)
    fitted = sum(right for _, right in room)
    said = [
        f"Winner against naive: {winner:.1%} of {len(winners)} cells right"
        f" (flash every time would be {always:.1%})."
    ]
    if missed:
        texts = [
            f"{records.label(c.backend)}, {c.scope}, {common.short(c.dtype)}, N = {c.N}"
            for c in missed
        ]
        said.append(f"Missed: {'; '.join(texts)}.")
    said.append(f"Naive fits in memory or not: {fitted} of {len(room)} cells right.")
    time = max(statistics.median(e) for (m, _), e in errors.items() if m == "time_ms")
    memory = max((max(e) for (m, _), e in errors.items() if m == "peak_delta_mib"), default=0.0)
    kept = {
        f"winner right in at least {PROMISE['winner']:.0%}": winner >= PROMISE["winner"],
        f"median time error at most {PROMISE['time']:.0%}, naive and flash each":
            time <= PROMISE["time"],
        f"every memory within {PROMISE['memory']:.0%}, out of memory where measured":
            memory <= PROMISE["memory"] and fitted == len(room),
    }  # fmt: skip
    return header, table, said, kept


def check(found, winners, room, markdown=False):
    """Print how the predictions did, on request as Markdown; the exit code."""
    header, table, said, promises = accuracy(found, winners, room)
    form, mark = ("github", "- ") if markdown else ("simple", "")
    print(tabulate(table, header, tablefmt=form, disable_numparse=True) + "\n")
    for text in said:
        print(mark + text)
    for text, kept in promises.items():
        print(f"{mark}{'kept' if kept else 'BROKEN'}: {text}")
    return 0 if all(promises.values()) else 1


def measure(cell, gpu, device):
    """Measure naive and the flash kernel as bench/seqlen.py does; print beside the predictions."""
    cells = [cell._replace(backend="naive"), cell]
    reasons = [r for c in cells if (r := seqlen.reason_against(c, device)) is not None]
    if reasons:
        print(f"{records.label(cell.backend)} cannot be measured here: {reasons[0]}")
        return 2
    bench = seqlen.Bench(device, seqlen.EFFORTS[device.type, "full"], seed=0)
    bench.verify(cells)
    table, bad = [], 0
    for c, result in bench.group(cells, lambda *_: None):
        guess, name = estimate(c, gpu), records.label(c.backend)
        if result.status != "ok":
            bad |= result.status != "oom"
            room = fits(c, gpu) if c.backend == "naive" else True
            expected = "fits" if room else "does not fit"
            table.append([name, "memory", expected, f"{result.status}: {result.reason}", ""])
            continue
        took = common.summary(result.samples["time_ms"])["p50"]
        delta = result.bytes["peak_delta_mib"] / common.MIB
        for what, one, two, show in (
            ("time", guess.time_ms, took, ms),
            ("memory", guess.memory / common.MIB, delta, answers.size),
        ):
            table.append([name, what, show(one), show(two), f"{one / two - 1:+.0%}"])
    print("\nPredicted beside measured")
    print(tabulate(table, ["", "", "predicted", "measured", "off by"], tablefmt="simple",
                   disable_numparse=True))  # fmt: skip
    return int(bad)


# The command line


def of_device(name):
    """The row of a GPU by the name that CUDA gives it, or by its key."""
    for key, gpu in GPUS.items():
        if name.lower() in (key, gpu.name.lower()):
            return gpu
    raise LookupError(
        f"no ceilings for {name!r}, only for {', '.join(GPUS)}; to add it, give GPUS in"
        " bench/explain.py a row: matrix product (python bench/peers.py measures it), copy rate,"
        " SMs, clock, memory, exponentials a clock, and where each is from"
    )


def parse(argv):
    p = argparse.ArgumentParser(
        prog="explain.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""
The constants beyond the GPU's ceilings were fitted to figures/reference/seqlen.jsonl and
mixed.jsonl (NVIDIA H200, 2026-11-22: forward, causal, batch 4, 16 heads of 128, 128 to 32,768
tokens, bf16, fp16 and fp32). So --check on these two files says how well the model fits, not that
it is right elsewhere. Other shapes, full attention and above all the backward are extrapolated, and
the page says so; records of them make --check a proof. Held out from the fit are the forward rates
of cuDNN's kernel in figures/reference/peers.jsonl, D = 128, full and causal. The two constants of
the backward come from an earlier run of the ladder; at head dims above 128 it is too optimistic.

Exit codes: 0 done, 1 --check below its promise or --measure failed, 2 bad arguments or no GPU.""",
    )
    add = p.add_argument
    add("--length", type=common.positive, metavar="N", help="tokens")
    add("--batch", type=common.positive, metavar="B", default=4, help="batch size (default: 4)")
    add("--heads", type=common.positive, metavar="H", default=16, help="heads (default: 16)")
    add("--kv-heads", type=common.positive, metavar="H_KV",
        help="key and value heads, dividing --heads (default: as many)")  # fmt: skip
    width = p.add_mutually_exclusive_group()
    width.add_argument("--head-dim", type=common.positive, metavar="D", help="default: 128")
    width.add_argument("--embed", type=common.positive, metavar="E", help="instead: H·D")
    add("--dtype", choices=list(common.DTYPES), default="bfloat16", help="default: bfloat16")
    add("--causal", action=argparse.BooleanOptionalAction, default=True,
        help="causal attention or full")  # fmt: skip
    add("--direction", choices=("forward", "backward"), default="forward",
        help="default: forward; backward: its time alone, the memory of both")  # fmt: skip
    add("--scope", choices=("attention", "block"), default="attention", help="default: attention")
    flash = [name for name, row in backends.BACKENDS.items() if row.family != "standard"]
    add("--backend", choices=flash, metavar="NAME",
        help=f"the flash kernel: {', '.join(flash)} (default: sdpa-cudnn, in fp32"
             " sdpa-efficient)")  # fmt: skip
    add("--gpu", metavar="NAME",
        help=f"{', '.join(GPUS)} (default: this machine's, without one h200)")  # fmt: skip
    add("--measure", action="store_true", help="measure it too (needs a GPU)")
    add("--check", nargs="+", metavar="FILE", help="compare with the records of bench/seqlen.py")
    add("--markdown", action="store_true", help="with --check: print its table as Markdown")
    args = p.parse_args(argv)
    if (args.length is None) == (args.check is None):
        p.error("expected either --length or --check")
    if args.check and args.measure:
        p.error("argument --measure: goes with --length, not with --check")
    if args.embed is not None and args.embed % args.heads:
        p.error(f"argument --heads: {args.heads} does not divide --embed {args.embed}")
    args.kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    if args.heads % args.kv_heads:
        p.error(f"argument --kv-heads: {args.kv_heads} does not divide --heads {args.heads}")
    if args.embed is None:
        args.embed = args.heads * (128 if args.head_dim is None else args.head_dim)
    if args.length and args.batch * args.heads * args.length**2 >= 2**55:
        p.error("argument --length: no computer's memory could address its scores")
    if args.backend is None:
        args.backend = "sdpa-efficient" if args.dtype == "float32" else "sdpa-cudnn"
    row = backends.BACKENDS[args.backend]
    if common.DTYPES[args.dtype] not in row.dtypes:
        p.error(f"argument --dtype: {args.backend} does not take {args.dtype}")
    if args.direction == "backward" and not row.backward:
        p.error(f"argument --direction: {args.backend} has no backward")
    if args.measure and not torch.cuda.is_available():
        p.error("argument --measure: needs a CUDA GPU, torch sees none")
    try:
        args.ceilings = None
        if args.gpu is not None:
            args.ceilings = of_device(args.gpu)
        elif args.check is None:
            cuda = torch.cuda.is_available()
            args.ceilings = of_device(torch.cuda.get_device_name() if cuda else "h200")
    except LookupError as e:
        p.error(f"argument --gpu: {e}")
    return p, args


def main(argv=None):
    p, args = parse(argv)
    if args.check:
        try:
            compared = to_check(args.check, args.ceilings)
        except (OSError, records.RecordError, LookupError) as e:
            p.error(f"argument --check: {e}")
        return check(*compared, markdown=args.markdown)
    cell = seqlen.Cell(
        args.backend, args.scope, args.direction, args.dtype, args.causal, args.batch, args.embed,
        args.heads, args.kv_heads, args.length,
    )  # fmt: skip
    print(page(cell, args.ceilings))
    if not args.measure:
        return 0
    try:
        return measure(cell, args.ceilings, common.default_device())
    except seqlen.DeadContext as e:
        print(f"the measurement ended the CUDA context: {e}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
