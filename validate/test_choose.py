"""flashstudy.attention and kernels.hopper: which steps they run, and that it is those steps."""

import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import flashstudy.kernels as kernels
import pytest
import torch
from flashstudy.kernels import _gluon, _host, attention, choose, hopper, v3_tma
from flashstudy.kernels.v7_hopper_backward import MAX_HEAD_DIM
from flashstudy.validate import errors
from torch.utils.flop_counter import FlopCounterMode

FP16 = torch.float16
STEPS = ("v3_tma", "v6_persistent", "v7_hopper_backward", "v7_wide_heads")


def tensor(b=4, h=16, n=4096, d=128, dtype=torch.bfloat16, **changed):
    """What `choose` looks at of a CUDA tensor, without one."""
    strides = changed.pop("strides", (h * n * d, n * d, d, 1))
    fields = {
        "shape": (b, h, n, d), "dtype": dtype, "is_cuda": True, "requires_grad": False,
        "device": torch.device("cuda", 0), "data_ptr": lambda: 1 << 20,
        "stride": lambda: strides,
    }  # fmt: skip
    return SimpleNamespace(**fields | changed)


# ---- The rule ------------------------------------------------------------------------------------


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(_gluon, "why_not", lambda device: None)


def both(t, q=None):
    q = t if q is None else q
    return choose(q, t, t), choose(q, t, t, backward=True)


def test_hopper_gets_the_hopper_steps(on_hopper):
    assert both(tensor()) == ("v6_persistent", "v7_hopper_backward")
    assert both(tensor(dtype=FP16, n=1024)) == ("v6_persistent", "v7_hopper_backward")
    assert choose(tensor(n=1), tensor(), tensor()) == "v6_persistent"  # decoding


@pytest.mark.parametrize(
    "changed", [{"n": 128}, {"is_cuda": False}, {"dtype": torch.float32}], ids=str
)
def test_what_they_cannot_take_or_would_not_gain_goes_to_the_portable_step(on_hopper, changed):
    assert both(tensor(**changed)) == ("v3_tma", "v3_tma")


@pytest.mark.parametrize(
    "changed",
    [
        {"d": 100},
        {"data_ptr": lambda: (1 << 20) + 2},
        {"strides": (16 * 4096 * 132, 4096 * 132, 132, 1)},
    ],
    ids=["head dim", "address", "strides"],
)
def test_what_the_copy_engine_cannot_address_matters_to_the_forward_alone(on_hopper, changed):
    assert both(tensor(**changed)) == ("v3_tma", "v7_hopper_backward")


@pytest.mark.parametrize("d", [MAX_HEAD_DIM + 1, 192, 256])
def test_the_backward_of_wider_heads_has_a_kernel_of_its_own(on_hopper, d):
    assert both(tensor(d=MAX_HEAD_DIM))[1] == "v7_hopper_backward"
    assert choose(*[tensor(d=d)] * 3, backward=True) == "v7_wide_heads"
    assert choose(*[tensor(d=d, n=128)] * 3, backward=True) == "v3_tma"


def test_other_gpus_get_the_portable_step(monkeypatch):
    monkeypatch.setattr(_gluon, "why_not", lambda device: "not a Hopper")
    assert both(tensor()) == ("v3_tma", "v3_tma")


# ---- What runs, without a GPU: the operator around launchers that tell ---------------------------


@pytest.fixture
def interpreted():
    if not _host.interpreting():
        pytest.skip("the interpreter is for machines without GPU")


def draw(n=40, d=32, h=2, grad=True):
    return [torch.randn(1, h, n, d, dtype=FP16).requires_grad_(grad) for _ in range(3)]


def grads(function, tensors, **options):
    return torch.autograd.grad(function(*tensors, **options).float().square().sum(), tensors)


@pytest.fixture
def told(monkeypatch, interpreted):
    """Every step launches v3's kernels and tells its name, direction and options."""
    calls = []

    def step(name):
        def launch(direction, *args, **options):
            calls.append((name, direction, options))
            return getattr(v3_tma, direction)(*args)

        return SimpleNamespace(**{d: functools.partial(launch, d) for d in ("forward", "backward")})

    monkeypatch.setattr(kernels, "_step", step)
    monkeypatch.setattr(kernels, "_gluon", SimpleNamespace(why_not=lambda device: None))
    return calls


