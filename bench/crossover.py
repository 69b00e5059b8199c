"""From which length on does each flash backend win? Dense around the crossing, on three clocks.

    python bench/crossover.py                       # defaults that suit this machine; resumes
    python bench/crossover.py --quick               # a first look
    python bench/crossover.py --budget 110          # end within that time, the base first
    python bench/crossover.py --slices base --head-dim 64 --batch 1

Short attention takes microseconds, and who wins depends on the clock:

    GPU time       device events around the call, the L2 flushed, the GPU kept busy until the host
                   has launched all of it: the kernels, cold
    graph replay   the same call in a CUDA graph, one after the other: the kernels, warm, and what
                   a program gets that hides the host
    wall clock     the eager call, called back to back: what a program gets that does not

Every flash backend is held against naive attention, naive attention through torch.compile, and
SDPA, at lengths from 16 to 1024. The base is one condition with every backend; the other slices
vary one thing of it each:

    base       forward, every flash backend, every length
    training   forward and backward in one call, every flash backend, powers of two
    fill       B·H, how many heads in all there are to fill the GPU with, powers of two: the heat
               map; a few backends
    mask       full where the base is causal, or the other way round; a few backends and lengths
    head-dim   the other head dims; likewise
    dtype      the other precisions; likewise

Not measured: the slices' combinations; the compiled naive outside of the first two slices and
between powers of two (training: four), and FlexAttention between powers of four, since each of
their shapes compiles for seconds; SDPA in the heat map, whose cuDNN kernels are planned anew for
every shape. --backends measures what it names everywhere. Without a GPU there is one clock, and the
answer is the CPU's.

In every cell the backends take turns, each round in another order. The crossing is interpolated
between the two lengths around it; its interval comes from turns drawn again (figures/crossings.py
says how). "At every length" and "nowhere" are answers too.

Records go to results/crossover-DEVICE.jsonl as each cell is done; the same command again measures
only what is missing. python figures/crossover.py draws them.

Exit code 1 where one of our kernels failed or was wrong or nothing was measured, 2 for a bad
argument, 130 where interrupted.
"""

import argparse
import contextlib
import gc
import math
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from flashstudy.backends import BACKENDS, load, torch_sdpa
from flashstudy.bench import cells, common, peers, rounds, seqlen
from flashstudy.figures import crossings, grid, records
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

LENGTHS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
QUICK_LENGTHS = (16, 64, 256, 1024)
SLICES = ("base", "training", "fill", "mask", "head-dim", "dtype")
DENSE = ("base", "training")  # every backend
HEAD_DIMS = (64, 128, 256)
FEW_LENGTHS = (16, 64, 256, 512, 1024)  # of the slices for which `lengths_of` names no other
# Where there are two such lengths, these backends take part at powers of a number alone.
COARSE = {"base": {"naive-compiled": 2, "flex": 4}, "training": {"naive-compiled": 4, "flex": 4}}
SETUP_SHARE, SETUP_END = 0.62, 0.75  # of a budget: then no more that compiles for long, no more
REPLAYS = 2  # of a graph in a turn
EVENT_S, WALL_S = 1.5e-3, 5e-3  # seconds in a turn: of events, of eager calls back to back
WALL_CALLS = 3, 10  # in a turn, at least and at most; the first of them finds an idle GPU


def defaults(device, quick):
    """Sizes that this device finishes in a minute or two."""
    if device.type == "cpu":
        sizes = {"batch": 1, "heads": 8, "head_dim": 64, "dtype": "float32"}
        sizes |= {"fills": [1, 4, 8, 32], "slices": ["base", "training", "fill", "mask"]}
    else:
        half = torch.cuda.get_device_capability(device) >= (8, 0)
        sizes = {"batch": 4, "heads": 16, "head_dim": 128}
        sizes |= {"fills": [1, 16, 64, 256, 1024], "slices": list(SLICES)}
        sizes["dtype"] = "bfloat16" if half else "float16"
    if quick:
        sizes |= {"slices": ["base", "training", "fill"], "fills": sizes["fills"][::2]}
    return sizes | {
        "lengths": list(QUICK_LENGTHS if quick else LENGTHS),
        "turns": 5 if quick else 9,
    }


# What is measured


def every_backend(device):
    """The baselines and all flash backends, on a CPU those that run there as they are."""
    names = [n for n, b in BACKENDS.items() if n in crossings.RIVALS or b.family == "flash"]
    if device.type == "cpu":
        return [n for n in names if BACKENDS[n].cpu == "native"]
    return names


