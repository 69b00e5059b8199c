"""torch.nn.functional.scaled_dot_product_attention: torch's own pick, and each kernel by name."""

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right


@functools.lru_cache(maxsize=2)
def _visible(n_q, n_k, device):
    return torch.ones(n_q, n_k, dtype=torch.bool, device=device).tril_(n_k - n_q)


def _mask(q, k, causal, explicit):
    """How to tell torch of a bottom-right causal mask: torch's own is_causal aligns top-left.

    The two agree where N_Q == N_K. With more keys than queries the flash and efficient kernels take
    a CausalBias, the others an explicit mask, cached so that a repeated call does not pay for it.
    """
    n_q, n_k = q.shape[2], k.shape[2]
    if not causal or n_q == n_k:
        return {"is_causal": causal}
    return {"attn_mask": _visible(n_q, n_k, q.device) if explicit else causal_lower_right(n_q, n_k)}


def _attend(q, k, v, causal, scale, explicit):
    empty = q.shape[2] - k.shape[2] if causal else 0
    if empty > 0:
        # The first queries see no key. On a GPU torch's kernels give them an average of v, or NaN
        # gradients, where the contract says 0; the other queries are a square problem.
        o = _attend(q[:, :, empty:], k, v, causal, scale, explicit)
        return F.pad(o, (0, 0, empty, 0))
    return F.scaled_dot_product_attention(
        q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1], **_mask(q, k, causal, explicit)
    )


def _only(backend, explicit):
    def attention(q, k, v, *, causal=False, scale=None):
        with sdpa_kernel(backend):
            return _attend(q, k, v, causal, scale, explicit)

    return attention


def sdpa(q, k, v, *, causal=False, scale=None):
    """What a user gets who names no kernel; `picked` says which one that is."""
    return _attend(q, k, v, causal, scale, explicit=True)


sdpa_math = _only(SDPBackend.MATH, explicit=True)
sdpa_efficient = _only(SDPBackend.EFFICIENT_ATTENTION, explicit=False)
sdpa_flash = _only(SDPBackend.FLASH_ATTENTION, explicit=False)
sdpa_cudnn = _only(SDPBackend.CUDNN_ATTENTION, explicit=True)


def picked(q, k, v, *, causal=False, scale=None):
    """The kernel that `sdpa` would run for these tensors: math, efficient, flash or cudnn."""
    if causal:
        q = q[:, :, max(0, q.shape[2] - k.shape[2]) :]
    choice = torch._fused_sdp_choice(
        q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1], **_mask(q, k, causal, True)
    )
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()
