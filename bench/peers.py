"""Our fastest kernels against everybody else's, on the grid of the FlashAttention papers.

    python bench/peers.py                                   # the whole grid, forward and backward
    python bench/peers.py --budget 120 --limit flex=4096    # the same in two minutes
    python bench/peers.py --long --head-dims 128            # N = 32k, 64k, 128k at batch 1
    python bench/peers.py --direction forward --head-dims 128 --backends v1_flash,sdpa-cudnn

Head dims 64, 128, 256; full and causal; N from 512 to 16384 at 16,384 tokens and a hidden size of
2048; bf16. In every cell the backends take turns, in an order that changes from round to round, so
that clocks and power limits treat them alike: quote the ratios rather than the TFLOP/s. Backward is
everything between dO and finished dQ, dK and dV. Each backend is verified before it is timed. The
8192³ matrix product takes turns with them: the machine's practical ceiling.

Records go to results/peers-DEVICE.jsonl as each cell is done; the same command again measures only
what is missing, so a long run may be cut in pieces. The table that ends a run shows all records of
this machine and software. python figures/peers.py draws it.

Exit code 1 where one of our kernels failed or was wrong or nothing was measured, 2 for a bad
argument or a machine without a GPU.
"""

import argparse
import sys

from flashstudy.backends import BACKENDS
from flashstudy.bench import cells
from flashstudy.bench.rounds import MATMUL
from flashstudy.figures import grid

PEERS = ("sdpa-cudnn", "flash-attn-4", "flash-attn", "flex", "sdpa-flash")


def our_best():
    """The ladder's last portable step and its last for newer GPUs, and the last with a backward."""
    found = []
    for newer in (False, True):
        rows = [n for n in grid.steps() if (BACKENDS[n].capability >= (9, 0)) == newer]
        for names in (rows, [n for n in rows if BACKENDS[n].backward]):
            found += [n for n in names[-1:] if n not in found]
    return [n for n in grid.steps() if n in found]


def parser():
    p = argparse.ArgumentParser(
        prog="peers.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cells.add_arguments(p, [*PEERS, *our_best()], grid.LENGTHS)
    p.add_argument(
        "--long", action="store_true",
        help="lengths 32768, 65536 and 131072 at batch 1, instead of those of --lengths",
    )  # fmt: skip
    return p


def planned(p, argv):
    """(arguments, what they ask for): {cell: names}."""
    args = cells.parse(p, argv, lambda args: [*PEERS, *our_best()])
    if args.long:
        args.lengths = list(grid.LONG_LENGTHS)
    return args, cells.plan_of(args)


def compilations(argv):
    """What other processes can compile for these arguments."""
    return cells.compilations(*planned(parser(), argv))


def main(argv=None, timer=None):
    p = parser()
    args, plan = planned(p, argv)
    rows, ended = cells.measured(args, p, "peers", plan, timer)
    if rows is None:
        return ended
    names = [*args.backends, MATMUL]
    found = grid.by_cell(grid.newest(rows), names, args.dtype)
    print(f"\nTFLOP/s, {args.dtype}; * the best peer; ÷* ours over it")
    print(cells.text(*grid.peers_table(found, names)))
    print("\n".join([*cells.reasons(found), *grid.peers_verdicts(found, names)]))
    return cells.exit_code(found, grid.steps())


if __name__ == "__main__":
    sys.exit(main())
