"""Our fastest kernels against everybody else's, on the grid of the FlashAttention papers.

    python bench/peers.py                                   # the whole grid, forward and backward
    python bench/peers.py --budget 120 --limit flex=4096    # the same in two minutes
    python bench/peers.py --long --head-dims 128            # N = 32k, 64k, 128k at batch 1
    python bench/peers.py --direction forward --head-dims 128 --backends v1_flash,sdpa-cudnn

Head dims 64, 128, 256; full and causal; N from 512 to 16384 at 16,384 tokens and a hidden size of
2048; bf16. In every cell the backends take turns (A B C A B C …), so that clocks and power limits
treat them alike: quote the ratios rather than the TFLOP/s. Backward is everything between dO and
finished dQ, dK and dV. Each backend is verified before it is timed. The 8192³ matrix product takes
turns with them: the machine's practical ceiling.

Records go to results/peers-DEVICE.jsonl as each cell is done; the same command again measures only
what is missing, so a long run may be cut in pieces. The table that ends a run shows all records of
this machine and software. python figures/peers.py draws it.

Exit code 1 where one of our kernels failed or was wrong or nothing was measured, 2 for a bad
argument or a machine without a GPU.
"""

import argparse
import contextlib
import sys

from flashstudy.backends import BACKENDS
from flashstudy.bench import cells
from flashstudy.bench.rounds import MATMUL
from flashstudy.figures import grid, records
from tabulate import tabulate

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


def table(found, names):
    """The text of the table: a row a cell, a column a backend, ratios of ours to the best peer."""
    ours = [n for n in names if n in grid.steps()]
    peers = [n for n in names if n not in ours and n != MATMUL]
    lines = []
    for cell, of_cell in found.items():
        rival = grid.best(of_cell, peers)
        line = ["causal" if cell.causal else "full", cell.head_dim, cell.length]
        for name in (*ours, *peers, MATMUL):
            best = rival is not None and name == rival[0]
            line.append(cells.shown(of_cell.get(name)) + " *" * best)
        for name in ours:
            r = grid.ratio(of_cell, name, peers)
            line.append("" if r is None else f"{r:.2f}")
        lines.append([cell.direction, *line])
    head = ["", "mask", "D", "N", *(records.label(n) for n in (*ours, *peers)), "matmul"]
    head += [f"{records.label(n)} ÷*" for n in ours]
    return tabulate(lines, headers=head, tablefmt="simple", disable_numparse=True, stralign="right")


def verdicts(found, names):
    """Sentences: each of ours against the best peer, over the cells that have both."""
    ours = [n for n in names if n in grid.steps()]
    peers = [n for n in names if n not in ours and n != MATMUL]
    sentences = []
    for direction in grid.DIRECTIONS:
        for name in ours:
            ratios = {
                cell: r
                for cell, of_cell in found.items()
                if cell.direction == direction
                and (r := grid.ratio(of_cell, name, peers)) is not None
            }
            if ratios:
                worst = min(ratios, key=ratios.get)
                behind = sum(r < 1 for r in ratios.values())
                sentences.append(
                    f"{records.label(name)}, {direction}: geometric mean"
                    f" {grid.geometric_mean(list(ratios.values())):.3f} of the best peer over"
                    f" {len(ratios)} cells, behind in {behind}, least {ratios[worst]:.3f} ({worst})"
                )
    return sentences


def main(argv=None, timer=None):
    p = parser()
    args = cells.parse(p, argv, lambda args: [*PEERS, *our_best()])
    if args.long:
        args.lengths = list(grid.LONG_LENGTHS)
    plan = cells.plan_of(args)
    if args.plan:
        print(cells.describe(plan))
        return 0
    timer = cells.timer_here(timer)
    if timer is None:
        return 2
    provenance = cells.Provenance("peers", timer, args.seed)
    with contextlib.closing(cells.open_records(args, p, provenance.device)) as file:
        stopped = cells.guarded(lambda: cells.execute(args, plan, timer, file, provenance))
    if stopped is not None:
        return stopped
    names = [*args.backends, MATMUL]
    found = grid.by_cell(grid.newest(file.rows), names, args.dtype)
    print(f"\nTFLOP/s, {args.dtype}; * the best peer; ÷* ours over it")
    print(table(found, names))
    print("\n".join([*cells.reasons(found), *verdicts(found, names)]))
    return cells.exit_code(found, grid.steps())


if __name__ == "__main__":
    sys.exit(main())
