"""How much memory does a call add, up to a million tokens, and where does naive attention end?

    python bench/memory.py                                 # naive to its end, flash to 1M tokens
    python bench/memory.py --backends v1_flash --lengths 1024,1048576 --heads 4
    python bench/memory.py --plan                          # the analytic lines; needs no GPU

Batch 1, 2 heads of 128, causal, bf16: few heads, so that a call over a million tokens (5.6·10¹⁴
FLOPs forward, 3.5 times that with the backward) takes seconds. Each number is the delta peak of one
call: what it adds to the inputs, by the caching allocator's counters. Beside it stands what was
known before:

    naive      its allocations, counted by running it on tensors without memory
    flash      what any such kernel must hold: o and 4·B·H·N bytes of lse; with the backward also
               delta (like lse), dq, dk and dv; and those of our steps that sum dQ in fp32, the sums

Naive's end is predicted from the memory that is free once the process has started: the longest
length whose inputs, causal mask and delta peak fit. Then it is tried, one length on either side:
2 % fewer bytes must run, 2 % more must not.

Each backend has a process of its own. It starts a cell only when it has given back all of what the
last one held, so that no cell can harm the next. Naive is called once before at the same length,
which builds its mask; the others at the shortest length alone. The allocator of these processes
grows one segment page by page (expandable segments), so that gaps between matrices, which no peak
counts and no later matrix fits into, do not bring the end forward.

It ends within --budget seconds, imports included; what does not fit is named and left to the next
run. Records go to results/memory-DEVICE.jsonl as each cell is done; the same command again measures
only what is missing. python figures/memory.py draws them.

Exit codes: 0 done, 1 a cell failed or nothing was measured, 2 bad arguments or no GPU, 130
interrupted.
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from flashstudy import backends
from flashstudy.backends import naive
from flashstudy.bench import cells, common, explain, seqlen
from flashstudy.figures import answers, grid, records
from flashstudy.figures import memory as figure

DEFAULT = ("naive", "sdpa-cudnn", "flash-attn", "v7_hopper_backward")
LENGTHS = tuple(4**i * 1024 for i in range(6))  # to 1,048,576
DIRECTIONS = ("forward", "backward")
METHOD = ("bench/common.py", "bench/seqlen.py", "bench/memory.py")
STEP = 128  # tried lengths are multiples of it
MARGIN = 0.02  # of the bytes that are free: how far on either side of the predicted end is tried
SLACK = 64 * common.MIB  # that a process may hold more after a cell: workspaces of libraries
SLOW = 250e12  # FLOP/s at which a call is expected to run, where time is short
GRACE = 15  # seconds that a process may be late
# Of a backend's process. The first name is that of torch since 2.9, the other that of those before.
ALLOCATOR_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
ALLOCATOR = "expandable_segments:True"


# What is expected


def cell_of(args, backend, direction, n):
    return seqlen.Cell(
        backend, "attention", direction, args.dtype, args.causal, args.batch,
        args.heads * args.head_dim, args.heads, args.heads, n,
    )  # fmt: skip


def stores_scores(backend):
    return backends.BACKENDS[backend].family == "standard"


def expected_bytes(cell):
    """The delta peak that is known without a measurement."""
    if stores_scores(cell.backend):
        return explain.naive_bytes(cell)
    return seqlen.predict(cell)[1]


def end_of(cell, free):
    """The longest length, a multiple of STEP, at which naive and its inputs fit in `free` bytes."""
    gpu = explain.GPUS["h200"]._replace(memory_mib=free / common.MIB / explain.USABLE)
    return explain.last_length(cell, gpu) // STEP * STEP


def tries(cell, free):
    """{"under": length, "over": length}: MARGIN fewer bytes than fit, and MARGIN more."""
    return {
        "under": end_of(cell, free * (1 - MARGIN)),
        "over": end_of(cell, free * (1 + MARGIN)) + STEP,
    }


# The process of a backend


def call_of(cell, device):
    """A function without arguments: one call, forward or forward and backward, on fresh inputs."""
    backward = cell.direction == "backward"
    attention = backends.load(cell.backend)
    where = {"device": device, "dtype": common.DTYPES[cell.dtype]}
    shapes = [(cell.B, h, cell.N, cell.head_dim) for h in (cell.H, cell.H_KV, cell.H_KV)]
    leaves = [torch.randn(s, **where, requires_grad=backward) for s in shapes]
    if not backward:
        return lambda: attention(*leaves, causal=cell.causal)
    gradient = torch.randn(shapes[0], **where)
    return lambda: torch.autograd.grad(attention(*leaves, causal=cell.causal), leaves, gradient)


def measured(cell, device, before=False):
    """(seqlen.Result, seconds) of a cell. before: call it once before it is measured."""
    result, seconds = seqlen.Result(), None
    with (
        seqlen.outcome_into(result, device),
        torch.set_grad_enabled(cell.direction == "backward"),
    ):
        call = call_of(cell, device)
        if before:
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        delta, absolute = common.peak(call, device)
        seconds = time.perf_counter() - start
        result.bytes = {"peak_delta_mib": delta, "peak_abs_mib": absolute}
    return result, seconds


def takes(cell):
    """Seconds that a cell may take."""
    flops = cell.flops() * (1 if cell.direction == "forward" else 3.5 / 2.5)
    return flops * (2 if stores_scores(cell.backend) else 1) / SLOW


def serve(lines, say):
    """What a backend's process does: read a task, warm up, wait for the seconds that it has (a line
    with their number), measure cell by cell.

    lines: iterator of what the parent says; say: sends it a dict. Nothing touches the GPU before
    the task is there: while another backend is measured, the free memory must not change.
    """
    task = json.loads(next(lines))
    device = torch.device(task["device"])
    todo = [(seqlen.Cell(*fields), None) for fields in task["cells"]]
    ends = [seqlen.Cell(*fields) for fields in task["ends"]]
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(task["seed"])
    for direction in DIRECTIONS:  # kernels get compiled, libraries take their workspaces
        same = [c for c in [*(c for c, _ in todo), *ends] if c.direction == direction]
        if same:
            measured(min(same, key=lambda c: c.N), device)
    free, held = free_now(device)
    say({"ready": True})
    stop = float(next(lines)) + time.monotonic()
    for cell in ends:
        tried = tries(cell, free)
        last = tried["under"]
        todo = [(c, r) for c, r in todo if c.direction != cell.direction or last > c.N]
        todo += [(cell._replace(N=n), role) for role, n in tried.items()]
    for cell, role in todo:
        if time.monotonic() + takes(cell) > stop:
            say({"late": cell})
            continue
        left, kept = free_now(device)
        said = {"cell": cell, "role": role, "free": left}
        said["end"] = end_of(cell, free) if role else None
        if kept > held + SLACK:
            reason = f"{(kept - held) / common.MIB:.0f} MiB of the cell before are not free again"
            say(said | {"status": "failed", "reason": reason})
            continue
        try:
            result, seconds = measured(cell, device, stores_scores(cell.backend))
        except seqlen.DeadContext as e:
            say(said | {"status": "failed", "reason": str(e)})
            return
        said |= {"status": result.status, "reason": result.reason, "seconds": seconds}
        say(said | {"bytes": result.bytes})
    say({"done": True})


def free_now(device):
    """(bytes of the GPU that are free, bytes this process holds), having given back what it can."""
    naive._hidden.cache_clear()  # the mask of the last length
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    return torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)


class Worker:
    """The process of a backend, seen from the parent."""

    command = (sys.executable, str(Path(__file__).resolve()), "--serve")

    def __init__(self, task):
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | dict.fromkeys(ALLOCATOR_NAMES, ALLOCATOR),
        )  # fmt: skip
        self.task, self.began = task, False

    def begin(self):
        """Give it its task; it takes its place on the GPU."""
        if not self.began:
            self.began = True
            self._send(json.dumps(self.task))

    def go(self, seconds):
        """Yield what it says of each cell. One that hangs is ended when its time is over."""
        end = time.monotonic() + seconds
        self.begin()
        timer = threading.Timer(seconds + GRACE, self.process.kill)
        timer.start()
        try:
            if self._hear() is not None:
                self._send(str(end - time.monotonic()))
                while (heard := self._hear()) is not None:
                    yield heard
        finally:
            timer.cancel()

    def _send(self, line):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def _hear(self):
        """The next dict it says, None at its end. What else libraries print is passed on."""
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
            print(line, end="", file=sys.stderr)
        return None

    def close(self):
        """Its exit code."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            return self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


