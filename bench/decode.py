"""Few queries over many keys: the shapes of generating text, with grouped heads.

    python bench/decode.py                              # 1 to 128 queries over 8k to 128k keys
    python bench/decode.py --queries 1 --lengths 65536 --batches 1,8
    python bench/decode.py --plan                       # what would be measured; needs no GPU

32 query heads share 8 KV heads of 128, bf16, no mask, forward, batch 1 unless --batches says more.
A call has to read K and V once, and hardly computes: the yardstick is the rate at which it reads
them. Tiles of queries alone cannot fill a GPU here, so the fastest implementations pack the query
heads of a KV head into one tile and split the keys over programs.

Backends take turns, each round in another order; the GPU idles before each timed call where
launching takes longer than the call, so that the times are the GPU's; each is verified first.

Records go to results/decode-DEVICE.jsonl as each cell is done; the same command again measures only
what is missing.

Exit code 1 where one of our kernels failed or was wrong or nothing was measured, 2 for a bad
argument or a machine without a GPU.
"""

import argparse
import sys

from flashstudy.bench import cells, common
from flashstudy.figures import grid

PEERS = ("sdpa-cudnn", "sdpa-flash", "flash-attn", "flash-attn-4")
OURS = ("v3_tma", "v6_persistent")  # the last portable step, and the last that is a forward
QUERIES = (1, 16, 128)
LENGTHS = (8192, 32768, 131072)
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128


def parser():
    p = argparse.ArgumentParser(
        prog="decode.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = p.add_argument
    add("--backends", nargs="+", metavar="NAME", type=cells.words(cells.BACKENDS),
        help=f"default: {','.join([*PEERS, *OURS])}")  # fmt: skip
    for name, several, default in (
        ("queries", "N_Q", QUERIES), ("lengths", "N_K", LENGTHS), ("batches", "B", (1,)),
    ):  # fmt: skip
        add(f"--{name}", nargs="+", metavar=several, type=common.positives, default=[default],
            help=f"default: {','.join(map(str, default))}")  # fmt: skip
    add("--heads", type=common.positive, default=HEADS, help="query heads (default: %(default)s)")
    add("--kv-heads", type=common.positive, default=KV_HEADS,
        help="KV heads, dividing --heads (default: %(default)s)")  # fmt: skip
    add("--head-dim", type=common.positive, default=HEAD_DIM, help="default: %(default)s")
    cells.add_run_arguments(p)
    return p


def plan_of(args):
    return {
        grid.Cell(
            "forward", args.head_dim, False, n, b, args.heads,
            None if args.kv_heads == args.heads else args.kv_heads, None if m == n else m,
        ): args.backends
        for b in args.batches
        for m in args.queries
        for n in args.lengths
    }  # fmt: skip


def planned(p, argv):
    """(arguments, what they ask for): {cell: names}."""
    args = p.parse_args(argv)
    args.end = common.ends(args.budget, argv)
    if args.heads % args.kv_heads:
        p.error(f"argument --kv-heads: {args.kv_heads} does not divide --heads {args.heads}")
    chosen = {n for part in args.backends or [[*PEERS, *OURS]] for n in part}
    args.backends = [n for n in cells.BACKENDS if n in chosen]
    for name in ("queries", "lengths", "batches"):
        setattr(args, name, sorted({n for part in getattr(args, name) for n in part}))
    return args, plan_of(args)


def compilations(argv):
    """What other processes can compile for these arguments."""
    return cells.compilations(*planned(parser(), argv))


def main(argv=None, timer=None):
    p = parser()
    args, plan = planned(p, argv)
    names = args.backends
    rows, ended = cells.measured(args, p, "decode", plan, timer)
    if rows is None:
        return ended
    found = grid.by_cell(grid.newest(rows), names, args.dtype)
    print(f"\nµs, {args.dtype}; * the best peer; ÷* ours over it")
    print(cells.text(*grid.decode_table(found, names), 0))
    print("\n".join([*cells.reasons(found), *grid.peers_verdicts(found, names)]))
    return cells.exit_code(found, grid.steps())


if __name__ == "__main__":
    sys.exit(main())
