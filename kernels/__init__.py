"""Attention kernels, a ladder from text-book to fast. `README.md` here says what to read first.

Every step has an `attention` of its own, in `v1_flash` and so on. The one here picks a step for
every call, forward and backward each for itself: what passes between the two is the same for all.
"""

import functools
import importlib

import torch

from . import _gluon, _host

__all__ = ["attention", "choose"]

# Multiplications (B·H·N_Q·N_K·D) below which the launch outlasts the kernel, and v3's is cheaper.
FORWARD_MIN_WORK = 1 << 33
FORWARD_MIN_KEYS = 4096  # or so many keys: few queries over many keys are split over the GPU
BACKWARD_MIN_WORK = 1 << 33


def choose(q, k, v, *, backward=False):
    """Name of the step that `attention` runs for these tensors; the whole rule.

    On a Hopper GPU, in half precision, with work enough to outlast the launch:

        forward     v6_persistent        head dim divisible by 8; storage and strides of q, k, v in
                                         multiples of 16 bytes
        backward    v7_hopper_backward   head dim up to 128
                    v7_wide_heads        wider ones

    and `v3_tma` everywhere else; on GPUs without a tensor copy engine that is `v2_lean` with other
    tiles. The choice is made when the operator runs, on tensors with memory. So it is the same in
    eager code, torch.compile, torch.export, autocast and CUDA graphs, and is no part of a graph.
    """
    b, h, n_q, d = q.shape
    n_k, work = k.shape[2], b * h * n_q * k.shape[2] * d
    if not q.is_cuda or q.dtype not in _host.HALF_DTYPES or _gluon.why_not(q.device):
        return "v3_tma"
    if backward:
        if work < BACKWARD_MIN_WORK:
            return "v3_tma"
        return "v7_hopper_backward" if d <= 128 else "v7_wide_heads"
    if d % 8 or (work < FORWARD_MIN_WORK and n_k < FORWARD_MIN_KEYS):
        return "v3_tma"
    return "v6_persistent" if _aligned(q) and _aligned(k) and _aligned(v) else "v3_tma"


def _aligned(t):
    """Whether the copy engine can address a half-precision tensor: in steps of 16 bytes."""
    b, h, n, _ = t.stride()
    return not (t.data_ptr() | (b | h | n) << 1) & 15


@functools.cache
def _step(name):
    return importlib.import_module(f".{name}", __name__)


def forward(q, k, v, causal, scale, allow_tf32, deterministic=False):
    """Launch the step of choice on checked tensors. Returns o, like q, and lse in fp32."""
    return _step(choose(q, k, v)).forward(q, k, v, causal, scale, allow_tf32)


def backward(do, q, k, v, o, lse, causal, scale, allow_tf32, deterministic=False):
    """Launch on what forward took and returned. Returns dq, dk, dv, like q, k, v."""
    name = choose(q, k, v, backward=True)
    how = {"deterministic": deterministic} if name.startswith("v7") else {}
    return _step(name).backward(do, q, k, v, o, lse, causal, scale, allow_tf32, **how)


_op = _host.operator("attention", forward, backward, flags=("deterministic",))


def attention(
    q, k, v, *, causal=False, scale=None, return_lse=False, allow_tf32=False, deterministic=None
):
    """softmax(scale · Q Kᵀ) V by the steps that `choose` names.

    q (B, H, N_Q, D), k and v (B, H_KV, N_K, D), H_KV dividing H, any lengths, D from 1 to 256,
    fp16, bf16 or fp32 (allow_tf32 trades its accuracy for tensor cores), any strides with a
    contiguous last dim. causal is aligned bottom-right; a row that sees no key gives 0. scale is
    1/sqrt(D) unless given. With return_lse also the logarithm of each row's sum of exponentials,
    (B, H, N_Q) in fp32, without a gradient.

    The forward, dk and dv repeat bit by bit. dq does, too, but where v7 sums it in the
    order in which its programs finish: as in other libraries, that is the default because it is
    faster. deterministic=True gives it an order, and so does PyTorch's setting
    torch.use_deterministic_algorithms(True) unless deterministic=False says otherwise.

    Raises ValueError where the arguments do not fit.
    """
    scale = _host.check(q, k, v, scale)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    o, lse = _op(q, k, v, causal, scale, allow_tf32, deterministic)
    return (o, lse) if return_lse else o