# Records


def rows(cell, said, shared):
    """The records of a cell, that of its call's time last: it says that the cell is complete."""
    base = {"study": "memory"} | cell.fields(shared)
    base |= {
        "source": common.source(cell.backend, METHOD), "utc": common.utc(),
        "predicted_mib": expected_bytes(cell) / common.MIB,
        "floor_mib": explain.flash_bytes(cell) / common.MIB, "role": said.get("role"),
        "predicted_end": said.get("end"),
        "free_mib": said["free"] / common.MIB if said.get("free") else None,
    }  # fmt: skip

    def row(metric, unit, value):
        numbers = dict.fromkeys(("value", "p50", "p20", "p80"), value)
        numbers["samples"] = int(value is not None)
        status = {"status": said["status"], "reason": said.get("reason")}
        return base | {"metric": metric, "unit": unit} | status | numbers

    made = []
    if said["status"] == "ok":
        made = [row(m, "MiB", b / common.MIB) for m, b in said["bytes"].items()]
    ok = said["status"] == "ok"
    return [*made, row("time_ms", "ms", said["seconds"] * 1e3 if ok else None)]


def identity(cell, shared):
    """The fields by which a record is that of this cell."""
    return cell.fields(shared) | {"source": common.source(cell.backend, METHOD)}


