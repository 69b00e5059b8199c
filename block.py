"""A minimal pre-norm Transformer block around a given attention. No MLP, no dropout."""

import torch
from torch import nn


class Block(nn.Module):
    """x + W_o · attention(heads of W_qkv · LayerNorm(x)).

    embed: model width E.  heads: query heads H, dividing E.  attention: a function of the contract
    in `backends`, called as attention(q, k, v, causal=causal).  kv_heads: H_KV key and value heads,
    dividing H; H of them unless given.  device, dtype: of the parameters.

    forward takes x (B, N, E) of the parameters' dtype and returns the same shape. The heads reach
    the attention function as strided views of one fused projection, without a copy.

    Raises ValueError where a size is not positive or does not divide.
    """

    def __init__(
        self, embed, heads, attention, *, kv_heads=None, causal=False, device=None, dtype=None
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        for name, n in (("embed", embed), ("heads", heads), ("kv_heads", kv_heads)):
            if n < 1:
                raise ValueError(f"{name}: expected a positive number, got {n}")
        if embed % heads:
            raise ValueError(f"heads: expected a divisor of embed={embed}, got {heads}")
        if heads % kv_heads:
            raise ValueError(f"kv_heads: expected a divisor of heads={heads}, got {kv_heads}")
        if not callable(attention):
            raise ValueError(f"attention: expected a function, got {attention!r}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, embed // heads
        self.attention, self.causal = attention, causal
        where = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(embed, **where)
        self.qkv = nn.Linear(embed, (heads + 2 * kv_heads) * self.head_dim, bias=False, **where)
        self.out = nn.Linear(embed, embed, bias=False, **where)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, e = x.shape
        # [B, N, E] -> [B, N, (H + 2 H_KV) D] -> [B, N, H + 2 H_KV, D] -> [B, H + 2 H_KV, N, D]
        qkv = self.qkv(self.norm(x)).view(b, n, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)  # [B, H, N, D] ×3
        o = self.attention(q, k, v, causal=self.causal)  # [B, H, N, D]
        o = o.transpose(1, 2).reshape(b, n, e)  # [B, H, N, D] -> [B, N, H, D] -> [B, N, E]
        return x + self.out(o)
