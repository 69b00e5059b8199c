"""Attention as the formula reads: scores, softmax, weighted sum, with S and P in device memory.

    S = scale · Q Kᵀ       `_scores_kernel`          a matrix product, [N_Q, N_K] for each head
    P = softmax(S)         `_softmax_kernel`         row by row, written over S
    O = P V                `_weighted_sum_kernel`    a matrix product

This is standard attention (FlashAttention, arXiv 2205.14135, algorithm 0), what a framework's eager
mode does, in Triton: the bottom rung, there to be compared with. Its products are tiled and run on
tensor cores, and its softmax reads a row twice; what it cannot escape is the matrix:

    HBM traffic      write S; read S twice and write P, a row at a time; read P
    device memory    N_Q · N_K elements a head: at 16,384 tokens in bf16, 512 MiB a head

S and P have the type of q, as in eager PyTorch, so that what differs from the later steps is the
algorithm and not the precision: in fp32 the matrix would be twice as large and a little more exact.

The backward computes S again by the same kernel, to the bit, and with it (∘ element by element)

    dP = dO Vᵀ             `_scores_kernel`, without mask or scale
    P, dS = P ∘ (dP - rowsum(P ∘ dP))      `_softmax_backward_kernel`, written over S and dP
    dQ = scale · dS K      dK = scale · dSᵀ Q      dV = Pᵀ dO      `_weighted_sum_kernel`

with two matrices at a time. A transposed product is the same kernel with the matrix's strides
exchanged; grouped heads are summed in its loop, in a fixed order, so that gradients repeat bit by
bit. Causal masking writes -inf into S and saves no work, as in eager mode.

Limits: memory; at half precision the scores are rounded before the softmax.

Measured on an H200 (bf16, causal, batch 4, 16 heads of 128; torch 2.11.0, Triton 3.6.0,
2026-11-22): 41.5, 48.9 and 50.8 TFLOP/s at N = 512, 2048 and 16384, counting half of the products,
which is what causal attention needs; at 16,384 a call adds 32 GiB. Eager PyTorch in the same run:
38.2, 39.1 and 40.6 TFLOP/s, 64 GiB.
"""

import torch
import triton
import triton.language as tl

from . import _host

# One row for every GPU and head dim: (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages), a
# [BLOCK_M, BLOCK_N] tile of a product that sums over steps of BLOCK_K. 96 KiB of shared memory.
PRODUCT = (128, 64, 64, 4, 3)
PRODUCT_FP32 = (64, 32, 16, 4, 2)  # fp32 at full precision does without tensor cores
SOFTMAX = (16, 256, 4)  # rows, keys at a time, num_warps


def _config(fp32):
    """The tile of both products."""
    return PRODUCT_FP32 if fp32 else PRODUCT


