"""The main job: attention over sequence lengths, inside a Transformer block and alone.

    python bench/seqlen.py                          # defaults that suit this machine; resumes
    python bench/seqlen.py --quick                  # a first look
    python bench/seqlen.py --protocol mixed         # how much of the advantage is precision?
    python bench/seqlen.py --backends naive sdpa v1_flash --lengths 512,1024 --direction both

Measures runtime, peak memory and throughput of every backend that this machine can run, prints
tables, draws charts, and ends with the answer in words: from which length the flash backends beat
Naive and SDPA at the same precision, by how much, and what ran out of memory.
"""

import argparse
import contextlib
import functools
import gc
import math
import os
import random
import re
import shlex
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch._functorch.config
from flashstudy import backends
from flashstudy.backends import torch_sdpa
from flashstudy.bench import cells as grid_cells
from flashstudy.bench import common, rounds
from flashstudy.block import Block
from flashstudy.figures import answers, records
from flashstudy.validate import errors
from tabulate import tabulate
from tqdm import tqdm

SMALL_MS = 0.1  # below this the host's launches show: graph and host clocks are measured too
GIB = 2**30
UNITS = {
    "time_ms": "ms", "graph_ms": "ms", "host_ms": "ms", "peak_delta_mib": "MiB",
    "peak_abs_mib": "MiB", "tokens_per_s": "tokens/s", "tflops": "TFLOP/s",
}  # fmt: skip
SHARE = 1 / 4  # of the memory: what a process may keep for the next cell, or take to compile
COMPILE_SHARE = 0.4  # of a budget
CALLS, CELL_SECONDS = 13, 0.2  # of a cell, where a budget has to be kept
FEW_TASKS = 4  # that are compiled where they are needed: starting processes takes seconds
SUMS_DQ = ("v7_hopper_backward",)  # dQ is added up in fp32, in memory
INTERPRETED = "Triton kernels need a CUDA GPU; interpreted ones are never timed beside real ones"


class Cell(NamedTuple):
    backend: str
    scope: str  # block, attention
    direction: str  # forward, backward
    dtype: str
    causal: bool
    B: int
    E: int
    H: int
    H_KV: int
    N: int

    @property
    def head_dim(self):
        return self.E // self.H

    def fields(self, shared):
        """As a record has it, on top of the fields that all records of a run share."""
        own = self._asdict()
        n = own.pop("N")
        own |= {"N_Q": n, "N_K": n, "D": self.head_dim}
        if self.dtype == common.TF32:
            own["float32_matmul"] = "high"
        return shared | own | {"source": common.source(self.backend)}

    def flops(self):
        """Of the two matrix products; causal needs half of them, a backward 2.5 times as many."""
        count = 4 * self.B * self.H * self.N**2 * self.head_dim
        return count * (0.5 if self.causal else 1) * (1 if self.direction == "forward" else 2.5)


class Effort(NamedTuple):
    """How long to measure a cell: rounds that alternate between the backends, each of so many
    seconds and samples."""

    rounds: int
    seconds: float
    least: int
    most: int


EFFORTS = {
    ("cuda", "full"): Effort(2, 0.1, 3, 30),
    ("cuda", "quick"): Effort(1, 0.05, 5, 30),
    ("cpu", "full"): Effort(2, 0.15, 3, 50),
    ("cpu", "quick"): Effort(1, 0.05, 3, 50),
}


class Result:
    """What is known of a cell so far; rows() makes records of it."""

    def __init__(self, status="ok", reason=None):
        self.status, self.reason = status, reason
        self.samples = {"time_ms": []}
        self.rounds = []  # median of each
        self.bytes = {}  # metric -> bytes
        self.kernel = None  # that torch's own SDPA picks here

    def fail(self, status, reason):
        self.status, self.reason = status, reason


class DeadContext(Exception):
    """An error that leaves the CUDA context unusable; what it was is already a record."""


# One cell


def attention_of(backend, precision):
    """The function of a backend, in this precision; torch's own heed common.products."""
    attention = backends.load(backend)
    if precision == common.TF32 and backends.BACKENDS[backend].target.startswith("kernels."):
        return functools.partial(attention, allow_tf32=True)
    return attention


def build(cell, attention, device):
    """A function without arguments that does what the cell measures, and one for its peak memory.

    Backward: the first is the backward alone, of one forward done here; the second is both.
    """
    dtype = common.PRECISIONS[cell.dtype]
    backward = cell.direction == "backward"
    where = {"device": device, "dtype": dtype}
    if cell.scope == "block":
        model = Block(
            cell.E, cell.H, attention, kv_heads=cell.H_KV, causal=cell.causal, **where
        ).requires_grad_(backward)
        x = torch.randn(cell.B, cell.N, cell.E, **where, requires_grad=backward)
        inputs = [x, *model.parameters()]
        forward = functools.partial(model, x)
    else:
        shapes = [(cell.B, h, cell.N, cell.head_dim) for h in (cell.H, cell.H_KV, cell.H_KV)]
        inputs = [torch.randn(s, **where, requires_grad=backward) for s in shapes]
        forward = functools.partial(attention, *inputs, causal=cell.causal)
    if not backward:
        return forward, forward
    torch._functorch.config.donated_buffer = False  # a compiled graph is run backward repeatedly
    out = forward()
    gradient = torch.randn_like(out)
    return (
        lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True),
        lambda: torch.autograd.grad(forward(), inputs, gradient),
    )