def pick(monkeypatch, forward, backward):
    def choice(q, k, v, *, backward=False, _names=(forward, backward)):
        assert q.data_ptr() and q.dtype in _host.HALF_DTYPES  # noqa: PT018 (real tensors, cast)
        return _names[backward]

    monkeypatch.setattr(kernels, "choose", choice)


@pytest.mark.parametrize("how", ["eager", "compiled", "autocast"])
@pytest.mark.parametrize("forward", ["v3_tma", "v6_persistent"])
@pytest.mark.parametrize("backward", ["v3_tma", "v7_hopper_backward", "v7_wide_heads"])
def test_each_direction_runs_the_step_of_choice(told, monkeypatch, forward, backward, how):
    """The choice is made when the operator runs, on tensors with memory: tracing sees one node."""
    pick(monkeypatch, forward, backward)
    q, k, v = draw()
    function = attention
    if how == "compiled":
        torch._dynamo.reset()
        function = torch.compile(attention, fullgraph=True, backend="aot_eager")
    if how == "autocast":
        q, k, v = (t.detach().float().requires_grad_() for t in (q, k, v))
    with torch.autocast("cpu", dtype=FP16, enabled=how == "autocast"):
        got = grads(function, (q, k, v), causal=True)
    assert [call[:2] for call in told] == [(forward, "forward"), (backward, "backward")]
    halves = [t.detach().to(FP16).requires_grad_() for t in (q, k, v)]
    for a, b in zip(got, grads(v3_tma.attention, halves, causal=True), strict=True):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("compiled", [False, True])
def test_deterministic_is_asked_for_by_keyword_or_globally(told, monkeypatch, compiled):
    pick(monkeypatch, "v6_persistent", "v7_hopper_backward")
    torch._dynamo.reset()
    function = attention
    if compiled:
        function = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for globally, keyword, want in (
        (False, None, False), (True, None, True), (False, True, True), (True, False, False),
    ):  # fmt: skip
        told.clear()
        torch.use_deterministic_algorithms(globally)
        try:
            options = {} if keyword is None else {"deterministic": keyword}
            grads(function, draw(), **options)
        finally:
            torch.use_deterministic_algorithms(False)
        assert told[-1][2].get("deterministic", False) == want, (globally, keyword)


def test_the_portable_steps_hear_nothing_of_it(told, monkeypatch):
    """v3 repeats bit by bit whatever is asked."""
    pick(monkeypatch, "v3_tma", "v3_tma")
    grads(attention, draw(), deterministic=True)
    assert told == [("v3_tma", "forward", {}), ("v3_tma", "backward", {})]


def test_it_is_the_step_that_it_names(interpreted):
    q, k, v = (torch.randn(1, 2, 50, 32, requires_grad=True) for _ in range(3))
    o, lse = attention(q, k, v, causal=True, return_lse=True)
    expected, expected_lse = v3_tma.attention(q, k, v, causal=True, return_lse=True)
    assert torch.equal(o, expected)
    assert torch.equal(lse, expected_lse)
    assert not lse.requires_grad
    for a, b in zip(*(torch.autograd.grad(t.sum(), (q, k, v)) for t in (o, expected)), strict=True):
        assert torch.equal(a, b)


def test_opcheck_export_and_flops(interpreted):
    q, k, v = draw(n=8, d=16)
    torch.library.opcheck(kernels._op.op, (q, k, v, True, 0.3, False, False))

    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attention(q, k, v)

    given = tuple(t.detach() for t in (q, k, v))
    program = torch.export.export(Module(), given)
    assert kernels._op.op in [n.target for n in program.graph.nodes]
    assert torch.equal(program.module()(*given), attention(*given))
    with FlopCounterMode(display=False) as counter:
        attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 8 * 8 * 16 * 3.5


def test_bad_arguments_get_the_message_of_the_step():
    q = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="q: expected 4 dimensions"):
        attention(q, q, q)


