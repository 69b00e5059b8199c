"""The text-book kernels with less to do beside the matrix products.

The tensor cores multiply a tile in a few hundred clocks; exponentials, masks, layout changes and
synchronisation must fit beside that, and in `v1_flash` they do not. This step computes the same
sums with the same programs, and leaves out what a tile does not need:

1. **Base 2.** The hardware's exponential has base 2, so exp costs a multiplication more. Fold
   log2 e into the scale: with c = scale · log2 e, P = 2^(c·S - m), one fused multiply-add an
   element. The maximum is taken before the scaling, which a positive c permits. m is in base 2,
   the lse that is returned in base e.

2. **Transposed scores.** dV = Pᵀ dO and dK = dSᵀ Q need tiles with a row for each *key*. v1 makes
   rows of queries and turns every tile over through shared memory; here Sᵀ = K Qᵀ and dPᵀ = V dOᵀ
   leave the tensor cores as the very registers that feed the next product:

       v1   S  = Q Kᵀ  [BLOCK_M, BLOCK_N] → P  → shared memory → Pᵀ → Pᵀ dO
       v2   Sᵀ = K Qᵀ  [BLOCK_N, BLOCK_M] → Pᵀ ────────────────────→ Pᵀ dO

   The product dPᵀ is issued before the exponentials of P, which run beside it.

3. **One loop.** v1 compiles its loops over keys twice, for full and for masked tiles, and masks
   every tile in its loop over queries. Here the mask is a branch that all threads of a program
   take alike. The loads stay in flight to the end, where a second loop would start its own. The
   dK, dV kernel walks through the tiles of all heads that share its keys in one loop, too.

4. **Heavy tiles first.** Causal tiles differ in work by the length of the sequence. Started in the
   order of the queries, the longest come last, and the GPU waits for them with most of it idle.

5. **Fewer passes.** delta is a by-product of the dQ kernel, which holds dO anyway, and every kernel
   has a tile of its own, for what it holds in registers.

Maths (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2; the lines are marked), memory traffic
and limits: `v1_flash`'s.

Measured on an H200 (bf16, 16,384 tokens, hidden size 2048; TFLOP/s of v1 → v2 in one run; torch
2.11.0, triton 3.6.0, 2026-11-22), at N = 512, 2048 and 16384:

    D = 64   forward  277 → 333, 331 → 395, 350 → 417    causal  171 → 216, 279 → 340, 330 → 408
             backward 226 → 290, 286 → 332, 309 → 342    causal  166 → 175, 258 → 271, 308 → 313
    D = 128  forward  284 → 322, 385 → 429, 433 → 468    causal  189 → 220, 317 → 367, 400 → 474
             backward 165 → 284, 211 → 361, 234 → 382    causal  123 → 198, 189 → 310, 222 → 377
    D = 256  forward  324 → 356, 428 → 481, 443 → 518    causal  203 → 234, 333 → 382, 430 → 517
             backward  73 → 186,  82 → 228,  81 → 230    causal   67 → 145,  80 → 212,  83 → 256

(D = 256 from another run; in its backward v2's two kernels were timed one by one. v1's causal
backward had a loop of its own for full tiles then.)
"""

import torch
import triton
import triton.language as tl

from . import _host

LOG2E = tl.constexpr(_host.LOG2E)

# BLOCK_M queries by BLOCK_N keys, num_warps, and num_stages tiles in flight of what the loop loads;
# by (compute capability, padded head dim), None: any GPU. Those rows fit in the 99 KiB of shared
# memory of the smallest GPUs from sm_80 on (sm_80 itself has 163, sm_90 227).
FORWARD = {
    ((9, 0), 64): (128, 64, 8, 3),
    ((9, 0), 128): (128, 64, 8, 3),
    ((9, 0), 256): (128, 64, 8, 2),
    (None, 64): (128, 64, 4, 3),
    (None, 128): (128, 32, 4, 3),
    (None, 256): (64, 32, 4, 2),
}
DQ = {
    ((9, 0), 64): (128, 64, 8, 3),
    ((9, 0), 128): (128, 64, 8, 3),
    ((9, 0), 256): (128, 32, 8, 2),
    (None, 64): (64, 64, 4, 2),
    (None, 128): (64, 32, 4, 2),
    (None, 256): (32, 32, 4, 1),
}
DKDV = {
    ((9, 0), 64): (32, 64, 4, 3),
    ((9, 0), 128): (32, 64, 4, 3),
    ((9, 0), 256): (64, 64, 8, 2),
    (None, 64): (32, 64, 4, 3),
    (None, 128): (32, 64, 4, 2),
    (None, 256): (32, 32, 4, 1),
}
# fp32 at full precision does without tensor cores, and its operands fill the registers.
FORWARD_FP32 = {64: (32, 32, 4, 2), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)}
DQ_FP32 = {64: (32, 16, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}
DKDV_FP32 = {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)}