class Ideal(torch.autograd.Function):
    """The allocations of a flash kernel; computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v, sums_dq):
        o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.sums_dq = sums_dq
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, _, lse = ctx.saved_tensors
        held = [torch.empty_like(lse)]  # delta lives until the gradients are written
        if ctx.sums_dq:  # which take lse along, in base 2
            held += [torch.empty_like(lse), torch.empty_like(q, dtype=torch.float32)]
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


@functools.cache
def predict(cell, kernel=None):
    """Delta peak bytes as (predicted, floor), None where unknown, by a run without memory.

    predicted: of an implementation written in torch operations alone, allocation by allocation.
    floor: of one whose scores stay on chip and that stores its output and log-sum-exp: the line
    that a flash backend should lie on. Backward: of forward and backward, with delta and the
    gradients, and the fp32 sums of dQ of those of our steps that have them; others hold more.
    """

    def ideal(q, k, v, *, causal=False, scale=None):
        return Ideal.apply(q, k, v, cell.backend in SUMS_DQ)

    row = backends.BACKENDS[cell.backend]
    standard = row.family == "standard" or kernel == "math"
    if standard and row.cpu != "native":
        return None, None
    attention = ideal
    if standard:
        attention = backends.load("sdpa-math" if kernel == "math" else cell.backend)
    try:
        with torch.set_grad_enabled(cell.direction == "backward"):
            _, whole = build(cell, attention, torch.device("meta"))
            whole()  # masks are cached on the first call, as they are before a measured one
            with common.LiveBytes() as counted:
                whole()
    except RuntimeError as e:  # an operation that this torch cannot trace; the measurement goes on
        tqdm.write(f"no memory prediction for {cell.backend}, N = {cell.N}: {first_line(e)}")
        return None, None
    return (counted.peak, None) if standard else (None, counted.peak)


def has_tf32(device):
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def reason_not(backend, device, dtype, backward):
    """Why a backend is not timed here, or None."""
    row = backends.BACKENDS[backend]
    kernel = row.target.startswith("kernels.")
    if kernel and (device.type == "cpu" or os.environ.get("TRITON_INTERPRET") == "1"):
        return INTERPRETED
    if dtype == common.TF32 and not has_tf32(device):
        return "TF32 needs a CUDA GPU of compute capability 8.0 or newer"
    return backends.why_not(backend, device, common.PRECISIONS[dtype], backward)


def first_line(error):
    text = " ".join(str(error).split()) or "no message"
    sentences = re.split(r"(?<=[a-zB])\. ", text)
    # "CUDA out of memory. Tried to allocate 128 GiB. GPU 0 has a total capacity of 140 GiB …"
    kept = 3 if isinstance(error, torch.OutOfMemoryError) else 1
    return f"{type(error).__name__}: {'. '.join(sentences[:kept])[:240]}"


@contextlib.contextmanager
def outcome_into(result, device):
    """A cell's exception becomes its status; only Ctrl-C and a dead CUDA context go on."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as e:
        result.fail("oom", first_line(e))
    except Exception as e:
        # torch's CPU allocator and some CUDA libraries raise a plain RuntimeError.
        out = re.search(r"out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC", str(e))
        result.fail("oom" if out else "failed", first_line(e))
    if result.status in ("oom", "failed") and device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as e:
            result.fail("failed", first_line(e))
            raise DeadContext(result.reason) from None
        gc.collect()
        torch.cuda.empty_cache()


def tuning_bytes(cell):
    """Bytes that the first call of compiled naive attention takes, at least; 0 of others.

    Its softmax overwrites the scores, and torch times kernels that overwrite on a copy.
    """
    if cell.backend != "naive-compiled":
        return 0
    return 2 * cell.B * cell.H * cell.N**2 * common.PRECISIONS[cell.dtype].itemsize


def make_room(cell, device):
    """Have torch make that copy on the GPU, by having held as much there once.

    Else it goes to page-locked memory of the host: 16 s for 32 GiB of scores (2026-11-27).
    """
    if (need := tuning_bytes(cell)) and device.type == "cuda":
        with contextlib.suppress(torch.OutOfMemoryError):  # other processes hold some
            torch.empty(int(1.1 * need), dtype=torch.uint8, device=device)
        torch.cuda.empty_cache()


def to_compile(cells, memory):
    """What other processes can compile for these cells, as tuples of cells for one process each.

    Of what compiles every shape anew, all; of the others the shortest of each sweep and, unless it
    stores scores, the longest: some launch another kernel there. Those that take a good part of the
    `memory` follow each other in one process. What compiles for long comes first.
    """
    once, shapes, large = {}, [], []
    for cell in sorted(cells, key=lambda c: -c.N):
        if not rounds.helped(cell.backend):
            continue
        if cell.backend not in rounds.DISK_CACHED:
            ends = once.setdefault(cell._replace(N=0, scope=""), [])
            stored = backends.BACKENDS[cell.backend].family == "standard"
            ends[0 if stored else 1 :] = [cell]
        elif tuning_bytes(cell) <= SHARE * memory:
            shapes.append((cell,))
        elif tuning_bytes(cell) <= memory:
            large.append(cell)
    return [tuple(task) for task in ([large] if large else []) + [*once.values(), *shapes]]


