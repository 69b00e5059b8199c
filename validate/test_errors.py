"""The error budget accepts what is right and rejects what is wrong; the adapters stay within it."""

import math

import pytest
import torch
from flashstudy.backends import load, why_not
from flashstudy.validate import errors, faults

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
SHAPE = {"b": 2, "h": 4, "h_kv": 2, "n_q": 70, "n_k": 101, "d": 32}


def tensors(dtype, *, b, h, h_kv, n_q, n_k, d):
    shapes = (b, h, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d), (b, h, n_q, d)
    return [torch.randn(s).to(dtype) for s in shapes]


def by_loops(q, k, v, causal, scale):
    """o and LSE by Python numbers, one query at a time: nothing shared with errors.compute."""
    b, h, n_q, _ = q.shape
    o, lse = torch.zeros(q.shape, dtype=torch.float64), torch.full((b, h, n_q), -math.inf)
    for x in range(b):
        for y in range(h):
            z = y // (h // k.shape[1])
            for i in range(n_q):
                seen = range(min(k.shape[2], i + k.shape[2] - n_q + 1) if causal else k.shape[2])
                s = [scale * sum(a * c for a, c in zip(q[x, y, i].tolist(), k[x, z, j].tolist(), strict=True)) for j in seen]  # fmt: skip # noqa: E501
                total = sum(math.exp(t) for t in s)
                if s:
                    lse[x, y, i] = math.log(total)
                for j, t in enumerate(s):
                    o[x, y, i] += math.exp(t) / total * v[x, z, j].double()
    return o, lse


# ---- The reference -------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_q", "n_k"), [(3, 5), (5, 3), (4, 4), (1, 6), (3, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_reference_against_loops(n_q, n_k, causal):
    q, k, v, _ = tensors(FP32, b=2, h=4, h_kv=2, n_q=n_q, n_k=n_k, d=3)
    got = errors.compute(q, k, v, causal=causal, scale=0.7)
    o, lse = by_loops(q.double(), k.double(), v, causal, 0.7)
    torch.testing.assert_close(got["o"], o, rtol=0, atol=1e-13)
    torch.testing.assert_close(got["lse"].float(), lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
def test_a_scale_of_zero_averages(dtype):
    """Uninitialised memory must not stand in for 0 · q kᵀ (torch's bf16 on some CPUs, beta=0)."""
    q, k, v, do = tensors(dtype, **SHAPE)
    for _ in range(3):
        torch.full((2, 4, 70, 101), math.nan, dtype=dtype)  # freed: likely to be handed out again
        verdict = errors.check(load("naive"), q, k, v, do, scale=0.0)
        assert verdict.ok, verdict.reasons


@pytest.mark.parametrize(("n_q", "n_k"), [(6, 9), (9, 6)])
@pytest.mark.parametrize("causal", [False, True])
def test_reference_gradients_against_finite_differences(n_q, n_k, causal):
    q, k, v, do = (t.double() for t in tensors(FP32, b=1, h=2, h_kv=1, n_q=n_q, n_k=n_k, d=4))
    got = errors.compute(q, k, v, do, causal=causal, scale=0.6)

    def loss(q, k, v):
        return (errors.compute(q, k, v, causal=causal, scale=0.6)["o"] * do).sum()

    for name, t, at in (("dq", q, 0), ("dk", k, 1), ("dv", v, 2)):
        direction = torch.randn_like(t)
        moved = [[x for x in (q, k, v)] for _ in range(2)]
        for sign, m in zip((1, -1), moved, strict=True):
            m[at] = t + sign * 1e-5 * direction
        slope = (loss(*moved[0]) - loss(*moved[1])) / 2e-5
        assert slope.item() == pytest.approx((got[name] * direction).sum().item(), rel=1e-6)


def test_reference_does_not_depend_on_the_chunks(monkeypatch):
    q, k, v, do = tensors(FP32, **SHAPE)
    whole = errors.compute(q, k, v, do, causal=True)
    for chunk in (64, 2000, 50_000):  # rows of a head, a head, a few heads
        monkeypatch.setitem(errors.CHUNK, "cpu", chunk)
        parts = errors.compute(q, k, v, do, causal=True)
        for name in ("o", "lse", "dq", "dk", "dv"):
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-12, atol=1e-14)
        assert parts["logit"] == pytest.approx(whole["logit"])


@pytest.mark.parametrize(
    ("x", "dtype", "wanted"),
    [
        (1.0, FP16, 2**-10),
        (1.99, BF16, 2**-7),
        (-4.0, FP32, 2**-21),
        (0.0, FP16, 2**-24),
        (1e-7, FP16, 2**-24),
        (65504.0, FP16, 32.0),
    ],
)
def test_ulp(x, dtype, wanted):
    assert errors.ulp(x, dtype) == wanted


# ---- The verdict ---------------------------------------------------------------------------------


