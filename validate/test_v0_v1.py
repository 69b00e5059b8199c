"""The two text-book steps against fp64, by the interpreter: values, gradients, layouts, edges."""

import math

import pytest
import torch
from flashstudy.kernels import _host, v0_naive, v1_flash
from flashstudy.validate import errors

ON_GPU = torch.cuda.is_available() and not _host.interpreting()
DEVICE = "cuda" if ON_GPU else "cpu"
if not ON_GPU and not _host.interpreting():
    pytest.skip("needs a CUDA GPU or TRITON_INTERPRET=1", allow_module_level=True)
FP16, FP32 = torch.float16, torch.float32
STEPS = {"v0": v0_naive, "v1": v1_flash}
both = pytest.mark.parametrize("step", STEPS)


def draw(*shape, dtype=FP16, seed=0):
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def inputs(n_q, n_k, d, h=2, h_kv=2, dtype=FP16):
    """q, k, v, do of one batch."""
    q, do = (draw(1, h, n_q, d, dtype=dtype, seed=s) for s in (1, 2))
    k, v = (draw(1, h_kv, n_k, d, dtype=dtype, seed=s) for s in (3, 4))
    return q, k, v, do


def judge(step, *tensors, **options):
    """Values, lse and gradients within the budgets of `errors`."""
    q = tensors[0]
    lse = q.dtype if step == "v0" else True  # v0 stores its scores at the precision of q
    attention = STEPS[step].attention
    expectation = errors.expect(*tensors, lse=lse, **options)
    verdict = errors.verdict(errors.run(attention, *tensors, lse=True, **options), expectation)
    assert verdict.ok, verdict.reasons


SHAPES = [  # n_q, n_k, d, h, h_kv: ragged at every tile, wide and tall, one row, one key
    (1, 1, 64, 1, 1), (1, 2, 8, 2, 2), (2, 1, 16, 2, 2), (3, 3, 1, 2, 2), (1, 239, 32, 2, 1),
    (129, 1, 40, 1, 1), (3, 199, 64, 1, 1), (64, 32, 64, 1, 1), (63, 130, 80, 1, 1),
    (33, 65, 111, 2, 1), (40, 70, 16, 6, 2), (130, 131, 59, 1, 1), (17, 40, 160, 3, 3),
    (20, 33, 256, 1, 1), (32, 48, 32, 6, 1),
]  # fmt: skip


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s)))
@both
def test_against_fp64(step, shape, causal):
    n_q, n_k, d, h, h_kv = shape
    dtype = FP16 if (n_q + d) % 2 == 0 else FP32
    judge(step, *inputs(n_q, n_k, d, h, h_kv, dtype), causal=causal)


@both
def test_the_other_dtype(step):
    for dtype in (FP16, FP32):
        judge(step, *inputs(37, 50, 24, 2, 1, dtype), causal=True)


@both
def test_empty_rows(step):
    """More queries than keys, causal: the first rows see nothing and give 0, lse -inf, dq 0."""
    q, k, v, do = inputs(100, 30, 32)
    judge(step, q, k, v, do, causal=True)
    got = errors.run(STEPS[step].attention, q, k, v, do, causal=True, lse=True)
    assert not got["o"][:, :, :70].any()
    assert not got["dq"][:, :, :70].any()
    assert (got["lse"][:, :, :70] == -math.inf).all()
    assert got["lse"][:, :, 70:].isfinite().all()


@pytest.mark.parametrize("causal", [False, True])
@both
def test_no_queries_no_keys_no_batch(step, causal):
    for b, n_q, n_k in ((1, 0, 5), (1, 5, 0), (1, 0, 0), (0, 4, 4)):
        q, do = draw(b, 2, n_q, 8), draw(b, 2, n_q, 8)
        k, v = draw(b, 1, n_k, 8), draw(b, 1, n_k, 8)
        got = errors.run(STEPS[step].attention, q, k, v, do, causal=causal, lse=True)
        assert not got["o"].any()
        assert (got["lse"] == -math.inf).all()
        for name, like in (("dq", q), ("dk", k), ("dv", v)):
            assert got[name].shape == like.shape
            assert not got[name].any()


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.25])
@both
def test_scale(step, scale):
    judge(step, *inputs(40, 70, 16, 1, 1), scale=scale, causal=True)


@both
def test_large_values(step):
    """Logits of ±1e4, all equal logits, one huge key: nothing overflows, nothing becomes NaN."""
    for dtype in (FP16, FP32):
        q, k, v, do = inputs(40, 70, 16, 1, 1, dtype)
        big = 1e4 / (q.float() @ k.float().mT).abs().max().item()
        judge(step, q * big, k, v, scale=1.0)
    assert all(
        t.isfinite().all() for t in errors.run(v1_flash.attention, q * big, k, v, do).values()
    )
    judge(step, q * 0, k, v, do, causal=True)
    huge = k.clone()
    huge[:, :, 7] *= 1e3
    judge(step, q, huge, v, do, causal=True)


@both
def test_first_key_tile_fully_masked(step):
    """A query tile that starts with rows without keys, and one whose first tile hides all."""
    for n_q, n_k in ((130, 66), (129, 129), (200, 5)):
        judge(step, *inputs(n_q, n_k, 16, 1, 1), causal=True)


@both
def test_ones_and_columns(step):
    """V = 1 gives 1; a one-hot V gives a column of P, whose rows sum to 1."""
    q, k, _, _ = inputs(33, 20, 32, 1, 1, FP32)
    attention = STEPS[step].attention
    ones = attention(q, k, torch.ones_like(k))
    assert (ones - 1).abs().max() <= 1e-6
    p = attention(q, k, torch.eye(20, 32, device=DEVICE).expand(1, 1, 20, 32))
    assert (p[..., :20].sum(-1) - 1).abs().max() <= 1e-6
    reference = ((q.double() @ k.double().mT) / math.sqrt(32)).softmax(-1)
    assert (p[..., :20] - reference).abs().max() <= 1e-6