def first_calls(cells, index, seed):
    """Call each cell once, in a process of its own, for the sake of what that leaves on disk."""
    rounds.compile_alone()
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    for cell in cells:
        torch.manual_seed(seed)
        with (
            contextlib.suppress(torch.OutOfMemoryError),
            torch.set_grad_enabled(cell.direction == "backward"),
            common.products(cell.dtype),
        ):
            _, whole = build(cell, attention_of(cell.backend, cell.dtype), device)
            make_room(cell, device)
            whole()
            del whole
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class Bench:
    """Measures groups of cells that differ in the backend alone, and records them."""

    def __init__(self, device, effort, seed):
        self.device, self.effort, self.seed = device, effort, seed
        self.random = random.Random(seed)
        self.verdicts = {}  # (backend, dtype, direction) -> (status, reason), of those that failed
        self.memory = common.memory_bytes(device)
        self.compiling = None  # the rounds.Precompiler of `precompile`

    def precompile(self, cells):
        """On a GPU, begin to compile in other processes what stays on disk; `wait` for it."""
        tasks = to_compile(cells, self.memory) if self.device.type == "cuda" else []
        if len(tasks) < FEW_TASKS:
            return
        tasks = [(some, self.device.index, self.seed) for some in tasks]
        self.compiling = rounds.Precompiler(tasks, first_calls)
        if found := len(self.compiling.tasks):
            print(f"compiling {found} kernels in other processes …", flush=True)

    def wait(self, seconds=math.inf):
        """Until the other processes are done, or so long; what hangs there is not called here."""
        if self.compiling is None:
            return
        compiling, self.compiling = self.compiling, None
        rounds.compile_alone()  # what is left for this process; others would disturb the clocks
        for (cell, *_), *_ in compiling.wait(seconds=seconds):
            reason = f"at N = {cell.N} it did not return within {rounds.PATIENCE} s"
            self.verdicts[cell.backend, cell.dtype, cell.direction] = "failed", reason

    def verify(self, cells, helped=None):
        """Judge each backend against the fp64 reference at the sweep's smallest length.

        helped: only those for which other processes compile, or only the others.
        """
        n, by_case = min(512, min(c.N for c in cells)), {}
        for c in cells:
            if helped in (None, rounds.helped(c.backend)):
                by_case.setdefault((c.dtype, c.direction), {}).setdefault(c.backend, c)
        for (dtype, direction), some in by_case.items():
            c = next(iter(some.values()))
            b = c.B if c.B * c.H * n * n <= 2**24 else 1
            torch.manual_seed(self.seed)
            shapes = [(b, h, n, c.head_dim) for h in (c.H, c.H_KV, c.H_KV, c.H)]
            tensors = [
                torch.randn(s, dtype=common.PRECISIONS[dtype], device=self.device) for s in shapes
            ]
            if direction == "forward":
                tensors[3] = None
            like = torch.float16 if dtype == common.TF32 else None
            expectation = errors.expect(*tensors, causal=c.causal, like=like)
            for name in (b for b in some if (b, dtype, direction) not in self.verdicts):
                judged = Result()
                try:
                    with outcome_into(judged, self.device), common.products(dtype):
                        attention = attention_of(name, dtype)
                        got = errors.run(attention, *tensors, causal=c.causal)
                        verdict = errors.verdict(got, expectation)
                        reasons = f"at N = {n}: {'; '.join(verdict.reasons)}"
                        if not verdict.over <= common.GROSS:
                            judged.fail("wrong", reasons)
                        elif not verdict.ok:
                            print(f"  {records.label(name)} is over the error budget {reasons}")
                finally:
                    if judged.status != "ok":
                        status = "wrong" if judged.status == "wrong" else "failed"
                        reason = f"at its check, {judged.reason}"
                        self.verdicts[name, dtype, direction] = status, reason

    def _ready(self, cell):
        """The cell's functions on fresh data and, in the block, a fresh model."""
        if self.device.type == "cuda" and torch.cuda.memory_reserved() > SHARE * self.memory:
            gc.collect()  # what the cell before left behind may not fill the memory
            torch.cuda.empty_cache()
        torch.manual_seed(self.seed)
        return build(cell, attention_of(cell.backend, cell.dtype), self.device)

    def prepare(self, cell, result):
        """Compile, warm up, measure memory."""
        if self.device.type == "cpu":  # Linux would not refuse the memory, but kill the process
            need = sum(filter(None, predict(cell)))
            if need > 0.9 * (free := common.available_bytes()):
                text = f"needs {need / GIB:.1f} GiB of {free / GIB:.1f} GiB available; not tried"
                result.fail("oom", text)
                return
        elif (need := tuning_bytes(cell)) > self.memory:  # nor the host's memory locked for it
            text = "needs {:.0f} GiB of {:.0f} GiB, its scores twice to time kernels on; not tried"
            result.fail("oom", text.format(need / GIB, self.memory / GIB))
            return
        with torch.set_grad_enabled(cell.direction == "backward"):
            fn, whole = self._ready(cell)
            if cell.backend == "sdpa":
                result.kernel = picked(cell, self.device)
            make_room(cell, self.device)
            fn()
            if whole is not fn:
                del fn  # and with it the graph of its forward
                whole()
            delta, absolute = common.peak(whole, self.device)
            result.bytes = {"peak_delta_mib": delta, "peak_abs_mib": absolute}

    def visit(self, cell, result):
        """One round of time samples."""
        e = self.effort
        with torch.set_grad_enabled(cell.direction == "backward"):
            fn, _ = self._ready(cell)
            times = common.samples(fn, self.device, e.seconds, e.least, e.most)
        result.samples["time_ms"] += times
        result.rounds.append(common.summary(times)["p50"])

    def small_clocks(self, cell, result):
        """Graph and host clocks of a cell in which the host's launches show."""
        times = result.samples["time_ms"]
        if self.device.type == "cpu" or common.summary(times)["p50"] > SMALL_MS:
            return
        if cell.direction == "backward":  # autograd's own threads do not capture reliably
            return
        with torch.no_grad():
            fn, _ = self._ready(cell)
            result.samples["host_ms"] = common.host_samples(fn)
            try:
                result.samples["graph_ms"] = common.graph_samples(fn)
            except Exception as e:  # a backend that cannot be captured still has its other clocks
                result.samples["graph_ms"] = first_line(e)

    def group(self, cells, step):
        """Measure cells that are to be compared; yields (cell, Result) when all are done.

        step(cell, what) is told what is in hand. The rounds alternate: A B C, C A B, …
        """
        gc.collect()
        gc.freeze()  # compilers leave a million objects: the collections before each cell skip them
        results = {
            c: Result(*self.verdicts.get((c.backend, c.dtype, c.direction), ("ok", None)))
            for c in cells
        }

        def each(what, work):
            for c in self.random.sample(cells, len(cells)):
                step(c, what)
                if results[c].status == "ok":
                    with outcome_into(results[c], self.device), common.products(c.dtype):
                        work(c, results[c])

        try:
            each("memory", self.prepare)
            for i in range(self.effort.rounds):
                each(f"time {i + 1}/{self.effort.rounds}", self.visit)
            each("clocks", self.small_clocks)
        except DeadContext:
            # Only the culprit is recorded; the others are measured by a fresh process.
            yield from [(c, r) for c, r in results.items() if r.status == "failed"]
            raise
        yield from results.items()