@triton.jit
def _scores_kernel(
    q_ptr, k_ptr, s_ptr, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    H, GROUP, N_Q, N_K,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of S = scale · Q Kᵀ, -inf where a query does not see a key."""
    tiles_m, tiles_n = tl.cdiv(N_Q, BLOCK_M), tl.cdiv(N_K, BLOCK_N)
    pid_m = tl.program_id(0) % tiles_m
    pid_n = tl.program_id(0) // tiles_m % tiles_n
    pid_bh = (tl.program_id(0) // tiles_m // tiles_n).to(tl.int64)  # S exceeds 2^31 elements soon
    b, h = pid_bh // H, pid_bh % H

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    q_ptrs = q_ptr + b * stride_qb + h * stride_qh + offs_m[:, None] * stride_qm
    k_ptrs = k_ptr + b * stride_kb + h // GROUP * stride_kh + offs_n[:, None] * stride_kn

    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_d in range(0, HEAD_DIM, BLOCK_K):
        offs_d = start_d + tl.arange(0, BLOCK_K)
        inside = offs_d[None, :] < HEAD_DIM
        q = tl.load(q_ptrs + offs_d[None, :], (offs_m[:, None] < N_Q) & inside, 0.0)
        k = tl.load(k_ptrs + offs_d[None, :], (offs_n[:, None] < N_K) & inside, 0.0)
        s = tl.dot(q, tl.trans(k), s, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]

    s *= scale
    if CAUSAL:  # aligned bottom-right: the last query sees the last key
        s = tl.where(offs_n[None, :] <= offs_m[:, None] + (N_K - N_Q), s, float("-inf"))
    s_ptrs = s_ptr + (pid_bh * N_Q + offs_m[:, None]) * N_K + offs_n[None, :]
    tl.store(
        s_ptrs, s.to(s_ptr.dtype.element_ty), (offs_m[:, None] < N_Q) & (offs_n[None, :] < N_K)
    )


@triton.jit
def _softmax_kernel(s_ptr, lse_ptr, ROWS, N_K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """P = softmax(S) over S, for BLOCK_M of all ROWS = B · H · N_Q rows, and their lse."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    s_ptrs = s_ptr + rows[:, None] * N_K + tl.arange(0, BLOCK_N)[None, :]
    left = tl.where(rows < ROWS, N_K, 0)[:, None] - tl.arange(0, BLOCK_N)[None, :]

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    for start_n in range(0, N_K, BLOCK_N):
        s = tl.load(s_ptrs + start_n, left > start_n, float("-inf")).to(tl.float32)
        m_new = tl.maximum(m_i, tl.max(s, 1))  # [BLOCK_M]
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key yet: -inf - -inf is NaN
        l_i = l_i * tl.exp(m_i - base) + tl.sum(tl.exp(s - base[:, None]), 1)  # [BLOCK_M]
        m_i = m_new

    norm = 1.0 / tl.where(l_i == 0.0, 1.0, l_i)
    base = tl.where(m_i == float("-inf"), 0.0, m_i)
    for start_n in range(0, N_K, BLOCK_N):
        s = tl.load(s_ptrs + start_n, left > start_n, float("-inf")).to(tl.float32)
        p = tl.exp(s - base[:, None]) * norm[:, None]  # [BLOCK_M, BLOCK_N]
        tl.store(s_ptrs + start_n, p.to(s_ptr.dtype.element_ty), left > start_n)
    tl.store(lse_ptr + rows, m_i + tl.log(l_i), rows < ROWS)


@triton.jit
def _softmax_backward_kernel(
    s_ptr, dp_ptr, lse_ptr, ROWS, N_K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """P over S and dS = P ∘ (dP - rowsum(P ∘ dP)) over dP, for BLOCK_M of all ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = rows[:, None] * N_K + tl.arange(0, BLOCK_N)[None, :]
    left = tl.where(rows < ROWS, N_K, 0)[:, None] - tl.arange(0, BLOCK_N)[None, :]
    lse = tl.load(lse_ptr + rows, rows < ROWS, 0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)[:, None]

    delta = tl.zeros([BLOCK_M], tl.float32)
    for start_n in range(0, N_K, BLOCK_N):
        s = tl.load(s_ptr + tile + start_n, left > start_n, float("-inf")).to(tl.float32)
        dp = tl.load(dp_ptr + tile + start_n, left > start_n, 0.0).to(tl.float32)
        delta += tl.sum(tl.exp(s - lse) * dp, 1)  # [BLOCK_M]

    for start_n in range(0, N_K, BLOCK_N):
        s = tl.load(s_ptr + tile + start_n, left > start_n, float("-inf")).to(tl.float32)
        dp = tl.load(dp_ptr + tile + start_n, left > start_n, 0.0).to(tl.float32)
        p = tl.exp(s - lse)  # [BLOCK_M, BLOCK_N]
        ds = p * (dp - delta[:, None])
        tl.store(s_ptr + tile + start_n, p.to(s_ptr.dtype.element_ty), left > start_n)
        tl.store(dp_ptr + tile + start_n, ds.to(dp_ptr.dtype.element_ty), left > start_n)


@triton.jit
def _weighted_sum_kernel(
    p_ptr, x_ptr, o_ptr, scale,
    stride_ph, stride_pm, stride_pn, stride_xb, stride_xh, stride_xn,
    stride_ob, stride_oh, stride_om,
    H, SUM, SHARE, M, N,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One [BLOCK_M, BLOCK_N] tile of O = scale · Σ P X: P [M, N], X [N, HEAD_DIM], O [M, HEAD_DIM].

    O has H heads. Head h sums the products of the heads of P from h · SUM to h · SUM + SUM - 1;
    SHARE heads of P share a head of X. So O = P V has SUM = 1 and SHARE = H / H_KV, and
    dK = dSᵀ Q has SUM = H / H_KV and SHARE = 1.
    """
    tiles_m, tiles_d = tl.cdiv(M, BLOCK_M), tl.cdiv(HEAD_DIM, BLOCK_N)
    pid_d = tl.program_id(0) % tiles_d
    pid_m = tl.program_id(0) // tiles_d % tiles_m
    pid_bh = (tl.program_id(0) // tiles_d // tiles_m).to(tl.int64)
    b, h = pid_bh // H, pid_bh % H

    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    offs_d = pid_d * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for h_p in range(h * SUM, h * SUM + SUM):
        p_ptrs = p_ptr + (b * H * SUM + h_p) * stride_ph + offs_m[:, None] * stride_pm
        x_ptrs = x_ptr + b * stride_xb + h_p // SHARE * stride_xh + offs_d[None, :]
        for start_n in range(0, N, BLOCK_K):
            offs_n = start_n + tl.arange(0, BLOCK_K).to(tl.int64)
            p_mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
            p = tl.load(p_ptrs + offs_n[None, :] * stride_pn, p_mask, 0.0)  # [BLOCK_M, BLOCK_K]
            x_mask = (offs_n[:, None] < N) & (offs_d[None, :] < HEAD_DIM)
            x = tl.load(x_ptrs + offs_n[:, None] * stride_xn, x_mask, 0.0)  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(p, x, acc, input_precision=PRECISION)

    o_ptrs = o_ptr + b * stride_ob + h * stride_oh + offs_m[:, None] * stride_om + offs_d[None, :]
    o_mask = (offs_m[:, None] < M) & (offs_d[None, :] < HEAD_DIM)
    tl.store(o_ptrs, (acc * scale).to(o_ptr.dtype.element_ty), o_mask)


def _scores(q, k, scale, causal, precision):
    """scale · Q Kᵀ as a new (B, H, N_Q, N_K)."""
    (B, H, N_Q, D), (_, H_KV, N_K, _) = q.shape, k.shape
    s = torch.empty((B, H, N_Q, N_K), dtype=q.dtype, device=q.device)
    m, n, step, warps, stages = _config(q.dtype == torch.float32)
    _scores_kernel[(-(-N_Q // m) * -(-N_K // n) * B * H,)](
        q, k, s, scale, *q.stride()[:3], *k.stride()[:3], H, H // H_KV, N_Q, N_K,
        D, m, n, step, causal, precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return s


def _weighted_sum(p, x, like, scale, precision):
    """scale · P X with the shape and layout of `like`; p is contiguous, or transposed."""
    (B, H_P, M, N), H, D = p.shape, like.shape[1], like.shape[3]
    o = _host.empty_like(like)
    m, n, step, warps, stages = _config(p.dtype == torch.float32)
    _weighted_sum_kernel[(-(-M // m) * -(-D // n) * B * H,)](
        p, x, o, scale, *p.stride()[1:], *x.stride()[:3], *o.stride()[:3],
        H, H_P // H, H_P // x.shape[1], M, N,
        D, m, n, step, precision, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return o


def forward(q, k, v, causal, scale, allow_tf32):
    """Launch on checked tensors. Returns o, like q, and lse (B, H, N_Q) in fp32."""
    (B, H, N_Q, _), N_K = q.shape, k.shape[2]
    precision = "tf32" if allow_tf32 else "ieee"
    p = _scores(q, k, scale, causal, precision)
    lse = torch.empty((B, H, N_Q), dtype=torch.float32, device=q.device)
    rows, block_n, warps = SOFTMAX
    grid = (-(-B * H * N_Q // rows),)
    _softmax_kernel[grid](p, lse, B * H * N_Q, N_K, rows, block_n, num_warps=warps)
    return _weighted_sum(p, v, q, 1.0, precision), lse


def backward(do, q, k, v, o, lse, causal, scale, allow_tf32):
    """Launch on what forward took and returned. Returns dq, dk, dv, like q, k, v."""
    (B, H, N_Q, _), N_K = q.shape, k.shape[2]
    precision = "tf32" if allow_tf32 else "ieee"
    p = _scores(q, k, scale, causal, precision)
    ds = _scores(do, v, 1.0, False, precision)
    rows, block_n, warps = SOFTMAX
    grid = (-(-B * H * N_Q // rows),)
    _softmax_backward_kernel[grid](p, ds, lse, B * H * N_Q, N_K, rows, block_n, num_warps=warps)
    dq = _weighted_sum(ds, k, q, scale, precision)
    dk = _weighted_sum(ds.mT, q, k, scale, precision)
    dv = _weighted_sum(p.mT, do, v, 1.0, precision)
    return dq, dk, dv


_op = _host.operator("v0_naive", forward, backward)


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
