"""FlashAttention-2 in Triton, from the text book: attention that never writes its score matrix.

Attention is O = softmax(scale · Q Kᵀ) V. The scores S and the probabilities P are N_Q × N_K, 512
MiB a head with 16,384 tokens at half precision. `v0_naive` stores both; here a program holds one
tile of them on chip, uses it and forgets it: memory grows with N and not with N².

A softmax needs its whole row's maximum and sum before it can normalise, but a tile of keys shows a
piece of the row. So keep, over the keys seen so far, the maximum m, the sum l = Σ exp(s - m) and
the unnormalised output acc = Σ exp(s - m) v. Where a tile raises m to m', all earlier terms carry
exp(-m) and should carry exp(-m'): one multiplication mends them, the *online softmax*.

    alpha = exp(m - m')    l ← alpha l + Σ exp(s - m')    acc ← alpha acc + Σ exp(s - m') v

After the last tile O = acc / l, exactly, and lse = m + log l = log Σ exp(s) is kept for the
backward (FlashAttention-2, arXiv 2307.08691, algorithm 1: "line" in the code below).

The backward (algorithm 2), ∘ being the product element by element:

    P = exp(S - lse)            recomputed by tiles: lse knows the row's maximum and sum
    dV = Pᵀ dO                  dP = dO Vᵀ
    dS = P ∘ (dP - delta)       delta = rowsum(P ∘ dP) = rowsum(dO ∘ O), without P or dP
    dQ = scale · dS K           dK = scale · dSᵀ Q

               keys →
             ┌────┬────┬────┐   `_forward_kernel`, `_dq_kernel`: a program for each tile of queries,
    queries  │ ░░ │    │    │   → over its keys, with acc or dq in registers. `_dkdv_kernel`: one
       ↓     ├────┼────┼────┤   for each tile of keys, ↓ over its queries, with dk and dv.
             │ ▓▓ │ ░░ │    │   Causal: ▓ full tiles need no mask (`_dkdv_kernel` masks them too),
             ├────┼────┼────┤   ░ tiles on the diagonal do, the others are never visited.
             │ ▓▓ │ ▓▓ │ ░░ │   HBM traffic: Q and O once, K and V once for each tile of queries
             └────┴────┴────┘   (mostly from L2), lse.

Differs from `v0_naive`: one kernel for three, no N² memory. Differs from the paper: algorithm 2
adds dQ into device memory from every tile of keys (line 15). A kernel of its own recomputes two
products, and sums in a fixed order: gradients repeat bit by bit. Limits: a head dim is padded to a
power of two, in time as well; P and dS are rounded to the inputs' type; scores and sums are fp32.

Measured on an H200 (bf16, 16,384 tokens, hidden size 2048, TFLOP/s at N = 512, 2048, 16384; torch
2.11.0, Triton 3.6.0, 2026-11-22; cuDNN's forward had 523, 646 and 646 at D = 128):

    D = 64   forward  277, 331, 350    causal  171, 279, 330    backward  226, 286, 309
    D = 128  forward  284, 385, 433    causal  189, 317, 400    backward  165, 211, 234
    D = 256  forward  324, 428, 443    causal  203, 333, 430    backward   73,  82,  81
"""

import torch
import triton
import triton.language as tl

from . import _host

# (BLOCK_M queries, BLOCK_N keys, num_warps, num_stages tiles of the loop's operands in flight), by
# padded head dim: for sm_90; for any GPU, within 99 KiB of shared memory; for fp32, which has no
# tensor cores at full precision. On sm_90 a pipelined loop (num_stages > 1) takes tiles of 64 and
# more both ways: smaller products do not run on wgmma, and Triton 3.6 lets a loop with both kinds
# of product overwrite a tile that one of them still reads.
FORWARD = {
    64: ((128, 64, 4, 3), (128, 64, 4, 3), (32, 32, 8, 1)),
    128: ((128, 128, 8, 2), (128, 64, 8, 2), (32, 32, 8, 1)),
    256: ((128, 64, 8, 2), (64, 32, 8, 2), (16, 16, 4, 1)),
}
DQ = {
    64: ((64, 64, 4, 2), (64, 32, 4, 2), (32, 16, 4, 1)),
    128: ((128, 64, 8, 2), (64, 32, 4, 2), (16, 16, 4, 1)),
    256: ((32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 8, 1)),
}
DKDV = {
    64: ((64, 64, 4, 2), (32, 64, 4, 2), (32, 32, 8, 1)),
    128: ((64, 64, 8, 2), (32, 64, 8, 2), (32, 16, 8, 1)),
    256: ((32, 32, 8, 1), (32, 32, 8, 1), (16, 16, 4, 1)),
}


