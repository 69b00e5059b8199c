"""Tiles that move themselves: tensor descriptors and Hopper's copy engine, TMA.

In `v2_lean` threads copy: each computes addresses, compares them with the ends of the matrix and
issues loads of 16 bytes, hundreds of instructions a tile from registers that the products need.
From sm_90 on an engine copies whole tiles. It is told once what a tensor looks like, by a
*descriptor* made on the host (address, shape, strides, tile); then one thread says "tile (b, h,
start, 0) to that buffer", and the engine does addresses, swizzling and the ends by itself: what
lies past an end reads as 0 and is not written, ragged lengths and odd head dims included.

    v2   128 threads:  address, compare, cp.async, ×8 each     wait for one's own, then for all's
    v3     1 thread:   copy(descriptor, b, h, start) ──────┐
                                                 engine:   └─ 16 KiB ─→ buffer, signals a barrier

What goes through descriptors: all that a loop streams (K, V; in the dK, dV kernel Q, dO and the
rows of lse and delta), the forward's Q, and results that leave from full registers (O, dK, dV).
Where a program loads several tensors once, pointers stay: outside a loop Triton waits for each
descriptor's load before it starts the next.

What this saves buys company. Once S = Q Kᵀ is issued a program waits for its scores, and while it
computes P the tensor cores have nothing to do, unless another program on the same SM has a product
ready. At D = 128 and 256 programs are therefore made small: a tile of keys is asked for when it is
needed, and K and V take turns in one buffer (`num_stages` 1). With tiles of 64 × 128 that is 49 KiB
and 160 registers a thread at D = 128, and three programs share an SM; at D = 256, two, 97 KiB each.

    program 0    K │ S │ softmax │ PV │ K │ S │ softmax │ PV │ …
    program 1            K │ S │ softmax │ PV │ K │ S │ softmax │ PV │ …      the gaps of one are
    program 2                    K │ S │ softmax │ PV │ K │ S │ softmax │ …   the products of others

The last heads of a causal call are started in another order for it: where so many programs run at
once, v2's order, all tiles of a head, then of the next, leaves the last heads' heavy tiles to a GPU
half empty. Here those come first of several heads (`_turn`).

The backward at D = 256 is made small, too. Two accumulators of 64 × 256 are 256 registers a thread,
one more than it has: dK and dV in one kernel take eight warps, spill, and fill an SM alone. So each
has a launch of its own, with four warps a program, and computes S and P for itself: eight products
in place of seven, but two programs an SM. Tiles come one by one, each in the last one's place:

    dV   Q, S │ dO, dV             dK   dO, dP │ Q, S, dK             dQ   V, dP │ K, S, dQ

At D = 64 the dK, dV kernel keeps its K and V in registers, 16 a thread each. Sᵀ = K Qᵀ with 64 keys
and 32 queries takes the tensor cores 16 clocks for 16 columns, and reading both tiles from shared
memory 24. Triton leaves there what was loaded for the left side of a product; what a product has
left it takes from registers. So both are multiplied by the identity, once (`_in_registers`).

Tiles in flight and larger tiles take the room of the third program (of the second at D = 256), and
were slower. So was a single program that keeps its own tensor cores busy by weighing V a tile late,
under the next tile's softmax (FlashAttention-3, arXiv 2407.08608, algorithm 2).

**No maximum but the first.** Softmax subtracts one number from all scores of a row, and any will
do, as it cancels in P V / Σ P: the maximum is one with which exp2 cannot overflow. Algorithm 1
brings it up to date with every tile of keys, and l and O with it. Here the maximum of a row's first
tile has to do for all. Where later scores are larger, P is above 1: floating point is as precise
there, and O, l and lse = log(2^m · l) go with any m. What must not happen is an overflow. So a
program notes the largest sum that the P of a row had in a tile, and looks at it when it is through:

    first tile     S │ maximum m │ P = exp2(scale · S - m), sums │ P V
    each other     S │ P, sums, the largest of them │ P V
    at the end     has a row a sum above 2⁶⁴?    no    O, lse
                                                 yes   all tiles once more, each with its maximum

A turn of the loop is 353 instructions in place of 496 at D = 128, 346 of 426 at D = 64 and 403 of
610 at D = 256, and the exponentials begin as soon as S is there. What it costs is trust in the
first tile of keys: where all programs start again, a call runs at 0.45 of the speed. In bf16 scores
must grow by 40 to 44 for that, by how many of a tile do; random ones with a standard deviation of
10 do in a few programs. (Short of that, O can overflow before it is divided by the sums: where V is
above 2⁶⁴ over the number of key tiles.) fp16 ends at 65,504, where 11 is enough and a deviation of
6 was too much: it takes every tile's maximum, as do small calls, through pointers, whose loops
would need more registers.

Asking after every tile, as `v6_persistent` does, costs little to start again, but each warp answers
for itself there. Triton's branch is one for a program: its warps have to agree before P V, and V,
now asked for among the exponentials, is asked for after them. It ran at 0.86 to 0.92 of the speed
with every maximum (D = 128, on an H200).

Not always: descriptors cost the CPU 10 to 20 µs each, so a small call is slower with them, and the
engine wants addresses and strides in multiples of 16 bytes. `_path` decides by GPU, work and
alignment; the other path is v2's, in the same kernels, by a compile-time flag. Nothing is copied.

The rest is `v2_lean` (maths and lines: FlashAttention-2, arXiv 2307.08691; one number for all rows,
and what overflows once more, has FlashDecoding++, arXiv 2311.01282). FlashAttention-3 has warps of
their own to drive the engine. In one thing more this differs from v2: the dQ kernel leaves lse in
base 2 beside delta, in padded rows that a descriptor can take.

Measured on an H200 (bf16, 16,384 tokens, hidden size 2048; TFLOP/s of v2 → v3 in one run; torch
2.11.0, triton 3.6.0, 2026-11-22), at N = 512, 2048 and 16384:

    D = 64   forward  333 → 333, 395 → 427, 417 → 455    causal  216 → 222, 340 → 365, 408 → 442
             backward 290 → 294, 332 → 356, 342 → 380    causal  175 → 223, 271 → 329, 313 → 366
    D = 128  backward 284 → 312, 361 → 417, 382 → 465    causal  198 → 226, 310 → 361, 377 → 444

(Causal: all heads one by one.) The forward, causal ones so, too, still with every tile's maximum,
at D = 128 and 256, each in one run of 2026-11-27, by BLOCK_M × BLOCK_N, num_stages; beside it
Triton's tutorial kernel, restated, with the best of three such tiles, and cuDNN:

    D = 128, N         full  512  2048  4096  16384      causal  512  2048  4096  16384
    64 × 128, 1             427   559   580    604              292   460   498    569
    64 × 64, 3              374   459   465    475              272   399   429    479
    64 × 64, 3, V late      368   473   493    501              259   428   471    544
    128 × 64, 2             385   482   501    520              262   395   437    485
    tutorial                382   487   503    530              253   408   447    488
    cuDNN                   499   612   605    605              335   473   513    563

    D = 256, N         full  512        4096  16384      causal  512        4096  16384
    64 × 128, 1             448         644    656              291         503    595
    128 × 64, 2             367         517    530              246         443    526
    cuDNN                   530         715    744              353         583    642

At D = 64 in one run of 2026-11-27, in the same way (the tutorial kernel: the best of four tiles):

    D = 64, N          full  512  1024  2048  4096  16384      causal  512  1024  2048  4096  16384
    64 × 128, 1              351   391   437   447    470              224   294   352   388    430
    64 × 128, 2              340   389   415   425    454              215   293   360   397    446
    64 × 64, 2               331   367   397   418    431              240   306   358   388    427
    64 × 64, 3               313   348   358   379    397              223   300   343   364    406
    tutorial                 334   373   396   406    419              229   295   351   372    408

So with every maximum full calls take the first row, causal ones the second, or up to 1,024 keys the
third, whose tiles have less behind the diagonal. In turns over the peers' grid (D = 64, 128, 256,
full and causal, N = 512 to 16384) that forward was ahead of the tutorial kernel, with the best of
three tiles for each cell, in all 36 cells: 1.12 times as fast on average, 1.01 at least (D = 64,
causal, N = 512).

Every maximum → the first alone over the same grid, in turns on an H100 (same versions, 2026-11-27),
at N = 512, 1024, 2048, 4096, 8192 and 16384:

    D = 64   full    340 → 343   404 → 419   429 → 461   444 → 468   445 → 485   447 → 490
             causal  228 → 239   307 → 333   362 → 386   404 → 433   420 → 461   430 → 467
    D = 128  full    386 → 388   470 → 477   531 → 548   535 → 598   542 → 574   563 → 613
             causal  257 → 256   371 → 372   456 → 460   483 → 498   507 → 510   522 → 524
    D = 256  full    413 → 414   507 → 512   557 → 565   572 → 574   599 → 589   599 → 619
             causal  263 → 264   377 → 385   431 → 438   471 → 475   482 → 484   519 → 515

That is 1.035 times as fast on average, and at D = 128 from 2,048 keys on 1.51 to 1.66 times as fast
as flash-attn 2 in the same turns; on an H200, in the peers' of that day, 1.55 to 1.81. At D = 64
full calls now take two stages: the first row of their table gave 331, 398, 432 up to N = 2048, the
third 331, 400, 439, 450, 457, 474; causal the second gave 220 and 317 up to 1024, the third from
2048 on 393, 433, 458, 473; 128 × 64 by eight warps 0.83 to 0.89 of what is here. At D = 128, 64 ×
64 with two stages gave 0.78 to 0.89 of it, 128 × 64 by four warps 555 and 589 (full, N = 2048 and
16384). D = 128, full, N = 16384, in other turns, by the standard deviation of the scores, 3, 6, 10:
540 → 581, 562 → 594, 560 → 546; scores that rise by 100 through the keys 552 → 250. fp16 with its
bound, the same: 562 → 584, 563 → 248, 568 → 253.

The backward at D = 256, N = 512, 4096 and 16384 in one run of 2026-11-27: dK and dV in one kernel
(64 × 64, dQ 128 × 32, eight warps, two stages) → apart; cuDNN in brackets:

    full    203 → 241 (238)    260 → 319 (391)    255 → 326 (364)
    causal  158 → 187 (175)    248 → 305 (346)    275 → 335 (380)

dV by eight warps, 64 × 128, two stages, was as fast. In the same run the causal forward at D = 128:

    N                           512  1024  2048  4096  16384     1024 with B · H = 64
    all heads one by one        277   355   428   473    534      290
    the last heads in turns     274   376   446   506    560      351

(Both new sides before `_turn` divided in 32 bits. As it stands, in another run of that day, at N =
512, 4096 and 16384: backward at D = 256 240 314 323 full and 188 314 327 causal, causal forward at
D = 128 284 515 566.)

K and V in shared memory → in registers at D = 64, the whole backward, in turns on an H200 (same
versions, 2026-11-27), at N = 512, 1024, 2048, 4096, 8192 and 16384; the gradients are the same to
the bit:

    full    288 → 298   323 → 340   350 → 369   356 → 378   373 → 391   376 → 391
    causal  209 → 210   268 → 271   317 → 327   338 → 356   362 → 376   365 → 377

(The causal ones also have a mask in two parts, as `_hide` has it.) Tried in the same way at N =
512, 2048 and 16384, as a share of the speed with K and V in shared memory: 64 queries a tile 0.94
0.98 1.04 full and 0.96 1.03 1.04 causal; lse and delta through pointers 1.10 1.02 1.00 and 1.02
0.98 0.96; Q and dO in registers in the dQ kernel 0.91 0.94 0.99 and 0.92 0.92 0.97, with a wrong
dQ at that: see `LOOKED_AT`. At D = 128 it gains nothing (0.96 1.00 1.00 and 0.94 0.99 0.99).

Left out: Triton's own warp specialisation (`tl.range(..., warp_specialize=True)`), which triton 3.6
compiles into the same kernel here, or into one that spills; and programs that stay for several
tiles, with the next one's loads in flight (`flatten=True`), which it fails to compile.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _host

LOG2E = tl.constexpr(_host.LOG2E)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of all numbers; -inf - -inf would be NaN

# ptxas, 12.8 as well as 12.9, can give an operand that stays in registers through a loop those of
# one that the loop computes (where Q and dO were to stay in the dQ kernel, dQ came out wrong). The
# machine code of the dK, dV kernel is right with these versions of Triton: validate/compiled.py
# looks at it. With others K and V stay in shared memory.
LOOKED_AT = ("3.6.", "3.7.", "3.8.", "3.9.")
STAY = tl.constexpr(triton.__version__.startswith(LOOKED_AT))

# BLOCK_M queries by BLOCK_N keys, num_warps, and num_stages tiles in flight of what the loop loads;
# by (path, padded head dim). With one stage a tile is asked for when it is needed, K and V take
# turns in one buffer, and the other programs on the SM work meanwhile.
# The rows for pointers fit in the 99 KiB of shared memory of the smallest GPUs from sm_80 on.
FORWARD = {
    ("tma", 64): (64, 128, 4, 2),
    ("tma, every maximum", 64): (64, 128, 4, 1),  # full mask
    ("tma, few keys", 64): (64, 64, 4, 2),  # causal: less of a tile lies behind the diagonal
    ("tma", 128): (64, 128, 4, 1),
    ("tma", 256): (64, 128, 4, 1),
    ("pointers", 64): (64, 64, 4, 3),
    ("pointers", 128): (64, 64, 4, 2),
    ("pointers", 256): (64, 32, 4, 2),
}
DQ = {
    ("tma", 64): (64, 64, 4, 2),
    ("tma", 128): (128, 64, 8, 3),
    ("tma", 256): (64, 64, 4, 1),
    ("pointers", 64): (64, 64, 4, 2),
    ("pointers", 128): (64, 32, 4, 2),
    ("pointers", 256): (32, 32, 4, 1),
}
DKDV = {
    ("tma", 64): (32, 64, 4, 3),
    ("tma", 128): (64, 64, 4, 2),
    ("pointers", 64): (32, 64, 4, 3),
    ("pointers", 128): (32, 64, 4, 2),
    ("pointers", 256): (32, 32, 4, 1),
}
# At head dim 256 with descriptors dV and dK have a launch each.
DV = {("tma", 256): (128, 64, 4, 1)}
DK = {("tma", 256): (64, 64, 4, 1)}
# fp32 at full precision does without tensor cores, and its operands fill the registers.
FORWARD_FP32 = {64: (32, 32, 4, 2), 128: (32, 16, 4, 1), 256: (16, 16, 4, 1)}
DQ_FP32 = {64: (32, 16, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)}
DKDV_FP32 = {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)}


def _config(table, table_fp32, row, head_dim, fp32):
    """A row of the table: for the path, "tma" or "pointers", or one of `_forward_row`."""
    d = max(64, 1 << (head_dim - 1).bit_length())
    return table_fp32[d] if fp32 else table[row, d]


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
def _stream(
    src, b, h, start, stride, N,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """BLOCK rows of a head from `start` on; src describes the tensor, or points to the head."""
    if TMA:
        tile = src.load([tl.cast(b, tl.int32), tl.cast(h, tl.int32), start, 0])
        return tl.reshape(tile, [BLOCK, BLOCK_D])  # from [1, 1, BLOCK, BLOCK_D]
    else:
        return _load(src, start + tl.arange(0, BLOCK), stride, N, HEAD_DIM, BLOCK_D)


@triton.jit
def _drain(
    dst, b, h, start, stride, N, tile,
    BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The reverse of `_stream`."""
    if TMA:
        tile = tl.reshape(tile.to(dst.dtype), [1, 1, BLOCK, BLOCK_D])
        dst.store([tl.cast(b, tl.int32), tl.cast(h, tl.int32), start, 0], tile)
    else:
        _store(dst, start + tl.arange(0, BLOCK), stride, N, tile, HEAD_DIM, BLOCK_D)


