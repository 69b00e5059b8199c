"""What the launchers share: input checks, and the bridge into PyTorch. No kernel code.

A ladder step defines two plain functions that launch its kernels,

    forward(q, k, v, causal, scale, allow_tf32) -> (o, lse)
    backward(do, q, k, v, o, lse, causal, scale, allow_tf32) -> (dq, dk, dv)

and `operator()` turns the pair into a PyTorch operator: autograd, `torch.compile` (fullgraph),
`torch.export`, CUDA graphs, autocast and FLOP counting come from there and nowhere else, and a
short way for calls that need none but autograd and autocast. A step's public function is then three
lines:

    scale = _host.check(q, k, v, scale)
    o, lse = _op(q, k, v, causal, scale, allow_tf32)
    return (o, lse) if return_lse else o
"""

import functools
import math
import os

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

LOG2E = math.log2(math.e)  # exp(x) = exp2(x * LOG2E); the hardware has only the base-2 exponential
MAX_HEAD_DIM = 256
HALF_DTYPES = (torch.float16, torch.bfloat16)
ALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton reads it once, too: at @jit


def interpreting():
    """True where Triton interprets kernels on the CPU (TRITON_INTERPRET=1 before the import)."""
    return INTERPRETED


@functools.cache
def capability(device):
    """Compute capability of a torch.device as a tuple, (0, 0) for the CPU (the interpreter)."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def empty_like(t):
    """An uninitialised tensor like `t`, dense, in the order of its dimensions, the last contiguous.

    (B, N, H, D) views give (B, N, H, D) results, slices of a fused projection too: the reshape
    behind the attention then needs no copy.
    """
    out = torch.empty_like(t)  # keeps the order of the dimensions, drops holes and repeats
    if out.stride(3) != 1 and t.shape[3] > 1:  # t overlaps itself: its rows are closer than D
        out = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    return out


# --- Checks -------------------------------------------------------------------------------------


def check(q, k, v, scale=None, dtypes=ALL_DTYPES):
    """Refuse what the kernels cannot take; return the softmax scale, 1/sqrt(D) unless given.

    q is (B, H, N_Q, D), k and v are (B, H_KV, N_K, D) with H_KV dividing H and D at most 256, all
    of one dtype on one device, any strides whose last one is 1. Under autocast the dtype is the
    one that they will be cast to.

    Raises ValueError naming the argument, what was expected and what came.
    """
    q_shape, k_shape, v_shape, device, dtype = q.shape, k.shape, v.shape, q.device, q.dtype
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        name, t = next((n, t) for n, t in (("q", q), ("k", k), ("v", v)) if t.ndim != 4)
        raise ValueError(f"{name}: expected 4 dimensions (B, H, N, D), got {tuple(t.shape)}")
    b, h, _, d = q_shape
    if not k.device == v.device == device:
        name, t = ("k", k) if k.device != device else ("v", v)
        raise ValueError(f"{name}: expected the device of q, {device}, got {t.device}")
    if torch.is_autocast_enabled(device.type):
        dtype = autocast_dtype(q)
        for name, t in (("k", k), ("v", v)):
            if autocast_dtype(t) != dtype:
                raise ValueError(f"{name}: expected the dtype of q, {dtype}, got {t.dtype}")
    elif not k.dtype == v.dtype == dtype:
        name, t = ("k", k) if k.dtype != dtype else ("v", v)
        raise ValueError(f"{name}: expected the dtype of q, {dtype}, got {t.dtype}")
    if dtype not in dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"q: expected a dtype among {names}, got {dtype}")
    if not 1 <= d <= MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim from 1 to {MAX_HEAD_DIM}, got {d}")
    k_b, h_kv, _, k_d = k_shape
    if k_b != b or k_d != d:
        raise ValueError(f"k: expected (B={b}, H_KV, N_K, D={d}), got {tuple(k_shape)}")
    if v_shape != k_shape:
        raise ValueError(f"v: expected the shape of k, {tuple(k_shape)}, got {tuple(v_shape)}")
    if h_kv == 0 or h % h_kv:
        raise ValueError(f"k: expected H_KV dividing the {h} heads of q, got {h_kv}")
    if not q.stride()[3] == k.stride()[3] == v.stride()[3] == 1 and d > 1:
        name, t = next((n, t) for n, t in (("q", q), ("k", k), ("v", v)) if t.stride(3) != 1)
        raise ValueError(f"{name}: expected a contiguous last dim, got strides {t.stride()}")
    if not q.is_cuda:
        if device.type != "cpu":
            raise ValueError(f"q: expected a CUDA tensor, got one on {device}")
        if not INTERPRETED:
            raise ValueError(
                "q: expected a CUDA tensor, got one on the CPU (set TRITON_INTERPRET=1 before"
                " importing triton to interpret the kernel there)"
            )
        if dtype == torch.bfloat16:
            raise ValueError("q: Triton's interpreter computes bfloat16 wrongly; use float16")
    if scale is None:
        return 1.0 / math.sqrt(d)
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    return float(scale)


def autocast_dtype(t):
    """The dtype that autocast gives to `t`: its own in float64, as everywhere in PyTorch."""
    castable = t.is_floating_point() and t.dtype != torch.float64
    return torch.get_autocast_dtype(t.device.type) if castable else t.dtype


# --- Launching ----------------------------------------------------------------------------------


_compiled = {}  # (function, key) -> triton's CompiledKernel


def launch(kernel, key, grid, *args, **options):
    """kernel[grid](*args, **options), quicker from the second launch of a key on.

    At every launch Triton asks each argument anew what the kernel has to be compiled for: half of
    the host's time of a small call. A launcher knows, and says it with the `key`: device, dtypes,
    constants, and whatever else Triton specialises on. That is nothing where the kernel exempts its
    integers and its pointers are those of new tensors, which are always aligned; `launch_key`
    serves the others. The key None leaves it to Triton.

    grid has three axes; args are positional, constants included; options are the compiler's.
    """
    compiled = None if key is None else _compiled.get((kernel.fn, key))
    if compiled is not None:
        compiled[grid](*args)
        return
    compiled = kernel[grid](*args, **options)
    loaded = getattr(compiled, "module", None) is not None  # not interpreted, not only built
    if loaded and key is not None:
        _compiled[kernel.fn, key] = compiled


def launch_key(tensors, integers, *constants):
    """The key for `launch` where addresses, strides and integers are specialised on.

    Addresses and strides of (B, H, N, D) tensors nearly always are multiples of 16 (bytes;
    elements), and those below 2^31 have one type: then whatever their values the kernel is the
    same. None for others. Of an integer it matters whether it is 1, a multiple of 16, or neither.
    """
    bits = 0
    for t in tensors:
        b, h, n, _ = t.stride()
        bits |= t.data_ptr() & 15 | b | h | n
    if bits & 15 or bits >> 31:
        return None
    kinds = [x == 1 or 2 * (x & 15 == 0) for x in integers]
    return tensors[0].get_device(), tensors[0].dtype, *constants, *kinds


# --- The bridge into PyTorch --------------------------------------------------------------------


def operator(name, forward, backward=None, flags=()):
    """Register `forward` and `backward` as the operators flashstudy::{name} and {name}_backward.

    Returns op(q, k, v, causal, scale, allow_tf32) -> (o, lse). `lse` carries no gradient; with
    `backward=None` asking for one raises NotImplementedError. `flags` names further bool
    arguments: op, forward and backward take them, in this order, after allow_tf32.

    A second copy of this folder in one process gets its own operators, name_2 and so on.
    """
    options = "bool causal, float scale, bool allow_tf32" + "".join(f", bool {f}" for f in flags)
    lib = torch.library.Library("flashstudy", "FRAGMENT")  # the registrations live as long as it
    taken, i = name, 1
    while hasattr(torch.ops.flashstudy, taken):
        i += 1
        taken = f"{name}_{i}"
    op_name, grad_name = taken, f"{taken}_backward"
    qkv = "Tensor q, Tensor k, Tensor v"
    lib.define(f"{op_name}({qkv}, {options}) -> (Tensor, Tensor)")
    lib.define(
        f"{grad_name}(Tensor do, {qkv}, Tensor o, Tensor lse, {options})"
        " -> (Tensor, Tensor, Tensor)"
    )
    op = getattr(torch.ops.flashstudy, op_name).default
    grad_op = getattr(torch.ops.flashstudy, grad_name).default

    def run_backward(do, q, k, v, o, lse, *args):
        if do.stride(3) != 1 and do.shape[3] > 1:  # o.sum() sends a single 1, repeated
            do = do.contiguous()
        return on_device(backward, do, q, k, v, o, lse, *args)

    def fake_forward(q, k, v, *args):
        return empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    def fake_backward(do, q, k, v, *args):
        return empty_like(q), empty_like(k), empty_like(v)

    def setup_context(ctx, inputs, output):
        q, k, v, *ctx.args = inputs
        ctx.save_for_backward(q, k, v, *output)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # no zeros for lse

    def differentiate(ctx, do, _, short=False):
        if backward is None:
            raise NotImplementedError(f"{name} has no backward: its step computes o and lse only")
        grads = (None,) * 3
        if do is not None:
            saved = ctx.saved_tensors  # once: hooks may have to compute them anew
            refuse_tangents(name, do, *saved)
            short = short and not torch.is_grad_enabled() and not needs_dispatcher(do, *saved)
            grads = (run_backward if short else grad_op)(do, *saved, *ctx.args)
        return *grads, *(None for _ in ctx.args)

    def differentiate_twice(ctx, *_):
        raise NotImplementedError(f"{name} has no second derivative")

    def autocast(q, k, v, *args):
        q, k, v = (t.to(autocast_dtype(t)) for t in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            return op(q, k, v, *args)

    for key in ("CUDA", "CPU"):
        lib.impl(op_name, functools.partial(on_device, forward), key)
        lib.impl(grad_name, run_backward, key)
        lib.impl(op_name, autocast, f"Autocast{key}")
    torch.library.register_fake(f"flashstudy::{op_name}", fake_forward, lib=lib)
    torch.library.register_fake(f"flashstudy::{grad_name}", fake_backward, lib=lib)
    torch.library.register_autograd(
        f"flashstudy::{op_name}", differentiate, setup_context=setup_context, lib=lib
    )
    torch.library.register_autograd(f"flashstudy::{grad_name}", differentiate_twice, lib=lib)
    register_flop_formula(op.overloadpacket)(forward_flops)
    register_flop_formula(grad_op.overloadpacket)(backward_flops)

    # The dispatcher costs a small call more than its launch does, so `call` goes around it where
    # none of what it serves is in use: straight to the launcher, or, where a gradient will be
    # asked for, through a function of autograd's that does what the registration would.

    def short_forward(ctx, *inputs):
        output = on_device(forward, *inputs)
        setup_context(ctx, inputs, output)
        return output

    def short_backward(ctx, do, dlse):
        return differentiate(ctx, do, dlse, short=True)

    functions = {"forward": staticmethod(short_forward), "backward": staticmethod(short_backward)}
    short = type(op_name, (torch.autograd.Function,), functions)  # grad_fn: <{op_name}Backward>

    def call(q, k, v, *args):
        if needs_dispatcher(q, k, v):
            refuse_tangents(name, q, k, v)
            return op(q, k, v, *args)
        if torch.is_autocast_enabled("cuda" if q.is_cuda else "cpu"):
            q, k, v = (t.to(autocast_dtype(t)) for t in (q, k, v))
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return short.apply(q, k, v, *args)
        return on_device(forward, q, k, v, *args)

    call.op, call.backward_op, call.library = op, grad_op, lib
    return call


def needs_dispatcher(*tensors):
    """Whether anything watches or transforms a call: then it has to be one operator in its view."""
    return (
        torch.compiler.is_compiling()
        or {*map(type, tensors)} != {torch.Tensor}  # subclasses, fake tensors
        or torch._C._len_torch_dispatch_stack() > 0  # modes: FLOP counter, fake, export, ...
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None  # torch.func
        or any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))  # is_grads_batched
        or torch._C._get_tracing_state() is not None  # torch.jit.trace
        or forward_ad._current_level >= 0  # dual numbers
    )


def refuse_tangents(name, *tensors):
    """Raise where forward-mode differentiation (torch.func.jvp) goes through one of the tensors.

    Autograd would drop the tangent in silence, and the result pass for a constant.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(f"{name} has no forward-mode derivative")


def on_device(function, q, *args):
    """Call a launcher with the GPU of `q` current: Triton launches on the current one."""
    if q.is_cuda and q.get_device() != torch.cuda.current_device():
        with torch.cuda.device(q.get_device()):
            return function(q, *args)
    return function(q, *args)


def visible_pairs(n_q, n_k, causal):
    """Query-key pairs that count: all; causal, those under the diagonal (N²/2 for a square)."""
    n = min(n_q, n_k)  # rows that see any key
    return n * n_k - n * n // 2 if causal else n_q * n_k


def forward_flops(q_shape, k_shape, v_shape, causal, *_, **__):
    """4·B·H·D for each pair: QKᵀ and PV, a multiply and an add each. The softmax is not counted."""
    b, h, n_q, d = q_shape
    return 4 * b * h * d * visible_pairs(n_q, k_shape[2], causal)


def backward_flops(
    do_shape, q_shape, k_shape, v_shape, o_shape, lse_shape, causal, *args, **kwargs
):
    """2.5× the forward: five products, QKᵀ again, dO·Vᵀ, Pᵀ·dO, dSᵀ·Q and dS·K."""
    return forward_flops(q_shape, k_shape, v_shape, causal) * 5 // 2
