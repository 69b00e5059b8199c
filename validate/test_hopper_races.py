"""Races in the Hopper kernels: the same bits, whoever comes first.

A barrier too few shows as results that change with timing. So the same call is repeated under
load, and variants of the kernel in which one role sleeps at a point of the protocol must give the
bits of the plain one. Inputs lie between rows of NaN, outputs in memory that held NaN: what is read
or left over from there shows. Each test runs in a process of its own: a barrier too many hangs.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).parents[1] / "kernels"
SOURCE = KERNELS / "v6_persistent.py"
NARROW = KERNELS / "v7_hopper_backward.py"
WIDE = KERNELS / "v7_wide_heads.py"
SLEEP = (
    'gl.inline_asm_elementwise("nanosleep.u32 {}; mov.u32 $0, $1;", "=r,r,~{{memory}}",'
    " [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)"
)
# name: (in front of the first such statement, who sleeps: all or a condition, nanoseconds)
LATE = {
    "loads": ("mbarrier.expect(v_ready,", None, 3000),
    "tile-number": ("mbarrier.arrive(w.tile_ready", None, 5000),
    "first-consumer": ("acc = warpgroup_mma_wait(0, [acc, a])[0]", "WHICH == 0", 2000),
    "last-consumer": ("barrier_arrive(_k_empty(k_stage)", "WHICH == w.CONSUMERS - 1", 2500),
    "store": ("tma_store(w.o_desc", "WHICH == 0", 8000),
}
WIDE_LATE = {
    "loads-of-q-and-do": ("mbarrier.expect(do_ready,", None, 3000),
    "sums": ("mbarrier.arrive(sm.do_empty", None, 3000),
    "p": ("fence_async_shared()  # it takes long", None, 2500),
    "ds": ("x = warpgroup_mma_wait(0, [x])\n                mbarrier.wait(sm.q_ready", None, 2500),
    "dq-of-one": ("barrier_arrive(DO_FULL + before", "WG == 0", 2500),
    "dq-of-the-other": ("barrier_arrive(DO_FULL + before", "WG == 1", 2500),
}
NARROW_LATE = {
    "loads-of-q": ("mbarrier.expect(q_ready,", None, 3000),
    "sums-are-done": ("_sums_done()\n            for c", None, 5000),
    "sums-are-fetched": ("mbarrier.expect(sm.out_empty", None, 3000),
    "way-out-is-empty": ("if it < n + 1:", None, 3000),
    "end-of-a-sum-of-one": ("rest = sm.out_as(which, dq_desc)", "WG == 0", 2500),
    "end-of-a-sum-of-the-other": ("rest = sm.out_as(which, dq_desc)", "WG == 1", 2500),
    "part-of-dq-of-one": ("ordered = dq.reshape", "WG == 0", 2500),
    "part-of-dq-of-the-other": ("ordered = dq.reshape", "WG == 1", 2500),
}
# D, causal, (B, H, H_KV, N_Q, N_K): dealt, drawn, split, packed; 1, 2, 3 tiles of keys; tails; one,
# two and three consumers; two turns, long tiles and short ones
SHAPES = [
    (128, True, (4, 16, 16, 2100, 2100)),
    (128, True, (2, 2, 2, 300, 77)),
    (128, False, (1, 8, 2, 1, 9000)),
    (64, False, (2, 40, 40, 700, 1200)),
    (64, False, (1, 1, 1, 64, 384)),
    (64, True, (9, 32, 32, 512, 512)),
    (256, True, (3, 20, 20, 520, 520)),
    (256, True, (1, 4, 1, 5, 190)),
    (128, True, (1, 16, 16, 1000, 1000)),
    (256, True, (1, 40, 40, 300, 300)),
]
# D, causal, (B, H, H_KV, N_Q, N_K): many tiles of queries, groups, empty rows; 1, 3 and few of them
WIDE_SHAPES = [
    (256, True, (2, 8, 8, 1000, 1000)),
    (256, False, (1, 8, 2, 500, 900)),
    (192, True, (1, 2, 2, 900, 500)),
    (256, False, (2, 20, 20, 64, 320)),
    (256, True, (2, 20, 20, 192, 192)),
]
# The same. Chains, in which dQ repeats to the bit, too: several for each multiprocessor, and one;
# tails, groups, more keys than queries and fewer; a single tile of keys, whole and in parts
CHAINS = [
    (128, True, (8, 33, 33, 512, 512)),
    (64, True, (4, 66, 33, 500, 500)),
    (128, False, (2, 66, 66, 250, 200)),
    (64, False, (4, 33, 33, 150, 256)),
    (128, True, (5, 60, 60, 128, 128)),
    (64, False, (1, 8, 2, 1000, 100)),
]
NARROW_SHAPES = [
    *CHAINS,
    (128, True, (2, 8, 8, 1000, 1000)),
    (64, True, (1, 2, 2, 900, 500)),
    (64, True, (1, 8, 2, 500, 900)),
]


def slowed(source, mark, who, ns):
    """The source of the kernel with one role sleeping in front of a statement."""
    head, found, tail = source.partition(mark)
    assert found, f"{mark} is no longer in the kernel"
    indent = head[head.rindex("\n") + 1 :]
    sleep = SLEEP.format(ns) if who is None else f"if {who}:\n{indent}    {SLEEP.format(ns)}"
    text = f"{head}{sleep}\n{indent}{found}{tail}"
    return text.replace('operator("v6_persistent"', 'operator("v6_late"')


def load(path, name):
    """Import a file as a module of the kernels' package, so that its relative imports work."""
    spec = importlib.util.spec_from_file_location(f"flashstudy.kernels.{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def guarded(*shape):
    """Random bf16 of that shape (B, H, N, D); rows of NaN in front of every head and behind."""
    b, h, n, d = shape
    t = torch.full((b, h, n + 16, d), float("nan"), device="cuda", dtype=torch.bfloat16)
    inside = t[:, :, 8 : n + 8]
    return inside.copy_(torch.randn(shape, device="cuda"))


def poison(*tensors):
    """Leave NaN in the memory from which tensors like these are allocated next."""
    _ = [torch.full_like(t, float("nan")) for t in tensors]  # all at once, given back on return


def compare(path, repeats):
    """Run the kernel in file `path` against the plain one, beside products on another stream."""
    from flashstudy.kernels import v6_persistent as plain

    late, side = load(path, "late"), torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for d, causal, (b, h, h_kv, n_q, n_k) in SHAPES:
        q, k, v = guarded(b, h, n_q, d), *(guarded(b, h_kv, n_k, d) for _ in range(2))
        want = plain.forward(q, k, v, causal, d**-0.5, False)
        assert want[0].isfinite().all()
        assert not want[1].isnan().any()
        for i in range(repeats):
            if i % 2:
                with torch.cuda.stream(side):
                    a @ a
            poison(*want)
            got = late.forward(q, k, v, causal, d**-0.5, False)
            for x, y in zip(got, want, strict=True):
                assert torch.equal(x, y), (d, causal, q.shape, k.shape, i)


def compare_backward(path, repeats, plain, shapes):
    """The same for the backward: dK and dV to the bit, dQ as near as another order of its sum."""
    from flashstudy.kernels import v6_persistent

    plain = load(plain, "plain")
    late, side = load(path, "late"), torch.cuda.Stream()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    for shape in shapes:
        d, causal, (b, h, h_kv, n_q, n_k) = shape
        q, do = guarded(b, h, n_q, d), guarded(b, h, n_q, d)
        k, v = guarded(b, h_kv, n_k, d), guarded(b, h_kv, n_k, d)
        o, lse = v6_persistent.forward(q, k, v, causal, d**-0.5, False)
        args = (do, q, k, v, o, lse, causal, d**-0.5, False)
        want = plain.backward(*args)
        near = 4 * torch.finfo(q.dtype).eps * want[0].abs().max()
        for i in range(repeats):
            if i % 2:
                with torch.cuda.stream(side):
                    a @ a
            poison(*want, want[0].float())
            got = late.backward(*args, deterministic=i % 3 == 2)
            assert (got[0] - want[0]).abs().max() <= near, (shape, i)
            for x, y in list(zip(got, want, strict=True))[shape not in CHAINS :]:
                assert torch.equal(x, y), (shape, i)


def run(path, repeats, what):
    return subprocess.run(
        [sys.executable, __file__, path, str(repeats), what],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        timeout=120,
    )


@pytest.fixture(scope="module")
def hopper():
    from flashstudy.backends import why_not

    if (reason := why_not("v6_persistent")) is not None:
        pytest.skip(reason)


VARIANTS = {SOURCE: LATE, NARROW: NARROW_LATE, WIDE: WIDE_LATE}
variants = pytest.mark.parametrize(
    ("source", "late"),
    [(source, late) for source, some in VARIANTS.items() for late in some.values()],
    ids=[name for some in VARIANTS.values() for name in some],
)
# what to compare with, and repeats: of the kernel as it is, of one in which somebody sleeps
RUNS = {SOURCE: ("forward", 200, 25), NARROW: ("narrow", 50, 10), WIDE: ("wide", 50, 10)}


@variants
def test_the_variants_apply(source, late):
    text = slowed(source.read_text(), *late)
    compile(text, "late", "exec")
    assert text.count("nanosleep") == 1


def test_there_are_chains():
    from flashstudy.kernels import v7_hopper_backward as v7

    for d, causal, (b, h, h_kv, n_q, n_k) in NARROW_SHAPES:
        size = h // h_kv * n_q * d * 8
        chained = v7._chains(b * h_kv, -(-n_k // 128), size, 132, causal)
        chained &= n_q == n_k or not causal
        assert chained == ((d, causal, (b, h, h_kv, n_q, n_k)) in CHAINS)


@pytest.mark.gpu
@pytest.mark.parametrize("source", RUNS, ids=lambda path: path.stem)
def test_repeats_are_bitwise_equal(hopper, source):
    direction, repeats, _ = RUNS[source]
    got = run(source, repeats, direction)
    assert got.returncode == 0, got.stderr[-2000:]


@pytest.mark.gpu
@variants
def test_timing_changes_nothing(hopper, tmp_path, source, late):
    direction, _, repeats = RUNS[source]
    path = tmp_path / "late.py"
    path.write_text(slowed(source.read_text(), *late))
    got = run(path, repeats, direction)
    assert got.returncode == 0, got.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
def test_memory_is_that_of_the_tensors(hopper):
    """No access outside an allocation; one allocation a tensor, so that none hides in a pool."""
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    got = subprocess.run(
        [*command, sys.executable, __file__, SOURCE, "1", "forward"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        timeout=600,
    )
    assert got.returncode == 0, got.stdout[-2000:] + got.stderr[-2000:]


if __name__ == "__main__":
    path, repeats, what = sys.argv[1:]
    if what == "forward":
        compare(path, int(repeats))
    else:
        plain, shapes = {"narrow": (NARROW, NARROW_SHAPES), "wide": (WIDE, WIDE_SHAPES)}[what]
        compare_backward(path, int(repeats), plain, shapes)
