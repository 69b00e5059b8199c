"""What ladder.py, peers.py and decode.py share: arguments, records and the run over the grid."""

import argparse
import contextlib
import shlex
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from flashstudy.backends import BACKENDS, why_not
from flashstudy.bench import common
from flashstudy.bench.rounds import (
    MATMUL,
    MATMUL_FLOPS,
    DeviceLost,
    GpuTimer,
    Session,
    first_call,
)
from flashstudy.figures import grid, records
from tabulate import tabulate
from tqdm import tqdm

MASKS = ("full", "causal")
READ_EVERY = 30  # seconds


# Records


def row(cell, it, dtype, about, metric="time_ms"):
    """The record of one contender in one cell; `about` says on what, with what and when."""
    timed = [t for turn in it.turns for t in turn]
    if it.status == "ok":
        numbers = common.summary(timed) | {"turns": [statistics.median(t) for t in it.turns]}
    else:
        numbers = dict.fromkeys(("value", "p50", "p20", "p80")) | {"samples": 0, "turns": []}
    return {
        "backend": it.name,
        "scope": "attention",
        "direction": cell.direction,
        "metric": metric,
        "unit": "ms",
        "B": cell.batch,
        "E": cell.heads * cell.head_dim,
        "H": cell.heads,
        "H_KV": cell.kv_heads or cell.heads,
        "N_Q": cell.queries or cell.length,
        "N_K": cell.length,
        "D": cell.head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "causal": cell.causal,
        "flops": MATMUL_FLOPS if it.name == MATMUL else cell.flops,
        "status": it.status,
        "reason": it.reason,
        "error_over_budget": it.over,
        **numbers,
        **about,
    }


def done(rows, environment, dtype, cell, names, metric="time_ms"):
    """Whether one run, on this machine with this software, left a row of every name in the cell."""
    runs = {}
    for r in rows:
        if (
            r["metric"] == metric
            and r["dtype"] == str(dtype).removeprefix("torch.")
            and grid.cell_of(r) == cell
            and all(r.get(k) == environment.get(k) for k in records.ENVIRONMENT)
        ):
            runs.setdefault(r["run"], set()).add(r["backend"])
    return any(set(names) <= found for found in runs.values())


# Command lines


def words(allowed):
    """argparse type: some of these words, separated by commas, or "all"."""

    def parse(text):
        found = list(allowed) if text == "all" else [w for w in text.split(",") if w]
        for word in found:
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"no {word!r}; there are {', '.join(allowed)}")
        return found

    return parse


def limit(text):
    """argparse type: BACKEND=N,N,…[@D,D,…], the only lengths (and head dims) of a backend."""
    name, _, where = text.partition("=")
    if name not in BACKENDS:
        raise argparse.ArgumentTypeError(f"no backend {name!r}; there are {', '.join(BACKENDS)}")
    lengths, at, head_dims = where.partition("@")
    found = common.positives(lengths), common.positives(head_dims)
    if not found[0] or bool(at) != bool(found[1]):
        raise argparse.ArgumentTypeError(
            f"expected {name}=N,N,… or {name}=N,N,…@D,D,…, got {text!r}"
        )
    return name, *found


def add_arguments(parser, backends, lengths):
    """The arguments that the ladder and the peers share; lists take commas, spaces or both."""

    def add(*names, several=None, **options):
        if several:
            options |= {"nargs": "+", "metavar": several}
        parser.add_argument(*names, **options)

    def joined(values):
        return ",".join(map(str, values))

    add("--backends", several="NAME", type=words(BACKENDS),
        help=f"default: {joined(backends)}")  # fmt: skip
    add("--direction", choices=[*grid.DIRECTIONS, "both"], default="both", help="default: both")
    add("--head-dims", several="D", type=common.positives, default=[grid.HEAD_DIMS],
        help=f"default: {joined(grid.HEAD_DIMS)}")  # fmt: skip
    add("--masks", several="MASK", type=words(MASKS), default=[MASKS],
        help=f"default: {joined(MASKS)}")  # fmt: skip
    add("--lengths", several="N", type=common.positives, default=[lengths],
        help=f"default: {joined(lengths)}")  # fmt: skip
    add("--tokens", type=common.positive, default=grid.TOKENS,
        help="of a cell: the batch is TOKENS / N, at least 1 (default: %(default)s)")  # fmt: skip
    add("--hidden", type=common.positive, default=grid.HIDDEN,
        help="heads are HIDDEN / D (default: %(default)s)")  # fmt: skip
    add("--limit", type=limit, action="append", default=[], metavar="NAME=N,…[@D,…]",
        help="this backend takes part at these lengths, and head dims, only; may be repeated."
             " FlexAttention compiles every shape for seconds: flex=4096@64,128 keeps a run"
             " short")  # fmt: skip
    add_run_arguments(parser)