def picked(cell, device):
    """The kernel that torch's own SDPA picks for such tensors."""
    shapes = [(cell.B, h, cell.N, cell.head_dim) for h in (cell.H, cell.H_KV, cell.H_KV)]
    tensors = [torch.empty(s, dtype=common.PRECISIONS[cell.dtype], device=device) for s in shapes]
    grad = cell.direction == "backward"
    return torch_sdpa.picked(*(t.requires_grad_(grad) for t in tensors), causal=cell.causal)


def rows(cell, result, shared):
    """The records of a measured cell, that of its time last: it says that the cell is complete."""
    base = {"study": "seqlen"} | cell.fields(shared) | {"sdpa_kernel": result.kernel}
    base["utc"] = common.utc()
    predicted, floor = predict(cell, result.kernel)
    if result.status == "oom":
        predicted = predicted or tuning_bytes(cell) or None
    base["predicted_mib"] = None if predicted is None else predicted / common.MIB
    base["floor_mib"] = None if floor is None else floor / common.MIB

    def row(metric, numbers=None, status="ok", reason=None):
        none = dict.fromkeys(("value", "p50", "p20", "p80")) | {"samples": 0}
        found = {"metric": metric, "unit": UNITS[metric], "status": status, "reason": reason}
        return base | found | (none if numbers is None else numbers)

    if result.status != "ok":
        return [row("time_ms", None, result.status, result.reason)]
    made = [
        row(metric, common.summary([value / common.MIB]))
        for metric, value in result.bytes.items()
        if value is not None
    ]
    for metric in ("host_ms", "graph_ms"):
        found = result.samples.get(metric)
        if isinstance(found, str):
            made.append(row(metric, None, "failed", found))
        elif found:
            made.append(row(metric, common.summary(found)))
    times = common.summary(result.samples["time_ms"])
    amount, metric = cell.flops() / 1e9, "tflops"  # over ms
    if cell.scope == "block":
        amount, metric = cell.B * cell.N * 1e3, "tokens_per_s"
    rate = {
        new: amount / times[old] for new, old in (("p50", "p50"), ("p20", "p80"), ("p80", "p20"))
    }
    made.append(row(metric, {"value": rate["p50"], **rate, "samples": times["samples"]}))
    return [*made, row("time_ms", times | {"rounds": result.rounds})]


# The sweep