def few_backends(device):
    """For the slices beside the base: two baselines, a library's kernel, our best."""
    if device.type == "cpu":
        return every_backend(device)
    return ["naive", "sdpa", "sdpa-flash", *peers.our_best()]


def powers(lengths, of):
    """The lengths that are powers of a number, all where fewer than two are or the number is 1."""
    if of == 1:
        return list(lengths)
    some = [n for n in lengths if of ** round(math.log(n, of)) == n]
    return some if len(some) > 1 else list(lengths)


def lengths_of(name, lengths):
    """The lengths that a slice has: all, the powers of two, or a few."""
    if name == "base":
        return lengths
    if name in ("training", "fill"):
        return powers(lengths, 2)
    some = [n for n in lengths if n in FEW_LENGTHS]
    return some if len(some) > 1 else lengths


def shape_of(fill, heads):
    """(batch, heads) of so many heads in all: whole sequences where there are enough."""
    return (fill // heads, heads) if fill >= heads else (1, fill)


def plan_of(args):
    """{slice: {(dtype, cell): names}}; a cell stands in the first slice that wants it."""
    device = args.device
    base = grid.Cell("forward", args.head_dim, args.causal, 0, args.batch, args.heads)
    dtypes = ["float32"] if device.type == "cpu" else list(common.DTYPES)
    made = {
        "base": [(args.dtype, base)],
        "training": [(args.dtype, base._replace(direction=grid.BOTH))],
        "fill": [
            (args.dtype, base._replace(batch=b, heads=h))
            for b, h in (shape_of(fill, args.heads) for fill in args.fills)
        ],
        "mask": [(args.dtype, base._replace(causal=not args.causal))],
        "head-dim": [
            (args.dtype, base._replace(head_dim=d)) for d in HEAD_DIMS if d != args.head_dim
        ],
        "dtype": [(dtype, base) for dtype in dtypes if dtype != args.dtype],
    }
    plan, seen = {}, set()
    for name in (s for s in SLICES if s in args.slices):
        dense, coarse = name in DENSE, COARSE.get(name, {})
        names = args.backends or (every_backend if dense else few_backends)(device)
        if name == "fill" and not args.backends and device.type == "cuda":
            names = [b for b in names if b != "sdpa"]
        plan[name] = {}
        for dtype, condition in made[name]:
            for n in lengths_of(name, args.lengths):
                key = dtype, condition._replace(length=n)
                if key not in seen:
                    seen.add(key)
                    plan[name][key] = [
                        b for b in names
                        if args.backends or n in powers(args.lengths, coarse.get(b, 1))
                    ]  # fmt: skip
    return plan


# Clocks


class GpuClocks:
    """Three clocks. `ready` gives what a turn calls: it returns milliseconds a call, a few."""

    metrics = ("time_ms", "graph_ms", "host_ms")

    def __init__(self):
        self.timer = rounds.GpuTimer()

    def ready(self, metric, call, it, idle):
        """it: the rounds.Contender, with its costs. idle: seconds, for time_ms."""
        if metric == "time_ms":
            period = max(it.cost, it.host) + idle + self.timer.flush_s
            calls = max(1, min(4, int(EVENT_S / period)))
            return lambda: self.timer.turn(call, calls, idle)
        if metric == "graph_ms":
            calls = common.graph_calls(it.cost)
            graph = common.capture(call, calls)
            pause = common.idle_before([common.cost(graph.replay)])
            return lambda: [
                t / calls for t in common.event_times(graph.replay, REPLAYS, idle=pause)
            ]
        least, most = WALL_CALLS
        calls = max(least, min(most, int(WALL_S / it.cost)))
        return lambda: common.host_samples(call, 1, calls)


class CpuTimer:
    """rounds.GpuTimer's part in the set-up, for a CPU: whoever launches also computes."""

    device, flush_s = "cpu", 0.0

    def once(self, call):
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return seconds, seconds


class CpuClocks:
    """The wall clock."""

    metrics = ("host_ms",)

    def __init__(self):
        self.timer = CpuTimer()

    def ready(self, metric, call, it, idle):
        calls = max(1, min(100, int(WALL_S / it.cost)))
        return lambda: common.host_samples(call, 1, calls, wait=lambda: None)


# The run


class Session(rounds.Session):
    """A run of the cells of one dtype: set up as the ladder and the peers are."""

    def why_not(self, name, cell):
        key = name, cell.direction != "forward"
        if key not in self.reasons:
            dtype = str(self.dtype).removeprefix("torch.")
            device = torch.device(self.timer.device)
            self.reasons[key] = seqlen.reason_not(name, device, dtype, key[1])
        return self.reasons[key]

    def prepare(self, it, cell, given):
        """The eager call as a user would write it, and its costs while no other process runs."""
        with chosen(it.name):
            name = "sdpa" if it.name in rounds.CHOSEN else it.name
            it.call = rounds.closure(load(name), cell, *given)
            self.timer.once(it.call)  # the first call in a shape may be a slow one
            it.cost, it.host = common.cost(it.call, self.timer.once)

    def measure_on(self, clocks, cell, names, turns):
        """{metric: contenders after their turns} of one cell."""
        given = self.inputs(cell)
        field = [self.ready[cell, n] for n in names if (cell, n) in self.ready]
        with rounds.grad_mode(cell):
            for it in field:
                self.attempt(it, lambda it=it: self.prepare(it, cell, given))
            idle = common.idle_before([(it.cost, it.host) for it in field if it.status == "ok"])
            made = {}
            for metric in clocks.metrics:
                made[metric] = [replace(it, turns=[]) for it in field]
                self.take_turns(clocks, metric, made[metric], turns, idle)
        for it in (it for some in (field, *made.values()) for it in some):
            it.call = None
        return made

    def take_turns(self, clocks, metric, field, turns, idle):
        """On one clock, every round in another order."""
        timed = {}

        def prepare(it):
            with chosen(it.name):
                timed[it.name] = clocks.ready(metric, it.call, it, idle)

        def turn(it):
            with chosen(it.name):
                it.turns.append(timed[it.name]())

        for it in field:
            self.attempt(it, lambda it=it: prepare(it))
        rounds.take_turns(field, turns, lambda it: self.attempt(it, lambda: turn(it)), self.draw)


def chosen(name):
    """The kernel of torch's that is a backend's, chosen outside of what is timed."""
    kernel = rounds.CHOSEN.get(name)
    return contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel)