def task_of(args, backend, rows_before, shared):
    """What is left to measure of a backend: {"cells", "ends", …}; None where nothing is."""
    done, left, ends = records.gather(rows_before), [], []
    for direction in args.directions:
        if seqlen.reason_not(backend, args.device, args.dtype, direction == "backward"):
            continue
        every = [cell_of(args, backend, direction, n) for n in args.lengths]
        if stores_scores(backend):
            about = identity(every[0], shared)
            for k in ("N_Q", "N_K"):
                del about[k]
            tried = {
                row.get("role"): row["N_Q"]
                for row in (m["time_ms"] for m in done.values())
                if all(row.get(k) == about.get(k) for k in (*records.CELL, *records.ENVIRONMENT)
                       if k not in ("N_Q", "N_K"))
            }  # fmt: skip
            if "under" in tried and "over" in tried:
                last = tried["under"]
                every = [c for c in every if last > c.N]
            else:
                ends.append(every[0])
        left += [c for c in every if records.key(identity(c, shared)) not in done]
    if not left and not ends:
        return None
    return {"cells": left, "ends": ends, "device": str(args.device), "seed": args.seed}


# The run


def run(args, store, shared, start=Worker):
    """Measure what is missing, one backend after the other: those that run out of memory first,
    then ours."""
    tasks = {}
    steps = grid.steps()
    for backend in sorted(args.backends, key=lambda b: (not stores_scores(b), b not in steps)):
        for direction in args.directions:
            why = seqlen.reason_not(backend, args.device, args.dtype, direction == "backward")
            if why is not None:
                print(f"  not run: {records.label(backend)}, {direction}: {why}")
        if task := task_of(args, backend, [] if args.again else store.rows, shared):
            tasks[backend] = task
    total = sum(len(t["cells"]) for t in tasks.values())
    print(f"{total} cells of {len(tasks)} backends to measure; in {args.out}", flush=True)
    workers = {backend: start(task) for backend, task in tasks.items()}
    try:
        for backend, worker in workers.items():
            if not stores_scores(backend):  # nobody needs the GPU alone any more: all may warm up
                for other in workers.values():
                    other.begin()
            measure_one(backend, worker, store, shared, max(0.0, args.end - time.monotonic()))
    finally:
        for worker in workers.values():
            worker.close()


def measure_one(backend, worker, store, shared, seconds):
    """Record what a backend's process says; what it left without an answer has failed."""
    waiting, late = [seqlen.Cell(*fields) for fields in worker.task["cells"]], []
    finished = False
    for said in worker.go(seconds):
        if "done" in said:
            finished = True
            continue
        cell = seqlen.Cell(*said.get("cell") or said["late"])
        waiting = [c for c in waiting if c != cell]
        if "late" in said:
            late.append(cell)
            continue
        store.append(rows(cell, said, shared))
        shown = f"{said['status']}: {said['reason']}"
        if said["status"] == "ok":
            delta = said["bytes"]["peak_delta_mib"] / common.MIB
            shown = f"{answers.size(delta)} in {explain.ms(said['seconds'] * 1e3)}"
        what = f"{records.label(backend)}, {direction_words(cell)}, N = {cell.N:,}"
        print(f"  {what}: {shown}", flush=True)
    if late:
        names = ", ".join(f"{c.N:,} ({direction_words(c)})" for c in late)
        print(f"  --budget left no time for {records.label(backend)} at {names}")
    if not finished:
        reason = f"its process ended with exit code {worker.close()}"
        print(f"  {records.label(backend)}: {reason}", flush=True)
        for cell in waiting:
            store.append(rows(cell, {"status": "failed", "reason": reason}, shared))


def direction_words(cell):
    return "forward" if cell.direction == "forward" else "forward and backward"