@triton.jit
def _program(N, H, BLOCK: tl.constexpr):
    """(b, h, start): the head and the first row of the tile that this program has."""
    tiles = tl.cdiv(N, BLOCK)
    pid_bh = (tl.program_id(0) // tiles).to(tl.int64)  # tensors may have more than 2^31 elements
    return pid_bh // H, pid_bh % H, tl.program_id(0) % tiles * BLOCK


@triton.jit
def _load(ptr, rows, stride, N, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a matrix as a tile, 0 past row N and column HEAD_DIM."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < N) & (offs_d[None, :] < HEAD_DIM)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _store(ptr, rows, stride, N, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of `_load`: what lies past the end is not written."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < N) & (offs_d[None, :] < HEAD_DIM)
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask)


@triton.jit
def _key_range(
    start_m, N_Q, N_K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr
):
    """(full, hi): all of this tile's queries see all keys below full; none sees one from hi on."""
    full, hi = N_K, N_K
    if CAUSAL:  # aligned bottom-right: query i sees the keys up to i + N_K - N_Q
        full = tl.minimum(N_K, tl.maximum(start_m + N_K - N_Q + 1, 0))
        hi = tl.minimum(N_K, tl.maximum(start_m + N_K - N_Q + BLOCK_M, 0))
    return full // BLOCK_N * BLOCK_N, hi