def picked(cell, given):
    """The kernel that torch's own SDPA picks in a cell."""
    with rounds.grad_mode(cell):
        tensors = [t.detach().requires_grad_(cell.direction != "forward") for t in given[:3]]
        return torch_sdpa.picked(*tensors, causal=cell.causal)


def execute(args, plan, clocks, file, provenance):
    """Measure what the record file lacks of the plan, slice by slice."""
    about, last = provenance.about, clocks.metrics[-1]
    whole = {key: names for part in plan.values() for key, names in part.items()}
    rest = {
        (dtype, cell): names
        for (dtype, cell), names in whole.items()
        if args.again or not cells.done(file.rows, about, common.DTYPES[dtype], cell, names, last)
    }
    if len(rest) < len(whole):
        print(f"{len(whole) - len(rest)} of {len(whole)} cells are in {args.out} already")
    if not rest:
        return
    sessions = set_up(args, plan, rest, clocks)
    shuffle = random.Random(args.seed).shuffle
    order = []
    for part, keys in plan.items():  # slices in order: a short budget leaves whole ones
        keys = [(part, *key) for key in keys if key in rest]
        shuffle(keys)
        order += keys
    gc.collect()
    gc.freeze()  # compilers leave a million objects: collections skip them from here on
    spent = done = 0
    for at, (part, dtype, cell) in enumerate(cells.progress(order, desc="measuring", unit="cell")):
        session, names = sessions[dtype], rest[dtype, cell]
        if not any((cell, name) in session.ready for name in names):
            continue  # there was no time to set it up, and that was said
        began = time.monotonic()
        expected = 1.3 * spent / done * len(names) if done else 0.0
        if began + expected > args.end:
            left = len(order) - at
            print(f"--budget left no time for {left} cells; the same command goes on from here")
            break
        made = session.measure_on(clocks, cell, names, args.turns)
        stamp = provenance.stamp()
        kernel = picked(cell, session.inputs(cell)) if "sdpa" in names else None
        file.append(
            [
                cells.row(cell, it, session.dtype, stamp, metric)
                | {"slice": part, "sdpa_kernel": kernel if it.name == "sdpa" else None}
                for metric, field in made.items()
                for it in field
            ]
        )
        spent, done = spent + time.monotonic() - began, done + len(names)