# ---- By name nothing falls back ------------------------------------------------------------------


def test_the_joined_steps_refuse_what_they_cannot_take():
    with pytest.raises(ValueError, match="q: expected a CUDA tensor, got one on cpu"):
        hopper.attention(*draw())


def test_the_joined_steps_are_the_two_steps(monkeypatch):
    """Forward by v6, backward by v7's file for the head dim, with the arguments in their places."""
    calls, wide = [], []
    q, k, v, do, o, lse = torch.empty(1, 1, 1, MAX_HEAD_DIM), "k", "v", "do", "o", "lse"
    monkeypatch.setattr(
        hopper.v6_persistent, "forward", lambda *args: calls.append(args) or (o, lse)
    )
    monkeypatch.setattr(
        hopper.v7_hopper_backward, "backward", lambda *args, **kw: calls.append((*args, kw))
    )
    monkeypatch.setattr(
        hopper.v7_wide_heads, "backward", lambda *args, **kw: wide.append((*args, kw))
    )
    hopper.forward(q, k, v, True, 0.5, False, True)
    hopper.backward(do, q, k, v, o, lse, True, 0.5, False, True)
    hopper.backward(do, q, k, v, o, lse, True, 0.5, False)
    assert calls[0] == (q, k, v, True, 0.5, False)
    assert calls[1] == (do, q, k, v, o, lse, True, 0.5, False, {"deterministic": True})
    assert calls[2][:-1] == calls[1][:-1]
    assert not calls[2][-1].get("deterministic", False)
    q = torch.empty(1, 1, 1, MAX_HEAD_DIM + 1)
    hopper.backward(do, q, k, v, o, lse, True, 0.5, False, True)
    assert wide == [(do, q, k, v, o, lse, True, 0.5, False, {"deterministic": True})]
    assert len(calls) == 3


STRIDES = """
import sys, torch
from flashstudy.kernels import _host, hopper, v7_hopper_backward
from flashstudy.validate import compiled

def draw(layout, h, n, d):
    if layout == "bnhd":
        return torch.empty(2, n, h, d, dtype=torch.bfloat16).transpose(1, 2)
    if layout == "qkv":  # a slice of a fused projection
        return torch.empty(2, n, h + 5, d, dtype=torch.bfloat16).transpose(1, 2)[:, 2:2 + h]
    return torch.empty(2, h, n, d, dtype=torch.bfloat16)

SIZES = (4, 4, 70, 64), (8, 2, 70, 64), (4, 4, 70, 59), (4, 2, 0, 64), (4, 2, 70, 200)
with compiled.compile_only(90):
    for layout in ("bhnd", "bnhd", "qkv"):
        for h, h_kv, n_q, d in SIZES:
            q, do, o = (draw(layout, h, n_q, d) for _ in range(3))
            k, v = (draw(layout, h_kv, 90, d) for _ in range(2))
            for deterministic in (False, True):
                lse = torch.empty(2, h, n_q)
                got = hopper.backward(do, q, k, v, o, lse, True, 1.0, False, deterministic)
                for name, g, t in zip(("dq", "dk", "dv"), got, (q, k, v), strict=True):
                    want = _host.empty_like(t)
                    assert g.shape == t.shape and g.dtype == t.dtype
                    if g.stride() != want.stride() and g.numel():
                        print(layout, (h, h_kv, n_q, d), name, g.stride(), want.stride())
"""


