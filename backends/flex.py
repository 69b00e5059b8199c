"""FlexAttention: torch's compiler writes a Triton kernel for the mask it is given."""

import functools

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# Each shape is its own compilation. With fullgraph, running out of recompilations is an error and
# not a silent return to the eager (materialising) version.
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 1024)
torch._dynamo.config.accumulated_recompile_limit = max(
    torch._dynamo.config.accumulated_recompile_limit, 4096
)
_compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)


BLOCK = 128  # queries and keys of a block of the mask, as flex_attention has it by default


@functools.lru_cache(maxsize=4)
def _causal(n_q, n_k, device):
    """Block mask, bottom-right; cached, so that a repeated (timed) call does not pay for it.

    Block by block: torch's create_block_mask, run eagerly, makes it from the N_Q × N_K mask itself
    and takes 10 bytes for each of its elements on the way: 10 GiB at 32,768 tokens, 160 at 131,072.
    """
    offset = n_k - n_q
    rows = torch.arange(0, n_q, BLOCK, device=device)[:, None]  # first query of each block
    keys = torch.arange(0, n_k, BLOCK, device=device)  # first key of each block
    last_row = (rows + BLOCK).clamp(max=n_q) - 1
    seen = last_row + offset >= keys  # some of the block
    whole = (rows + offset >= keys + BLOCK - 1) & (rows + BLOCK <= n_q) & (keys + BLOCK <= n_k)

    def ordered(blocks):
        """How many blocks each row of blocks has, and which: those first, in order."""
        blocks = blocks.to(torch.int8)[None, None]  # [1, 1, rows of blocks, columns of blocks]
        first = blocks.argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32), first.to(torch.int32)

    return BlockMask.from_kv_blocks(
        *ordered(seen & ~whole), *ordered(whole), BLOCK_SIZE=BLOCK, seq_lengths=(n_q, n_k),
        mask_mod=lambda b, h, i, j: i + offset >= j,
    )  # fmt: skip


def attention(q, k, v, *, causal=False, scale=None):
    """The contract of `backends`; compiled on the first call of each shape (seconds)."""
    mask = _causal(q.shape[2], k.shape[2], q.device) if causal else None
    return _compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
