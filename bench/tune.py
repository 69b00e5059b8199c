"""Time tile configurations of a ladder step on this GPU; print the rows to paste into its table.

    python bench/tune.py v3_tma                              # every kernel, D = 64, 128, 256
    python bench/tune.py v3_tma --kernels forward --head-dims 128 --lengths 512 4096 16384
    python bench/tune.py v2_lean --kernels dkdv --head-dims 64 --try 64,64,4,2 32,64,4,3

The steps launch with tiles from a plain table in their source: BLOCK_M queries by BLOCK_N keys,
num_warps, num_stages. This program runs a step's own launcher with other rows in the place of the
table's, one kernel at a time, over a grid of lengths at a constant number of tokens, full and
causal. What is timed is checked first: a candidate's results must equal the shipped row's within
the rounding of another order of sums.

A candidate's score is the geometric mean, over the cells, of its speed relative to the shipped
row's; each round visits all candidates in a new order, so that a GPU that warms up does not favour
the first. "spread" is how far the rounds of a row lie apart where they differ most. A row is worth
pasting where its score exceeds 1 by more than its own spread and that of the shipped row.

Exit code 2 where there is no GPU.
"""

import argparse
import contextlib
import importlib
import itertools
import math
import random
import statistics
import sys
import time

from flashstudy.bench import common

KERNELS = {  # name: (table in the step's module, kernel's name there, FLOPs by 2·B·H·N²·D)
    "forward": ("FORWARD", "_forward_kernel", 2),
    "dq": ("DQ", "_dq_kernel", 3),
    "dkdv": ("DKDV", "_dkdv_kernel", 4),
    "dk": ("DK", "_dk_kernel", 3),  # some steps have dK and dV apart for some head dims
    "dv": ("DV", "_dv_kernel", 2),
}
WARP_TILES = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8), (64, 128, 8),
              (32, 64, 4), (64, 32, 4), (128, 32, 4), (128, 32, 8), (64, 64, 8))  # fmt: skip


def candidates(given, shared_limit, head_dim):
    """The rows to try: `given`, else usual tiles that may fit in a block's shared memory."""
    if given:
        return given
    rows = []
    for (m, n, warps), stages in itertools.product(WARP_TILES, (1, 2, 3)):
        stays, streams = max(m, n), min(m, n)  # at least one tile stays, two stream
        if 2 * head_dim * (stays + 2 * streams * stages) <= shared_limit:
            rows.append((m, n, warps, stages))
    return rows


def parse_row(text):
    """'128,64,4,2' as a tuple of BLOCK_M, BLOCK_N, num_warps, num_stages."""
    try:
        row = tuple(int(x) for x in text.split(","))
    except ValueError:
        row = ()
    if len(row) != 4 or any(x < 1 for x in row) or any(x & (x - 1) for x in row[:3]):
        raise argparse.ArgumentTypeError(
            f"expected BLOCK_M,BLOCK_N,num_warps,num_stages, the first three powers of two,"
            f" got {text!r}"
        )
    return row


@contextlib.contextmanager
def only(module, kernel, row=None):
    """Within this context `module` launches only `kernel`, with `row` in place of its table's."""

    class Nothing:
        fn = None  # what `_host.launch` knows a kernel by

        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    saved = {n: x for n, x in vars(module).items() if n.endswith("_kernel")}
    try:
        for name in saved:
            if name != KERNELS[kernel][1]:
                setattr(module, name, Nothing())
        with tabled(module, kernel, row):
            yield
    finally:
        for name, value in saved.items():
            setattr(module, name, value)


def launched(module, kernel, tensors, causal):
    """Whether the step launches this kernel for these tensors."""
    seen = []

    class Spy:
        fn = object()  # unknown to `_host.launch`

        def __getitem__(self, grid):
            seen.append(grid)
            return lambda *args, **kwargs: None

    name = KERNELS[kernel][1]
    with only(module, kernel):  # puts the name back
        setattr(module, name, Spy())
        launch(module, kernel, tensors, causal)
    return bool(seen)


