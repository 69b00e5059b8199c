"""The bridge into PyTorch: what the registered operators promise, and what the checks refuse."""

import importlib
import math
import re

import pytest
import torch
from flashstudy.kernels import _host, v0_naive, v1_flash
from torch.utils.flop_counter import FlopCounterMode

if not (torch.cuda.is_available() or _host.interpreting()):
    pytest.skip("needs a CUDA GPU or TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cpu" if _host.interpreting() else "cuda"
FP16 = torch.float16
steps = pytest.mark.parametrize("step", [v0_naive, v1_flash], ids=["v0", "v1"])


def draw(*shape, dtype=FP16, grad=False):
    return torch.randn(*shape, dtype=dtype, device=DEVICE).requires_grad_(grad)


def inputs(dtype=FP16, grad=False, n_q=5, n_k=7, h=2, h_kv=1, d=8):
    q = draw(1, h, n_q, d, dtype=dtype, grad=grad)
    return q, *(draw(1, h_kv, n_k, d, dtype=dtype, grad=grad) for _ in range(2))


def gradients(function, tensors):
    return torch.autograd.grad(function(*tensors).sum(), tensors)


@steps
def test_opcheck(step):
    """PyTorch's own checks: schema, fakes, autograd registration, tracing with symbolic sizes."""
    q, k, v = inputs(grad=True)
    torch.library.opcheck(step._op.op, (q, k, v, True, 0.3, False))
    views = (t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    torch.library.opcheck(step._op.op, (*views, False, 0.3, False))
    q, k, v = (t.detach() for t in (q, k, v))
    o, lse = step._op(q, k, v, True, 0.3, False)
    call = (torch.randn_like(o), q, k, v, o, lse, True, 0.3, False)
    torch.library.opcheck(step._op.backward_op, call)


@steps
def test_compile_fullgraph(step):
    torch._dynamo.reset()
    q, k, v = inputs(grad=True)
    compiled = torch.compile(step.attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(q, k, v), step.attention(q, k, v))
    for a, b in zip(
        gradients(lambda *t: compiled(*t, causal=True), (q, k, v)),
        gradients(lambda *t: step.attention(*t, causal=True), (q, k, v)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_compile_with_changing_lengths():
    """Sequence lengths are run-time integers: one dynamic graph serves them."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(v1_flash.attention, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for n in (5, 9, 33):
            tensors = inputs(n_q=n, n_k=n + 2)
            assert torch.equal(compiled(*tensors), v1_flash.attention(*tensors))
    assert len(graphs) == 1


@steps
def test_export(step):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return step.attention(q, k, v, causal=True)

    tensors = inputs()
    program = torch.export.export(Module(), tensors)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert step._op.op in targets
    assert torch.equal(program.module()(*tensors), step.attention(*tensors, causal=True))


@steps
def test_autocast(step):
    """As SDPA: fp32 and mixed inputs are cast, gradients come back in the inputs' dtypes."""
    q, k, v = inputs(torch.float32, grad=True)
    k = k.detach().half().requires_grad_()
    with torch.autocast(DEVICE, dtype=FP16):
        o = step.attention(q, k, v)
        with torch.no_grad():
            assert torch.equal(step.attention(q, k, v), o)
    assert o.dtype == FP16
    assert torch.equal(o, step.attention(q.half(), k, v.half()))
    assert [g.dtype for g in torch.autograd.grad(o.sum(), (q, k, v))] == [
        torch.float32, FP16, torch.float32,
    ]  # fmt: skip
    with torch.autocast(DEVICE, dtype=FP16), pytest.raises(ValueError, match="q: expected a dtype"):
        step.attention(q.double(), k.double(), v.double())


@steps
def test_flop_counter(step):
    """4·B·H·N_Q·N_K·D forward and 2.5 times that backward; causal squares count half."""
    q, k, v = inputs(grad=True, n_q=6, n_k=8)
    with FlopCounterMode(display=False) as counter:
        step.attention(q, k, v).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 8 * (6 * 8) * 3.5
    for n_q, n_k, pairs in ((6, 6, 18), (4, 8, 24), (8, 4, 8)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            step.attention(*inputs(n_q=n_q, n_k=n_k), causal=True)
        assert counter.get_total_flops() == 4 * 2 * 8 * pairs


@steps
def test_lse_has_no_gradient(step):
    o, lse = step.attention(*inputs(grad=True), return_lse=True)
    assert o.requires_grad
    assert not lse.requires_grad
    assert lse.dtype == torch.float32


@steps
def test_second_derivative_is_refused(step):
    tensors = inputs(torch.float32, grad=True)
    o = step.attention(*tensors)
    first = torch.autograd.grad(o.square().sum(), tensors, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        first[0].sum().backward()


def test_step_without_backward():
    op = _host.operator("test_no_backward", v1_flash.forward)
    o, _ = op(*inputs(grad=True), False, 1.0, False)
    with pytest.raises(NotImplementedError, match="test_no_backward has no backward"):
        o.sum().backward()


def test_flags_reach_both_functions():
    seen = []

    def forward(q, k, v, causal, scale, allow_tf32, deterministic):
        seen.append(deterministic)
        return v1_flash.forward(q, k, v, causal, scale, allow_tf32)

    def backward(do, q, k, v, o, lse, causal, scale, allow_tf32, deterministic):
        seen.append(deterministic)
        return v1_flash.backward(do, q, k, v, o, lse, causal, scale, allow_tf32)

    op = _host.operator("test_flags", forward, backward, flags=("deterministic",))
    op(*inputs(grad=True), False, 1.0, False, True)[0].sum().backward()
    assert seen == [True, True]
    assert "bool deterministic" in str(op.op._schema)


def test_registering_twice(monkeypatch):
    """A second copy of the folder, or a reload, gets operators of its own; both keep working."""
    first = _host.operator("test_twice", v1_flash.forward, v1_flash.backward)
    second = importlib.reload(importlib.import_module(_host.__name__)).operator(
        "test_twice", v0_naive.forward, v0_naive.backward
    )
    assert first.op._name != second.op._name
    tensors = inputs(torch.float32, grad=True)
    a, b = (op(*tensors, False, 0.3, False)[0] for op in (first, second))
    assert (a - b).abs().max() <= 1e-5
    b.sum().backward()


def test_the_short_way_gives_what_the_operator_gives():
    """A call that nothing watches or transforms goes around the dispatcher, gradients included."""
    q, k, v = inputs(grad=True)
    options = (True, 0.3, False)
    with torch.no_grad():
        short, long = (op(q, k, v, *options) for op in (v1_flash._op, v1_flash._op.op))
    assert torch.equal(short[0], long[0])
    assert torch.equal(short[1], long[1])
    short, long = (op(q, k, v, *options) for op in (v1_flash._op, v1_flash._op.op))
    assert type(short[0].grad_fn) is not type(long[0].grad_fn)
    assert "v1_flash" in short[0].grad_fn.name()
    assert not short[1].requires_grad
    grads = [torch.autograd.grad(o.sum(), (q, k, v)) for o, _ in (short, long)]
    assert all(map(torch.equal, *grads))
    q, k, v = (t.detach().float().requires_grad_() for t in (q, k, v))
    with torch.autocast(DEVICE, dtype=FP16):
        short, long = (op(q, k, v, *options) for op in (v1_flash._op, v1_flash._op.op))
    assert short[0].dtype == FP16
    assert torch.equal(short[0], long[0])


def test_what_takes_the_long_way():
    q, k, v = inputs()
    assert not _host.needs_dispatcher(q, k, v)
    with FlopCounterMode(display=False):
        assert _host.needs_dispatcher(q, k, v)
    assert _host.needs_dispatcher(torch.nn.Parameter(q), k, v)
    assert _host.needs_dispatcher(q, k, torch.nn.Parameter(v))
    with torch.autograd.forward_ad.dual_level():
        assert _host.needs_dispatcher(q, k, v)
    inside = []
    torch.func.vmap(lambda t: inside.append(_host.needs_dispatcher(t, t, t)) or t)(q)
    assert inside == [True]


@steps
def test_forward_derivatives_are_refused(step):
    """Not dropped: an output without its tangent would pass for a constant."""
    q, k, v = inputs()
    with torch.autograd.forward_ad.dual_level():
        q = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            step.attention(q, k, v)
    q, k, v = inputs()
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(step.attention, (q, k, v), (q, k, v))


@steps
def test_a_backward_that_is_watched_takes_the_long_way(step):
    """Modes may come on after the forward: the counter sees a backward alone."""
    q, k, v = inputs(grad=True, n_q=6, n_k=8)
    o = step.attention(q, k, v).sum()
    with FlopCounterMode(display=False) as counter:
        o.backward()
    assert counter.get_total_flops() == 4 * 2 * 8 * (6 * 8) * 2.5


@steps
@pytest.mark.parametrize("watched", [False, True])
def test_with_checkpointing(step, watched):
    """Saved tensors go through hooks, once, and may be computed anew."""
    from torch.utils.checkpoint import checkpoint

    tensors = inputs(grad=True)
    o = checkpoint(step.attention, *tensors, use_reentrant=False)
    again = torch.autograd.grad(o.sum(), tensors, create_graph=watched)
    for a, b in zip(again, gradients(step.attention, tensors), strict=True):
        assert torch.equal(a, b)


@steps
@pytest.mark.parametrize("watched", [False, True])
def test_saved_tensors_are_unpacked_once(step, watched):
    """Hooks may fetch each from somewhere, as torch.autograd.graph.save_on_cpu does."""
    tensors, unpacked = inputs(grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: unpacked.append(t) or t):
        o = step.attention(*tensors)
    torch.autograd.grad(o, tensors, torch.ones_like(o), create_graph=watched)
    assert len(unpacked) == 5  # q, k, v, o, lse


@steps
def test_batched_gradients(step):
    """What vectorised Jacobians are made of, through autograd's own kind of vmap."""
    tensors = inputs(torch.float32, grad=True)
    o = step.attention(*tensors)
    several = torch.randn(3, *o.shape, device=DEVICE)
    at_once = torch.autograd.grad(o, tensors, several, is_grads_batched=True, retain_graph=True)
    for i, do in enumerate(several):
        for a, b in zip(
            at_once, torch.autograd.grad(o, tensors, do, retain_graph=True), strict=True
        ):
            assert torch.equal(a[i], b)


@steps
def test_forward_derivatives_of_gradients_are_refused(step):
    tensors = inputs(torch.float32, grad=True)
    with torch.autograd.forward_ad.dual_level():
        o = step.attention(*tensors)
        do = torch.autograd.forward_ad.make_dual(torch.ones_like(o), torch.ones_like(o))
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            torch.autograd.grad(o, tensors, do)


@pytest.mark.parametrize("loaded", [True, False])
def test_launch_keeps_what_was_compiled(loaded):
    """The first launch of a key is Triton's, the next ones are the compiled kernel's, if loaded."""
    calls = []

    class Recorder:
        """A JIT function or what it compiled: notes who is launched, on what grid, with what."""

        def __init__(self, name, returns=None):
            self.name, self.returns, self.fn = name, returns, object()
            self.module = object() if loaded else None

        def __getitem__(self, grid):
            def run(*args, **options):
                calls.append((self.name, grid, args, options))
                return self.returns

            return run

    kernel = Recorder("jit", Recorder("compiled"))
    other = Recorder("other", Recorder("compiled"))
    for k, key, x in ((kernel, "a", 1), (kernel, "a", 2), (kernel, "b", 3), (other, "a", 4)):
        _host.launch(k, key, (x, 1, 1), x, num_warps=4)
    names = ["jit", "compiled" if loaded else "jit", "jit", "other"]
    assert [c[0] for c in calls] == names
    assert [c[1:3] for c in calls] == [((x, 1, 1), (x,)) for x in (1, 2, 3, 4)]
    assert [c[3] for c in calls] == [{} if n == "compiled" else {"num_warps": 4} for n in names]


def refused(message, q=None, k=None, v=None, **options):
    a, b, c = inputs()
    tensors = (a if q is None else q, b if k is None else k, c if v is None else v)
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        v1_flash.attention(*tensors, **options)


def test_refusals():
    """Each names the argument, what was expected and what came."""
    refused("q: expected 4 dimensions (B, H, N, D), got (2, 5, 8)", q=draw(2, 5, 8))
    refused("v: expected 4 dimensions (B, H, N, D), got (1, 1, 1, 7, 8)", v=draw(1, 1, 1, 7, 8))
    refused(
        "k: expected the dtype of q, torch.float16, got torch.float32", k=draw(1, 1, 7, 8).float()
    )
    refused(
        "v: expected the dtype of q, torch.float16, got torch.float32", v=draw(1, 1, 7, 8).float()
    )
    double = [t.double() for t in inputs()]
    refused("q: expected a dtype among float16, bfloat16, float32, got torch.float64", *double)
    meta = torch.empty(1, 1, 7, 8, dtype=FP16, device="meta")
    refused(f"k: expected the device of q, {draw(1).device}, got meta", k=meta)
    refused("v: expected the device of q", v=meta)
    wide = draw(1, 2, 5, 257), *(draw(1, 1, 7, 257) for _ in range(2))
    refused("q: expected a head dim from 1 to 256, got 257", *wide)
    none = draw(1, 2, 5, 0), *(draw(1, 1, 7, 0) for _ in range(2))
    refused("q: expected a head dim from 1 to 256, got 0", *none)
    refused("k: expected (B=1, H_KV, N_K, D=8), got (2, 1, 7, 8)", k=draw(2, 1, 7, 8))
    refused("k: expected (B=1, H_KV, N_K, D=8), got (1, 1, 7, 9)", k=draw(1, 1, 7, 9))
    refused("v: expected the shape of k, (1, 1, 7, 8), got (1, 1, 6, 8)", v=draw(1, 1, 6, 8))
    three = [draw(1, 3, 7, 8) for _ in range(2)]
    refused("k: expected H_KV dividing the 2 heads of q, got 3", None, *three)
    refused("k: expected H_KV dividing the 2 heads of q, got 0", None, *(t[:, :0] for t in three))
    for name in "qkv":
        tensors = dict(zip("qkv", inputs(), strict=True))
        tensors[name] = draw(*tensors[name].shape[:2], 8, tensors[name].shape[2]).mT
        strides = tensors[name].stride()
        refused(f"{name}: expected a contiguous last dim, got strides {strides}", **tensors)
    for scale in (math.nan, math.inf, -math.inf):
        refused(f"scale: expected a finite number, got {scale}", scale=scale)


@pytest.mark.skipif(DEVICE == "cuda", reason="speaks of the interpreter")
def test_refusals_on_a_cpu(monkeypatch):
    brain = [t.bfloat16() for t in inputs()]
    refused("q: Triton's interpreter computes bfloat16 wrongly; use float16", *brain)
    monkeypatch.setattr(_host, "INTERPRETED", False)
    refused("q: expected a CUDA tensor, got one on the CPU (set TRITON_INTERPRET=1")


def test_check_returns_the_scale():
    q, k, v = inputs(d=16)
    assert _host.check(q, k, v) == 0.25
    assert _host.check(q, k, v, 2) == 2.0
    assert isinstance(_host.check(q, k, v, 2), float)
    with pytest.raises(ValueError, match="q: expected a dtype among float16, bfloat16, got"):
        _host.check(*inputs(torch.float32), dtypes=_host.HALF_DTYPES)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@steps
def test_cuda_graph(step):
    q, k, v = (t.detach() for t in inputs(n_q=130, n_k=130, d=64))
    step.attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step.attention(q, k, v, causal=True)
    q.normal_()
    graph.replay()
    assert torch.equal(o, step.attention(q, k, v, causal=True))
