"""Standard attention as torch's compiler makes it: the baseline of whoever writes no kernel."""

import math

import torch

# Each shape is its own compilation, as fast as the compiler can make it. With fullgraph, running
# out of recompilations is an error and not a silent return to the eager version.
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 1024)
torch._dynamo.config.accumulated_recompile_limit = max(
    torch._dynamo.config.accumulated_recompile_limit, 4096
)


def _formula(q, k, v, causal, scale):
    """softmax(scale * q kᵀ) v; q (B, H, N_Q, D), k and v (B, H_KV, N_K, D).

    Written for the compiler: scale, mask and softmax become one kernel between two matrix products.
    S is written once and read by it, P is written once. On [B*H, N, D] the compiler does not
    recognise attention; on four dimensions it would call SDPA, which is another baseline.
    """
    b, h, n_q, d = q.shape
    h_kv, n_k = k.shape[1:3]
    if h_kv != h:
        k, v = (t.repeat_interleave(h // h_kv, dim=1) for t in (k, v))

    q, k, v = (t.reshape(b * h, -1, d) for t in (q, k, v))  # [B*H, N, D]
    s = torch.bmm(q, k.mT).float() * scale  # [B*H, N_Q, N_K]
    if causal:  # bottom-right
        rows = torch.arange(n_q, device=q.device)[:, None]
        visible = torch.arange(n_k, device=q.device) <= rows + (n_k - n_q)  # [N_Q, N_K]
        s = s.masked_fill(~visible, -math.inf)
    p = s.softmax(-1)
    if causal and n_q > n_k:  # the first rows see no key: exp(-inf - -inf) left NaN there
        p = p.masked_fill(~visible, 0)
    return torch.bmm(p.to(v.dtype), v).view(b, h, n_q, d)


_compiled = torch.compile(_formula, fullgraph=True, dynamic=False)


def attention(q, k, v, *, causal=False, scale=None):
    """The contract of `backends`; compiled on the first call of each shape (seconds)."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _compiled(q, k, v, causal, scale)
