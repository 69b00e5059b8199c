"""FlexAttention: torch's compiler writes a Triton kernel for the mask it is given."""

import functools

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# Each shape is its own compilation. With fullgraph, running out of recompilations is an error and
# not a silent return to the eager (materialising) version.
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 1024)
torch._dynamo.config.accumulated_recompile_limit = max(
    torch._dynamo.config.accumulated_recompile_limit, 4096
)
_compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)


@functools.lru_cache(maxsize=4)
def _causal(n_q, n_k, device):
    """Block mask, bottom-right; cached, so that a repeated (timed) call does not pay for it."""
    offset = n_k - n_q
    return create_block_mask(
        lambda b, h, i, j: i + offset >= j, None, None, n_q, n_k, device=device
    )


def attention(q, k, v, *, causal=False, scale=None):
    """The contract of `backends`; compiled on the first call of each shape (seconds)."""
    mask = _causal(q.shape[2], k.shape[2], q.device) if causal else None
    return _compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