def defaults(device, quick):
    """Sizes that this device finishes in a minute or two (CPU) or five (GPU)."""
    memory = common.memory_bytes(device)
    if device.type == "cpu":
        sizes = {"batch": 1, "embed": 512, "heads": 8, "longest": 4096, "dtype": "float32"}
    else:
        half = torch.cuda.get_device_capability(device) >= (8, 0)
        sizes = {"batch": 4, "embed": 1024, "heads": 16, "longest": 8192}
        sizes["dtype"] = "bfloat16" if half else "float16"
        if memory > 20 * GIB:
            sizes |= {"longest": 16384}
        if memory > 60 * GIB:
            sizes |= {"embed": 2048, "longest": 32768}
    lengths = [2**i for i in range(7, sizes.pop("longest").bit_length())]
    sizes["lengths"] = lengths[::2][:3] if quick else lengths
    return sizes


def plan(args):
    """Every cell of the sweep, grouped into what is to be compared, in a fixed random order.

    Whole groups in random order: an interrupted sweep leaves complete columns from short to long,
    a drifting machine does not look like a trend, and the time that is left can be estimated.
    """
    scopes = ("block", "attention") if args.scope == "both" else (args.scope,)
    directions = ("forward", "backward") if args.direction == "both" else (args.direction,)
    only = {name: lengths for name, lengths, _ in args.limit}
    groups = []
    for n in args.lengths:
        for scope in scopes:
            for direction in directions:
                group = [
                    Cell(
                        name, scope, direction, dtype, args.causal, args.batch, args.embed,
                        args.heads, args.kv_heads, n,
                    )
                    for name in args.backends
                    if n in only.get(name, (n,))
                    for dtype in precisions(name, args)
                ]  # fmt: skip
                groups.append(group)
    random.Random(args.seed).shuffle(groups)
    return groups


def precisions(backend, args):
    """Mixed, as in the public study: fp32 except for flash; and what is between, to split it."""
    if args.protocol == "matched" or backends.BACKENDS[backend].family == "flash":
        return [args.dtype]
    return ["float32", *[common.TF32] * has_tf32(args.device), args.dtype]


def pending(groups, done, shared, device):
    """The groups without the cells that are recorded; what was unsupported may now be possible."""

    def finished(cell):
        found = done.get(records.key(cell.fields(shared)))
        if found is None or found["time_ms"]["status"] != "unsupported":
            return found is not None
        return reason_against(cell, device) is not None

    left = ([c for c in group if not finished(c)] for group in groups)
    return [group for group in left if group]


def reason_against(cell, device):
    """Why a cell is not timed here, or None."""
    return reason_not(cell.backend, device, cell.dtype, cell.direction == "backward")


def takes(group, memory):
    """Seconds that cells of one length need at least, roughly: for calls that take long."""

    def calls(cell):
        if max(tuning_bytes(cell), predict(cell)[0] or 0) > memory:
            return 0.0
        stored = backends.BACKENDS[cell.backend].family == "standard"
        wide = common.PRECISIONS[cell.dtype] == torch.float32
        return CALLS * cell.flops() / (40e12 if stored or wide else 400e12)

    return sum(calls(c) + CELL_SECONDS for c in group)


def sweep(args, store, shared):
    """Measure what is not recorded yet. Returns how many cells that was."""
    groups = plan(args)
    todo = pending(groups, records.gather(store.rows), shared, args.device)
    total = sum(len(g) for g in groups)
    recorded = total - sum(len(g) for g in todo)
    absent = {c: r for g in todo for c in g if (r := reason_against(c, args.device)) is not None}
    todo = [left for g in todo if (left := [c for c in g if c not in absent])]
    left = sum(len(g) for g in todo)
    cannot = f"{len(absent)} cannot run here, " if absent else ""
    print(f"{total} cells, {recorded} recorded already, {cannot}{left} to measure; in {args.out}")
    store.append(
        [r for c, why in absent.items() for r in rows(c, Result("unsupported", why), shared)]
    )
    if not left:
        return 0

    start = time.monotonic()
    bench = Bench(args.device, EFFORTS[args.device.type, shared["effort"]], args.seed)
    before = {"study": "seqlen", "metric": "machine", "when": "before"} | shared
    store.append([before | {"utc": common.utc()} | common.gpu_state(args.device)])
    cells = [c for group in todo for c in group]
    bench.precompile(cells)
    print("checking the backends against the fp64 reference …", flush=True)
    try:
        bench.verify(cells, helped=False)  # meanwhile
        bench.wait(max(0.0, start + COMPILE_SHARE * (args.end - start) - time.monotonic()))
        bench.verify(cells, helped=True)
    except DeadContext:
        for c in cells:
            if judged := bench.verdicts.get((c.backend, c.dtype, c.direction)):
                store.append(rows(c, Result(*judged), shared))
        raise
    finally:
        bench.wait(0.0)
    for (name, dtype, direction), (status, reason) in bench.verdicts.items():
        print(f"  {records.label(name)} ({direction}, {dtype}): {status}: {reason}")

    steps = 2 + bench.effort.rounds
    bar = tqdm(
        total=left * steps, unit="step", disable=args.no_progress, dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10, smoothing=0.02,
    )  # fmt: skip
    with bar:

        def step(cell, what):
            bar.set_description(
                f"{records.label(cell.backend)} {cell.scope} N={cell.N} {what}", refresh=False
            )
            bar.update()

        late = []
        for group in todo:
            if time.monotonic() + takes(group, bench.memory) > args.end:
                late.append(group)
                continue
            for cell, result in bench.group(group, step):
                store.append(rows(cell, result, shared))
            if args.device.type == "cuda":
                torch.cuda.empty_cache()
    after = before | {"when": "after", "utc": common.utc()}
    store.append([after | common.gpu_state(args.device)])
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    for group in late:
        where = "the block" if group[0].scope == "block" else "attention alone"
        print(f"--budget left no time for {where} at {group[0].N}, {group[0].direction}")
    left -= sum(map(len, late))
    print(f"measured {left} cells in {minutes} min {seconds} s")
    return left


