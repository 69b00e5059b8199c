"""The portable steps above the text-book one, interpreted on the CPU: v2_lean and v3_tma.

Values and gradients against fp64 over ragged shapes, grouped heads, causal offsets, odd head dims,
strides and extreme logits; repeats bit by bit; the rules that choose a tile and a path.
"""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from flashstudy.bench import tune
from flashstudy.kernels import _host, v2_lean, v3_tma
from flashstudy.validate import errors

pytestmark = pytest.mark.skipif(not _host.interpreting(), reason="tests the interpreted kernels")

STEPS = {"v2": v2_lean, "v3": v3_tma, "v3-tma": v3_tma, "v3-tma-first": v3_tma}
FP16_MOST = 65504.0  # that bf16 is interpreted wrongly need not leave its kernel untested


@pytest.fixture(params=STEPS)
def attention(request, monkeypatch):
    """Each step's function; v3 through pointers, as here by itself, and through descriptors, these
    with every tile's maximum, as fp16 has it, and with the first one's, as bf16."""
    module = STEPS[request.param]
    if request.param == "v3-tma-first":
        monkeypatch.setitem(v3_tma.MOST, torch.float16, FP16_MOST)
    if request.param.startswith("v3-tma"):
        monkeypatch.setattr(_host, "capability", lambda device: (9, 0))
        monkeypatch.setattr(v3_tma, "TMA_MIN_WORK", 1)
    return module.attention


def inputs(n_q, n_k, d, heads=(2, 2), dtype=torch.float16, batch=1, scale=1.0):
    g = torch.Generator().manual_seed(n_q * 1000 + n_k * 10 + d)
    h, h_kv = heads

    def new(h, n):  # (B, N, H, D) memory, as a projection leaves it
        return (torch.randn(batch, n, h, d, generator=g) * scale).to(dtype).transpose(1, 2)

    return new(h, n_q), new(h_kv, n_k), new(h_kv, n_k), new(h, n_q)  # q, k, v, do


def judge(attention, q, k, v, do, **options):
    got = errors.check(attention, q, k, v, do, lse=True, **options)
    assert got.ok, got.reasons


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("n_q", "n_k", "d"), [(1, 1, 16), (1, 70, 64), (65, 63, 40), (130, 70, 8), (70, 130, 72)]
)
def test_values(attention, n_q, n_k, d, causal):
    judge(attention, *inputs(n_q, n_k, d), causal=causal)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
def test_grouped_heads(attention, heads):
    judge(attention, *inputs(40, 67, 16, heads, batch=2), causal=True)


@pytest.mark.parametrize(("n_q", "n_k", "d"), [(70, 135, 256), (135, 70, 200)])
def test_widest_heads(attention, n_q, n_k, d):
    """Two tiles of queries and of keys where v3 through descriptors has dK and dV apart."""
    judge(attention, *inputs(n_q, n_k, d, heads=(2, 1)), causal=True)


@pytest.mark.parametrize("scale", [None, 0.0, -0.2, 1e3])
def test_scale(attention, scale):
    """0 is the plain mean, a negative one turns the order around, a large one picks one key."""
    judge(attention, *inputs(20, 33, 16, dtype=torch.float32), causal=True, scale=scale)


def test_huge_logits(attention):
    judge(attention, *inputs(40, 40, 16, dtype=torch.float32, scale=50.0), causal=True)


def rising(n_q, n_k, d, rise, dtype=torch.float16):
    """Scores that rise by `rise` from the first key to the last, beside noise."""
    q, k, v, do = inputs(n_q, n_k, d, dtype=dtype)
    q[..., 0] = 8
    k[..., 0] = torch.linspace(0, rise * d**0.5 / 8, n_k)
    return q, k, v, do


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(70, 300), (200, 150)])
@pytest.mark.parametrize("rise", [8, 20, 300])
def test_rising_scores(attention, n_q, n_k, rise, causal):
    """Past the first tile's maximum by less than the largest number of fp16, by more, of fp32."""
    q, k, v, _ = rising(n_q, n_k, 64, rise)
    got = errors.check(attention, q, k, v, lse=True, causal=causal)
    assert got.ok, got.reasons


@pytest.mark.parametrize("rise", [20, 300])
def test_rising_scores_are_done_again(monkeypatch, rise):
    """What v3 would make of them with the first tile's maximum alone."""
    monkeypatch.setattr(_host, "capability", lambda device: (9, 0))
    monkeypatch.setattr(v3_tma, "TMA_MIN_WORK", 1)
    q, k, v, _ = rising(70, 300, 64, rise)
    monkeypatch.setitem(v3_tma.MOST, torch.float16, FP16_MOST)
    assert v3_tma.attention(q, k, v).isfinite().all()
    monkeypatch.setitem(v3_tma.MOST, torch.float16, float("inf"))
    assert not v3_tma.attention(q, k, v).isfinite().all()