def add_run_arguments(parser):
    """Those that say how to measure and where to, not what."""
    add = parser.add_argument
    add("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="default: bfloat16")
    add("--budget", type=common.positive, metavar="SECONDS",
        help="end within this time, imports and set-up included: turns get shorter, and what does"
             " not fit is named and left to the next run (default: every turn takes --slot-ms)",
        )  # fmt: skip
    add("--slot-ms", type=common.positive, default=100, metavar="MS",
        help="longest turn of a backend (default: %(default)s)")  # fmt: skip
    add("--rounds", type=common.positive, default=3,
        help="turns that each backend has in a cell (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the data and of the order (default: 0)")
    add("--out", type=Path, metavar="FILE",
        help="record file, JSON lines (default: results/PROGRAM-DEVICE.jsonl)")  # fmt: skip
    add("--again", action="store_true", help="measure anew what the record file holds")
    add("--plan", action="store_true",
        help="say what would be measured and how long it takes at least; needs no GPU")  # fmt: skip


def parse(parser, argv, backends):
    """The arguments, lists flattened and in the order of tables, and combinations checked.

    backends(args): those to take where none are named.
    """
    args = parser.parse_args(argv)
    args.end = common.ends(args.budget, argv)
    if args.backends is None:
        args.backends = [backends(args)]
    for name, order in (("backends", list(BACKENDS)), ("masks", MASKS)):
        found = {word for part in getattr(args, name) for word in part}
        setattr(args, name, [word for word in order if word in found])
        if not found:
            parser.error(f"argument --{name}: expected at least one of {', '.join(order)}")
    for name in ("head_dims", "lengths"):
        setattr(args, name, sorted({n for part in getattr(args, name) for n in part}))
        if not getattr(args, name):
            parser.error(f"argument --{name.replace('_', '-')}: expected at least one number")
    for d in args.head_dims:
        if args.hidden % d:
            parser.error(f"argument --head-dims: {d} does not divide --hidden {args.hidden}")
    return args


def plan_of(args):
    """{cell: backends that take part in it, the matrix product with them}."""
    directions = grid.DIRECTIONS if args.direction == "both" else (args.direction,)
    causal = [mask == "causal" for mask in args.masks]
    only = {name: (lengths, head_dims) for name, lengths, head_dims in args.limit}

    def takes_part(name, cell):
        lengths, head_dims = only.get(name, ((), ()))
        return cell.length in (lengths or (cell.length,)) and (
            cell.head_dim in (head_dims or (cell.head_dim,))
        )

    plan = {}
    for cell in grid.cells(
        directions, args.head_dims, causal, args.lengths, args.tokens, args.hidden
    ):
        names = [n for n in args.backends if takes_part(n, cell)]
        if names:
            plan[cell] = [*names, MATMUL]
    return plan


def describe(plan):
    """The plan for people, with a lower bound of the time it takes."""
    lines = [[str(c), f"B={c.batch} H={c.heads}", " ".join(names)] for c, names in plan.items()]
    of_each = sum(cell.flops * len({*names} - {MATMUL}) for cell, names in plan.items())
    names = list(dict.fromkeys(n for of_cell in plan.values() for n in of_cell if n != MATMUL))
    here = [f"{n} would not run here: {why}" for n in names if (why := why_not(n)) is not None]
    return "\n".join(
        [
            tabulate(lines, headers=("cell", "shape", "taking turns"), tablefmt="simple"),
            *here,
            f"{len(plan)} cells, {sum(map(len, plan.values()))} measurements; one call of each, at"
            f" 400 TFLOP/s, takes {of_each / 4e14:.1f} s, and a run needs at least eight",
        ]
    )


def open_records(args, parser, device):
    """The record file, named after the program and the device unless --out names one."""
    if args.out is None:
        args.out = common.result_file(Path(parser.prog).stem, device)
    return common.open_records(args.out, parser)


def command(study, arguments):
    """What a reader types to repeat the run: where its records went is no part of it."""
    kept, skip = [], False
    for word in arguments:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return shlex.join(["python", f"bench/{study}.py", *kept])


class Provenance:
    """What every record of a run says besides its numbers."""

    def __init__(self, study, timer, seed):
        self.device = torch.device("cuda", 0) if timer.device == "cuda" else torch.device("cpu")
        method = ("bench/common.py", "bench/rounds.py", f"bench/{study}.py")
        self.about = {"study": study, **common.environment(self.device), "effort": "turns"}
        self.about["source"] = common.source(method=method)
        self.run = {"seed": seed, "run": common.utc(), "command": command(study, sys.argv[1:])}
        self.before = self.after = common.gpu_state(self.device)
        self.read = time.monotonic()

    def stamp(self):
        """The fields, with the GPU's clocks, power and temperature at the last two readings.

        They are READ_EVERY seconds apart: nvidia-smi can take a good part of a second.
        """
        if time.monotonic() - self.read > READ_EVERY:
            self.before, self.after = self.after, common.gpu_state(self.device)
            self.read = time.monotonic()
        now = {"utc": common.utc(), "gpu_before": self.before, "gpu_after": self.after}
        return self.about | self.run | now


def compilations(args, plan):
    """What other processes can compile for this plan: [(function, its arguments …)]."""
    timer = SimpleNamespace(device="cuda")
    session = Session(
        plan, timer, common.DTYPES[args.dtype], seconds=None, slot=0.0, rounds=1, seed=args.seed
    )
    return [(first_call, *task) for task in session.to_compile()]


def missing(args, plan, file, provenance, metric="time_ms"):
    """The part of the plan that the record file lacks; all of it with --again."""
    if args.again:
        return plan
    about, dtype = provenance.about, common.DTYPES[args.dtype]
    rest = {c: n for c, n in plan.items() if not done(file.rows, about, dtype, c, n, metric)}
    if len(rest) < len(plan):
        print(f"{len(plan) - len(rest)} of {len(plan)} cells are in {args.out} already")
    return rest


def progress(things=None, **options):
    """tqdm, which tells a terminal at once and a log every now and then."""
    return tqdm(things, mininterval=0.1 if sys.stderr.isatty() else 20, **options)


def seconds_left(args):
    """Of --budget; None where there is none."""
    return None if args.budget is None else max(0.0, args.end - time.monotonic())


def execute(args, plan, timer, file, provenance):
    """Measure what the record file lacks of the plan. Raises DeviceLost where the GPU is."""
    dtype = common.DTYPES[args.dtype]
    plan = missing(args, plan, file, provenance)
    if not plan:
        return

    def write(cell, contenders):
        stamp = provenance.stamp()
        file.append([row(cell, it, dtype, stamp) for it in contenders])

    session = Session(
        plan, timer, dtype, seconds=seconds_left(args), slot=args.slot_ms / 1e3,
        rounds=args.rounds, seed=args.seed, report=tqdm.write,
    )  # fmt: skip
    not_set_up, not_measured = session.run(write, progress)
    if not_set_up:
        names = ", ".join(sorted({name for name, _ in not_set_up}))
        print(f"--budget left no time to set up {len(not_set_up)} measurements of {names}")
    if not_measured:
        print(f"--budget left no time for {'; '.join(map(str, not_measured))}")
    if not_set_up or not_measured:
        print("the same command again goes on from here")


def text(head, lines, left=2):
    """A table for a terminal, its first `left` columns aligned left and the numbers right."""
    align = ["left"] * left + ["right"] * (len(head) - left)
    return tabulate(lines, head, "simple", disable_numparse=True, colalign=align)


def reasons(found):
    """A sentence for each backend that has no time somewhere, and why."""
    cells = {}
    for cell, of_cell in found.items():
        for name, r in of_cell.items():
            if r["status"] != "ok":
                cells.setdefault((name, r["status"], r.get("reason")), []).append(cell)
    return [
        f"{records.label(name)}, {status} in {len(at)} of {len(found)} cells ({at[0]}): {reason}"
        for (name, status, reason), at in cells.items()
    ]


def exit_code(found, ours):
    """1 where nothing was measured, or one of our kernels failed or was wrong."""
    rows = [(name, r["status"]) for of_cell in found.values() for name, r in of_cell.items()]
    bad = any(name in ours and status in ("failed", "wrong") for name, status in rows)
    return int(bad or not any(status == "ok" for name, status in rows if name != MATMUL))


def guarded(work):
    """Do it; the exit code where it was cut short, else None. What was measured is on disk."""
    try:
        work()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command again goes on from here", file=sys.stderr)
        return 130
    except DeviceLost as e:
        print(f"the GPU no longer answers, {e}; the same command again goes on", file=sys.stderr)
        return 1
    return None


def measured(args, parser, study, plan, timer, work=execute):
    """What a program of this kind does between its arguments and its tables.

    work(args, plan, timer, file, provenance) measures. Returns (rows of the record file, None), or
    (None, exit code) where the program ends here: after --plan, without a GPU, cut short.
    """
    if args.plan:
        print(describe(plan))
        return None, 0
    timer = timer_here(timer)
    if timer is None:
        return None, 2
    provenance = Provenance(study, timer, args.seed)
    with contextlib.closing(open_records(args, parser, provenance.device)) as file:
        stopped = guarded(lambda: work(args, plan, timer, file, provenance))
    return (file.rows, None) if stopped is None else (None, stopped)


def timer_here(timer):
    """A timer for this machine's GPU unless one is given; None, said why, where it has no GPU."""
    if timer is None and not torch.cuda.is_available():
        print(
            "this program times GPU kernels, and torch sees no CUDA GPU here; --plan shows what it"
            " would measure",
            file=sys.stderr,
        )
        return None
    return GpuTimer() if timer is None else timer