# What is shown


METRICS = {
    "time_ms": ("runtime", True),
    "peak_delta_mib": ("memory", True),
    "tokens_per_s": ("throughput", False),
    "tflops": ("tflops", False),
}


def reports(one):
    """A sweep through triton.testing.perf_report: a Benchmark per metric over measured cells."""
    from flashstudy.figures import style
    from triton.testing import Benchmark, perf_report

    rate = "tokens_per_s" if one.scope == "block" else "tflops"
    shown = one.backends("ok", "oom", "failed", "wrong")
    benchmarks = [
        Benchmark(
            x_names=["N"],
            x_vals=one.lengths,
            line_arg="backend",
            line_vals=shown,
            line_names=[records.label(b) for b in shown],
            styles=[(style.look(b).color, style.look(b).dash) for b in shown],
            xlabel="sequence length (tokens)",
            ylabel=records.scale(one, metric)[1],
            x_log=True,
            y_log=log,
            plot_name=f"{one.scope}-{one.direction}-{one.dtype}-{name}",
            args={"metric": metric},
        )
        for metric, (name, log) in METRICS.items()
        if metric in ("time_ms", "peak_delta_mib", rate)
    ]

    @perf_report(benchmarks)
    def report(N, backend, metric):
        row, scale = one.at(backend, N, metric), records.scale(one, metric)[0]
        return [row[p] * scale for p in ("p50", "p20", "p80")] if row else [math.nan] * 3

    return report, benchmarks, shown


def number(value):
    """Four significant digits at most, thousands separated."""
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.1 else f"{value:.2g}"


def print_tables(one, charts):
    """Print a sweep's tables; perf_report's own charts and CSVs go to `charts` unless None."""
    import matplotlib.pyplot as plt
    from flashstudy.figures import style

    report, benchmarks, shown = reports(one)
    if not shown:
        return
    if charts is not None:
        charts.mkdir(parents=True, exist_ok=True)
    plt.close("all")
    frames = report.run(save_path=str(charts) if charts is not None else "", return_df=True)
    if charts is not None:  # its figures are still open: give their axes readable labels
        for figure, bench in zip(map(plt.figure, plt.get_fignums()), benchmarks, strict=True):
            figure.set_size_inches(9, 5)
            style.length_axis(figure.gca(), one.lengths)
            figure.gca().legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1))
            figure.savefig(charts / f"{bench.plot_name}.png", bbox_inches="tight")
    plt.close("all")
    for bench, frame in zip(benchmarks, frames, strict=True):
        metric = bench.args["metric"]
        if frame.iloc[:, 1:].isna().all(axis=None):
            continue
        table = []
        for i, name in enumerate(shown):
            values = frame.iloc[:, 1 + i]
            marks = [one.status(name, n) or "–" for n in one.lengths]
            cells = [
                number(v) if v == v else {"ok": "–"}.get(mark, mark)
                for v, mark in zip(values, marks, strict=True)
            ]
            table.append([records.label(name), *cells])
        what = {
            "time_ms": "Runtime",
            "peak_delta_mib": "Peak memory that a call adds",
            "tokens_per_s": "Throughput",
            "tflops": "Throughput",
        }[metric]
        what += f", {bench.ylabel}"
        where = "block" if one.scope == "block" else "attention alone"
        if metric == "peak_delta_mib" and one.direction == "backward":
            what += " (forward and backward)"
        print(f"\n{what}: {where}, {one.title()}")
        print(
            tabulate(
                table, ["N", *one.lengths], tablefmt="simple", disable_numparse=True,
                colalign=["left"] + ["right"] * len(one.lengths),
            )
        )  # fmt: skip


