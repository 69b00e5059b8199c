"""Races in the Hopper forward kernels: the same bits, whoever comes first.

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

SOURCE = Path(__file__).parents[1] / "kernels" / "v6_persistent.py"
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
# D, causal, (B, H, H_KV, N_Q, N_K): dealt, drawn, split, packed; 1, 2, 3 tiles of keys; tails
SHAPES = [
    (128, True, (4, 16, 16, 2100, 2100)),
    (128, True, (2, 2, 2, 300, 77)),
    (128, False, (1, 8, 2, 1, 9000)),
    (64, False, (2, 40, 40, 700, 1200)),
    (64, False, (1, 1, 1, 64, 384)),
    (64, True, (9, 32, 32, 512, 512)),
    (256, True, (3, 20, 20, 520, 520)),
    (256, True, (1, 4, 1, 5, 190)),
]


def slowed(source, name):
    """The source of the kernel with one role sleeping where LATE says."""
    mark, who, ns = LATE[name]
    head, found, tail = source.partition(mark)
    assert found, f"{mark} is no longer in the kernel"
    indent = head[head.rindex("\n") + 1 :]
    sleep = SLEEP.format(ns) if who is None else f"if {who}:\n{indent}    {SLEEP.format(ns)}"
    text = f"{head}{sleep}\n{indent}{found}{tail}"
    return text.replace('operator("v6_persistent"', f'operator("v7_late_{name.replace("-", "_")}"')


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


def run(path, repeats):
    return subprocess.run(
        [sys.executable, __file__, path, str(repeats)],
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


@pytest.mark.parametrize("name", LATE)
def test_the_variants_apply(name):
    text = slowed(SOURCE.read_text(), name)
    compile(text, name, "exec")
    assert text.count("nanosleep") == 1


@pytest.mark.gpu
def test_repeats_are_bitwise_equal(hopper):
    got = run(SOURCE, 200)
    assert got.returncode == 0, got.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("name", LATE)
def test_timing_changes_nothing(hopper, tmp_path, name):
    path = tmp_path / "late.py"
    path.write_text(slowed(SOURCE.read_text(), name))
    got = run(path, 25)
    assert got.returncode == 0, got.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
def test_memory_is_that_of_the_tensors(hopper):
    """No access outside an allocation; one allocation a tensor, so that none hides in a pool."""
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    got = subprocess.run(
        [*command, sys.executable, __file__, SOURCE, "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        timeout=600,
    )
    assert got.returncode == 0, got.stdout[-2000:] + got.stderr[-2000:]


if __name__ == "__main__":
    compare(sys.argv[1], int(sys.argv[2]))
