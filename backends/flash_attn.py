"""The reference packages, flash-attn (FlashAttention-2) and flash-attn-4: (B, N, H, D) inside."""


def flash_attn_2(q, k, v, *, causal=False, scale=None):
    """flash_attn.flash_attn_func; fp16 and bf16."""
    from flash_attn import flash_attn_func

    o = flash_attn_func(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, causal=causal
    )
    return o.transpose(1, 2)


def flash_attn_4(q, k, v, *, causal=False, scale=None):
    """flash_attn.cute.interface.flash_attn_func; fp16 and bf16."""
    from flash_attn.cute.interface import flash_attn_func

    o = flash_attn_func(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale, causal=causal
    )
    return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)