def show(found, charts):
    """Tables, charts and, last, the answer in words, for the sweeps of this run."""
    for one in found:
        print_tables(one, charts / "perf_report" if charts is not None else None)
    for one in found:
        header, table = answers.crossover_table(one)
        if table:
            where = "block" if one.scope == "block" else "attention alone"
            print(f"\nCrossovers: {where}, {one.title()}")
            print(tabulate(table, header, tablefmt="simple", disable_numparse=True))
    lines = [(s, slope) for s in found if s.scope == "block" for slope in answers.slopes(s)]
    if lines:
        print("\nBlock memory, bytes per token: fitted line against what must be held")
        table = [
            [
                records.label(x.backend),
                s.direction,
                s.dtype,
                f"{x.fitted:,.0f}",
                "–" if x.analytic is None else f"{x.analytic:,.0f}",
                f"{x.worst:.1%}",
            ]
            for s, x in lines
        ]
        print(
            tabulate(
                table, ["backend", "direction", "dtype", "fitted", "analytic", "worst misfit"],
                tablefmt="simple", disable_numparse=True,
            )
        )  # fmt: skip
    if charts is not None:
        from flashstudy.figures import mixed, seqlen

        made = seqlen.draw(found, charts) + mixed.draw(found, charts)
        print(f"\nCharts, drawn from the records: {len(made)} files in {charts}/")
        for path in (p for p in made if p.suffix == ".png"):
            print(f"  {path.name}")
        print(f"triton.testing.perf_report's own charts and CSVs: {charts}/perf_report/")
    for pair in answers.pairs(found):
        header, table = answers.mixed_table(pair)
        if table:
            where = "block" if pair.wide.scope == "block" else "attention alone"
            print(
                f"\nMixed precision, speed-up = precision × algorithm: {where}, {pair.half.title()}"
            )
            print(tabulate(table, header, tablefmt="simple", disable_numparse=True))
    print()
    for one in found:
        print(" ".join(answers.words(one)) + "\n")
    for pair in answers.pairs(found):
        said = answers.mixed_words(pair)
        if said:
            where = "Inside the block" if pair.wide.scope == "block" else "Attention alone"
            print(f"{where}, {pair.wide.direction}, with mixed precision. " + " ".join(said) + "\n")