@pytest.fixture(params=[FP16, BF16, FP32], ids=["fp16", "bf16", "fp32"])
def judged(request):
    """Inputs, expectation and the yardstick's own outputs."""
    q, k, v, do = tensors(request.param, **SHAPE)
    expectation = errors.expect(q, k, v, do, causal=True, lse=True)
    eager = errors.compute(q, k, v, do, causal=True, dtype=request.param)
    exact = errors.compute(q, k, v, causal=True, dtype=FP32)["lse"]
    return expectation, {n: eager[n] for n in ("o", "dq", "dk", "dv")} | {"lse": exact}


def test_the_yardstick_is_accepted(judged):
    expectation, outputs = judged
    verdict = errors.verdict(outputs, expectation)
    assert verdict.ok, verdict.reasons
    assert 0 < verdict.over <= 1
    assert set(verdict.stats) == {"o", "lse", "dq", "dk", "dv"}


def test_the_rounded_reference_is_accepted(judged):
    expectation, _ = judged
    outputs = {n: t.to(expectation.dtype) for n, t in expectation.reference.items() if n != "lse"}
    verdict = errors.verdict(outputs | {"lse": expectation.reference["lse"].float()}, expectation)
    assert verdict.ok, verdict.reasons


@pytest.mark.parametrize("name", ["o", "lse", "dq", "dk", "dv"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_rejected(judged, name, bad):
    expectation, outputs = judged
    broken = outputs[name].clone()
    broken.view(-1)[7] = bad
    verdict = errors.verdict(outputs | {name: broken}, expectation)
    assert not verdict.ok
    assert verdict.over == math.inf
    assert f"{name}: 1 of " in verdict.reasons[0] or "-inf in the wrong rows" in verdict.reasons[0]


@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
def test_one_wrong_number_is_rejected(judged, name):
    expectation, outputs = judged
    broken = outputs[name].clone()
    largest = expectation.reference[name].abs().argmax()
    broken.view(-1)[largest] *= 1.1
    verdict = errors.verdict(outputs | {name: broken}, expectation)
    assert not verdict.ok
    assert f"{name}: max error" in verdict.reasons[0]


@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
def test_a_small_error_everywhere_is_rejected_by_the_mean(judged, name):
    """Each number within the maximum, all of them together too far off."""
    expectation, _ = judged
    true, budget = expectation.reference[name], expectation.budget[name]
    sign = torch.randint(0, 2, true.shape) * 2 - 1
    outputs = {n: t.to(expectation.dtype) for n, t in expectation.reference.items()}
    outputs["lse"] = expectation.reference["lse"].float()
    outputs[name] = (true + sign * 0.8 * budget.max).to(expectation.dtype)
    verdict = errors.verdict(outputs, expectation)
    assert not verdict.ok
    assert f"{name}: mean error" in verdict.reasons[0]


@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
@pytest.mark.parametrize("gain", [0.01, -0.01])
def test_a_systematic_error_is_rejected_by_the_gain(name, gain):
    """A few roundings of bf16, always in the same direction."""
    q, k, v, do = tensors(BF16, **SHAPE)
    expectation = errors.expect(q, k, v, do)
    outputs = {n: t.to(BF16) for n, t in expectation.reference.items()}
    outputs[name] = ((1 + gain) * expectation.reference[name]).to(BF16)
    verdict = errors.verdict(outputs, expectation)
    assert not verdict.ok
    assert verdict.stats[name].gain == pytest.approx(gain, rel=0.05)
    assert f"{name}: gain {gain:+.1g}"[:-1] in verdict.reasons[0]


def test_form_is_part_of_the_verdict(judged):
    expectation, outputs = judged
    o = outputs["o"]
    wrong = {
        "expected shape": o[:, :, :-1],
        "expected torch": o.double(),
        "expected a contiguous last dim": o.mT.contiguous().mT,
        "expected a tensor": None,
        "expected it on": o.to("meta"),
    }
    for text, value in wrong.items():
        verdict = errors.verdict(outputs | {"o": value}, expectation)
        assert not verdict.ok
        assert text in verdict.reasons[0]
        assert verdict.over == math.inf


def test_the_lse_of_empty_rows_is_minus_infinity():
    q, k, v, _ = tensors(FP32, b=1, h=1, h_kv=1, n_q=5, n_k=2, d=8)
    expectation = errors.expect(q, k, v, causal=True, lse=True)
    right = {n: t.float() for n, t in expectation.reference.items()}
    assert errors.verdict(right, expectation).ok
    for value in (0.0, math.inf, -1e30, math.nan):
        lse = right["lse"].clone()
        lse[0, 0, 0] = value
        assert not errors.verdict(right | {"lse": lse}, expectation).ok


def test_bias_is_signed():
    q, k, v, _ = tensors(FP32, **SHAPE)
    expectation = errors.expect(q, k, v)
    for shift in (1e-3, -1e-3):
        stat = errors.verdict({"o": expectation.reference["o"].float() + shift}, expectation).stats
        assert stat["o"].bias == pytest.approx(shift, rel=1e-2)


def test_inputs_that_judge_nobody_are_an_error():
    q, k, v, _ = tensors(FP16, **SHAPE)
    with pytest.raises(errors.BadCase, match="not finite"):
        errors.expect(q, k * math.nan, v)
    with pytest.raises(errors.BadCase, match="not finite"):
        errors.expect(q * 1000, k * 1000, v)  # logits overflow fp16: the yardstick is NaN


def test_small_cases_measure_the_yardstick_several_times(monkeypatch):
    small = tensors(FP16, b=1, h=1, h_kv=1, n_q=1, n_k=3, d=4)
    draws = list(errors._draws(*small))
    assert len(draws) == errors.MAX_DRAWS
    assert all(a is b for a, b in zip(draws[0], small, strict=True))
    assert not any(torch.equal(draws[1][2], v) for v in (small[2], draws[2][2]))
    assert len(list(errors._draws(*tensors(FP16, **SHAPE)))) == 1
    many = errors.expect(*small).budget["o"]
    monkeypatch.setattr(errors, "MAX_DRAWS", 1)
    once = errors.expect(*small).budget["o"]
    assert many.max > once.max
    assert many.mean > once.mean


def test_small_cases_draw_until_luck_is_out():
    """The yardstick of 4 numbers is often exact; a right answer must pass all the same."""
    good = faults.attention()
    for seed in range(60):
        torch.manual_seed(seed)
        q, k, v, do = tensors(FP16, b=1, h=1, h_kv=1, n_q=1, n_k=2 + seed % 3, d=4)
        verdict = errors.check(good, q, k, v, do, lse=True)
        assert verdict.ok, (seed, verdict.reasons)


SUBTLE = (
    "scale 1 % off",
    "dq 1 % off",
    "dk 1 % off",
    "dv 1 % off",
    "P rounded to bf16",
    "TF32 products",
)


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("fault", ["", *SUBTLE])
def test_one_ordinary_call_shows_a_subtle_fault(fault, dtype):
    """Without help from traps or the LSE: 2 batches of 4 heads, 70 by 101."""
    if not faults.shows_in(fault, dtype):
        pytest.skip("changes nothing in this dtype")
    verdict = errors.check(faults.attention(fault), *tensors(dtype, **SHAPE))
    assert verdict.ok == (not fault), verdict


def test_a_long_sequence_shows_what_an_absolute_tolerance_hides():
    """At N_K = 4096 outputs shrink to 1/64: an error of a tenth of them is below 1e-2."""
    q, k, v, _ = tensors(FP16, b=1, h=1, h_kv=1, n_q=64, n_k=4096, d=32)
    true = errors.compute(q, k, v)["o"]
    wrong = (true * 0.9).half()
    assert (wrong - true).abs().max() < 1e-2
    assert not errors.verdict({"o": wrong}, errors.expect(q, k, v)).ok


# ---- The adapters that run anywhere --------------------------------------------------------------

ADAPTERS = ("naive", "sdpa", "sdpa-math", "sdpa-flash")


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(33, 33), (20, 45), (45, 20), (1, 30), (7, 0)])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name, n_q, n_k, causal, dtype):
    """Bottom-right causal with N_Q != N_K, empty rows, grouped heads, gradients."""
    assert why_not(name, "cpu", dtype) is None
    q, k, v, do = tensors(dtype, b=2, h=4, h_kv=2, n_q=n_q, n_k=n_k, d=24)
    verdict = errors.check(load(name), q, k, v, do, causal=causal, scale=0.3)
    assert verdict.ok, verdict.reasons