def lines_table(args, memory_mib):
    """The analytic lines as (header, rows), and a sentence on where naive ends."""
    flash = next((b for b in args.backends if not stores_scores(b)), "sdpa-cudnn")
    lines = []
    for n in args.lengths:
        found = [
            answers.size(expected_bytes(cell_of(args, b, d, n)) / common.MIB)
            for b in ("naive", flash) for d in args.directions
        ]  # fmt: skip
        lines.append([f"{n:,}", *found])
    head = ["N", *(f"{b}, {d}" for b in ("naive", "flash") for d in args.directions)]
    gpu = explain.GPUS["h200"]._replace(memory_mib=memory_mib)
    last = [
        f"{explain.last_length(cell_of(args, 'naive', d, 1), gpu):,} tokens ({d})"
        for d in args.directions
    ]  # fmt: skip
    ends = f"Naive would end at {' and '.join(last)} on a GPU of {answers.size(memory_mib)}."
    return head, lines, ends


def parse(argv):
    p = argparse.ArgumentParser(
        prog="memory.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--backends", nargs="+", type=cells.words(backends.BACKENDS), metavar="NAME",
        default=[DEFAULT], help=f"default: {','.join(DEFAULT)}")  # fmt: skip
    add("--lengths", nargs="+", type=common.positives, metavar="N", default=[LENGTHS],
        help=f"default: {','.join(map(str, LENGTHS))}; naive's go to its end")  # fmt: skip
    add("--direction", choices=[*DIRECTIONS, "both"], default="both",
        help="backward is the memory of forward and backward (default: both)")  # fmt: skip
    add("--batch", type=common.positive, default=1, help="default: %(default)s")
    add("--heads", type=common.positive, default=2, help="default: %(default)s")
    add("--head-dim", type=common.positive, default=128, help="default: %(default)s")
    add("--causal", action=argparse.BooleanOptionalAction, default=True,
        help="causal attention or full (twice the work)")  # fmt: skip
    add("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: bfloat16")
    add("--device", type=common.device_argument, default=None,
        help="cpu, cuda or cuda:INDEX (default: cuda where there is one)")  # fmt: skip
    add("--budget", type=common.positive, default=58, metavar="SECONDS",
        help="end within this time (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the data (default: 0)")
    add("--out", type=Path, metavar="FILE",
        help="record file, JSON lines (default: results/memory-DEVICE.jsonl)")  # fmt: skip
    add("--again", action="store_true", help="measure anew what the record file holds")
    add("--plan", action="store_true", help="print the analytic lines, measure nothing")
    add("--serve", action="store_true", help=argparse.SUPPRESS)  # a backend's process
    args = p.parse_args(argv)
    args.end = common.ends(args.budget, argv)
    if args.serve:
        return p, args
    args.backends = [
        n for n in backends.BACKENDS if n in {w for part in args.backends for w in part}
    ]
    args.lengths = sorted({n for part in args.lengths for n in part})
    for name in ("backends", "lengths"):
        if not getattr(args, name):
            p.error(f"argument --{name}: expected at least one")
    args.directions = DIRECTIONS if args.direction == "both" else (args.direction,)
    args.device = common.default_device() if args.device is None else args.device
    return p, args


def main(argv=None, start=Worker):
    p, args = parse(argv)
    if args.serve:
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes elsewhere than what the parent reads
        serve(iter(sys.stdin), lambda said: print(json.dumps(said), file=out, flush=True))
        return 0
    if args.plan or args.device.type == "cpu":
        gpu = explain.GPUS["h200"]
        head, lines, ends = lines_table(
            args, gpu.memory_mib if args.device.type == "cpu"
            else common.memory_bytes(args.device) / common.MIB,
        )  # fmt: skip
        cell = cell_of(args, "naive", "forward", 1)
        print(f"Bytes that a call adds at its peak, {explain.titled(cell).split(', ', 1)[1]}")
        print(cells.text(head, lines, 1))
        print(ends)
        if args.plan:
            return 0
        print("peak memory of a GPU is what this program measures, and torch sees none here")
        return 2
    if args.out is None:
        args.out = common.result_file("memory", args.device)
    shared = common.environment(args.device) | {"seed": args.seed, "effort": "one call"}
    shared |= {"run": common.utc(), "command": cells.command("memory", sys.argv[1:])}
    with contextlib.closing(common.open_records(args.out, p)) as store:
        stopped = cells.guarded(lambda: run(args, store, shared, start))
    if stopped is not None:
        return stopped
    found = figure.Study(store.rows)
    head, lines = found.table()
    print(cells.text(head, lines, 2))
    for text in found.words():
        print("\n" + text)
    mine = [r for r in store.rows if r.get("run") == shared["run"] and r["metric"] == "time_ms"]
    return int(any(r["status"] == "failed" for r in mine))


if __name__ == "__main__":
    sys.exit(main())