@triton.jit
def _stream_row(src, row, start, stride, N, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """BLOCK numbers from `start` on of one row, 0 past the end."""
    if TMA:
        return tl.reshape(src.load([tl.cast(row, tl.int32), start]), [BLOCK])
    else:
        offs = start + tl.arange(0, BLOCK)
        return tl.load(src + row * stride + offs, offs < N, 0.0)


@triton.jit
def _turn(tiles, ACROSS: tl.constexpr, CAUSAL: tl.constexpr):
    """(head, turn) of this program: its head of all, and which of that head's tiles it takes.

    Head by head, because programs of one head share in L2 what they stream. Causal tiles differ in
    work, and start with a head's heaviest, turn 0. The last ACROSS programs take turn 0 of all
    their heads, then turn 1 of all: what runs at the end, on a GPU half empty, is short. Callers
    say, by whether two or three share an SM, twice to three times what an H200 runs at once.
    """
    pid = tl.program_id(0)
    head, turn = pid // tiles, pid % tiles
    if CAUSAL:
        heads = tl.num_programs(0) // tiles
        last = tl.minimum(tl.maximum(ACROSS // tiles, 1), heads)
        i = pid - (heads - last) * tiles
        head = tl.where(i < 0, head, heads - last + i % last)
        turn = tl.where(i < 0, turn, i // last)
    return head, turn


@triton.jit
def _tile_of_queries(H, N_Q, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr):
    """(b, h, start_m) of this program."""
    tiles = tl.cdiv(N_Q, BLOCK_M)
    head, tile = _turn(tiles, 512 if BLOCK_D > 128 else 1024, CAUSAL)
    if CAUSAL:  # the last queries see most keys
        tile = tiles - 1 - tile
    # 64 bits, because tensors may have more than 2^31 elements
    return (head // H).to(tl.int64), (head % H).to(tl.int64), tile * BLOCK_M


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
def _hide(s, keys):
    """Scores with -inf past the first `keys` of a tile, a number or one for each row, [BLOCK_M, 1].

    In a tensor core's result a thread has columns 8j + {0, 1} + 2 · (its lane % 4). Compared in two
    parts, the left side is a constant for each register, and the right side one number for a row.
    """
    offs_n = tl.arange(0, s.shape[1])
    return tl.where((offs_n & ~6)[None, :] < keys - (offs_n & 6)[None, :], s, float("-inf"))


@triton.jit
def _in_registers(tile):
    """The same tile as a product leaves it: in the registers from which the next one can take it.

    Times the identity, which is exact for finite numbers. Triton puts a loaded left operand into
    shared memory, whence every product with it reads it again.
    """
    i = tl.arange(0, tile.shape[1])
    identity = (i[:, None] == i[None, :]).to(tile.dtype)
    return tl.dot(tile, identity).to(tile.dtype)


@triton.jit
def _attend(
    q, k_src, v_src, b, h_kv, stride_kn, stride_vn, offs_m, full, hi, scale_log2, N_Q, N_K,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, MOST: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The inner loop of algorithm 1: acc, l_i, m_i, and the most that a row's P summed up to.

    CAREFUL takes the maximum of every tile, otherwise the first one's has to do: see `No maximum
    but the first`.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    BLOCK_D: tl.constexpr = q.shape[1]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)  # line 5
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)
    most = tl.zeros([BLOCK_M], tl.float32)

    visible = offs_m + (N_K - N_Q + 1)  # causal: query i sees the keys below i + N_K - N_Q + 1

    # Hoisted out of a loop that is rare, addresses of Q would be kept through the other one, too.
    for start_n in tl.range(0, hi, BLOCK_N, disable_licm=CAREFUL and MOST is not None):
        k = _stream(k_src, b, h_kv, start_n, stride_kn, N_K, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N], line 8
        if start_n >= full:  # the same way for all threads
            keys = N_K - start_n
            if CAUSAL:  # (rows past N_Q may see past N_K: zeros, and nobody reads them)
                keys = (visible - start_n)[:, None]
            s = _hide(s, keys)
        if CAREFUL:
            m_new = tl.maximum(m_i, tl.max(s, 1) * scale_log2)  # [BLOCK_M], line 9
            alpha = tl.exp2(m_i - m_new)  # [BLOCK_M], 0 at a row's first key
            l_i *= alpha
            m_i = m_new
        elif start_n == 0:  # a row that sees any key sees the first
            m_i = tl.maximum(m_i, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - m_i[:, None])  # [BLOCK_M, BLOCK_N], 0 where masked
        sums = tl.sum(p, 1)
        l_i += sums
        if not CAREFUL:
            most = tl.maximum(most, sums)
        v = _stream(v_src, b, h_kv, start_n, stride_vn, N_K, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
        if CAREFUL:
            acc *= alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)  # line 10
    return acc, l_i, m_i, most


@triton.jit
def _forward_kernel(
    q_src, k_src, v_src, o_dst, lse_ptr, scale_log2,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    H, GROUP, N_Q, N_K,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """O and lse of one tile of queries: algorithm 1, one turn of its outer loop."""
    b, h, start_m = _tile_of_queries(H, N_Q, BLOCK_M, BLOCK_D, CAUSAL)
    offs_m = start_m + tl.arange(0, BLOCK_M)

    h_kv = h // GROUP  # GROUP heads of queries share one of keys
    if not TMA:
        q_src += b * stride_qb + h * stride_qh
        o_dst += b * stride_ob + h * stride_oh
        k_src += b * stride_kb + h_kv * stride_kh
        v_src += b * stride_vb + h_kv * stride_vh

    q = _stream(q_src, b, h, start_m, stride_qm, N_Q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA)  # line 4
    full, hi = _key_range(start_m, N_Q, N_K, BLOCK_M, BLOCK_N, CAUSAL)
    acc, l_i, m_i, most = _attend(
        q, k_src, v_src, b, h_kv, stride_kn, stride_vn, offs_m, full, hi, scale_log2, N_Q, N_K,
        HEAD_DIM, BLOCK_N, CAUSAL, PRECISION, TMA, MOST, CAREFUL=MOST is None,
    )  # fmt: skip
    if MOST is not None:
        top = tl.max(tl.max(most[:, None], 0))  # of two dimensions: a row of numbers would move
        if (hi > 0) & (top > MOST):  # rarely; hi > 0 spares acc the choice between itself and 0
            acc, l_i, m_i, most = _attend(
                q, k_src, v_src, b, h_kv, stride_kn, stride_vn, offs_m, full, hi, scale_log2, N_Q,
                N_K, HEAD_DIM, BLOCK_N, CAUSAL, PRECISION, TMA, MOST, CAREFUL=True,
            )  # fmt: skip

    lse = (m_i + tl.log2(l_i)) / LOG2E  # line 13, to base e; no keys: -inf
    tl.store(lse_ptr + (b * H + h) * N_Q + offs_m, lse, offs_m < N_Q)
    o = acc * tl.where(l_i > 0, 1 / l_i, 0.0)[:, None]  # line 12; no keys: 0
    _drain(o_dst, b, h, start_m, stride_om, N_Q, o, BLOCK_M, HEAD_DIM, BLOCK_D, TMA)


@triton.jit
def _dq_kernel(
    q_src, k_src, v_src, o_src, do_src, dq_dst, lse_ptr, rows_ptr, scale, scale_log2,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_ob, stride_oh, stride_om,
    stride_dob, stride_doh, stride_dom, stride_dqb, stride_dqh, stride_dqm, stride_rows,
    H, GROUP, N_Q, N_K,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, ONE_BUFFER: tl.constexpr,
):  # fmt: skip
    """dQ and delta of one tile of queries; its loop visits the tiles that the forward's visits."""
    b, h, start_m = _tile_of_queries(H, N_Q, BLOCK_M, BLOCK_D, CAUSAL)
    offs_m = start_m + tl.arange(0, BLOCK_M)

    h_kv = h // GROUP
    if not TMA:
        k_src += b * stride_kb + h_kv * stride_kh
        v_src += b * stride_vb + h_kv * stride_vh
    if not ONE_BUFFER:
        q_src += b * stride_qb + h * stride_qh
        o_src += b * stride_ob + h * stride_oh
        do_src += b * stride_dob + h * stride_doh
        dq_dst += b * stride_dqb + h * stride_dqh

    q = _stream(q_src, b, h, start_m, stride_qm, N_Q, BLOCK_M, HEAD_DIM, BLOCK_D, ONE_BUFFER)
    o = _stream(o_src, b, h, start_m, stride_om, N_Q, BLOCK_M, HEAD_DIM, BLOCK_D, ONE_BUFFER)
    do = _stream(do_src, b, h, start_m, stride_dom, N_Q, BLOCK_M, HEAD_DIM, BLOCK_D, ONE_BUFFER)
    lse_log2 = tl.load(lse_ptr + (b * H + h) * N_Q + offs_m, offs_m < N_Q, 0.0) * LOG2E  # [BLOCK_M]
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)  # [BLOCK_M], line 4
    rows_ptr += (b * H + h) * 2 * stride_rows + offs_m
    tl.store(rows_ptr, lse_log2, offs_m < N_Q)
    tl.store(rows_ptr + stride_rows, delta, offs_m < N_Q)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    full, hi = _key_range(start_m, N_Q, N_K, BLOCK_M, BLOCK_N, CAUSAL)
    for start_n in range(0, hi, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        if ONE_BUFFER:  # V, and K in its place
            v = _stream(v_src, b, h_kv, start_n, stride_vn, N_K, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N], line 13
        k = _stream(k_src, b, h_kv, start_n, stride_kn, N_K, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
        if not ONE_BUFFER:
            v = _stream(v_src, b, h_kv, start_n, stride_vn, N_K, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
        if q.dtype == tl.float32:  # without tensor cores ptxas would spill the operands of S = Q Kᵀ
            s = tl.trans(tl.dot(k, tl.trans(q), input_precision=PRECISION))
        else:
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N], line 10
        if not ONE_BUFFER:
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N], line 13
        p = tl.exp2(s * scale_log2 - lse_log2[:, None])  # line 11
        if start_n >= full:  # not by s = -inf: a row without keys has lse = -inf, too
            visible = _visible(offs_m[:, None], offs_n[None, :], N_Q, N_K, CAUSAL)
            p = tl.where(visible, p, 0.0)
        ds = p * (dp - delta[:, None])  # line 14
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)  # line 15

    dq *= scale
    _drain(dq_dst, b, h, start_m, stride_dqm, N_Q, dq, BLOCK_M, HEAD_DIM, BLOCK_D, ONE_BUFFER)


@triton.jit
def _dkdv_kernel(
    q_src, k_ptr, v_ptr, do_src, dk_dst, dv_dst, rows_src, scale, scale_log2,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn, stride_dob, stride_doh, stride_dom,
    stride_dkb, stride_dkh, stride_dkn, stride_dvb, stride_dvh, stride_dvn, stride_rows,
    H, GROUP, N_Q, N_K,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """dK, dV or both of one tile of keys: algorithm 2, one turn of its outer loop, no line 15."""
    tiles = tl.cdiv(N_K, BLOCK_N)
    head, tile = _turn(tiles, 512 if BLOCK_D > 128 else 1024, CAUSAL)
    b, h_kv = (head // (H // GROUP)).to(tl.int64), (head % (H // GROUP)).to(tl.int64)
    start_n = tile * BLOCK_N  # causal: the first keys are seen by most queries
    offs_n = start_n + tl.arange(0, BLOCK_N)

    k_ptr += b * stride_kb + h_kv * stride_kh
    v_ptr += b * stride_vb + h_kv * stride_vh
    if not TMA:
        dk_dst += b * stride_dkb + h_kv * stride_dkh
        dv_dst += b * stride_dvb + h_kv * stride_dvh

    k = _load(k_ptr, offs_n, stride_kn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D], line 6
    if DK:
        v = _load(v_ptr, offs_n, stride_vn, N_K, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    if TMA and BLOCK_D == 64 and STAY:  # 16 registers a thread each; three programs still fit
        k, v = _in_registers(k), _in_registers(v)
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
        q_head = q_src if TMA else q_src + (b * stride_qb + h * stride_qh)
        do_head = do_src if TMA else do_src + (b * stride_dob + h * stride_doh)
        row = (b * H + h) * 2
        if DK and DV:
            q = _stream(q_head, b, h, start_m, stride_qm, N_Q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA)
            do = _stream(do_head, b, h, start_m, stride_dom, N_Q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA)
            lse_log2 = _stream_row(rows_src, row, start_m, stride_rows, N_Q, BLOCK_M, TMA)
            delta = _stream_row(rows_src, row + 1, start_m, stride_rows, N_Q, BLOCK_M, TMA)
            s_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
            dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        elif DV:  # Q, and dO in its place
            q = _stream(q_head, b, h, start_m, stride_qm, N_Q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA)
            s_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            lse_log2 = _stream_row(rows_src, row, start_m, stride_rows, N_Q, BLOCK_M, False)
            do = _stream(do_head, b, h, start_m, stride_dom, N_Q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA)
        else:  # dO, and Q in its place
            do = _stream(do_head, b, h, start_m, stride_dom, N_Q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA)
            dp_t = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            lse_log2 = _stream_row(rows_src, row, start_m, stride_rows, N_Q, BLOCK_M, False)
            q = _stream(q_head, b, h, start_m, stride_qm, N_Q, BLOCK_M, HEAD_DIM, BLOCK_D, TMA)
            s_t = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            delta = _stream_row(rows_src, row + 1, start_m, stride_rows, N_Q, BLOCK_M, False)
        p_t = tl.exp2(s_t * scale_log2 - lse_log2[None, :])
        if CAUSAL:  # noqa: SIM102 (a constant: without it there is no branch to compile)
            if start_m < full:
                offs_m = tl.arange(0, BLOCK_M)
                first = offs_n - (start_m + N_K - N_Q)  # in this tile, who sees a key first
                visible = (offs_m & ~6)[None, :] >= first[:, None] - (offs_m & 6)[None, :]
                p_t = tl.where(visible, p_t, 0.0)  # in two parts: see `_hide`
        if DV:
            dv = tl.dot(p_t.to(do.dtype), do, dv, input_precision=PRECISION)  # line 12
        if DK:
            ds_t = p_t * (dp_t - delta[None, :])
            dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision=PRECISION)  # line 16
        start_m += BLOCK_M
        done = start_m >= N_Q
        h, start_m = tl.where(done, h + 1, h), tl.where(done, lo, start_m)

    if DK:
        dk *= scale
        _drain(dk_dst, b, h_kv, start_n, stride_dkn, N_K, dk, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
    if DV:
        _drain(dv_dst, b, h_kv, start_n, stride_dvn, N_K, dv, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)


_dk_kernel = _dv_kernel = _dkdv_kernel  # names to time each by, where they are launched apart

# Products of 2^33 multiplications take a large GPU about 80 µs. Descriptors take the CPU that long.
TMA_MIN_WORK = 1 << 33
FEW_KEYS = 1024  # at most: causal tiles at head dim 64 are half as long
# By dtype, what the P of a row may sum up to in a tile, for calls through descriptors: see `No
# maximum but the first`. Others take every tile's maximum.
MOST = {torch.bfloat16: 2.0**64}


def _path(capability, work, *tensors):
    """How tiles move: "tma" or "pointers".

    The copy engine exists from sm_90 on, wants bases and strides in multiples of 16 bytes, and is
    used where a call of `work` multiplications keeps the GPU busy for longer than the descriptors
    keep the CPU. Never for fp32, whose arithmetic takes longer than any copy.
    """
    if capability < (9, 0) or work < TMA_MIN_WORK or tensors[0].dtype == torch.float32:
        return "pointers"
    for t in tensors:
        b, h, n, _ = t.stride()
        if (t.data_ptr() | (b | h | n) << 1) & 15 or not (b and h and n):  # 2 bytes an element
            return "pointers"
    return "tma"


def _forward_row(path, d, causal, n_k, most):
    """Which row of FORWARD's path; at head dim 64 the best depends on the mask, and on MOST."""
    if path == "tma" and d <= 64:
        if causal and n_k <= FEW_KEYS:
            return "tma, few keys"
        if not causal and most is None:
            return "tma, every maximum"
    return path


def _describe(t, block, block_d):
    """Describe a tensor as tiles of `block` rows of one head; past their ends, tiles read as 0."""
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, 1, block, block_d])


def _tiles(table, table_fp32, row, q, allow_tf32):
    """What a kernel is compiled for: head dim, tile, padded head dim, and precision; and how."""
    d, fp32 = q.shape[3], q.dtype == torch.float32
    m, n, warps, stages = _config(table, table_fp32, row, d, fp32)
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
    path = _path(_host.capability(q.device), B * H * N_Q * N_K * D, q, k, v, o)
    most = MOST.get(q.dtype) if path == "tma" else None
    row = _forward_row(path, D, causal, N_K, most)
    m, n, d, precision, how = _tiles(FORWARD, FORWARD_FP32, row, q, allow_tf32)
    q_src, k_src, v_src, o_dst = q, k, v, o
    if path == "tma":
        q_src, o_dst = _describe(q, m, d), _describe(o, m, d)
        k_src, v_src = _describe(k, n, d), _describe(v, n, d)
    compiled_for = (D, m, n, causal, precision, path, most, *how.values())
    key = _host.launch_key((q, k, v, o), (H, H // H_KV, N_Q, N_K), *compiled_for)
    _host.launch(
        _forward_kernel, key, (-(-N_Q // m) * B * H, 1, 1),  # the other axes end at 65,535
        q_src, k_src, v_src, o_dst, lse, scale * _host.LOG2E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *o.stride()[:3],
        H, H // H_KV, N_Q, N_K, D, m, n, d, causal, precision, path == "tma", most, **how,
    )  # fmt: skip
    return o, lse


def backward(do, q, k, v, o, lse, causal, scale, allow_tf32):
    """Launch on what forward took and returned. Returns dq, dk, dv, like q, k, v."""
    (B, H, N_Q, D), (_, H_KV, N_K, _) = q.shape, k.shape
    dq, dk, dv = _host.empty_like(q), _host.empty_like(k), _host.empty_like(v)
    # Base-2 lse and delta, a row each for every head: what the second kernel streams beside Q and
    # dO. The rows of a descriptor start at multiples of 16 bytes.
    rows = torch.empty((B * H * 2, -(-N_Q // 4) * 4), dtype=torch.float32, device=q.device)
    qkv_strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    path = _path(_host.capability(q.device), B * H * N_Q * N_K * D, q, k, v, do, o, dq, dk, dv)
    m, n, d, precision, how = _tiles(DQ, DQ_FP32, path, q, allow_tf32)
    apart = path == "tma" and d == 256  # and dQ from the same small programs
    q_src, k_src, v_src, o_src, do_src, dq_dst = q, k, v, o, do, dq
    if path == "tma":
        k_src, v_src = _describe(k, n, d), _describe(v, n, d)
    if apart:
        q_src, o_src = _describe(q, m, d), _describe(o, m, d)
        do_src, dq_dst = _describe(do, m, d), _describe(dq, m, d)
    sizes = H, H // H_KV, N_Q, N_K
    compiled_for = (D, m, n, causal, precision, path, *how.values())
    key = _host.launch_key((q, k, v, o, do, dq), (*sizes, rows.stride(0)), *compiled_for)
    _host.launch(  # first: it computes the rows
        _dq_kernel, key if lse.data_ptr() % 16 == 0 else None, (-(-N_Q // m) * B * H, 1, 1),
        q_src, k_src, v_src, o_src, do_src, dq_dst, lse, rows, scale, scale * _host.LOG2E,
        *qkv_strides, *o.stride()[:3], *do.stride()[:3], *dq.stride()[:3], rows.stride(0),
        *sizes, D, m, n, d, causal, precision, path == "tma", apart, **how,
    )  # fmt: skip
    launches = ((_dkdv_kernel, DKDV, True, True),)
    if apart:
        launches = (_dv_kernel, DV, False, True), (_dk_kernel, DK, True, False)
    for kernel, table, with_dk, with_dv in launches:
        m, n, d, precision, how = _tiles(table, DKDV_FP32, path, q, allow_tf32)
        q_src, do_src, rows_src, dk_dst, dv_dst = q, do, rows, dk, dv
        if path == "tma":
            q_src, do_src = _describe(q, m, d), _describe(do, m, d)
            dk_dst, dv_dst = _describe(dk, n, d), _describe(dv, n, d)
            if not apart:
                rows_src = TensorDescriptor(rows, [B * H * 2, N_Q], [rows.stride(0), 1], [1, m])
        compiled_for = (D, m, n, causal, precision, path, with_dk, with_dv, *how.values())
        key = _host.launch_key((q, k, v, do, dk, dv), (*sizes, rows.stride(0)), *compiled_for)
        _host.launch(
            kernel, key, (-(-N_K // n) * B * H_KV, 1, 1),
            q_src, k, v, do_src, dk_dst, dv_dst, rows_src, scale, scale * _host.LOG2E,
            *qkv_strides, *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], rows.stride(0),
            *sizes, D, m, n, d, causal, precision, path == "tma",
            with_dk, with_dv, **how,
        )  # fmt: skip
    return dq, dk, dv


_op = _host.operator("v3_tma", forward, backward)


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
