"""Attention kernels, a ladder from text-book to fast. `README.md` here says what to read first.

Every step has an `attention` of its own, in `v1_flash` and so on. The one here picks a step.
"""

import torch

from . import _gluon, _host, v3_tma

__all__ = ["attention", "choose"]

HOPPER_MIN_WORK = 1 << 33  # multiplications (B·H·N_Q·N_K·D): below, the launch outlasts the kernel
HOPPER_MIN_KEYS = 4096  # or so many keys: few queries over many keys are split over the GPU


def choose(q, k, v):
    """Name of the step that `attention` runs for these tensors; the whole rule.

    `v6_persistent` where it can run and pays: a Hopper GPU, half precision, a head dim divisible by
    8, storage and strides in multiples of 16 bytes, no gradient asked for (it has no backward), not
    inside torch.compile, and work enough to outlast its launch. `v3_tma` everywhere else; on GPUs
    without a tensor copy engine it is `v2_lean` with other tiles.
    """
    b, h, n_q, d = q.shape
    n_k = k.shape[2]
    pays = n_k >= HOPPER_MIN_KEYS or b * h * n_q * n_k * d >= HOPPER_MIN_WORK
    if not pays or d % 8 or not q.is_cuda or q.dtype not in _host.HALF_DTYPES:
        return "v3_tma"
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
        return "v3_tma"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "v3_tma"
    if any((t.data_ptr() | (t.stride(i) * 2)) & 15 for t in (q, k, v) for i in range(3)):
        return "v3_tma"
    return "v3_tma" if _gluon.why_not(q.device) else "v6_persistent"


def attention(q, k, v, *, causal=False, scale=None, return_lse=False, allow_tf32=False):
    """softmax(scale · Q Kᵀ) V by the step that `choose` names.

    q (B, H, N_Q, D), k and v (B, H_KV, N_K, D), H_KV dividing H, any lengths, D from 1 to 256,
    fp16, bf16 or fp32 (allow_tf32 trades its accuracy for tensor cores), any strides with a
    contiguous last dim. causal is aligned bottom-right; a row that sees no key gives 0. scale is
    1/sqrt(D) unless given. With return_lse also the logarithm of each row's sum of exponentials,
    (B, H, N_Q) in fp32, without a gradient. Gradients repeat bit by bit.

    Raises ValueError where the arguments do not fit.
    """
    step = v3_tma
    if q.ndim == k.ndim == v.ndim == 4 and choose(q, k, v) == "v6_persistent":
        from . import v6_persistent as step
    return step.attention(
        q, k, v, causal=causal, scale=scale, return_lse=return_lse, allow_tf32=allow_tf32
    )
