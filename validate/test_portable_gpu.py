"""The portable steps on a GPU: what the interpreter cannot show.

Values in bf16 through both ways of moving tiles, 200 calls bit by bit, grids and tensors too large
for 16 and 32 bits, extra memory up to 131,072 tokens, PyTorch's compilers, and memcheck.
"""

import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch
from flashstudy.kernels import _host, v1_flash, v2_lean, v3_tma
from flashstudy.validate import errors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_host.interpreting(), reason="tests the compiled kernels"),
]
STEPS = {"v1": v1_flash, "v2": v2_lean, "v3": v3_tma, "v3-tma": v3_tma}
BF16 = torch.bfloat16


@pytest.fixture(params=STEPS)
def step(request, monkeypatch):
    """Each step; v3 as it chooses by the work of a call, and through descriptors always."""
    if request.param == "v3-tma":
        if torch.cuda.get_device_capability() < (9, 0):
            pytest.skip("needs the copy engine of sm_90")
        monkeypatch.setattr(v3_tma, "TMA_MIN_WORK", 1)
    return STEPS[request.param]


def inputs(b, h, h_kv, n_q, n_k, d):
    """q, k, v, do as a projection leaves them: views of (B, N, H, D)."""
    shapes = [(b, n_q, h, d), (b, n_k, h_kv, d), (b, n_k, h_kv, d), (b, n_q, h, d)]
    return [torch.randn(s, device="cuda", dtype=BF16).transpose(1, 2) for s in shapes]


def gradients(step, q, k, v, do, causal=True):
    """o and the three gradients of one call."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o = step.attention(*leaves, causal=causal)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


SHAPES = [  # b, h, h_kv, n_q, n_k, d: every tile, ragged, grouped, with empty rows
    (1, 4, 2, 700, 1100, 128),
    (2, 4, 2, 1100, 700, 128),
    (2, 6, 2, 333, 450, 64),
    (1, 4, 1, 130, 257, 256),
    (1, 2, 2, 190, 190, 40),
]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(step, shape, causal):
    verdict = errors.check(step.attention, *inputs(*shape), causal=causal, lse=True)
    assert verdict.ok, verdict.reasons


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_rising_scores(step, d, dtype, causal):
    """Far past what fp16, and exp2 in fp32, can hold beside the first tile's maximum."""
    q, k, v, _ = (t.to(dtype) for t in inputs(1, 2, 2, 700, 1100, d))
    q[..., 0] = 8
    for rise in (20, 300):
        k[..., 0] = torch.linspace(0, rise * d**0.5 / 8, 1100, device="cuda")
        verdict = errors.check(step.attention, q, k, v, causal=causal, lse=True)
        assert verdict.ok, (rise, verdict.reasons)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_200_calls_bit_by_bit(step, d):
    """A tile that is overwritten while a product still reads it shows as a rare difference."""
    tensors = inputs(4, 2048 // d, 512 // d, 1024, 1024, d)
    first = gradients(step, *tensors)
    for _ in range(200):
        assert all(map(torch.equal, first, gradients(step, *tensors)))


def test_more_heads_than_a_grid_axis(step):
    q, k, v, do = (t.repeat(70_000, 1, 1, 1) for t in inputs(1, 1, 1, 3, 5, 64))
    few = gradients(step, *(t[:2] for t in (q, k, v, do)))
    for a, b in zip(gradients(step, q, k, v, do), few, strict=True):
        assert torch.equal(a[:2], b)
        assert torch.equal(a[-2:], b)


def test_more_elements_than_32_bits(step):
    """Rows of one head far apart, and more tiles of queries than a second grid axis has."""
    far = torch.zeros(2, 1, 17_000_000, 64, device="cuda", dtype=BF16)  # 2.2e9 elements
    rows = far.as_strided((2, 1, 128, 64), (17_000_000 * 64, 64, 130_000 * 64, 1))
    rows.copy_(torch.randn(2, 1, 128, 64))
    near = rows.contiguous()
    got, want = gradients(step, rows, rows, rows, rows), gradients(step, near, near, near, near)
    assert all(map(torch.equal, got, want))
    o = step.attention(far, near, near)[:, :, ::130_000][:, :, :128]
    assert (o - step.attention(rows, near, near)).abs().max() <= 2e-2  # tiles of another size


def test_extra_memory_is_linear(step):
    """Outputs, lse, and a number or two a row for the backward: up to 131,072 tokens."""
    d, heads = 64, 2
    for n in (1024, 16_384, 131_072):
        q, k, v, do = inputs(1, heads, heads, n, n, d)
        gradients(step, q[:, :, :256], k[:, :, :256], v[:, :, :256], do[:, :, :256])
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a block of the cache may be larger than what it is taken for
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(step, q, k, v, do)
        extra = torch.cuda.max_memory_allocated() - before
        line = 4 * q.numel() * 2 + heads * n * 4 * (1 + 2)  # o, dq, dk, dv; lse; two numbers a row
        assert extra <= line + 8 * 512, (n, extra, line)  # the allocator's rounding


def test_pytorch_compiles_exports_and_captures(step):
    tensors = inputs(4, 16, 4, 1024, 1024, 128)  # enough work for descriptors
    want = gradients(step, *tensors)
    q, k, v, do = tensors
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    function = functools.partial(step.attention, causal=True)

    torch._dynamo.reset()
    o = torch.compile(function, fullgraph=True)(*leaves)
    for a, b in zip([o, *torch.autograd.grad(o, leaves, do)], want, strict=True):
        assert torch.equal(a, b)

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return function(q, k, v)

    exported = torch.export.export(Module(), (q, k, v)).module()
    assert torch.equal(exported(q, k, v), want[0])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(step, *tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(step, *tensors)
    for t in captured:
        t.zero_()
    graph.replay()
    for a, b in zip(captured, want, strict=True):
        assert torch.equal(a, b)


MEMCHECK = """
import torch
from flashstudy.kernels import v2_lean, v3_tma
for module, work in ((v2_lean, None), (v3_tma, 1), (v3_tma, 1 << 60)):
    if work:
        v3_tma.TMA_MIN_WORK = work
    shapes = ((1, 70, 600, 128), (2, 130, 65, 64), (2, 33, 100, 40), (1, 70, 130, 256))
    for h_kv, n_q, n_k, d in shapes:
        q, do = (torch.randn(1, 2, n_q, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.randn(1, h_kv, n_k, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        o, lse = module.forward(q, k, v, True, 0.1, False)
        module.backward(do, q, k, v, o, lse, True, 0.1, False)
torch.cuda.synchronize()
print("ran")
"""


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
def test_memcheck():
    """No access outside an allocation, each tensor having one of its own."""
    got = subprocess.run(
        ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c",
         MEMCHECK],
        capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip
    if "Device not supported" in got.stdout:  # some virtual machines keep it from the GPU
        pytest.skip("compute-sanitizer cannot attach to this GPU")
    assert got.returncode == 0, got.stdout[-3000:] + got.stderr[-3000:]
    assert "ran" in got.stdout
    assert "ERROR SUMMARY: 0 errors" in got.stdout