def test_odd_head_dim_and_fp32(attention):
    judge(attention, *inputs(33, 17, 59, dtype=torch.float32), causal=True)


def test_strides(attention):
    """Slices of a fused projection, and one head of keys expanded over all heads."""
    q, k, v, do = inputs(35, 35, 32, heads=(2, 1))
    fused = torch.cat([q, q.flip(2), do], dim=1)  # [B, 3 H, N, D]
    q, do = fused[:, :2], fused[:, 4:]
    judge(attention, q, k.expand(-1, 2, -1, -1), v.expand(-1, 2, -1, -1), do, causal=True)


def test_unaligned_storage(attention):
    """A base off the 16 bytes that the copy engine wants: pointers, not a wrong answer."""
    q, k, v, do = inputs(20, 20, 16)
    k = torch.empty(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape).copy_(k)
    judge(attention, q, k, v, do)


@pytest.mark.parametrize(("n_q", "n_k"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_do(attention, n_q, n_k):
    q, k, v, do = (t.requires_grad_() for t in inputs(n_q, n_k, 16))
    o, lse = attention(q, k, v, return_lse=True)
    o.backward(do)
    assert not o.any()
    assert (lse == -torch.inf).all()
    assert not any(t.grad.any() for t in (q, k, v))


def test_repeats_bit_by_bit(attention):
    q, k, v, do = inputs(70, 70, 16, heads=(4, 2))
    runs = [errors.run(attention, q, k, v, do, causal=True, lse=True) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_only_visible_keys_count(attention):
    """NaN in keys that a query does not see must not reach it."""
    q, k, v, _ = inputs(40, 40, 16)
    o = attention(q[:, :, :20], k[:, :, :20], v[:, :, :20], causal=True)
    k[:, :, 20:] = torch.nan
    whole = attention(q, k, v, causal=True)
    assert torch.equal(whole[:, :, :20], o)


def test_paths():
    """Descriptors from sm_90 on, for work that hides their price, where the addresses allow."""
    t = torch.empty(1, 2, 8, 16, dtype=torch.float16)
    big, small = v3_tma.TMA_MIN_WORK, v3_tma.TMA_MIN_WORK - 1
    assert v3_tma._path((9, 0), big, t, t) == "tma"
    assert v3_tma._path((8, 0), big, t, t) == "pointers"
    assert v3_tma._path((9, 0), small, t, t) == "pointers"
    assert v3_tma._path((9, 0), big, t.float()) == "pointers"
    assert v3_tma._path((9, 0), big, t, t.expand(4, -1, -1, -1)) == "pointers"  # stride 0
    assert v3_tma._path((9, 0), big, t.flatten()[1:241].view(1, 1, 15, 16)) == "pointers"
    assert v3_tma._path((9, 0), big, torch.empty(1, 2, 8, 12, dtype=torch.float16)) == "pointers"


def test_forward_rows_at_head_dim_64():
    """Short tiles for causal calls of few keys, another for every maximum; others by path alone."""
    few = v3_tma.FEW_KEYS
    asked = {
        ("tma", 64, False, few, 1.0): (64, 128, 4, 2),
        ("tma", 64, False, 1 << 17, None): (64, 128, 4, 1),
        ("tma", 8, True, few, 1.0): (64, 64, 4, 2),
        ("tma", 8, True, few, None): (64, 64, 4, 2),
        ("tma", 64, True, few + 1, None): (64, 128, 4, 2),
        ("tma", 65, True, few, 1.0): (64, 128, 4, 1),
        ("pointers", 64, False, few, None): (64, 64, 4, 3),
    }
    for (path, d, *rest), row in asked.items():
        name = v3_tma._forward_row(path, d, *rest)
        assert v3_tma._config(v3_tma.FORWARD, v3_tma.FORWARD_FP32, name, d, False) == row


@pytest.mark.parametrize("module", [v2_lean, v3_tma])
def test_every_head_dim_has_a_tile(module):
    keys = ["tma", "pointers"] if module is v3_tma else [(9, 0), (8, 0), (12, 0)]
    for key, d, fp32 in itertools.product(keys, (1, 16, 17, 64, 65, 128, 129, 256), (False, True)):
        keys_kernels = ("DK", "DV") if key == "tma" and d > 128 else ("DKDV",)
        for kernel in ("FORWARD", "DQ", *keys_kernels):
            fp32_table = getattr(module, f"{'DKDV' if kernel in ('DK', 'DV') else kernel}_FP32")
            row = module._config(getattr(module, kernel), fp32_table, key, d, fp32)
            assert len(row) == 4
            assert all(x & (x - 1) == 0 for x in row[:3])


@triton.jit
def turns_kernel(out, tiles, ACROSS: tl.constexpr, CAUSAL: tl.constexpr):
    head, turn = v3_tma._turn(tiles, ACROSS, CAUSAL)
    tl.store(out + tl.program_id(0) * 2, head)
    tl.store(out + tl.program_id(0) * 2 + 1, turn)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "tiles"), [(1, 1), (5, 3), (3, 150), (7, 40), (3, 210), (80, 5)])
def test_turns(heads, tiles, causal):
    """Every tile has one program; of the last heads, causal, the heaviest tiles come first."""
    out = torch.empty(heads * tiles, 2, dtype=torch.int64)
    turns_kernel[(heads * tiles,)](out, tiles, 200, causal)
    last = min(max(200 // tiles, 1), heads) if causal else 0
    first = [(h, t) for h in range(heads - last) for t in range(tiles)]
    assert out.tolist() == [list(x) for x in first] + [
        [h, t] for t in range(tiles) for h in range(heads - last, heads)
    ]


@pytest.mark.parametrize("module", [v2_lean, v3_tma])
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_tuner_puts_its_row_in_and_takes_it_out(module, kernel):
    """Under the tuner a step launches one kernel only, with the candidate's tile."""
    if not hasattr(module, tune.KERNELS[kernel][0]):
        pytest.skip("the step has no such kernel")
    before = dict(vars(module))
    q, k, v, do = inputs(20, 33, 16)
    o, lse = module.forward(q, k, v, False, 0.25, False)
    with tune.tabled(module, kernel, (16, 16, 4, 1)):
        got = tune.launch(module, kernel, (q, k, v, o, lse, do), False)
    assert tune.same(torch, kernel, got, tune.launch(module, kernel, (q, k, v, o, lse, do), False))
    with tune.only(module, kernel, (32, 16, 4, 1)):
        assert (32, 16, 4, 1) in getattr(module, tune.KERNELS[kernel][0]).values()
        running = [n for n in before if n.endswith("_kernel") and vars(module)[n] is before[n]]
        assert running == [tune.KERNELS[kernel][1]]
    here = kernel not in ("dk", "dv")  # those are for descriptors
    assert tune.launched(module, kernel, (q, k, v, o, lse, do), False) == here
    assert {n: vars(module)[n] for n in before} == before  # the interpreter adds names of its own


@pytest.mark.parametrize("text", ["64,64,4", "64,48,4,2", "0,64,4,2", "a,b,c,d"])
def test_tuner_refuses_bad_rows(text, capsys):
    with pytest.raises(SystemExit):
        tune.main(["v3_tma", "--try", text])
    assert "BLOCK_M,BLOCK_N,num_warps,num_stages" in capsys.readouterr().err


def test_tuner_recommends_nothing_within_its_noise():
    a, b = (64, 64, 4, 2), (128, 64, 8, 2)
    speeds = {
        None: {512: [100, 102], 1024: [200, 200]},
        a: {512: [103, 103], 1024: [206, 208]},
        b: {512: [150, 150]},  # not timed everywhere
    }
    found = tune.ranked(speeds, [512, 1024])
    assert [row for *_, row, _ in found] == [a, None]
    (score, spread, _, tflops), (one, noise, *_) = found
    assert (score, one) == (pytest.approx((103 / 101 * 207 / 200) ** 0.5), 1)
    assert (spread, noise) == (pytest.approx(208 / 206 - 1), pytest.approx(0.02))
    assert tflops == [103, 207]
    assert "no row beats the shipped one beyond the spread" in tune.advice(found, "DQ", 64)
    speeds[a] = {n: [2 * x for x in s] for n, s in speeds[a].items()}
    found = tune.ranked(speeds, [512, 1024])
    assert tune.advice(found, "DQ", 64) == f"paste into DQ for head dim 64: {a}"
    assert tune.advice(found[1:], "DQ", 64) == "the shipped row is the fastest"


@pytest.mark.parametrize("option", ["--head-dims", "--lengths", "--tokens", "--heads", "--rounds"])
def test_tuner_refuses_sizes_that_are_none(option, capsys):
    with pytest.raises(SystemExit):
        tune.main(["v3_tma", option, "0"])
    assert "expected a whole number from 1 up, got '0'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuner_needs_a_gpu(capsys):
    assert tune.main(["v3_tma"]) == 2
    assert "GPU" in capsys.readouterr().err
