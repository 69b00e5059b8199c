"""Every step of the ladder, forward and backward: what it reaches and what it gains.

    python bench/ladder.py                              # every step, three lengths
    python bench/ladder.py --budget 120                 # the same in two minutes
    python bench/ladder.py --direction forward --head-dims 128 --lengths 16384
    python bench/ladder.py --small-calls                # launch costs at N = 128 and 512

Per head dim, mask and length: TFLOP/s, the share of the 8192³ matrix product, and the gain over the
step before. The steps and the matrix product take turns in every cell, in an order that changes
from round to round, so that clocks and power limits treat them alike. Backward is everything
between dO and finished dQ, dK and dV. Each step is verified before it is timed; 16,384 tokens and a
hidden size of 2048, bf16.

--small-calls measures what a small call costs instead (batch 1, 16 heads of 64, causal), a forward
and a forward with its backward: host time of an eager call, and GPU time of a CUDA-graph replay,
for the steps and their peers.

Records go to results/ladder-DEVICE.jsonl as each cell is done; the same command again measures only
what is missing. python figures/ladder.py draws them.

Exit code 1 where a step failed or was wrong or nothing was measured, 2 for a bad argument or a
machine without a GPU.
"""

import argparse
import contextlib
import functools
import sys
from dataclasses import replace

from flashstudy.backends import BACKENDS, load
from flashstudy.bench import cells, common, rounds
from flashstudy.bench.rounds import CHOSEN, MATMUL
from flashstudy.figures import grid
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

LENGTHS = (512, 4096, 16384)
SMALL_LENGTHS = (128, 512)
SMALL_PEERS = (*CHOSEN, "flex", "flash-attn", "flash-attn-4")
CLOCKS = {"host_ms": common.host_samples, "graph_ms": common.graph_samples}


def parser():
    p = argparse.ArgumentParser(
        prog="ladder.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cells.add_arguments(p, grid.steps(), LENGTHS)
    p.add_argument(
        "--small-calls", action="store_true",
        help="instead of the grid, host and graph time of small calls, peers included",
    )  # fmt: skip
    return p


def small_call(name, cell, given, stack):
    """The eager call as a user would write it; `stack` holds what he would have set up before."""
    if name in CHOSEN:
        stack.enter_context(sdpa_kernel(CHOSEN[name]))
        name = "sdpa"
    return rounds.closure(load(name), cell, *given)


def call_once(session, name, cell, given):
    session.closure(name, cell, given)()


def small_plan(names):
    plan = {grid.Cell("forward", 64, True, n, 1, 16): names for n in SMALL_LENGTHS}
    names = [name for name in names if BACKENDS[name].backward]
    if names:
        plan |= {grid.Cell(grid.BOTH, 64, True, n, 1, 16): names for n in SMALL_LENGTHS}
    return plan


def measure_small(args, plan, timer, file, provenance, clocks):
    """Small calls on each clock, the backends taking turns; a row a backend, length and clock."""
    dtype = common.DTYPES[args.dtype]
    plan = cells.missing(args, plan, file, provenance, list(clocks)[-1])
    session = rounds.Session(
        plan, timer, dtype, seconds=cells.seconds_left(args), slot=0.1, rounds=args.rounds,
        seed=args.seed, report=tqdm.write,
    )  # fmt: skip
    session.set_up_all(lambda pairs: cells.progress(pairs, desc="set-up", unit="call"))
    for cell, names in cells.progress(plan.items(), desc="small calls", unit="cell"):
        given = session.inputs(cell)
        ready = [session.ready[cell, n] for n in names if (cell, n) in session.ready]
        with rounds.grad_mode(cell):  # the first call in a shape may be a slow one
            for it in ready:
                session.attempt(it, functools.partial(call_once, session, it.name, cell, given))
        made = {metric: [replace(it, turns=[]) for it in ready] for metric in clocks}

        def turn(it, clock, cell=cell, given=given):
            with contextlib.ExitStack() as stack:
                call = small_call(it.name, cell, given, stack)
                it.turns.append(clock(call))

        with rounds.grad_mode(cell):
            for metric, contenders in made.items():
                rounds.take_turns(
                    contenders,
                    args.rounds,
                    lambda it, m=metric: session.attempt(it, lambda: turn(it, clocks[m])),
                    session.draw,
                )
        stamp = provenance.stamp()
        file.append(
            [cells.row(cell, it, dtype, stamp, m) for m, field in made.items() for it in field]
        )


def planned(p, argv):
    """(arguments, what they ask for): {cell: names}."""
    steps = grid.steps()
    args = cells.parse(p, argv, lambda args: [*SMALL_PEERS, *steps] if args.small_calls else steps)
    others = [n for n in args.backends if n not in steps]
    if others and not args.small_calls:
        p.error(
            f"argument --backends: {others[0]} is no step of the ladder ({', '.join(steps)});"
            " bench/peers.py compares with the others"
        )
    return args, small_plan(args.backends) if args.small_calls else cells.plan_of(args)


def compilations(argv):
    """What other processes can compile for these arguments."""
    return cells.compilations(*planned(parser(), argv))


def main(argv=None, timer=None, clocks=CLOCKS):
    p = parser()
    args, plan = planned(p, argv)
    work = functools.partial(measure_small, clocks=clocks) if args.small_calls else cells.execute
    rows, ended = cells.measured(args, p, "ladder", plan, timer, work)
    if rows is None:
        return ended
    rows = grid.newest(rows)
    if args.small_calls:
        head, lines, found = grid.small_table(rows, args.backends, args.dtype)
        print("\n" + cells.text(head, lines, 1))
    else:
        found = grid.by_cell(rows, [*args.backends, MATMUL], args.dtype)
        print(f"\nTFLOP/s, {args.dtype}; share of the matrix product; gain over the step before")
        print(cells.text(*grid.ladder_table(found, args.backends)))
        print("\n".join(grid.ladder_gains(found, args.backends)))
    for line in cells.reasons(found):
        print(line)
    return cells.exit_code(found, grid.steps())


if __name__ == "__main__":
    sys.exit(main())