def arguments(argv):
    """(arguments, parser)."""
    parser = argparse.ArgumentParser(
        prog="seqlen.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""
How it measures. Each backend is first checked against an fp64 reference at the smallest length.
Then, per length and scope, every backend's memory is measured on one call of a fresh model, and
its time in rounds that alternate between the backends: device events with the L2 cache flushed on
a GPU, which idles before a short call until the host has launched it; torch.utils.benchmark on a
CPU; median, 20th and 80th percentile. Calls shorter than 0.1 ms are also timed as CUDA graph
replays and by the host's clock, since a program that makes them one by one waits for launches.
Peak memory is what a call adds to its inputs and parameters. Backward is timed alone; its memory is
that of forward and backward. FLOPs: 4·B·H·N²·D, half of it when causal, 2.5 times it backward.

How it resumes. Every cell is appended to the record file when it is done, so the same command goes
on where an interrupted one stopped and measures nothing twice. A cell is the same one when its
sizes, dtype and scope are, and the GPU, the versions of CUDA, cuDNN, torch, Triton and flash-attn,
torch's precision of fp32 products, the sources of the backend and of this program, and --quick or
not. A run out of memory is a result like any other; to measure again, name another --out.

Exit codes: 0 done (out of memory and unsupported included), 1 some cell failed or was wrong,
2 bad arguments, 130 interrupted.""",
    )
    add = parser.add_argument
    add("--backends", nargs="+", metavar="NAME", default=list(backends.BACKENDS),
        help=f"which (default: all of {', '.join(backends.BACKENDS)})")  # fmt: skip
    add("--lengths", nargs="+", type=common.positives, metavar="N",
        help="sequence lengths (default: powers of two from 128 to 4096 on a CPU, to 8192, 16384 or"
             " 32768 on a GPU, by its memory)")  # fmt: skip
    add("--limit", type=grid_cells.limit, action="append", default=[], metavar="NAME=N,…",
        help="this backend at these lengths only; may be repeated")  # fmt: skip
    add(
        "--batch",
        type=common.positive,
        metavar="B",
        help="batch size (default: 1 on a CPU, else 4)",
    )
    add("--embed", type=common.positive, metavar="E",
        help="width of the block, H·D (default: 512 on a CPU, 1024 or 2048 on a GPU)")  # fmt: skip
    add("--heads", type=common.positive, metavar="H",
        help="query heads, dividing --embed (default: 8 on a CPU, else 16)")  # fmt: skip
    add("--kv-heads", type=common.positive, metavar="H_KV",
        help="key and value heads, dividing --heads (default: as many)")  # fmt: skip
    add("--causal", action=argparse.BooleanOptionalAction, default=True,
        help="causal attention, as language models run it, or full")  # fmt: skip
    add("--scope", choices=("block", "attention", "both"), default="both",
        help="inside the Transformer block, the attention function alone, or both (the default)",
        )  # fmt: skip
    add("--direction", choices=("forward", "backward", "both"), default="forward",
        help="what to time (default: forward)")  # fmt: skip
    add("--dtype", choices=list(common.PRECISIONS),
        help="precision; tf32: fp32 tensors, torch and our kernels set to multiply them as TF32"
             " (default: float32 on a CPU, bfloat16 on a GPU that has it; under --protocol"
             " mixed the one of the flash backends, default float16)")  # fmt: skip
    add("--protocol", choices=("matched", "mixed"), default="matched",
        help="matched: every backend at one precision. mixed: Naive and SDPA in float32 and flash"
             " in --dtype, as studies often do; and Naive and SDPA as TF32 and in --dtype too,"
             " which splits the speed-up into precision times algorithm")  # fmt: skip
    add("--quick", action="store_true", help="three lengths, few samples: a first look")
    add("--budget", type=common.positive, metavar="SECONDS",
        help="begin no length that would not end within this time, imports included; the next run"
             " goes on from there")  # fmt: skip
    add("--out", type=Path, metavar="FILE",
        help="record file, JSON lines (default: results/seqlen-DEVICE.jsonl or"
             " results/seqlen-mixed-DEVICE.jsonl)")  # fmt: skip
    add("--charts", type=Path, metavar="DIR", help="where charts go (default: beside the records)")
    add("--no-charts", action="store_true", help="tables and the answer only")
    add("--no-progress", action="store_true", help="no progress bar")
    add("--device", type=common.device_argument, default=None,
        help="cpu, cuda or cuda:INDEX (default: cuda where there is one)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the data and of the order (default: 0)")
    args = parser.parse_args(argv)

    args.end = common.ends(args.budget, argv)
    if args.device is None:
        args.device = common.default_device()
    args.backends = [name for text in args.backends for name in text.split(",") if name]
    for name in args.backends:
        if name not in backends.BACKENDS:
            have = ", ".join(backends.BACKENDS)
            parser.error(f"argument --backends: no backend {name!r}; there are {have}")
    args.backends = [name for name in backends.BACKENDS if name in args.backends]
    if not args.backends:
        parser.error("argument --backends: expected at least one name")
    fallback = defaults(args.device, args.quick)
    if args.protocol == "mixed":
        fallback["dtype"] = "float16"
    for name, value in fallback.items():
        if getattr(args, name) is None:
            setattr(args, name, [value] if name == "lengths" else value)
    args.lengths = sorted({n for part in args.lengths for n in part})
    if not args.lengths:
        parser.error("argument --lengths: expected at least one length")
    if args.kv_heads is None:
        args.kv_heads = args.heads
    if args.embed % args.heads:
        parser.error(f"argument --heads: {args.heads} does not divide --embed {args.embed}")
    if args.heads % args.kv_heads:
        parser.error(f"argument --kv-heads: {args.kv_heads} does not divide --heads {args.heads}")
    if args.protocol == "mixed" and args.dtype in ("float32", common.TF32):
        parser.error("argument --dtype: --protocol mixed compares a half precision with float32")
    if args.out is None:
        study = "seqlen" + "-mixed" * (args.protocol == "mixed")
        args.out = common.result_file(study, args.device)
    return args, parser


def parse(argv):
    """(arguments, record file)."""
    args, parser = arguments(argv)
    store = common.open_records(args.out, parser)
    if args.charts is None:
        args.charts = args.out.with_name(args.out.stem + "-charts" * (not args.out.suffix))
    return args, store


def compilations(argv):
    """What other processes can compile for these arguments: [(function, its arguments …)]."""
    args, _ = arguments(argv)
    cells = [c for g in plan(args) for c in g if reason_against(c, args.device) is None]
    tasks = to_compile(cells, common.memory_bytes(args.device))
    return [(first_calls, some, args.device.index, args.seed) for some in tasks]


def main(argv=None):
    args, store = parse(argv)
    with contextlib.closing(store):
        if args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        shared = common.environment(args.device) | {
            "protocol": args.protocol,
            "seed": args.seed,
            "effort": "quick" if args.quick else "full",
            "command": grid_cells.command("seqlen", sys.argv[1:] if argv is None else argv),
        }
        print(f"{shared['device']}, {shared['memory_mib'] / 1024:.0f} GiB; torch {shared['torch']}")
        absent = {}  # (reason, what) -> backends
        for name in args.backends:
            for direction in ("forward", "backward"):
                if args.direction not in (direction, "both"):
                    continue
                for dtype in precisions(name, args):
                    reason = reason_not(name, args.device, dtype, direction == "backward")
                    if reason:
                        absent.setdefault((reason, f"{direction}, {dtype}"), []).append(name)
        for (reason, what), names in absent.items():
            print(f"  not run ({what}): {', '.join(map(records.label, names))}: {reason}")
        again = shlex.join(["python", *sys.argv])
        try:
            sweep(args, store, shared)
        except KeyboardInterrupt:
            wanted = {records.key(c.fields(shared)) for g in plan(args) for c in g}
            kept = len(wanted & records.gather(store.rows).keys())
            print(f"\ninterrupted: {kept} of {len(wanted)} cells are in {args.out};", end=" ")
            print(f"the same command goes on from there:\n  {again}", flush=True)
            return 130
        except DeadContext as e:
            print(
                f"\n{e}\nthat error ended the CUDA context; going on in a fresh process", flush=True
            )
            store.close()
            os.execv(sys.executable, sys.orig_argv)

        wanted = {records.key(c.fields(shared)) for g in plan(args) for c in g}
        mine = [r for r in store.rows if "backend" in r and records.key(r) in wanted]
        show(records.sweeps(mine), None if args.no_charts else args.charts)
        statuses = {m["time_ms"]["status"] for m in records.gather(mine).values()}
        return 1 if statuses & {"failed", "wrong"} else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # outside of the sweep: nothing is lost, nothing was being measured
        sys.exit(130)