def sessions_of(args, rest, timer):
    """{dtype: Session} of what is left of the plan."""
    made = {}
    for dtype in dict.fromkeys(dtype for dtype, _ in rest):
        own = {cell: names for (of, cell), names in rest.items() if of == dtype}
        made[dtype] = Session(
            own, timer, common.DTYPES[dtype], seconds=None, slot=0.0, rounds=args.turns,
            seed=args.seed, report=tqdm.write,
        )  # fmt: skip
    return made


def compilations(argv):
    """What other processes can compile for these arguments: [(function, its arguments …)]."""
    args = parse(parser(), argv)
    whole = {key: names for part in plan_of(args).values() for key, names in part.items()}
    sessions = sessions_of(args, whole, SimpleNamespace(device="cuda")).values()
    return [(rounds.first_call, *task) for s in sessions for task in s.to_compile()]


def set_up(args, plan, rest, clocks):
    """{dtype: Session}, every backend compiled and verified.

    The dense slices first, what compiles for long last. Other processes compile what they can;
    meanwhile this one sets up what they cannot help with. Where a budget is short, what comes last
    is left out, first of all what compiles for long.
    """
    start, sessions = time.monotonic(), sessions_of(args, rest, clocks.timer)
    seconds = args.end - start
    order = [
        (rounds.helped(backend), rounds.slow(backend), name not in DENSE, backend, dtype, cell)
        for name, part in plan.items()
        for dtype, cell in part
        if (dtype, cell) in rest
        for backend in rest[dtype, cell]
    ]
    order.sort(key=lambda item: item[:3])

    def late(share):
        return time.monotonic() - start >= share * seconds

    left_out, compiling = [], None
    if clocks.timer.device == "cuda":
        compiling = rounds.Precompiler([t for s in sessions.values() for t in s.to_compile()])
    for helped, slow_one, _, backend, dtype, cell in cells.progress(
        order, desc="set-up", unit="call"
    ):
        if helped and compiling is not None:
            if found := len(compiling.tasks):
                tqdm.write(f"waiting for {found} compilations in other processes")
            spare = max(0.0, start + SETUP_SHARE * seconds - time.monotonic())
            hung, compiling = compiling.wait(seconds=spare), None
            for session in sessions.values():
                session.refuse(hung)
        if late(SETUP_SHARE if slow_one else SETUP_END):
            left_out.append(backend)
        else:
            sessions[dtype].settle(backend, cell)
    if left_out:
        names = ", ".join(map(records.label, dict.fromkeys(left_out)))
        print(f"--budget left no time to set up {len(left_out)} calls of {names}")
    print(f"set-up took {time.monotonic() - start:.0f} s")
    return sessions


def describe(plan, metrics):
    """The plan for people."""
    found = {}  # (slice, condition) -> (lengths, names)
    for name, part in plan.items():
        for (dtype, cell), names in part.items():
            mask = "causal" if cell.causal else "full"
            what = (
                f"{cell.direction} {dtype} {mask} D={cell.head_dim} B·H={cell.batch}·{cell.heads}"
            )
            lengths, taking = found.setdefault((name, what), ([], {}))
            lengths.append(str(cell.length))
            taking.update(dict.fromkeys(names))
    lines = [[*k, ",".join(lengths), " ".join(taking)] for k, (lengths, taking) in found.items()]
    count = sum(len(names) for part in plan.values() for names in part.values())
    head = ["slice", "condition", "N", "taking turns"]
    text = cells.text(head, lines, 4)
    return f"{text}\n{count} measurements on {len(metrics)} clocks: {', '.join(metrics)}"


def show(found):
    """Tables, then the answer in words."""
    for rival in crossings.RIVALS:
        header, lines = crossings.table(found, rival)
        if lines:
            print(f"\nFaster than {records.label(rival)} from N = …")
            print(cells.text(header, lines, 1))
    header, lines = crossings.conditions_table(found)
    if len(lines) > len(crossings.CLOCKS):
        print(f"\nFaster than {records.label('naive')} from N = …, by condition")
        print(cells.text(header, lines, 2))
    print("\n" + " ".join(crossings.words(found)))


# The command line


