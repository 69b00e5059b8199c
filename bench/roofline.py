"""Why are they as fast as they are? Counted work against measured traffic and measured ceilings.

    python bench/roofline.py                               # all of it
    python bench/roofline.py --backends naive v6_persistent --lengths 512,4096
    python bench/roofline.py --no-counters                 # without ncu
    python bench/roofline.py --plan                        # what would be measured; needs no GPU

Three things are measured in one run and laid over each other:

    ceilings   what this GPU reaches: a matrix product, a copy in device memory, a copy in the L2
               cache, exponentials in registers; the best of several turns counts
    times      of every call: device events with the L2 cache flushed before it; short calls also as
               a CUDA graph's replay and by the host's clock
    counters   of one more call each, by ncu (Nsight Compute) where it is installed and may read
               them: bytes through device memory and L2; of some, exponentials issued and use of the
               matrix units. Each call starts with none of its tensors in L2; within it, one kernel
               finds there what the one before left. What still lies there at its end is missing.

FLOPs, exponentials and bytes are counted by the formulas of bench/explain.py. Forward, batch 4 and
16 heads of 128, bf16: every length with the full mask, some also causal, one also at other head
dims (hidden size the same).

It ends within --budget seconds, imports included; what does not fit is left to the next run.
Records go to results/roofline-DEVICE.jsonl as each cell is done; the same command again measures
only what is missing. Five paragraphs that explain them stand at the end. python figures/roofline.py
draws them.

Exit codes: 0 done, 1 a kernel of ours failed or was wrong or nothing was measured, 2 bad arguments
or no GPU, 130 interrupted.
"""

import argparse
import concurrent.futures
import contextlib
import csv
import io
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from flashstudy.backends import BACKENDS, load
from flashstudy.bench import cells, common, explain, ladder, rounds, seqlen
from flashstudy.figures import grid, records
from flashstudy.figures import roofline as figure
from tqdm import tqdm

DEFAULT = (
    "naive", "sdpa-cudnn", "flash-attn", "v0_naive", "v1_flash", "v3_tma", "v6_persistent",
)  # fmt: skip
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Where the scores of 64 heads outgrow the L2 caches of today: for those that store scores.
BETWEEN = (384, 640, 768)
CAUSAL_LENGTHS = (512, 2048, 8192, 16384)
HEAD_DIM, HEAD_DIMS, HEAD_DIMS_AT = 128, (64, 256), 8192
SMALL_MS = seqlen.SMALL_MS


class Counter(NamedTuple):
    """A number that ncu reads: `names` of which the first that this ncu knows is taken."""

    metric: str  # of our record
    unit: str
    names: tuple  # (ncu's metric, factor to our unit)
    mean: bool = False  # over a call's kernels: mean weighted with their times; else their sum


TIME = Counter("ncu_ms", "ms", (("gpu__time_duration.sum", 1e-6),))
# Groups so small that one pass reads them: kernels need not be run again, over what the first run
# left in L2.
TRAFFIC = (
    TIME,
    Counter("dram_read_bytes", "B", (("dram__bytes_read.sum", 1),)),
    Counter("dram_write_bytes", "B", (("dram__bytes_write.sum", 1),)),
    Counter(
        "l2_bytes", "B",
        (("lts__t_sectors_srcnode_gpc.sum", 32), ("lts__t_sectors_srcunit_tex.sum", 32),
         ("lts__t_bytes.sum", 1)),
    ),
)  # fmt: skip
UNITS = (
    TIME,
    Counter("xu_threads", "thread instructions", (("sm__inst_executed_pipe_xu.sum", 32),)),
    Counter(
        "tensor_share", "% of the cycles",
        (("sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed", 1),), mean=True,
    ),
)  # fmt: skip
LARGE = 2**34  # bytes of scores from which a call is not run under ncu
TIMES_SHARE = 0.6  # of the budget for ceilings and times, where counters follow
LEAST_SECONDS = 12  # in which ncu can count anything
MARK = "spin_kernel"  # torch.cuda._sleep's: stands before each call among the profiled kernels


# Ceilings