def _config(table, table_fp32, capability, head_dim, fp32):
    """A row of the table for this GPU, or else for any."""
    d = max(64, 1 << (head_dim - 1).bit_length())
    return table_fp32[d] if fp32 else table.get((capability, d)) or table[None, d]


@triton.jit
def _load(ptr, rows, stride, N, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a matrix as a tile, 0 past row N and column HEAD_DIM."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < N) & (offs_d[None, :] < HEAD_DIM)
    return tl.load(
        ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :], mask=mask, other=0.0
    )


@triton.jit
def _store(ptr, rows, stride, N, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of `_load`: what lies past the end is not written."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = (rows[:, None] < N) & (offs_d[None, :] < HEAD_DIM)
    tl.store(
        ptr + rows.to(tl.int64)[:, None] * stride + offs_d[None, :],
        tile.to(ptr.dtype.element_ty),
        mask,
    )


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
def _visible(m, n, N_Q, N_K, CAUSAL: tl.constexpr):
    """Which queries m see which keys n, in the shape that m and n broadcast to."""
    mask = n < N_K
    if CAUSAL:
        mask &= n <= m + (N_K - N_Q)
    return mask


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, scale_log2,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    H, GROUP, N_Q, N_K,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O and lse of one tile of queries: algorithm 1, one turn of its outer loop."""
    tiles = tl.cdiv(N_Q, BLOCK_M)
    start_m = tl.program_id(0) % tiles * BLOCK_M
    if CAUSAL:  # the tiles with most keys first: what runs last, on a GPU half empty, is short
        start_m = (tiles - 1) * BLOCK_M - start_m
    pid_bh = (tl.program_id(0) // tiles).to(tl.int64)  # tensors may have more than 2^31 elements
    b, h = pid_bh // H, pid_bh % H
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
    for start_n in range(0, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, offs_n, stride_kn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N], line 8
        if start_n >= full:  # the same way for all threads
            visible = _visible(offs_m[:, None], offs_n[None, :], N_Q, N_K, CAUSAL)
            s = tl.where(visible, s, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)  # [BLOCK_M], line 9
        # A row that has seen no key yet is at -inf, and -inf - -inf would be NaN.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * scale_log2 - base[:, None])  # [BLOCK_M, BLOCK_N], 0 where masked
        alpha = tl.exp2(m_i - base)  # [BLOCK_M], 0 at a row's first key
        l_i = alpha * l_i + tl.sum(p, 1)
        v = _load(v_ptr, offs_n, stride_vn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)  # 10
        m_i = m_new

    o = acc * (1 / tl.where(l_i == 0.0, 1.0, l_i))[:, None]  # line 12; a row without keys gives 0
    lse = (m_i + tl.log2(l_i)) / LOG2E  # line 13, to base e; -inf there

    _store(o_ptr, offs_m, stride_om, N_Q, o, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + pid_bh * N_Q + offs_m, lse, offs_m < N_Q)


@triton.jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, dq_ptr, lse_ptr, delta_ptr, scale, scale_log2,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    stride_dob, stride_doh, stride_dom, stride_dqb, stride_dqh, stride_dqm,
    H, GROUP, N_Q, N_K,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ and delta of one tile of queries; its loop visits the tiles that the forward's visits."""
    tiles = tl.cdiv(N_Q, BLOCK_M)
    start_m = tl.program_id(0) % tiles * BLOCK_M
    if CAUSAL:  # the tiles with most keys first: what runs last, on a GPU half empty, is short
        start_m = (tiles - 1) * BLOCK_M - start_m
    pid_bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H
    offs_m = start_m + tl.arange(0, BLOCK_M)

    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh
    o_ptr += b * stride_ob + h * stride_oh
    do_ptr += b * stride_dob + h * stride_doh
    dq_ptr += b * stride_dqb + h * stride_dqh

    q = _load(q_ptr, offs_m, stride_qm, N_Q, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    o = _load(o_ptr, offs_m, stride_om, N_Q, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    do = _load(do_ptr, offs_m, stride_dom, N_Q, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    lse_log2 = tl.load(lse_ptr + pid_bh * N_Q + offs_m, offs_m < N_Q, 0.0) * LOG2E  # [BLOCK_M]
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BLOCK_M], line 4
    tl.store(delta_ptr + pid_bh * N_Q + offs_m, delta, offs_m < N_Q)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    full, hi = _key_range(start_m, N_Q, N_K, BLOCK_M, BLOCK_N, CAUSAL)
    for start_n in range(0, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = _load(k_ptr, offs_n, stride_kn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        v = _load(v_ptr, offs_n, stride_vn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        if q.dtype == tl.float32:  # without tensor cores ptxas would spill the operands of S = Q Kᵀ
            s = tl.trans(tl.dot(k, tl.trans(q), input_precision=PRECISION))
        else:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N], line 10
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N], line 13
        p = tl.exp2(s * scale_log2 - lse_log2[:, None])  # line 11
        if start_n >= full:  # not by s = -inf: a row without keys has lse = -inf, too
            visible = _visible(offs_m[:, None], offs_n[None, :], N_Q, N_K, CAUSAL)
            p = tl.where(visible, p, 0.0)
        ds = p * (dp - delta[:, None])  # line 14
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)  # line 15

    _store(dq_ptr, offs_m, stride_dqm, N_Q, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, lse_ptr, delta_ptr, scale, scale_log2,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_dom,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn,
    H, GROUP, N_Q, N_K,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys: algorithm 2, one turn of its outer loop, without line 15."""
    tiles = tl.cdiv(N_K, BLOCK_N)
    start_n = tl.program_id(0) % tiles * BLOCK_N
    pid_bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h_kv = pid_bh // (H // GROUP), pid_bh % (H // GROUP)
    offs_n = start_n + tl.arange(0, BLOCK_N)

    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    dk_ptr += b * stride_dkb + h_kv * stride_dkh
    dv_ptr += b * stride_dvb + h_kv * stride_dvh

    k = _load(k_ptr, offs_n, stride_kn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D], line 6
    v = _load(v_ptr, offs_n, stride_vn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # line 7
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # Queries before lo see none of these keys, those from full on see all of them. Keys past the
    # end need no mask: they only make rows of dk and dv that are not stored.
    lo, full = 0, 0
    if CAUSAL:
        lo = tl.maximum(start_n - (N_K - N_Q), 0) // BLOCK_M * BLOCK_M
        full = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - (N_K - N_Q), 0), BLOCK_M) * BLOCK_M
    # One loop through the tiles of all heads of queries that share k and v: its loads never pause.
    # It always runs (on zeros for N_Q = 0): around one that might not, ptxas would overlap nothing.
    h, start_m = h_kv * GROUP, lo
    for _ in range(tl.maximum(GROUP * tl.cdiv(tl.maximum(N_Q - lo, 0), BLOCK_M), 1)):
        q_head = q_ptr + b * stride_qb + h * stride_qh
        do_head = do_ptr + b * stride_dob + h * stride_doh
        row = (b * H + h) * N_Q
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q = _load(q_head, offs_m, stride_qm, N_Q, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
        do = _load(do_head, offs_m, stride_dom, N_Q, HEAD_DIM, BLOCK_D)
        # Past the end lse is inf, which makes p and ds 0.
        lse = tl.load(lse_ptr + row + offs_m, offs_m < N_Q, float("inf"))  # [BLOCK_M]
        delta = tl.load(delta_ptr + row + offs_m, offs_m < N_Q, 0.0)  # [BLOCK_M]
        s_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        p_t = tl.exp2(s_t * scale_log2 - (lse * LOG2E)[None, :])
        if CAUSAL:  # noqa: SIM102 (a constant: without it there is no branch to compile)
            if start_m < full:
                visible = _visible(offs_m[None, :], offs_n[:, None], N_Q, N_K, CAUSAL)
                p_t = tl.where(visible, p_t, 0.0)
        ds_t = p_t * (dp_t - delta[None, :])
        dv = tl.dot(p_t.to(do.dtype), do, dv, input_precision=PRECISION)  # line 12
        dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)  # line 16
        start_m += BLOCK_M
        done = start_m >= N_Q
        h, start_m = tl.where(done, h + 1, h), tl.where(done, lo, start_m)

    _store(dk_ptr, offs_n, stride_dkn, N_K, dk * scale, HEAD_DIM, BLOCK_D)  # line 18
    _store(dv_ptr, offs_n, stride_dvn, N_K, dv, HEAD_DIM, BLOCK_D)


def _tiles(table, table_fp32, q, allow_tf32):
    """What a kernel is compiled for: head dim, tile, padded head dim, and precision; and how."""
    d, fp32 = q.shape[3], q.dtype == torch.float32
    m, n, warps, stages = _config(table, table_fp32, _host.capability(q.device), d, fp32)
    precision = "tf32" if allow_tf32 else "ieee"
    block_d = max(16, 1 << (d - 1).bit_length())  # tl.dot takes powers of two from 16 on
    return m, n, block_d, precision, {"num_warps": warps, "num_stages": stages}


def forward(q, k, v, causal, scale, allow_tf32):
    """Launch on checked tensors. Returns o, like q, and lse (B, H, N_Q) in fp32."""
    (B, H, N_Q, D), (_, H_KV, N_K, _) = q.shape, k.shape
    o = _host.empty_like(q)
    lse = torch.empty((B, H, N_Q), dtype=torch.float32, device=q.device)
    # The maximum is taken before the scaling: the scale must be positive (and 0 · -inf is NaN).
    if scale < 0:
        q, scale = -q, -scale
    scale = max(scale, 1e-37)
    m, n, d, precision, how = _tiles(FORWARD, FORWARD_FP32, q, allow_tf32)
    compiled_for = (D, m, n, causal, precision, *how.values())
    key = _host.launch_key((q, k, v, o), (H, H // H_KV, N_Q, N_K), *compiled_for)
    _host.launch(
        _forward_kernel, key, (-(-N_Q // m) * B * H, 1, 1),  # the other axes end at 65,535
        q, k, v, o, lse, scale * _host.LOG2E,
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
    m, n, d, precision, how = _tiles(DQ, DQ_FP32, q, allow_tf32)
    _dq_kernel[(-(-N_Q // m) * B * H,)](  # first: it computes delta
        q, k, v, o, do, dq, lse, delta, scale, scale * _host.LOG2E,
        *qkv_strides, *o.stride()[:3], *do.stride()[:3], *dq.stride()[:3],
        H, H // H_KV, N_Q, N_K, D, m, n, d, causal, precision, **how,
    )  # fmt: skip
    m, n, d, precision, how = _tiles(DKDV, DKDV_FP32, q, allow_tf32)
    _dkdv_kernel[(-(-N_K // n) * B * H_KV,)](
        q, k, v, do, dk, dv, lse, delta, scale, scale * _host.LOG2E,
        *qkv_strides, *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        H, H // H_KV, N_Q, N_K, D, m, n, d, causal, precision, **how,
    )  # fmt: skip
    return dq, dk, dv


_op = _host.operator("v2_lean", forward, backward)


def attention(q, k, v, *, causal=False, scale=None, return_lse=False, allow_tf32=False):
    """softmax(scale · Q Kᵀ) V, with q (B, H, N_Q, D) and k, v (B, H_KV, N_K, D), H_KV dividing H.

    Any lengths, D from 1 to 256, fp16, bf16 or fp32 (allow_tf32 trades its accuracy for tensor
    cores), any strides with a contiguous last dim. causal is aligned bottom-right; a row that sees
    no key gives 0. scale is 1/sqrt(D) unless given. With return_lse also the logarithm of each
    row's sum of exponentials, (B, H, N_Q) in fp32, without a gradient. Gradients repeat bit by bit.

    Raises ValueError where the arguments do not fit.
    """
    scale = _host.check(q, k, v, scale)
    o, lse = _op(q, k, v, causal, scale, allow_tf32)
    return (o, lse) if return_lse else o