@contextlib.contextmanager
def tabled(module, kernel, row):
    """Within this context every entry of the kernel's tables is `row` (None: as shipped)."""
    tables = (KERNELS[kernel][0], f"{KERNELS[kernel][0]}_FP32")
    names = [t for t in tables if row is not None and hasattr(module, t)]
    saved = {n: getattr(module, n) for n in names}
    try:
        for name, table in saved.items():
            setattr(module, name, dict.fromkeys(table, row))
        yield
    finally:
        for name, table in saved.items():
            setattr(module, name, table)


def launch(module, kernel, tensors, causal):
    """Run the launcher that launches `kernel`; its results."""
    q, k, v, o, lse, do = tensors
    scale = q.shape[3] ** -0.5
    if kernel == "forward":
        return module.forward(q, k, v, causal, scale, False)
    return module.backward(do, q, k, v, o, lse, causal, scale, False)


def make(torch, n, d, heads, kv_heads, tokens, dtype):
    """q, k, v and do of one cell, random and of the same seed every time."""
    g = torch.Generator("cuda").manual_seed(n + d)
    b = max(1, tokens // n)

    def new(h):
        return torch.randn(b, h, n, d, device="cuda", generator=g).to(dtype)

    q, k, v, do = new(heads), new(kv_heads), new(kv_heads), new(heads)
    return q, k, v, do


def same(torch, kernel, got, want):
    """Whether two results of one kernel agree but for the order of their sums."""
    picks = {"forward": (0, 1), "dq": (0,), "dkdv": (1, 2), "dk": (1,), "dv": (2,)}[kernel]
    for i in picks:
        error = (got[i].double() - want[i].double()).norm()
        if not error <= 4 * torch.finfo(want[i].dtype).eps * want[i].double().norm():
            return False
    return True


def tune(torch, module, kernel, d, args):
    """Time every candidate in every cell; the cells, and (score, spread, row, TFLOP/s by cell)s.

    The best row comes first. None where the step launches no such kernel for this head dim.
    """
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    limit = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    rows = candidates(args.rows, limit, d)
    heads = args.heads or max(1, 2048 // d)
    dtype = getattr(torch, args.dtype)
    cells, speeds, dropped = [], {row: {} for row in [None, *rows]}, {}
    for n, causal in itertools.product(args.lengths, (False, True)):
        q, k, v, do = make(torch, n, d, heads, args.kv_heads or heads, args.tokens, dtype)
        cells.append((n, causal))
        with torch.no_grad():
            o, lse = module.forward(q, k, v, causal, d**-0.5, False)
            tensors = (q, k, v, o, lse, do)
            if not launched(module, kernel, tensors, causal):
                return cells, None
            want = launch(module, kernel, tensors, causal)
            flops = KERNELS[kernel][2] * 2 * q.shape[0] * heads * n * n * d / (2 if causal else 1)
            for round_ in range(args.rounds):
                order = [r for r in [None, *rows] if r not in dropped]
                random.Random(round_).shuffle(order)
                for i, row in enumerate(order):
                    note = (
                        f"{kernel} D={d} N={n} {'causal' if causal else 'full'}: {row or 'shipped'}"
                    )
                    print(f"\r{note} ({i + 1}/{len(order)})".ljust(79), end="", file=sys.stderr)
                    try:
                        if round_ == 0 and row is not None:
                            with tabled(module, kernel, row):  # all kernels run, to compare
                                got = launch(module, kernel, tensors, causal)
                            if not same(torch, kernel, got, want):
                                dropped[row] = "wrong results"
                                continue
                        with only(module, kernel, row):
                            ms = do_bench(
                                lambda: launch(module, kernel, tensors, causal),  # noqa: B023
                                warmup=10,
                                rep=args.rep,
                                return_mode="median",
                            )
                    except OutOfResources as e:
                        dropped[row] = f"needs more {e.name} than this GPU has"
                        continue
                    speeds[row].setdefault((n, causal), []).append(flops / ms / 1e9)
    print("\r".ljust(80), end="\r", file=sys.stderr)
    for row, why in dropped.items():
        print(f"left out {row}: {why}", file=sys.stderr)
    return cells, ranked({r: s for r, s in speeds.items() if r not in dropped}, cells)


def ranked(speeds, cells):
    """(score, spread, row, TFLOP/s by cell) of every row timed in all cells, best first.

    speeds: {row: {cell: TFLOP/s of each round}}, the shipped row under None.
    """
    shipped = {c: statistics.median(s) for c, s in speeds[None].items()}
    result = []
    for row, by_cell in speeds.items():
        if len(by_cell) < len(cells):
            continue
        tflops = {c: statistics.median(s) for c, s in by_cell.items()}
        score = math.exp(statistics.mean(math.log(tflops[c] / shipped[c]) for c in cells))
        spread = max(max(s) / min(s) for s in by_cell.values()) - 1
        result.append((score, spread, row, [tflops[c] for c in cells]))
    return sorted(result, key=lambda r: -r[0])


def advice(result, table, d):
    """What to do about a ranking, in a line."""
    (noise,) = [spread for _, spread, row, _ in result if row is None]
    score, spread, row, _ = result[0]
    if row is None:
        return "the shipped row is the fastest"
    if score - 1 <= spread + noise:
        return f"no row beats the shipped one beyond the spread; {row} comes closest"
    return f"paste into {table} for head dim {d}: {row}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", help="a kernel file with tables, such as v3_tma")
    parser.add_argument(
        "--kernels", nargs="+", choices=list(KERNELS), help="(default: all that the step has)"
    )
    parser.add_argument("--head-dims", nargs="+", type=common.positive, default=[64, 128, 256])
    parser.add_argument("--lengths", nargs="+", type=common.positive, default=[512, 2048, 16384])
    parser.add_argument("--tokens", type=common.positive, default=16384, help="B·N of every cell")
    parser.add_argument(
        "--heads", type=common.positive, help="query heads (default: 2048 / head dim)"
    )
    parser.add_argument(
        "--kv-heads", type=common.positive, help="key and value heads (default: as many)"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--rep", type=common.positive, default=40, help="ms of timing a cell and round"
    )
    parser.add_argument("--rounds", type=common.positive, default=2)
    parser.add_argument(
        "--try", dest="rows", nargs="+", type=parse_row, metavar="M,N,WARPS,STAGES",
        help="the candidates (default: usual tiles that fit in shared memory)",
    )  # fmt: skip
    args = parser.parse_args(argv)

    import torch

    if not torch.cuda.is_available():
        print("tune.py: times kernels on a GPU, and torch sees none here", file=sys.stderr)
        return 2
    try:
        module = importlib.import_module(f"flashstudy.kernels.{args.step}")
    except ModuleNotFoundError as e:
        if e.name != f"flashstudy.kernels.{args.step}":
            raise
        parser.error(f"step: no file kernels/{args.step}.py")
    args.kernels = args.kernels or [k for k, (t, *_) in KERNELS.items() if hasattr(module, t)]
    for table in (KERNELS[k][0] for k in args.kernels or KERNELS):
        rows = getattr(module, table, {}).values()
        if not rows or not all(len(r) == 4 and all(isinstance(x, int) for x in r) for r in rows):
            parser.error(
                f"step: expected a table {table} of rows (BLOCK_M, BLOCK_N, num_warps, num_stages)"
                f" in {args.step}, found none"
            )

    from tabulate import tabulate

    print(f"{torch.cuda.get_device_name()}, {args.dtype}, torch {torch.__version__}, TFLOP/s")
    for kernel, d in itertools.product(args.kernels, args.head_dims):
        start = time.perf_counter()
        cells, result = tune(torch, module, kernel, d, args)
        if result is None:
            print(f"\n{args.step} {kernel}, head dim {d}: this step launches none")
            continue
        head = ["score", "spread", "row", *(f"{n}{' causal' if c else ''}" for n, c in cells)]
        lines = [
            [f"{score:.3f}", f"{spread:.1%}", row or "shipped", *(f"{x:.0f}" for x in tflops)]
            for score, spread, row, tflops in result
        ]
        print(f"\n{args.step} {kernel}, head dim {d} ({time.perf_counter() - start:.0f} s)")
        print(tabulate(lines, headers=head, disable_numparse=True))
        print(advice(result, KERNELS[kernel][0], d))
    return 0


if __name__ == "__main__":
    sys.exit(main())