def test_gradients_have_the_strides_that_tracing_is_told():
    """Else a compiled graph fails, or reads them wrongly: launchers run, nothing is launched."""
    got = subprocess.run(
        [sys.executable, "-c", STRIDES], capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert got.returncode == 0, got.stderr[-3000:]
    assert got.stdout == ""


# ---- On a Hopper ---------------------------------------------------------------------------------

# B, H, H_KV, N_Q, N_K, D: grouped, unequal, empty rows, ragged
SHAPES = [
    (2, 4, 4, 1024, 1024, 128),
    (1, 8, 2, 700, 1500, 128),
    (1, 4, 2, 1500, 700, 64),
    (3, 4, 4, 333, 333, 96),
    (2, 4, 2, 700, 900, 256),
    (1, 2, 2, 1024, 1024, 192),
]


@pytest.fixture
def real():
    from flashstudy.backends import why_not

    if (reason := why_not("v7_hopper_backward")) is not None:
        pytest.skip(reason)


def on_gpu(b, h, h_kv, n_q, n_k, d, dtype=torch.bfloat16):
    shapes = [(b, h, n_q, d), (b, h_kv, n_k, d), (b, h_kv, n_k, d), (b, h, n_q, d)]
    return [torch.randn(s, device="cuda", dtype=dtype) for s in shapes]


@pytest.mark.gpu
@pytest.mark.parametrize("function", [hopper.attention, attention], ids=["hopper", "attention"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients(real, shape, causal, function):
    verdict = errors.check(function, *on_gpu(*shape), causal=causal, lse=True)
    assert verdict.ok, verdict.reasons


@pytest.mark.gpu
def test_opcheck_on_hopper(real):
    for layout in ("bhnd", "bnhd"):
        q, k, v, do = on_gpu(2, 4, 2, 200, 260, 64)
        if layout == "bnhd":
            q, k, v, do = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v, do))
        args = (True, 0.3, False, True)
        for op in (hopper._op, kernels._op):
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            torch.library.opcheck(op.op, (*leaves, *args))
            o, lse = op(q, k, v, *args)
            torch.library.opcheck(op.backward_op, (do, q, k, v, o, lse, *args))


@pytest.mark.gpu
@pytest.mark.parametrize("function", [hopper.attention, attention], ids=["hopper", "attention"])
def test_compile_autocast_and_graphs(real, function):
    function = functools.partial(function, causal=True, deterministic=True)
    q, k, v, do = on_gpu(4, 16, 16, 1024, 1024, 128)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    want = torch.autograd.grad(function(*leaves), leaves, do)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves, do), want, strict=True):
        assert torch.equal(a, b)

    wide = [t.detach().float().requires_grad_() for t in leaves]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        o = function(*wide)
    assert o.dtype == torch.bfloat16
    for a, b in zip(torch.autograd.grad(o, wide, do), want, strict=True):
        assert torch.equal(a, b.float())

    def step():
        return torch.autograd.grad(function(*leaves), leaves, do)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for t in captured:
        t.zero_()
    graph.replay()
    for a, b in zip(captured, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("function", [hopper.attention, attention], ids=["hopper", "attention"])
@pytest.mark.parametrize("causal", [False, True])
def test_deterministic_gradients_repeat_bit_by_bit(real, causal, function):
    q, k, v, do = on_gpu(2, 16, 4, 2000, 2100, 128)
    leaves = [t.requires_grad_() for t in (q, k, v)]

    def step(**options):
        return torch.autograd.grad(function(*leaves, causal=causal, **options), leaves, do)

    want = step(deterministic=True)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [step() for _ in range(10)]
    finally:
        torch.use_deterministic_algorithms(False)
    for again in [*runs, *(step(deterministic=True) for _ in range(10))]:
        assert all(torch.equal(a, b) for a, b in zip(again, want, strict=True))
    for again in [step() for _ in range(10)]:  # dk and dv do in any case
        assert all(torch.equal(a, b) for a, b in zip(again[1:], want[1:], strict=True))


@pytest.mark.gpu
def test_a_tensor_off_the_16_bytes_is_served(real):
    """Also by a graph compiled for tensors on them: the choice is not part of the graph."""
    q, k, v, do = on_gpu(4, 16, 16, 1024, 1024, 64)
    torch._dynamo.reset()
    compiled = torch.compile(functools.partial(attention, causal=True), fullgraph=True)
    flat = torch.randn(q.numel() + 1, device="cuda", dtype=q.dtype)
    odd = flat[1:].view(q.shape)
    for first in (q, odd):
        verdict = errors.check(
            lambda q, k, v, causal, scale: compiled(q, k, v), first, k, v, do, causal=True
        )
        assert verdict.ok, verdict.reasons
