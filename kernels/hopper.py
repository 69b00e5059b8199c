"""The Hopper steps joined: forward by `v6_persistent`, backward by `v7_hopper_backward`.

The latter has a second file, `v7_wide_heads`, for head dims above 128. Steps do not import
one another, so that each can be read, copied and measured by itself. A user wants both directions
under one autograd node: that is all there is here. Between the two travels what `_host` says of
every pair: o, and lse, the natural logarithm of each row's sum.

The backward adds up dQ in the order in which its programs come, so two calls differ in dQ's last
bits, but where one program takes a whole head (`_chains` of v7); dK and dV, and the forward, repeat
bit by bit. `deterministic=True`, or PyTorch's torch.use_deterministic_algorithms(True), gives dQ an
order too, in which programs wait for one another.
"""

import torch

from . import _gluon, _host, v6_persistent, v7_hopper_backward, v7_wide_heads


def forward(q, k, v, causal, scale, allow_tf32, deterministic=False):
    """Launch on checked tensors. Returns o, like q, and lse (B, H, N_Q) in fp32."""
    return v6_persistent.forward(q, k, v, causal, scale, allow_tf32)  # repeats bit by bit anyway


def backward(do, q, k, v, o, lse, causal, scale, allow_tf32, deterministic=False):
    """Launch on what forward took and returned. Returns dq, dk, dv, like q, k, v."""
    wide = q.shape[3] > v7_hopper_backward.MAX_HEAD_DIM
    step = v7_wide_heads if wide else v7_hopper_backward
    return step.backward(
        do, q, k, v, o, lse, causal, scale, allow_tf32, deterministic=deterministic
    )


_op = _host.operator("hopper", forward, backward, flags=("deterministic",))


def attention(
    q, k, v, *, causal=False, scale=None, return_lse=False, allow_tf32=False, deterministic=None
):
    """softmax(scale · Q Kᵀ) V on Hopper, for q (B, H, N_Q, D) and k, v (B, H_KV, N_K, D).

    What `v6_persistent` takes: fp16 or bf16, H_KV dividing H, any lengths, D a multiple of 8 up to
    256, storage and strides in multiples of 16 bytes. causal is aligned bottom-right; a row that
    sees no key gives 0. scale is 1/sqrt(D) unless given. With return_lse also the logarithm of each
    row's sum of exponentials, (B, H, N_Q) in fp32, without a gradient. deterministic asks for
    gradients that repeat bit by bit, or not; unless given, PyTorch's global setting decides.

    Raises ValueError where the arguments do not fit; never falls back to another step.
    """
    scale = _gluon.check(q, k, v, scale)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    o, lse = _op(q, k, v, causal, scale, allow_tf32, deterministic)
    return (o, lse) if return_lse else o
