"""Standard attention as text-books write it: every score goes through device memory."""

import functools
import math

import torch


@functools.lru_cache(maxsize=2)
def _hidden(n_q, n_k, device):
    """Bool mask [N_Q, N_K], True where bottom-right causal attention must not look.

    Cached, so that a repeated (timed) call does not pay for building it.
    """
    return torch.ones(n_q, n_k, dtype=torch.bool, device=device).triu_(n_k - n_q + 1)


def attention(q, k, v, *, causal=False, scale=None):
    """softmax(scale * q kᵀ) v with S and P materialised; differentiable; B·H·N_Q·N_K elements each.

    A fair baseline: three passes and nothing more. The scale rides in the matrix product's epilogue
    (baddbmm with beta=0), the mask is written in place, the softmax accumulates in fp32.
    q (B, H, N_Q, D), k and v (B, H_KV, N_K, D), any float dtype; returns (B, H, N_Q, D).
    """
    b, h, n_q, d = q.shape
    h_kv, n_k = k.shape[1:3]
    scale = 1.0 / math.sqrt(d) if scale is None else scale
    if h_kv != h:  # text-book code repeats the shared heads
        k, v = (t.repeat_interleave(h // h_kv, dim=1) for t in (k, v))

    if scale == 0:  # torch's bf16 on CPUs leaves memory unwritten where alpha and beta are both 0
        q, scale = q * 0, 1.0
    q, k, v = (t.reshape(b * h, -1, d) for t in (q, k, v))  # [B*H, N, D]
    s = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=scale)  # [B*H, N_Q, N_K]
    if causal:
        hidden = _hidden(n_q, n_k, q.device)
        s.masked_fill_(hidden, -math.inf)
    p = s.softmax(-1)  # [B*H, N_Q, N_K]
    if causal and n_q > n_k:  # the first rows see no key: exp(-inf - -inf) left NaN there
        p = p.masked_fill(hidden, 0)
    return (p @ v).view(b, h, n_q, d)