@triton.jit
def _visible(offs_m, offs_n, N_Q, N_K, CAUSAL: tl.constexpr):
    """Which queries of a tile see which of its keys."""
    mask = offs_n[None, :] < N_K
    if CAUSAL:
        mask &= offs_n[None, :] <= offs_m[:, None] + (N_K - N_Q)
    return mask  # [BLOCK_M, BLOCK_N], or [1, BLOCK_N]


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    H, GROUP, N_Q, N_K, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O and lse of one tile of queries: algorithm 1, one turn of its outer loop."""
    b, h, start_m = _program(N_Q, H, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)

    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // GROUP * stride_kh  # GROUP heads of queries share one of keys
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    o_ptr += b * stride_ob + h * stride_oh

    q = _load(q_ptr, offs_m, stride_qm, N_Q, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D], line 4
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # line 5
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)

    full, hi = _key_range(start_m, N_Q, N_K, BLOCK_M, BLOCK_N, CAUSAL)
    # One body, compiled for the full tiles and for the masked ones. The latter are few and not
    # pipelined: of two pipelined loops in a row ptxas would serialise the matrix products.
    for MASKED in tl.static_range(2):
        for start_n in tl.range(
            full * MASKED, hi if MASKED else full, BLOCK_N, num_stages=1 if MASKED else None
        ):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = _load(k_ptr, offs_n, stride_kn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # line 8
            if MASKED:
                s = tl.where(_visible(offs_m, offs_n, N_Q, N_K, CAUSAL), s, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(s, 1))  # [BLOCK_M], line 9
            # A row that has seen no key yet is at -inf, and -inf - -inf would be NaN.
            base = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
            p = tl.exp(s - base[:, None])  # [BLOCK_M, BLOCK_N], 0 where masked
            alpha = tl.exp(m_i - base)  # [BLOCK_M], 0 at a row's first key
            l_i = alpha * l_i + tl.sum(p, 1)
            v = _load(v_ptr, offs_n, stride_vn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)  # 10
            m_i = m_new

    o = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]  # line 12; a row without keys gives 0
    lse = m_i + tl.log(l_i)  # line 13; -inf there

    _store(o_ptr, offs_m, stride_om, N_Q, o, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + (b * H + h) * N_Q + offs_m, lse, offs_m < N_Q)


@triton.jit
def _p_and_ds(
    q, do, k, v, lse, delta, offs_m, offs_n, scale, N_Q, N_K,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dS of one tile, recomputed from lse: algorithm 2, lines 10, 11, 13 and 14."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [BLOCK_M, BLOCK_N]
    p = tl.exp(s - lse[:, None])
    if MASKED:  # not by s = -inf: a row without keys has lse = -inf, too
        p = tl.where(_visible(offs_m, offs_n, N_Q, N_K, CAUSAL), p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    return p, p * (dp - delta[:, None])


@triton.jit
def _delta_kernel(
    o_ptr, do_ptr, delta_ptr, stride_ob, stride_oh, stride_om, stride_dob, stride_doh, stride_dom,
    H, N_Q, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO ∘ O): algorithm 2, line 4."""
    b, h, start_m = _program(N_Q, H, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)

    o_ptr += b * stride_ob + h * stride_oh
    do_ptr += b * stride_dob + h * stride_doh

    o = _load(o_ptr, offs_m, stride_om, N_Q, HEAD_DIM, BLOCK_D).to(tl.float32)
    do = _load(do_ptr, offs_m, stride_dom, N_Q, HEAD_DIM, BLOCK_D).to(tl.float32)
    tl.store(delta_ptr + (b * H + h) * N_Q + offs_m, tl.sum(o * do, 1), offs_m < N_Q)


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_dom,
    stride_dqb, stride_dqh, stride_dqm,
    H, GROUP, N_Q, N_K, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries; its loop visits the tiles that the forward's visits."""
    b, h, start_m = _program(N_Q, H, BLOCK_M)
    offs_m = start_m + tl.arange(0, BLOCK_M)

    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    do_ptr += b * stride_dob + h * stride_doh
    dq_ptr += b * stride_dqb + h * stride_dqh

    q = _load(q_ptr, offs_m, stride_qm, N_Q, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do = _load(do_ptr, offs_m, stride_dom, N_Q, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    lse = tl.load(lse_ptr + (b * H + h) * N_Q + offs_m, offs_m < N_Q, 0.0)  # [BLOCK_M]
    delta = tl.load(delta_ptr + (b * H + h) * N_Q + offs_m, offs_m < N_Q, 0.0)  # [BLOCK_M]
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    full, hi = _key_range(start_m, N_Q, N_K, BLOCK_M, BLOCK_N, CAUSAL)
    for MASKED in tl.static_range(2):
        for start_n in tl.range(
            full * MASKED, hi if MASKED else full, BLOCK_N, num_stages=1 if MASKED else None
        ):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = _load(k_ptr, offs_n, stride_kn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            v = _load(v_ptr, offs_n, stride_vn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            _, ds = _p_and_ds(
                q, do, k, v, lse, delta, offs_m, offs_n, scale, N_Q, N_K, CAUSAL, MASKED, PRECISION
            )
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)  # line 15

    _store(dq_ptr, offs_m, stride_dqm, N_Q, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_dom,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    H, GROUP, N_Q, N_K, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys: algorithm 2, one turn of its outer loop, without line 15."""
    b, h_kv, start_n = _program(N_K, H // GROUP, BLOCK_N)
    offs_n = start_n + tl.arange(0, BLOCK_N)

    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    dk_ptr += b * stride_dkb + h_kv * stride_dkh
    dv_ptr += b * stride_dvb + h_kv * stride_dvh

    k = _load(k_ptr, offs_n, stride_kn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D], line 6
    v = _load(v_ptr, offs_n, stride_vn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # line 7
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # Queries before lo see none of these keys. Keys past the end need no mask: their rows of dk and
    # dv are not stored. Causal, all tiles are masked: two loops would need too many registers.
    lo = tl.maximum(start_n - (N_K - N_Q), 0) // BLOCK_M * BLOCK_M if CAUSAL else 0
    for h in range(h_kv * GROUP, h_kv * GROUP + GROUP):  # the heads of queries that share k and v
        q_head = q_ptr + b * stride_qb + h * stride_qh
        do_head = do_ptr + b * stride_dob + h * stride_doh
        row = (b * H + h) * N_Q
        for start_m in range(lo, N_Q, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q = _load(q_head, offs_m, stride_qm, N_Q, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            do = _load(do_head, offs_m, stride_dom, N_Q, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            # Past the end lse is inf, which makes p and ds 0.
            lse = tl.load(lse_ptr + row + offs_m, offs_m < N_Q, float("inf"))  # [BLOCK_M]
            delta = tl.load(delta_ptr + row + offs_m, offs_m < N_Q, 0.0)  # [BLOCK_M]
            p, ds = _p_and_ds(
                q, do, k, v, lse, delta, offs_m, offs_n, scale, N_Q, N_K, CAUSAL, CAUSAL, PRECISION
            )
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)  # line 12
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)  # line 16

    _store(dk_ptr, offs_n, stride_dkn, N_K, dk * scale, HEAD_DIM, BLOCK_D)  # line 18
    _store(dv_ptr, offs_n, stride_dvn, N_K, dv, HEAD_DIM, BLOCK_D)


def _config(table, q, allow_tf32):
    """What a kernel is compiled for: its tile, the padded head dim, the precision; and how."""
    block_d = max(16, 1 << (q.shape[3] - 1).bit_length())  # tl.dot takes powers of two from 16 on
    sm_90, any_gpu, fp32 = table[max(64, block_d)]
    half = sm_90 if _host.capability(q.device) == (9, 0) else any_gpu
    m, n, warps, stages = fp32 if q.dtype == torch.float32 else half
    precision = "tf32" if allow_tf32 else "ieee"
    return m, n, block_d, precision, {"num_warps": warps, "num_stages": stages}


def forward(q, k, v, causal, scale, allow_tf32):
    """Launch on checked tensors. Returns o, like q, and lse (B, H, N_Q) in fp32."""
    (B, H, N_Q, D), (_, H_KV, N_K, _) = q.shape, k.shape
    o = _host.empty_like(q)
    lse = torch.empty((B, H, N_Q), dtype=torch.float32, device=q.device)
    m, n, d, precision, how = _config(FORWARD, q, allow_tf32)
    _forward_kernel[(-(-N_Q // m) * B * H,)](  # tiles, rounded up; other axes end at 65,535
        q, k, v, o, lse, scale,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
        H, H // H_KV, N_Q, N_K, D, m, n, d, causal, precision, **how,
    )  # fmt: skip
    return o, lse


def backward(do, q, k, v, o, lse, causal, scale, allow_tf32):
    """Launch on what forward took and returned. Returns dq, dk, dv, like q, k, v."""
    (B, H, N_Q, D), (_, H_KV, N_K, _) = q.shape, k.shape
    dq, dk, dv = _host.empty_like(q), _host.empty_like(k), _host.empty_like(v)
    delta = torch.empty_like(lse)
    qkv_strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    m, n, d, precision, how = _config(DQ, q, allow_tf32)
    grid = (-(-N_Q // m) * B * H,)
    strides = (*o.stride()[:3], *do.stride()[:3])
    _delta_kernel[grid](o, do, delta, *strides, H, N_Q, D, m, d, num_warps=8)
    _dq_kernel[grid](
        q, k, v, do, dq, lse, delta, scale, *qkv_strides, *do.stride()[:3], *dq.stride()[:3],
        H, H // H_KV, N_Q, N_K, D, m, n, d, causal, precision, **how,
    )  # fmt: skip
    m, n, d, precision, how = _config(DKDV, q, allow_tf32)
    _dkdv_kernel[(-(-N_K // n) * B * H_KV,)](
        q, k, v, do, dk, dv, lse, delta, scale,
        *qkv_strides, *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        H, H // H_KV, N_Q, N_K, D, m, n, d, causal, precision, **how,
    )  # fmt: skip
    return dq, dk, dv


_op = _host.operator("v1_flash", forward, backward)


def attention(q, k, v, *, causal=False, scale=None, return_lse=False, allow_tf32=False):
    """softmax(scale · Q Kᵀ) V, with q (B, H, N_Q, D) and k, v (B, H_KV, N_K, D), H_KV dividing H.

    Any lengths, D from 1 to 256, fp16, bf16 or fp32 (allow_tf32 trades its accuracy for tensor
    cores), any strides with a contiguous last dim; else ValueError. causal aligns bottom-right; a
    row that sees no key gives 0. scale is 1/sqrt(D) unless given. With return_lse also the log of
    each row's sum of exponentials, (B, H, N_Q), fp32, no gradient. Gradients repeat bit by bit.
    """
    scale = _host.check(q, k, v, scale)
    o, lse = _op(q, k, v, causal, scale, allow_tf32)
    return (o, lse) if return_lse else o