def test_naive_never_builds_the_mask_twice():
    """The mask of a timed call comes from the cache."""
    from flashstudy.backends import naive

    q, k, v, _ = tensors(FP32, **SHAPE)
    naive._hidden.cache_clear()
    for _ in range(3):
        naive.attention(q, k, v, causal=True)
    assert naive._hidden.cache_info().misses == 1


@pytest.mark.parametrize(("ulps", "ok"), [(1.4, True), (6.0, False)])
def test_an_approximate_reciprocal_is_no_error(ulps, ok):
    """Keys that take all the weight: eager normalises by exactly 1, a flash kernel by 1/l."""
    q, k, v, _ = tensors(FP32, b=1, h=1, h_kv=1, n_q=113, n_k=139, d=64)
    expectation = errors.expect(q * 100, k * 100, v)
    right = expectation.reference["o"].float()
    got = right * (1 + ulps * torch.finfo(FP32).eps)
    verdict = errors.verdict({"o": got}, expectation)
    assert verdict.ok == ok, verdict.reasons


def test_products_of_ten_bits_pass_like_fp16_and_not_as_fp32():
    """What TF32 does to fp32 tensors: the operands of each product lose 13 bits, nothing else."""

    def round_tf32(t):
        return ((t.view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)

    def attention(q, k, v, *, causal=False, scale=None):
        s = round_tf32(q) @ round_tf32(k).mT / math.sqrt(q.shape[-1])
        return round_tf32(s.softmax(-1)) @ round_tf32(v)

    given = tensors(torch.float32, b=1, h=2, h_kv=2, n_q=128, n_k=128, d=64)[:3]
    got = errors.run(attention, *given)
    assert errors.verdict(got, errors.expect(*given, like=torch.float16)).ok
    assert errors.verdict(got, errors.expect(*given)).over > 100