@triton.jit
def _exponential_kernel(x_ptr, STEPS, BLOCK: tl.constexpr):
    """x ← 2^-x, STEPS times in registers; BLOCK independent chains a program."""
    x_ptrs = x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptrs)
    for _ in range(STEPS):
        # The instruction itself: exp2 would add two that handle denormals.
        x = tl.inline_asm_elementwise(
            "{.reg .f32 t; neg.f32 t, $1; ex2.approx.ftz.f32 $0, t;}", "=f,f", [x], tl.float32,
            is_pure=True, pack=1,
        )  # fmt: skip
    tl.store(x_ptrs, x)


@triton.jit
def _l2_copy_kernel(x_ptr, y_ptr, STEPS, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Each program copies STEPS of BLOCKS blocks from x to y; .cg goes past L1, to L2."""
    block = tl.program_id(0)
    for _ in range(STEPS):
        offs = block % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offs, cache_modifier=".cg")
        tl.store(y_ptr + offs, x, cache_modifier=".cg")
        block += tl.num_programs(0) + 1  # another block than its neighbour had


class Ceiling(NamedTuple):
    call: object
    amount: float  # of work in a call
    unit: str


def ceiling_calls(dtype, device, seed, sms):
    """{name: Ceiling}."""
    generator = torch.Generator(device).manual_seed(seed)
    source = torch.randn(2**27, generator=generator, device=device)  # 512 MiB, ten times an L2
    target = torch.empty_like(source)
    steps, block, programs = 1024, 2048, 16 * sms
    x = source[: programs * block].clone()
    # 8 MiB read and 8 MiB written, again and again.
    l2_steps, l2_block, l2_blocks, l2_programs = 64, 4096, 512, 8 * sms

    def l2():
        _l2_copy_kernel[(l2_programs,)](
            source, target, l2_steps, l2_blocks, l2_block, num_warps=8
        )  # fmt: skip

    def exp():
        _exponential_kernel[(programs,)](x, steps, block, num_warps=4)

    product = rounds.matmul_closure(dtype, device, seed)
    return {
        "matmul": Ceiling(product, rounds.MATMUL_FLOPS, "FLOP/s"),
        "copy": Ceiling(lambda: target.copy_(source), 2 * source.nbytes, "B/s"),
        "l2": Ceiling(l2, 2 * l2_programs * l2_steps * l2_block * 4, "B/s"),
        "exp": Ceiling(exp, programs * block * steps, "exp/s"),
    }


def measure_ceilings(calls, timer, turns=5, seconds=0.03):
    """{ceiling: summary of its rates, and `best`, the median of its best turn}; they take turns.

    Best: for some turns the clocks are down, from the power that the call before drew.
    """
    times = {name: [] for name in calls}
    for name in [*calls] * (turns + 1):  # the first turn warms up
        call = calls[name].call
        cost, _ = timer.once(call)
        count = max(3, min(rounds.MOST_CALLS, int(seconds / (cost + timer.flush_s))))
        times[name].append(timer.turn(call, count, 0))
    found = {}
    for name, of_turn in times.items():
        rates = [[calls[name].amount / (t * 1e-3) for t in turn] for turn in of_turn[1:]]
        found[name] = common.summary([*itertools.chain(*rates)])
        found[name]["best"] = max(map(statistics.median, rates))
    return found


# Counted work


def counted(cell, name, dtype):
    """FLOPs, exponentials and bytes of a call, by bench/explain.py; of any GPU, so of one it knows.

    Of what stores its scores, all is Naive's, but for v0_naive's: it masks on the way, and its
    softmax reads every row twice.
    """
    stores = BACKENDS[name].family == "standard"
    causal = cell.causal and (not stores or name == "naive")
    found = explain.estimate(
        seqlen.Cell(
            "naive" if stores else name, "attention", cell.direction, dtype, causal, cell.batch,
            cell.heads * cell.head_dim, cell.heads, cell.heads, cell.length,
        ),
        explain.GPUS["h200"],
    )  # fmt: skip
    size = explain.SIZES[dtype]
    scores = cell.batch * cell.heads * cell.length**2 * size if stores else 0
    again = scores if name == "v0_naive" else 0
    return {
        "counted_flops": found.flops, "counted_exps": found.exps,
        "counted_bytes": found.bytes + again, "scores_bytes": scores,
    }  # fmt: skip


# Counters


def ncu_knows():
    """Names of the metrics that ncu has for this GPU, without their suffixes. Raises NoCounters."""
    if shutil.which("ncu") is None:
        raise NoCounters("ncu (Nsight Compute) is not installed")
    try:
        listed = subprocess.run(
            ["ncu", "--query-metrics"], capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError) as e:
        raise NoCounters(f"ncu lists no metrics: {e}") from None
    return set(re.findall(r"^\s*\"?(\w+__\w+)", listed.stdout, re.MULTILINE))


def choose(known, counters):
    """({Counter: (ncu's metric, factor)}, [Counter] of which ncu has none)."""
    chosen = {}
    for counter in counters:
        for name, factor in counter.names:
            if name.split(".")[0] in known:
                chosen[counter] = name, factor
                break
    return chosen, [c for c in counters if c not in chosen]


def ncu_command(ncu, log, metrics, tasks):
    return [
        ncu, "--csv", "--page", "raw", "--print-units", "base", "--print-kernel-base", "function",
        # The GPU's clocks stay as they are; what a kernel left in L2, the next one finds there.
        "--clock-control", "none", "--cache-control", "none",
        "--profile-from-start", "off", "--target-processes", "application-only",
        "--log-file", str(log), "--metrics", ",".join(metrics),
        sys.executable, str(Path(__file__).resolve()), "--profile", str(tasks),
    ]  # fmt: skip


def parse_ncu(text):
    """([{column: text}] of the profiled kernels in order, the most passes that one took or None).

    ncu's messages (==PROF== …) surround a table: names, then units, then a line for each kernel.
    More than one pass means that kernels were run again over what an earlier pass left in L2.
    """
    passes = [int(n) for n in re.findall(r"- (\d+) pass(?:es)?\b", text)]
    most = max(passes, default=None)
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return [], most
    table = itertools.takewhile(lambda line: line.startswith('"'), lines[start:])
    names, _, *kernels = csv.reader(io.StringIO("\n".join(table)))
    return [dict(zip(names, k, strict=True)) for k in kernels], most


def split_calls(kernels):
    """The kernels of each call: those between two marks."""
    calls = []
    for kernel in kernels:
        if MARK in kernel["Kernel Name"]:
            calls.append([])
        elif not calls:
            raise ValueError(f"kernel {kernel['Kernel Name']!r} stands before the first mark")
        else:
            calls[-1].append(kernel)
    return calls


def number(text):
    """A value of ncu's table; None where it says n/a."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def add_up(call, chosen):
    """{Counter: (value of the call, [[kernel, value]])} of those that every kernel has."""
    read = {
        c: [None if (v := number(k.get(name, ""))) is None else v * factor for k in call]
        for c, (name, factor) in chosen.items()
    }
    times = next((v for c, v in read.items() if c.metric == "ncu_ms"), [None])
    found = {}
    for counter, values in read.items():
        if None in values or not values or (counter.mean and None in times):
            continue
        total = sum(values)
        if counter.mean:
            total = sum(v * t for v, t in zip(values, times, strict=True)) / sum(times)
        named = [[k["Kernel Name"], v] for k, v in zip(call, values, strict=True)]
        found[counter] = total, named
    return found


def profiled(path):
    """What ncu watches: each task's call once, a mark before it. `path`: what `count` wrote."""
    given = json.loads(Path(path).read_text())
    dtype, other = common.DTYPES[given["dtype"]], torch.empty(common.FLUSH_BYTES // 4).cuda()
    for name, *fields in cells.progress(given["tasks"], desc="counting", unit="call"):
        cell = grid.Cell(*fields)
        try:
            profile_one(name, cell, dtype, given["seed"], other)
        except Exception as e:
            print(f"{name}, {cell}, under ncu: {rounds.failure(e)[1]}", file=sys.stderr)
        torch.cuda.empty_cache()
    return 0


@torch.no_grad()
def profile_one(name, cell, dtype, seed, other):
    """Profile one call between two that are not; `other` takes its tensors' place in L2."""
    call = rounds.closure(load(name), cell, *rounds.inputs(cell, dtype, "cuda", seed))
    call()
    other.sum()  # by reading: nothing in L2 waits to be written then
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        torch.cuda._sleep(1)
        call()
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()


def run_within(command, seconds):
    """(exit code, standard output) of a command; it and its children are killed when time is up.

    Raises subprocess.TimeoutExpired then.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        out, _ = process.communicate(timeout=seconds)
    finally:
        if process.returncode is None:  # out of time, or Ctrl-C: nothing may go on using the GPU
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return process.returncode, out


def count(tasks, counters, known, dtype, seed, seconds):
    """([(task, {Counter: (value, kernels)})], passes, what to tell people), within `seconds`.

    tasks: (backend, *cell). Raises NoCounters.
    """
    chosen, absent = choose(known, counters)
    said = [
        f"ncu has no {c.metric} for this GPU ({', '.join(n for n, _ in c.names)})" for c in absent
    ]
    with tempfile.TemporaryDirectory() as folder:
        given, log = Path(folder) / "tasks.json", Path(folder) / "log.csv"
        given.write_text(json.dumps({"dtype": dtype, "seed": seed, "tasks": tasks}))
        metrics = [name for name, _ in chosen.values()]
        try:
            code, out = run_within(ncu_command("ncu", log, metrics, given), seconds)
        except subprocess.TimeoutExpired:
            raise NoCounters(f"ncu did not end within {seconds:.0f} s") from None
        text = log.read_text() if log.exists() else ""
    kernels, passes = parse_ncu(f"{out}\n{text}")
    calls = split_calls(kernels)
    if len(calls) < len(tasks):
        errors = re.findall(r"==ERROR==\s*(.*)", text + out)
        why = errors[-1] if errors else f"exit code {code}"
        if len(calls) < 2:
            raise NoCounters(f"ncu profiled {len(calls)} of {len(tasks)} calls: {why}")
        said.append(f"ncu profiled {len(calls)} of {len(tasks)} calls: {why}")
        calls.pop()  # it may have been cut off
    if passes is not None and passes > 1:
        said.append(f"ncu needed {passes} passes a kernel: traffic includes what replaying leaves")
    found = [(t, add_up(c, chosen)) for t, c in zip(tasks, calls, strict=False)]
    return found, passes, said


class NoCounters(Exception):
    """Why there are no counters here."""


# Records


def chip(device):
    """What of a GPU the explanation needs besides rates."""
    if device.type != "cuda":
        return {"sms": None, "l2_cache_bytes": None}
    found = torch.cuda.get_device_properties(device)
    return {"sms": found.multi_processor_count, "l2_cache_bytes": found.L2_cache_size}


def ceiling_rows(rates, calls, about, of_chip):
    """A record for each ceiling; they have no backend."""
    return [
        about | of_chip | {"metric": "ceiling", "ceiling": name, "unit": calls[name].unit}
        | {"status": "ok"} | rate
        for name, rate in rates.items()
    ]  # fmt: skip


def counter_rows(cell, name, dtype, about, found):
    made = []
    for counter, (value, kernels) in found.items():
        it = rounds.Contender(name, turns=[[value]])
        row = cells.row(cell, it, dtype, about, counter.metric)
        made.append(row | {"unit": counter.unit, "kernels": kernels})
    return made


# The run


def plan_of(args):
    """{cell: backends}; the sweep over lengths first."""
    flash = [n for n in args.backends if BACKENDS[n].family != "standard"]
    stores = [n for n in args.backends if n not in flash]
    between = BETWEEN if args.lengths == list(LENGTHS) else ()

    def cell(n, d=HEAD_DIM, causal=False):
        return grid.Cell("forward", d, causal, n, args.batch, args.hidden // d)

    plan = {cell(n): args.backends for n in args.lengths}
    plan |= {cell(n): stores for n in between}
    plan |= {cell(n, causal=True): flash for n in CAUSAL_LENGTHS if n in args.lengths}
    plan |= {cell(HEAD_DIMS_AT, d): flash for d in HEAD_DIMS if HEAD_DIMS_AT in args.lengths}
    return {c: names for c, names in plan.items() if names}


def clocks(session, cell, field):
    """Graph and host clocks of calls so short that launches show: {metric: [Contender]}."""
    short = [
        it for it in field
        if it.status == "ok" and common.summary([*itertools.chain(*it.turns)])["p50"] <= SMALL_MS
    ]  # fmt: skip
    made = {metric: [replace(it, turns=[]) for it in short] for metric in ("graph_ms", "host_ms")}
    given = session.inputs(cell)
    with torch.no_grad():
        for metric, clock in (("graph_ms", common.graph_samples), ("host_ms", common.host_samples)):

            def turn(it, clock=clock):
                with contextlib.ExitStack() as stack:
                    it.turns.append(clock(ladder.small_call(it.name, cell, given, stack)))

            for it in made[metric]:
                session.attempt(it, lambda it=it, turn=turn: turn(it))
    return made


def measure(args, plan, timer, file, provenance):
    """Ceilings, times and counters that the record file lacks. Raises DeviceLost."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    known = pool.submit(ncu_knows) if args.counters else None  # seconds, beside the set-up
    pool.shutdown(wait=False)
    rest = cells.missing(args, plan, file, provenance)
    if rest:
        left = args.end - time.monotonic()
        share = TIMES_SHARE if args.counters else 1.0
        measure_times(args, rest, timer, file, provenance, args.end - (1 - share) * left)
    if args.counters:
        count_missing(args, plan, file, provenance, known, args.end)


def measure_times(args, plan, timer, file, provenance, end):
    """Ceilings, then the cells of `plan`."""
    dtype, of_chip = common.DTYPES[args.dtype], chip(provenance.device)
    calls = ceiling_calls(dtype, timer.device, args.seed, of_chip["sms"])
    rates = measure_ceilings(calls, timer)
    file.append(ceiling_rows(rates, calls, provenance.stamp(), of_chip))
    del calls  # and their gigabytes
    session = rounds.Session(
        plan, timer, dtype, seconds=end - time.monotonic(), slot=args.slot_ms / 1e3,
        rounds=args.rounds, seed=args.seed, report=tqdm.write,
    )  # fmt: skip

    def write(cell, field):
        stamp = provenance.stamp()
        made = [
            cells.row(cell, it, dtype, stamp, metric)
            for metric, some in clocks(session, cell, field).items() for it in some
        ]  # fmt: skip
        made += [
            cells.row(cell, it, dtype, stamp) | counted(cell, it.name, args.dtype) for it in field
        ]
        file.append(made)

    not_set_up, not_measured = session.run(write, cells.progress)
    for name, cell in not_set_up:
        print(f"--budget left no time to set up {name}, {cell}")
    if not_measured:
        print(f"--budget left no time for {'; '.join(map(str, not_measured))}")


def batches(plan):
    """[(tasks, counters)]: what one run of ncu counts, the more telling first.

    Traffic of the full mask at the usual head dim; the units at every head dim.
    """
    traffic, units = [], []
    for cell, names in plan.items():
        for name in names:
            if cell.causal:
                continue
            if cell.head_dim == HEAD_DIM:
                traffic.append((name, *cell))
            if cell.length == HEAD_DIMS_AT and BACKENDS[name].family != "standard":
                units.append((name, *cell))
    found = [(traffic, TRAFFIC), (units, UNITS)]
    return [(tasks, counters) for tasks, counters in found if tasks]


def uncounted(tasks, counters, args, about, rows):
    """Those of the tasks that were timed and have none of these counters on record."""
    have = records.gather([r for r in rows if r.get("study") == "roofline"])
    left, metrics = [], {c.metric for c in counters if c is not TIME}
    for name, *fields in tasks:
        unmeasured = rounds.Contender(name, turns=[[0.0]])
        row = cells.row(grid.Cell(*fields), unmeasured, common.DTYPES[args.dtype], about)
        found = have.get(records.key(row), {})
        timed = found.get("time_ms", {})
        if timed.get("status") != "ok" or timed["scores_bytes"] >= LARGE:
            continue
        if args.again or not metrics & found.keys():
            left.append((name, *fields))
    return left


def count_missing(args, plan, file, provenance, known, end):
    """Counters of the timed calls that have none on record."""
    todo = [
        (left, counters) for tasks, counters in batches(plan)
        if (left := uncounted(tasks, counters, args, provenance.about, file.rows))
    ]  # fmt: skip
    if todo and provenance.device.type == "cuda":
        torch.cuda.empty_cache()  # the memory is the other process' now
    for tasks, counters in todo:
        seconds = end - time.monotonic()
        if seconds < LEAST_SECONDS:
            print(f"--budget left no time to count {len(tasks)} calls")
            continue
        print(f"ncu watches {len(tasks)} calls", flush=True)
        stamp = provenance.stamp()
        try:
            names = known.result()
            found, passes, said = count(tasks, counters, names, args.dtype, args.seed, seconds)
        except NoCounters as e:
            print(f"no counters: {e}")
            row = {"metric": "counters", "status": "unsupported", "reason": str(e)}
            file.append([stamp | row])
            return
        for line in said:
            print(line)
        stamp |= {"ncu_passes": passes}
        for (name, *fields), values in found:
            cell = grid.Cell(*fields)
            if not values:
                print(f"no counters of {name}, {cell}")
            own = {c: v for c, v in values.items() if c is not TIME or counters is TRAFFIC}
            file.append(counter_rows(cell, name, common.DTYPES[args.dtype], stamp, own))


def parser():
    p = argparse.ArgumentParser(
        prog="roofline.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = p.add_argument
    add("--backends", nargs="+", type=cells.words(BACKENDS), metavar="NAME", default=[DEFAULT],
        help=f"default: {','.join(DEFAULT)}")  # fmt: skip
    add("--lengths", nargs="+", type=common.positives, metavar="N", default=[LENGTHS],
        help=f"default: {','.join(map(str, LENGTHS))}, and"
             f" {','.join(map(str, BETWEEN))} for what stores its scores")  # fmt: skip
    add("--batch", type=common.positive, default=4, help="default: %(default)s")
    add("--hidden", type=common.positive, default=2048,
        help="heads are HIDDEN / D (default: %(default)s)")  # fmt: skip
    add("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: bfloat16")
    add("--counters", action=argparse.BooleanOptionalAction, default=True,
        help="read hardware counters with ncu where it is installed (the default)")  # fmt: skip
    add("--budget", type=common.positive, default=75, metavar="SECONDS",
        help="end within this time (default: %(default)s)")  # fmt: skip
    add("--slot-ms", type=common.positive, default=25, metavar="MS",
        help="longest turn of a backend (default: %(default)s)")  # fmt: skip
    add("--rounds", type=common.positive, default=3,
        help="turns that each backend has in a cell (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the data and of the order (default: 0)")
    add("--out", type=Path, metavar="FILE",
        help="record file, JSON lines (default: results/roofline-DEVICE.jsonl)")  # fmt: skip
    add("--again", action="store_true", help="measure anew what the record file holds")
    add("--plan", action="store_true", help="say what would be measured; needs no GPU")
    add("--profile", metavar="FILE", help=argparse.SUPPRESS)  # this program under ncu
    return p


def parse(p, argv):
    args = p.parse_args(argv)
    args.end = common.ends(args.budget, argv)
    args.backends = [n for n in BACKENDS if n in {w for part in args.backends for w in part}]
    args.lengths = sorted({n for part in args.lengths for n in part})
    for name in ("backends", "lengths"):
        if not getattr(args, name):
            p.error(f"argument --{name}: expected at least one")
    for d in (HEAD_DIM, *HEAD_DIMS):
        if args.hidden % d:
            p.error(f"argument --hidden: {d} does not divide {args.hidden}")
    return args


def compilations(argv):
    """What other processes can compile for these arguments."""
    args = parse(parser(), argv)
    return cells.compilations(args, plan_of(args))


def main(argv=None, timer=None):
    p = parser()
    args = parse(p, argv)
    if args.profile:
        return profiled(args.profile)
    plan = plan_of(args)
    if args.plan:
        print(cells.describe(plan))
        return 0
    timer = cells.timer_here(timer)
    if timer is None:
        return 2
    provenance = cells.Provenance("roofline", timer, args.seed)
    with contextlib.closing(cells.open_records(args, p, provenance.device)) as file:
        stopped = cells.guarded(lambda: measure(args, plan, timer, file, provenance))
    if stopped is not None:
        return stopped
    found = figure.Study(file.rows)
    for title, head, lines in found.tables():
        print(f"\n{title}")
        print(cells.text(head, lines))
    for text in figure.paragraphs(found).values():
        print("\n" + text)
    of_cells = grid.by_cell(
        [r for r in file.rows if r.get("study") == "roofline" and "backend" in r], args.backends,
        args.dtype,
    )  # fmt: skip
    for line in cells.reasons(of_cells):
        print(line)
    return cells.exit_code(of_cells, grid.steps())


if __name__ == "__main__":
    sys.exit(main())