def parser():
    p = argparse.ArgumentParser(
        prog="crossover.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = p.add_argument
    add("--backends", nargs="+", metavar="NAME", type=cells.words(BACKENDS),
        help="which, in every slice (default: as above)")  # fmt: skip
    add("--slices", nargs="+", metavar="SLICE", type=cells.words(SLICES),
        help=f"which (default: {','.join(SLICES)})")  # fmt: skip
    add("--lengths", nargs="+", metavar="N", type=common.positives,
        help=f"default: {','.join(map(str, LENGTHS))}")  # fmt: skip
    add("--batch", type=common.positive, metavar="B", help="of the base (default: 4; CPU: 1)")
    add("--heads", type=common.positive, metavar="H", help="of the base (default: 16; CPU: 8)")
    add("--head-dim", type=common.positive, metavar="D",
        help="of the base (default: 128; CPU: 64)")  # fmt: skip
    add("--dtype", choices=list(common.DTYPES),
        help="of the base (default: bfloat16 on a GPU that has it; CPU: float32)")  # fmt: skip
    add("--causal", action=argparse.BooleanOptionalAction, default=True, help="the base's mask")
    add("--fills", nargs="+", metavar="BH", type=common.positives,
        help="B·H of the heat map, in whole sequences of --heads heads from there on"
             " (default: 1,16,64,256,1024; CPU: 1,4,8,32)")  # fmt: skip
    add("--turns", type=common.positive,
        help="turns of each backend on each clock (default: 9)")  # fmt: skip
    add("--quick", action="store_true", help="four lengths, three slices, fewer turns")
    add("--budget", type=common.positive, metavar="SECONDS",
        help="end within this time, imports included; the next run goes on there")  # fmt: skip
    add("--again", action="store_true", help="measure anew what the record file holds")
    add("--plan", action="store_true", help="say what would be measured")
    add("--out", type=Path, metavar="FILE",
        help="record file, JSON lines (default: results/crossover-DEVICE.jsonl)")  # fmt: skip
    add("--charts", type=Path, metavar="DIR", help="where charts go (default: beside the records)")
    add("--no-charts", action="store_true", help="tables and the answer only")
    add("--device", type=common.device_argument,
        help="cpu or cuda (default: cuda where there is one)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the data and of the order (default: 0)")
    return p


def parse(p, argv):
    args = p.parse_args(argv)
    args.end = common.ends(args.budget, argv)
    args.device = common.default_device() if args.device is None else args.device
    if args.device.type == "cuda" and args.device.index != 0:
        p.error("argument --device: this program measures the first GPU; set CUDA_VISIBLE_DEVICES")
    given = {"backends": list(BACKENDS), "slices": SLICES}
    for name, order in given.items():
        if (parts := getattr(args, name)) is not None:
            wanted = {word for part in parts for word in part}
            setattr(args, name, [word for word in order if word in wanted])
    for name in ("lengths", "fills"):
        if (parts := getattr(args, name)) is not None:
            setattr(args, name, sorted({n for part in parts for n in part}))
    for name, value in defaults(args.device, args.quick).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("slices", "lengths", "fills"):
        if not getattr(args, name):
            p.error(f"argument --{name}: expected at least one")
    if args.backends == []:
        p.error("argument --backends: expected at least one")
    for fill in args.fills:
        if fill > args.heads and fill % args.heads:
            p.error(f"argument --fills: {fill} is no multiple of --heads {args.heads}")
    return args


def main(argv=None, clocks=None):
    p = parser()
    args = parse(p, argv)
    plan = plan_of(args)
    kind = CpuClocks if args.device.type == "cpu" else GpuClocks
    if args.plan:
        print(describe(plan, kind.metrics))
        return 0
    clocks = kind() if clocks is None else clocks
    provenance = cells.Provenance("crossover", clocks.timer, args.seed)
    provenance.about["effort"] = f"{args.turns} turns"
    with contextlib.closing(cells.open_records(args, p, provenance.device)) as file:
        stopped = cells.guarded(lambda: execute(args, plan, clocks, file, provenance))
    if stopped is not None:
        return stopped
    wanted = {key for part in plan.values() for key in part}
    mine = [
        r for r in grid.newest([r for r in file.rows if r.get("study") == "crossover"])
        if (r["dtype"], grid.cell_of(r)) in wanted
    ]  # fmt: skip
    found = crossings.sweeps(mine)
    show(found)
    of_clock = [r for r in mine if r["metric"] == clocks.metrics[-1]]
    by_cell = {}
    for r in of_clock:
        by_cell.setdefault(f"{grid.cell_of(r)} {r['dtype']}", {})[r["backend"]] = r
    for line in cells.reasons(by_cell):
        print(line)
    if not args.no_charts:
        from flashstudy.figures import crossover as figure

        charts = args.out.with_name(args.out.stem) if args.charts is None else args.charts
        made = figure.draw(mine, charts)
        print(f"Charts, drawn from the records: {len(made)} files in {charts}/")
    return cells.exit_code(by_cell, grid.steps())


if __name__ == "__main__":
    sys.exit(main())