@both
def test_future_keys_do_not_matter(step):
    """NaN in keys that the earlier rows may not see leaves those rows bit by bit as they were."""
    q, k, v, _ = inputs(90, 90, 16, 1, 1)
    before = STEPS[step].attention(q, k, v, causal=True)
    k[:, :, 50:] = math.nan
    after = STEPS[step].attention(q, k, v, causal=True)
    assert torch.equal(before[:, :, :50], after[:, :, :50])
    assert after[:, :, 50:].isnan().all()


def layouts():
    """name -> (q, k, v) of equal meaning in memory as PyTorch code brings it."""
    b, h, n, d = 2, 4, 37, 24
    yield "bnhd views", [draw(b, n, h, d, seed=s).transpose(1, 2) for s in range(3)]
    qkv = draw(b, n, 3 * h, d).transpose(1, 2)
    yield "fused qkv", list(qkv.split(h, dim=1))
    yield "fused qkv last", list(draw(b, h, n, 3 * d).split(d, dim=3))
    kv = [draw(b, 1, n, d, seed=s).expand(b, h, n, d) for s in (1, 2)]
    yield "expanded heads", [draw(b, h, n, d), *kv]
    yield "expanded batch", [draw(b, h, n, d), *(t[:1].expand(b, h, n, d) for t in kv)]
    flat = draw(3 * b * h * n * d + 3)
    size = b * h * n * d
    yield (
        "odd offsets",
        [flat[1 + i * size : 1 + (i + 1) * size].view(b, h, n, d) for i in range(3)],
    )
    yield "every other row", [draw(b, h, 2 * n, d, seed=s)[:, :, ::2] for s in range(3)]
    yield "every other head", [draw(b, 2 * h, n, d, seed=s)[:, ::2] for s in range(3)]
    rows = draw(b * h * n * d)
    yield "overlapping rows", [rows.as_strided((b, h, n, d), (900, 200, 5, 1))] * 3


@pytest.mark.parametrize("layout", [name for name, _ in layouts()])
@both
def test_strides(step, layout):
    """Any strides with a contiguous last dim, read where they are; results equal the copy's."""
    q, k, v = dict(layouts())[layout]
    do = draw(*q.shape, seed=9).transpose(1, 2).contiguous().transpose(1, 2)
    got = errors.run(STEPS[step].attention, q, k, v, do, causal=True, lse=True)
    plain = (t.contiguous() for t in (q, k, v, do))
    want = errors.run(STEPS[step].attention, *plain, causal=True, lse=True)
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert got["o"].stride(3) == 1
    if layout in ("bnhd views", "fused qkv"):  # the reshape behind it needs no copy
        assert got["o"].transpose(1, 2).is_contiguous()


@both
def test_gradient_of_a_sum(step):
    """o.sum() sends back one expanded number, whose last dim is not contiguous."""
    q, k, v, _ = (t.requires_grad_() for t in inputs(9, 12, 8, 1, 1, FP32))
    got = torch.autograd.grad(STEPS[step].attention(q, k, v).sum(), (q, k, v))
    want = torch.autograd.grad(STEPS[step].attention(q, k, v), (q, k, v), torch.ones_like(q))
    assert all(map(torch.equal, got, want))


@both
def test_repeats_bit_by_bit(step):
    q, k, v, do = inputs(70, 50, 16, 4, 2)
    runs = [errors.run(STEPS[step].attention, q, k, v, do, causal=True, lse=True) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(runs[0][n], other[n]) for n in runs[0])


@both
def test_heads_and_batches_are_independent(step):
    q, k, v, _ = (torch.cat([t, t.flip(2)]) for t in inputs(20, 30, 16, 2, 2))
    whole = STEPS[step].attention(q, k, v)
    for b in range(2):
        for h in range(2):
            one = (t[b : b + 1, h : h + 1] for t in (q, k, v))
            assert torch.equal(STEPS[step].attention(*one), whole[b : b + 1, h : h + 1])


def test_every_row_of_the_tables_is_right(monkeypatch):
    """The tiles for GPUs, which the interpreter's (0, 0) never meets, compute the same numbers."""
    tensors = inputs(70, 75, 16, 1, 1)
    for d in (64, 128, 256):
        for table in ("FORWARD", "DQ", "DKDV"):
            sm_90, _, full_precision = getattr(v1_flash, table)[d]
            monkeypatch.setattr(v1_flash, table, {64: (sm_90, sm_90, full_precision)})
        for dtype in (FP16, FP32):
            judge("v1", *(t.to(dtype) for t in tensors), causal=True)
        monkeypatch.undo()


@pytest.mark.skipif(not ON_GPU, reason="a GPU's grid and address space")
def test_many_heads_and_far_rows_on_a_gpu():
    judge("v1", *(t.expand(70000, 1, -1, -1) for t in inputs(3, 5, 16, 1, 1)), causal=True)
    far = torch.zeros(1, 1, 17_000_000, 128, device="cuda", dtype=FP16)  # 2.2e9 elements
    rows = far.as_strided((1, 1, 128, 64), (0, 0, 17_000_000, 1)).copy_(draw(1, 1, 128, 64))
    for step in STEPS.values():
        near = rows.contiguous()
        assert torch.equal(step.attention(rows, rows, rows), step.attention(near, near, near))
