"""Hopper, third step: programs stay on their multiprocessor and draw tiles.

A program of `v5_pingpong` computes one tile of queries and ends. Shared memory and registers leave
room for one program a multiprocessor, so nothing covers its start (barriers, registers, the first
loads) and its end (the last product, O on its way out). At N = 512, where a tile has 4 tiles of
keys, that is a quarter of the time. Here 132 programs are launched, one a multiprocessor, and each
works through many tiles:

    producer    │ Q K V of tile a ··········│ Q K V of tile b ·········│ …
    consumer 0  │ wait │ a a a a a a │ O │ b b b b b b b │ O │ c …         O: normalise and store
    consumer 1  │  wait  │ a a a a a a │ O │ b b b b b b b │ O │ c …

The producer does not wait for an end: while the consumers store O, the next Q and the first K and V
are on their way, Q into a second buffer (Q_STAGES; at D=256 there is no room for one). The two
consumers reach their ends at different moments, so the tensor cores have work meanwhile. And an end
is kept short:

- Which tile comes next, and which keys it visits, takes a chain of integer divisions. The producer,
  who has the time, does them and leaves a note in shared memory for the consumers.
- The sums of the rows are added up, and lse is stored, while the last P V runs.
- O goes out of the buffer of Q, where TMA reads it in its own time. The consumer looks whether it
  has when the first QKᵀ of the next tile runs, and only then gives the buffer back.

At N = 512, D=128, these three are worth 5 % (full) and 4 % (causal). Issuing the last P V together
with the next tile's first QKᵀ won 3 % at N = 16384, causal, and lost 6 % at N = 512.

**Who gets which tile.** Without causal all tiles cost the same, and they are dealt: 132 in a turn,
back and forth. With it the longest costs N_K / BLOCK_N times the shortest. With few tiles a head,
the turn back gives the short ones to who has had the long ones; and where two turns are all, it
does so for any number of them, if the longest tiles of all heads come first. With many, any fixed
deal leaves some multiprocessors idle. So programs draw: a counter in device memory, one atomic
addition a tile. (The counter must be zeroed, a launch of its own: too dear where a deal will do.)
The producer draws, when it has asked for all loads of its current tile.

**In which order.** Long tiles first, so that the last to be drawn are short and all programs end at
about the same time: the rule of longest processing time first. But K and V should stay in L2, and a
tile of the last queries of *every* head in turn touches them all. So heads go in sections whose K
and V fill about 32 MiB of the 50 MiB of L2, and the order is longest first within a section.

**Grouped heads.** With few queries a tile would be mostly empty, while GROUP query heads read the
same K and V. They are packed into the tile: row r holds query r // PACK of head r % PACK, and a
tensor descriptor of five dims, (B, H / PACK, N_Q, PACK, D), lets TMA do the shuffle for Q and O. A
row's mask looks at its query. Used where it makes fewer tiles.

**Splitting the keys.** A step of decoding has a few queries and many keys: fewer tiles than
multiprocessors, and each long. Then a tile's keys are split into shares (flash decoding): every
share writes an O of its own, normalised by itself, and its lse; `_merge_kernel` weighs them by
exp(lse).

**Empty without an mbarrier.** "K is read" comes as a named barrier on which consumers arrive and
only the producer waits. To arrive on an mbarrier Triton first gathers the threads of the partition;
to arrive on a named barrier each warp goes on at once.

**How many consumers.** Two share a tile of 128 queries. At D=64 three share one of 192: a product
is over sooner there and two softmaxes must lie under it. Short sequences fill the larger tile
badly, and on the diagonal it masks more: two consumers there. One consumer has the tensor cores to
itself and uses them badly, for its softmax lies under nothing: a tile of 64 queries takes about
0.7 of the time of one of 128. But a call may have too few tiles:

    16 heads, 512 queries       two      64 tiles for 132      1    turn
                                one     128 tiles              0.76 turns
    16 heads, 1024 queries      two     128 tiles              1    turn
                                one     256 tiles              1.52 turns; causal 0.76

So `_plan` cuts a call for every configuration, counts the turns that a multiprocessor has, weighs
them by TILE_TIME and takes the quickest. Two turns count as one where the diagonal cuts tiles to
half on average, as a long tile goes with a short one then; shares of the keys divide.

**No maximum.** Softmax subtracts one number from all scores of a row, and any will do, as it
cancels in P V / Σ P: the maximum is one with which exp2 cannot overflow. `v5_pingpong` brings it up
to date with every tile of keys, and O and l with it (algorithm 1 of FlashAttention-2). But the one
of the tiles so far nearly always does for the next tile too. So a step works with it unseen, and
asks afterwards; the sums that it asks for are needed anyway:

    P = exp2(scale · S - m)     sums of P: each lane its part of a row
    has a lane of this warp a sum above 2¹⁵ (fp16) or 2⁴⁰ (bf16), or NaN?
        no     l += sums                               318 instructions in all at D=128, with wgmma
        yes    m, alpha, P, l, O as in `v5_pingpong`

Without, there are 456 instructions: 68 for the maximum and 66 to rescale O and l are gone (D=64:
308 for 415, D=256: 241 for 412), and with them the chain through the maximum, for which all of S
and two shuffles had to wait before the first exponential. S stays in its registers until the
question is answered.

The result is as good. Where no lane's sum is above 2¹⁵, no P is, and fp16 ends at 65,504; bf16 has
the range of fp32, and 2⁴⁰ leaves room for P V. Numbers in floating point are as precise there as
between 0 and 1, and O, l and lse = log(2^m · l) go with any m. As m is a maximum of the row, only
not always the latest, l is at least 1. The first tile of a row takes its maximum, and so does a row
that has seen no key: m is -inf there, and P inf or NaN. FlashAttention-4 (on Blackwell,
`rescale_threshold` in its softmax.py) takes the maximum and leaves O as it is until that has grown
by 2⁸; FlashDecoding++ (arXiv 2311.01282) takes one number for all rows and repeats what overflows.
A warp decides alone: no other waits for it before the next product.

Protocol, beside what `v4_warp_specialized` explains of rings and phases:
- Every counter of a ring (i over tiles of keys, turn over tiles of queries) runs on over all tiles
  of a program; it is never set back, or the phases would go wrong.
- A consumer arrives on `empty` of a stage once a use; the producer waits once for each use after
  the first. The last arrivals are never waited for: the program ends with them.
- The end is noted like a tile, one without keys: consumers and producer stop at the same turn.
- O is staged in the consumer's own Q: overwritten after its last QKᵀ, given back when TMA has read,
  in the next tile at the latest; so the producer is never two tiles of queries ahead. The program
  ends when TMA has read the last one.
- Only consumers of one program take turns. All make the tile's number of steps.

Limits and maths as in `v5_pingpong`.

Measured on an H200 (bf16, 16,384 tokens, hidden size 2048, torch 2.11.0, Triton 3.6.0, 2026-11-27),
in turns of 50 ms whose order changes, TFLOP/s at N = 512 / 4096 / 16384, in brackets cuDNN:

            D=64                         D=128                        D=256
    full    411 574 621 (368 441 455)    525 729 753 (468 583 604)    504 700 763 (469 622 642)
    causal  264 453 569 (245 404 433)    334 633 732 (300 486 530)    320 636 728 (323 505 558)

In the same turns with every tile's maximum, as up to that day: full 385 483 520, 493 638 656 and
476 656 684, causal 244 422 495, 315 547 604 and 320 595 676. So leaving it out is 1.00 to 1.21
times as fast, 1.10 on average. Long calls draw the 700 W that the GPU may, and there an instruction
less is clock. The other way round where the maximum must be taken: scores that climb by 2²⁰ from
tile to tile, each of them computed twice, ran at 0.71 (D=128), 0.83 (D=256) and 0.66 (D=64) of the
speed of the kernel that always takes it. Normally distributed ones with a deviation of 3 ran at
full speed, with one of 10 at 0.98 to 0.99. (These with the bound 2¹⁵ for bf16, too.)

Beside the libraries, all in turns of one run of the same day (`bench/peers.py`), it reached, in
brackets flash-attn 4, at N = 512 / 2048 / 16384:

            D=64                         D=128                        D=256
    full    425 562 605 (326 483 542)    561 714 726 (441 622 690)    534 714 765 (484 695 756)
    causal  263 424 570 (178 381 528)    362 618 743 (263 530 645)    330 616 803 (292 586 757)

The third buffer of K at D=256 gains 1 % on average (0.98 to 1.05 over 14 cells of two runs, in
turns). The first table is from before three consumers took D=64, causal, from 4096 keys on, which
is 1.04 times as fast (467 for 448 in turns of one run; at N = 2048 it was 0.81 times as fast).

Short calls, 1 × 16 heads, µs a call in a CUDA graph of 20, replayed in turns, same day; in brackets
with two consumers or more as before, and flash-attn 4. From 1024 queries, full, and 2048, causal,
one consumer has nothing to win; there D=64 gains by two consumers instead of three, and causal by
long tiles dealt with short ones:

    N               128             256             512             1024            2048
    D=64   full     4.1 (5.5  5.1)  4.8 (6.5  6.8)  6.4 ( 8.4  9.4)  12 (15 15)  37 ( 46 50)
           causal   4.3 (5.8  5.3)  5.1 (6.8  7.2)  6.5 ( 8.8  9.7)  11 (13 15)  24 ( 25 27)
    D=128  full     4.8 (6.5  5.5)  5.8 (8.0  7.0)  8.0 (10.4  9.6)  16 (16 16)  49 ( 48 54)
           causal   5.0 (6.9  5.3)  6.1 (8.1  7.0)  8.2 (10.6  9.8)  14 (16 16)  31 ( 32 33)
    D=256  full     6.0 (8.5  8.2)  7.6 (10.8 11.2) 10.9 (15.8 15.9)  27 (27 27)  the same
           causal   6.1 (8.8  8.6)  7.5 (11.1 12.1) 10.9 (15.9 16.5)  23 (26 26)  58 ( 58 59)

Between products as in a block (`torch.mm` to three times the hidden size, attention, `torch.mm`)
all of it took 0.94 to 0.95 (D=128) and 0.89 to 0.92 (D=64) of the time at 512 queries; at 1024,
causal, 0.97 and 1.01 in two runs at D=128, 0.95 and 0.94 at D=64. Launching the kernel while the
one before it ends (programmatic dependent launch) took 4 to 20 % off calls that follow each other,
and nothing between products: left out. Tiles of 64 keys for one consumer took 0.93 to 1.01 of the
time of 128 at D=128, causal, but 1.09 to 1.14 when decoding, and 0.97 to 1.11 at D=64: left out,
too. At D=64, causal, 16 heads of 4096 queries, three consumers are chosen and take 1.03 of the time
of two.

Decoding, D=128, 32 heads over 8: one query over 131,072 keys 142 µs (cuDNN 139; 1432 without the
split, on 2026-11-22), 16 queries over as many 144 µs (flash-attn 2 482, cuDNN 1496); those called
one by one, by two consumers. In graphs as above one query over 8192 keys takes 14 µs (by two
consumers 18, cuDNN 11), over 131,072 122 µs (125, cuDNN 125); at D=64 11 µs (by three 17, cuDNN 9)
and 65 µs (86, cuDNN 65).

Turns of one call differ (D=64, causal, N = 2048, 16,384 tokens: 0.32 to 0.39 ms in an earlier run).
That is the clock: near its 700 W the GPU sets it anew every tenth of a second, between 1650 and
1965 MHz during eight seconds at 669 to 697 W. Nine turns of 0.327 to 0.348 ms went with it, their
cycles within 4 % of each other's mean. Dealing instead of drawing (0.98 of the speed) and sections
of 8 or 16 MiB (1.00, 1.00) change nothing there; of 64 MiB they are slower (0.93).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import _gluon, _host
from ._gluon import (
    aggregate,
    any_above,
    barrier_arrive,
    barrier_sync,
    declare_vote,
    tma_load,
    tma_store,
    tma_store_wait,
)

ROWS = 64  # rows of a consumer: the M of a wgmma
# What the P of a lane and row may sum up to, by type: see `No maximum`.
MOST_FP16 = gl.constexpr(2.0**15)
MOST_BF16 = gl.constexpr(2.0**40)
# Two numbers of fp32 in one register, each rounded to half precision.
TO_FP16 = gl.constexpr("cvt.rn.f16x2.f32 $0, $2, $1;")
TO_BF16 = gl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
DRAW_TILES = 16  # tiles of queries a head, causal, from which drawing is ahead of dealing
SECTION_BYTES = 32 << 20  # of K and V that neighbouring tiles read: what L2 keeps
MAX_PACK = 64  # heads in a tile: then it holds one query of each consumer
MIN_SHARE, MIN_SHARES = 8, 3  # tiles of keys, and shares: less is not worth a second launch
MERGED = 16  # shares that the second launch loads at once


class Config(NamedTuple):
    head_dim: int  # of the tile: the tensor's, or more, filled with zeros
    block_n: int  # keys a tile
    consumers: int  # warpgroups of ROWS queries
    k_stages: int  # buffers of K
    v_stages: int  # of V
    q_stages: int  # of Q
    pingpong: bool  # the consumers take turns
    registers: tuple[int, int]  # a thread: consumer, producer


# By head dim of the tile, the fewest consumers first. The buffers fill up to 227 KiB; registers add
# up to 65,536 for all threads.
CONFIGS = {
    64: (
        Config(64, 128, 1, 3, 3, 2, False, (240, 24)),
        Config(64, 128, 2, 2, 2, 2, True, (240, 24)),
        Config(64, 128, 3, 2, 2, 2, True, (160, 32)),
    ),
    128: (
        Config(128, 128, 1, 3, 3, 2, False, (240, 24)),
        Config(128, 128, 2, 2, 2, 2, True, (240, 24)),
    ),
    256: (
        Config(256, 64, 1, 3, 2, 2, False, (240, 24)),
        Config(256, 64, 2, 3, 2, 1, False, (240, 24)),
    ),
}
LONG = {False: 1024, True: 4096}  # keys, by causal, from which three consumers may be ahead
# What a tile of so many consumers takes, end and all: see `How many consumers`.
TILE_TIME = {1: 0.76, 2: 1, 3: 1.3}


class Sizes(NamedTuple):
    """Run-time integers of the kernel, in the order of its arguments: no compilation for each.

    Quotients come from the host: LLVM would compute them once, in front of the partitions, and keep
    them in too few registers.
    """

    H: int  # heads of q_desc
    GROUP: int  # of them to one head of K
    N_Q: int
    N_K: int
    diagonal: int  # keys that query 0 sees, causal: N_K - N_Q + 1, may be negative
    tiles: int  # of queries: all of them
    tiles_m: int  # those of a head
    tiles_n: int  # of keys
    full_n: int  # those that no key is missing from
    share_n: int  # of them: those of a share
    B: int
    heads: int  # heads of all batches
    section: int  # heads whose tiles are neighbours
    share_tiles: int  # tiles_m · heads
    section_tiles: int  # tiles_m · section


class Plan(NamedTuple):
    """How a call is computed: what follows from its shapes alone."""

    config: Config
    pack: int  # heads in a tile
    shares: int  # of the keys
    programs: int
    draw: bool  # tiles are drawn, else dealt
    sizes: Sizes
    q_tile: list[int]  # of five dims, see `Grouped heads`
    k_tile: list[int]


def _configs(head_dim, causal, n_k):
    """The configurations that a call may take."""
    most = 3 if n_k >= LONG[causal] else 2
    tile = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    return [c for c in CONFIGS[tile] if c.consumers <= most]


def _cut(c, B, H, group, N_Q, N_K, processors):
    """How a call is cut for a configuration: heads in a tile, tiles of a head, shares of the keys.

    With them the number of heads that tiles are of, and of tiles of keys in a share.
    """
    rows, pack = c.consumers * ROWS, 1
    tiles_m = -(-N_Q // rows)
    if 1 < group <= MAX_PACK and group & (group - 1) == 0:  # tiles are powers of two
        packed = -(-N_Q * group // rows)
        if packed < group * tiles_m:
            pack, tiles_m = group, packed
    heads, tiles_n = B * H // pack, -(-N_K // c.block_n)
    # Few tiles, long ones: split the keys, so that every multiprocessor has a share.
    shares = min(processors // (tiles_m * heads), tiles_n // MIN_SHARE)
    share_n = -(-tiles_n // shares) if shares >= MIN_SHARES else tiles_n
    return pack, tiles_m, heads, -(-tiles_n // share_n), share_n


def _time(c, cut, causal, N_Q, N_K, processors):
    """What a call takes that is cut so, in tiles of two consumers over all keys."""
    _, tiles_m, heads, shares, _ = cut
    turns = -(-tiles_m * heads // processors)
    if causal and 2 * N_Q > N_K:  # tiles are half as long on average, and the longest as long
        turns = max(1, turns / 2)
    return turns / shares * TILE_TIME[c.consumers]


@functools.lru_cache(maxsize=1024)
def _plan(B, H, H_KV, N_Q, N_K, D, causal, processors):
    """The plan of a call on so many multiprocessors; N_Q and N_K are at least 1."""
    group = H // H_KV
    cuts = {c: _cut(c, B, H, group, N_Q, N_K, processors) for c in _configs(D, causal, N_K)}
    c = min(cuts, key=lambda c: _time(c, cuts[c], causal, N_Q, N_K, processors))
    pack, tiles_m, heads, shares, share_n = cuts[c]
    tiles_n = -(-N_K // c.block_n)
    tiles = tiles_m * heads * shares
    programs = min(tiles, processors)
    section, draw = 1, False
    if causal and programs < tiles <= 2 * programs:
        # Longest first over all heads, unless the longest would get a second one all the same and
        # the turn back within a head gives each its counterpart.
        if tiles + heads <= 2 * programs or 2 * programs % tiles_m:
            section = heads
    elif causal and tiles_m >= DRAW_TILES and programs < tiles:
        draw = True
        section = _gluon.section(heads, SECTION_BYTES * group // (pack * 4 * N_K * c.head_dim))
    sizes = Sizes(
        H // pack, group // pack, N_Q, N_K, N_K - N_Q + 1, tiles, tiles_m, tiles_n,
        N_K // c.block_n, share_n, B, heads, section, tiles_m * heads, tiles_m * section,
    )  # fmt: skip
    q_tile, k_tile = [1, 1, ROWS // pack, pack, c.head_dim], [1, 1, c.block_n, c.head_dim]
    return Plan(c, pack, shares, programs, draw, sizes, q_tile, k_tile)


@aggregate
class Work:
    """What every partition gets: tensors, buffers, barriers, sizes."""

    q_desc: tma.tensor_descriptor  # (B, H / PACK, N_Q, PACK, D), as o_desc
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    o_desc: tma.tensor_descriptor
    lse_ptr: gl.tensor
    drawn_ptr: gl.tensor  # DRAW: how many tiles have been drawn
    q_bufs: gl.shared_memory_descriptor  # [Q_STAGES · CONSUMERS, 1, 1, ROWS / PACK, PACK, HEAD_DIM]
    k_bufs: gl.shared_memory_descriptor  # [K_STAGES, 1, 1, BLOCK_N, HEAD_DIM]
    v_bufs: gl.shared_memory_descriptor  # [V_STAGES, 1, 1, BLOCK_N, HEAD_DIM]
    tile_bufs: gl.shared_memory_descriptor  # [2 · 6, 1]: what `_post` says of two tiles
    q_ready: gl.shared_memory_descriptor  # barriers, one a buffer
    q_empty: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor
    v_ready: gl.shared_memory_descriptor
    tile_ready: gl.shared_memory_descriptor
    tile_empty: gl.shared_memory_descriptor
    scale_log2: gl.tensor
    H: gl.tensor  # from here to section_tiles: see Sizes
    GROUP: gl.tensor
    N_Q: gl.tensor
    N_K: gl.tensor
    diagonal: gl.tensor
    tiles: gl.tensor
    tiles_m: gl.tensor
    tiles_n: gl.tensor
    full_n: gl.tensor
    share_n: gl.tensor
    B: gl.tensor
    heads: gl.tensor
    section: gl.tensor
    share_tiles: gl.tensor
    section_tiles: gl.tensor
    CONSUMERS: gl.constexpr
    CAUSAL: gl.constexpr
    DRAW: gl.constexpr
    PINGPONG: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, q_desc, k_desc, v_desc, o_desc, lse_ptr, drawn_ptr, q_bufs, k_bufs, v_bufs, tile_bufs,
        q_ready, q_empty, k_ready, v_ready, tile_ready, tile_empty, scale_log2, H, GROUP, N_Q,
        N_K, diagonal, tiles, tiles_m, tiles_n, full_n, share_n, B, heads, section,
        share_tiles, section_tiles, CONSUMERS, CAUSAL, DRAW, PINGPONG,
    ):  # fmt: skip
        self.q_desc, self.k_desc, self.v_desc, self.o_desc = q_desc, k_desc, v_desc, o_desc
        self.lse_ptr, self.drawn_ptr = lse_ptr, drawn_ptr
        self.q_bufs, self.k_bufs, self.v_bufs = q_bufs, k_bufs, v_bufs
        self.tile_bufs, self.tile_ready, self.tile_empty = tile_bufs, tile_ready, tile_empty
        self.q_ready, self.q_empty, self.k_ready, self.v_ready = q_ready, q_empty, k_ready, v_ready
        self.scale_log2 = scale_log2
        self.H, self.GROUP, self.N_Q, self.N_K = H, GROUP, N_Q, N_K
        self.diagonal, self.tiles, self.tiles_m, self.tiles_n = diagonal, tiles, tiles_m, tiles_n
        self.full_n, self.share_n, self.B, self.heads = full_n, share_n, B, heads
        self.section, self.share_tiles, self.section_tiles = section, share_tiles, section_tiles
        self.CONSUMERS = gl.constexpr(CONSUMERS)
        self.CAUSAL, self.DRAW = gl.constexpr(CAUSAL), gl.constexpr(DRAW)
        self.PINGPONG = gl.constexpr(PINGPONG)


@gluon.jit
def _tile(w, tile):
    """Which tile that is: share of the keys, batch, head, first row; and which keys it visits.

    Those are: the rightmost tile, how many tiles from there to the left, how many of them masked.
    """
    PACK: gl.constexpr = w.q_bufs.shape[4]
    ROWS: gl.constexpr = w.q_bufs.shape[3] * PACK
    BLOCK_N: gl.constexpr = w.k_bufs.shape[3]
    share = tile // w.share_tiles
    tile = tile % w.share_tiles
    first_bh = tile // w.section_tiles * w.section
    heads = gl.minimum(w.section, w.heads - first_bh)  # in this section: the last may be smaller
    rank = tile % w.section_tiles
    bh = first_bh + rank % heads
    pid_m = rank // heads
    if w.CAUSAL:  # longest first
        pid_m = w.tiles_m - 1 - pid_m
    start_m = pid_m * (w.CONSUMERS * ROWS)

    n_tiles = w.tiles_n
    n_full = w.full_n
    if w.CAUSAL:
        # Keys that the first row sees, and the last.
        first = start_m // PACK + w.diagonal
        last = first + (w.CONSUMERS * ROWS // PACK - 1)
        n_tiles = gl.minimum(n_tiles, gl.cdiv(gl.maximum(last, 0), BLOCK_N))
        n_full = gl.minimum(n_full, gl.maximum(first, 0) // BLOCK_N)
    left = share * w.share_n
    right = gl.minimum(n_tiles, left + w.share_n)
    right = gl.maximum(right, left + 1)  # nothing to see: one tile, all of it masked
    return share, bh // w.H, bh % w.H, start_m, right - 1, right - left, right - n_full


@gluon.jit
def _uniform(x):
    """Lane 0's value in all lanes: they are equal, but now ptxas knows and keeps loops uniform.

    Without, addresses and loop counters that depend on x move from uniform to vector registers,
    and the main loop moves them back for every wgmma.
    """
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;",
        "=r,r",
        [x],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


# Named barriers, by number: 7 to 9 "V is read", 10 to 12 "K is read", one a stage, in which the
# consumers arrive and the producer waits; 13 to 15 a consumer's turn (see `v5_pingpong`).


@gluon.jit
def _k_empty(stage):
    return 10 + stage


@gluon.jit
def _v_empty(stage):
    return 7 + stage


@gluon.jit
def _post(w, turn, n_tiles, n_masked, b_o, h, start_m, start_n):
    """Leave for the consumers what they need to know of the tile of this turn."""
    FIELDS: gl.constexpr = w.tile_bufs.shape[0] // 2
    scalar: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    note = (n_tiles, n_masked, b_o, h, start_m, start_n)
    for n in gl.static_range(FIELDS):
        field = w.tile_bufs.index(turn % 2 * FIELDS + n)
        field.store(gl.full([1], note[n], gl.int32, scalar))
    mbarrier.arrive(w.tile_ready.index(turn % 2), count=1)


@gluon.jit
def _field(w, turn, n):
    FIELDS: gl.constexpr = w.tile_bufs.shape[0] // 2
    scalar: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return _uniform(gl.max(w.tile_bufs.index(turn % 2 * FIELDS + n).load(scalar), 0))


@gluon.jit
def _next(w, turn):
    """What `_post` has left."""
    mbarrier.wait(w.tile_ready.index(turn % 2), turn // 2 & 1)
    n_tiles, n_masked, b_o = _field(w, turn, 0), _field(w, turn, 1), _field(w, turn, 2)
    h, start_m, start_n = _field(w, turn, 3), _field(w, turn, 4), _field(w, turn, 5)
    mbarrier.arrive(w.tile_empty.index(turn % 2), count=1)
    return n_tiles, n_masked, b_o, h, start_m, start_n


@gluon.jit
def _producer(w):
    K_STAGES: gl.constexpr = w.k_bufs.shape[0]
    V_STAGES: gl.constexpr = w.v_bufs.shape[0]
    BLOCK_N: gl.constexpr = w.k_bufs.shape[3]
    PACK: gl.constexpr = w.q_bufs.shape[4]
    ROWS: gl.constexpr = w.q_bufs.shape[3] * PACK
    Q_STAGES: gl.constexpr = w.q_bufs.shape[0] // w.CONSUMERS
    THREADS: gl.constexpr = 128 * w.CONSUMERS + 32

    tile = gl.program_id(0)
    turn = 0
    i = 0
    while tile >= 0:
        mbarrier.wait(w.tile_empty.index(turn % 2), turn // 2 & 1 ^ 1)
        if tile >= w.tiles:  # no tile: it has none of keys
            _post(w, turn, 0, 0, 0, 0, 0, 0)
            tile = -1
        else:
            share, b, h, start_m, last, n_tiles, n_masked = _tile(w, tile)
            # o_desc and lse hold the shares of all batches one after the other.
            _post(w, turn, n_tiles, n_masked, share * w.B + b, h, start_m, last * BLOCK_N)
            q_stage = turn % Q_STAGES * w.CONSUMERS
            for c in gl.static_range(w.CONSUMERS):
                q_ready = w.q_ready.index(q_stage + c)
                start_query = (start_m + c * ROWS) // PACK
                mbarrier.wait(w.q_empty.index(q_stage + c), turn // Q_STAGES & 1 ^ 1)
                mbarrier.expect(q_ready, w.q_desc.block_type.nbytes)
                tma_load(w.q_desc, [b, h, start_query, 0, 0], q_ready, w.q_bufs.index(q_stage + c))

            h_kv = h // w.GROUP
            for j in range(n_tiles + 1):  # K a tile ahead of V, in the order of use
                start_n = (last - j) * BLOCK_N
                if j < n_tiles:
                    stage = i % K_STAGES
                    k_ready = w.k_ready.index(stage)
                    if i >= K_STAGES:
                        barrier_sync(_k_empty(stage), THREADS)
                    mbarrier.expect(k_ready, w.k_desc.block_type.nbytes)
                    tma_load(w.k_desc, [b, h_kv, start_n, 0], k_ready, w.k_bufs.index(stage))
                if j > 0:
                    stage = (i - 1) % V_STAGES
                    v_ready = w.v_ready.index(stage)
                    if i > V_STAGES:
                        barrier_sync(_v_empty(stage), THREADS)
                    mbarrier.expect(v_ready, w.v_desc.block_type.nbytes)
                    before = start_n + BLOCK_N
                    tma_load(w.v_desc, [b, h_kv, before, 0], v_ready, w.v_bufs.index(stage))
                i += 1
            i -= 1

            # Last, so that its round trip to L2 hides behind the tiles in the ring.
            if w.DRAW:
                drawn = gl.atomic_add(w.drawn_ptr, 1, sem="relaxed")
                tile = gl.num_programs(0) + _uniform(drawn)
            else:  # position p of one turn is position G - 1 - p of the next
                tile = (turn + 1) * 2 * gl.num_programs(0) - 1 - tile
        turn += 1


@gluon.jit
def _mask(s, visible):
    """-inf where a row does not see a key; visible [ROWS]: how many keys of this tile it sees.

    A thread holds columns 8j + {0, 1} + 2 · (its lane % 4) of its rows. Written as 8j + {0, 1} <
    visible - 2 · (lane % 4), the left side is a constant for each register and needs none itself.
    """
    offs_n = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    bound = gl.expand_dims(visible, 1) - gl.expand_dims(offs_n & 6, 0)
    return gl.where(gl.expand_dims(offs_n & ~6, 0) < bound, s, float("-inf"))


@gluon.jit
def _lane_sums(p):
    """[ROWS, BLOCK_N] -> [ROWS, 4]: sum what each of the 4 lanes of a row holds, no shuffles."""
    parts = gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2])  # columns 8j + 2 · lane + {0, 1}
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def _rescale(x, alpha):
    """The rows of x times alpha [ROWS]."""
    return x * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, x.type.layout)), 1)


@gluon.jit
def _pairs(p, dtype: gl.constexpr):
    """[ROWS, BLOCK_N] fp32 -> [ROWS, BLOCK_N / 2] int32: two neighbours, in half precision, each.

    So P goes through branches and loops. LLVM would take values of 16 bits apart there and pack
    them anew behind, 32 instructions of 320. Not pure, or it would pack where P is used and keep
    twice the registers until then.
    """
    low, high = gl.split(gl.reshape(p, [p.shape[0], p.shape[1] // 2, 2]))
    half: gl.constexpr = TO_BF16 if dtype == gl.bfloat16 else TO_FP16
    return gl.inline_asm_elementwise(
        half, "=r,r,r", [low, high], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _operand(p, dtype: gl.constexpr, o_layout: gl.constexpr):
    """Pairs as the A operand of PV: the same registers under another name, no data moves."""
    low = p.to(gl.int16).to(dtype, bitcast=True)
    high = (p >> 16).to(gl.int16).to(dtype, bitcast=True)
    p = gl.reshape(gl.join(low, high), [p.shape[0], 2 * p.shape[1]])  # [ROWS, BLOCK_N]
    return gl.convert_layout(p, gl.DotOperandLayout(0, o_layout, 2), assert_trivial=True)


@gluon.jit
def _weights(w, s, m_log2):
    """P = exp2(scale_log2 · S - m_log2), in pairs, and its sums [ROWS, 4]."""
    p = gl.exp2(gl.fma(s, w.scale_log2, gl.expand_dims(-m_log2, 1)))  # [ROWS, BLOCK_N]
    return _pairs(p, w.v_desc.dtype), _lane_sums(p)


@gluon.jit
def _softmax(w, s, m_log2, l_i):
    """Online softmax of a tile (algorithm 1 of FlashAttention-2, line 9): p, alpha, m_log2, l_i."""
    m_new = gl.maximum(m_log2, gl.max(s, 1) * w.scale_log2)
    m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)  # no key yet: -inf - -inf would be NaN
    alpha = gl.exp2(m_log2 - m_safe)
    p, sums = _weights(w, s, m_safe)
    return p, alpha, m_new, _rescale(l_i, alpha) + sums


@gluon.jit
def _here(x):
    """x, and what follows from it is computed here and not before.

    LLVM would do in front of the loop, or even of the partitions, what is the same in every tile,
    and keep it in registers that are not there: without causal the bits of 64 comparisons.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1
    )


@gluon.jit
def _take_turn(WHICH: gl.constexpr):
    barrier_sync(13 + WHICH, 256)


@gluon.jit
def _give_turn(WHICH: gl.constexpr):
    barrier_arrive(13 + WHICH, 256)


@gluon.jit
def _step(
    w, q_smem, zero, acc, p, m_log2, l_i, visible, i, WHICH: gl.constexpr, MASKED: gl.constexpr
):  # fmt: skip
    """Scores and softmax of the i-th tile, and P V of the tile before."""
    K_STAGES: gl.constexpr = w.k_bufs.shape[0]
    V_STAGES: gl.constexpr = w.v_bufs.shape[0]
    BLOCK_N: gl.constexpr = w.k_bufs.shape[3]
    HEAD_DIM: gl.constexpr = w.k_bufs.shape[4]
    THREADS: gl.constexpr = 128 * w.CONSUMERS + 32
    o_layout: gl.constexpr = acc.type.layout
    MOST: gl.constexpr = MOST_BF16 if w.v_desc.dtype == gl.bfloat16 else MOST_FP16
    k_stage = i % K_STAGES
    v_stage = (i - 1) % V_STAGES
    k_smem = w.k_bufs.index(k_stage).reshape([BLOCK_N, HEAD_DIM])
    v_smem = w.v_bufs.index(v_stage).reshape([BLOCK_N, HEAD_DIM])

    mbarrier.wait(w.k_ready.index(k_stage), i // K_STAGES & 1)
    if w.PINGPONG:
        _take_turn(WHICH)
    s = warpgroup_mma(q_smem, k_smem.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(w.v_ready.index(v_stage), (i - 1) // V_STAGES & 1)
    a = _operand(p, w.v_desc.dtype, o_layout)
    acc = warpgroup_mma(a, v_smem, acc, is_async=True)
    if w.PINGPONG:
        _give_turn((WHICH + 1) % w.CONSUMERS)

    s = warpgroup_mma_wait(1, [s])  # [ROWS, BLOCK_N]
    barrier_arrive(_k_empty(k_stage), THREADS)
    # a among what is waited for: its registers are read until PV has finished.
    acc = warpgroup_mma_wait(0, [acc, a])[0]
    barrier_arrive(_v_empty(v_stage), THREADS)
    if MASKED:
        s = _mask(s, visible)
    p, sums = _weights(w, s, m_log2)  # with the maximum that is there: see `No maximum`
    if any_above(sums, MOST):  # rarely; also where m_log2 is -inf, for then p is inf or NaN
        p, alpha, m_log2, l_i = _softmax(w, s, m_log2, l_i)
        acc = _rescale(acc, alpha)
    else:
        l_i += sums
    return acc, p, m_log2, l_i


@gluon.jit
def _store_lse(w, m_log2, l_sum, b_o, h, start_m):
    PACK: gl.constexpr = w.q_bufs.shape[4]
    lse = (m_log2 + gl.log2(l_sum)) * 0.6931471805599453  # ln 2: the natural one
    offs_r = _here(start_m) + gl.arange(0, m_log2.shape[0], layout=m_log2.type.layout)
    offs_m, offs_h = offs_r // PACK, offs_r % PACK
    offs = ((b_o * w.H + h).to(gl.int64) * PACK + offs_h) * _here(w.N_Q) + offs_m
    gl.store(w.lse_ptr + offs, lse, mask=offs_m < w.N_Q)


@gluon.jit
def _consumer(w, WHICH: gl.constexpr):
    K_STAGES: gl.constexpr = w.k_bufs.shape[0]
    V_STAGES: gl.constexpr = w.v_bufs.shape[0]
    BLOCK_N: gl.constexpr = w.k_bufs.shape[3]
    PACK: gl.constexpr = w.q_bufs.shape[4]
    ROWS: gl.constexpr = w.q_bufs.shape[3] * PACK
    HEAD_DIM: gl.constexpr = w.q_bufs.shape[5]
    Q_STAGES: gl.constexpr = w.q_bufs.shape[0] // w.CONSUMERS
    THREADS: gl.constexpr = 128 * w.CONSUMERS + 32
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)  # a name only: use_acc=False reads none
    if w.PINGPONG and WHICH == w.CONSUMERS - 1:
        _give_turn(0)

    turn = 0
    i = 0
    n_tiles, n_masked, b_o, h, start_m, start_n = _next(w, turn)
    while n_tiles > 0:
        start_m += WHICH * ROWS
        # Keys that a row sees, from the first of the rightmost tile on. Causal: query i sees those
        # up to i + N_K - N_Q. (Rows past N_Q may see past N_K: zeros, and nobody reads them.)
        if w.CAUSAL:
            first = _here(start_m // PACK + w.diagonal - start_n)
            visible = _here(gl.arange(0, ROWS, layout=rows)) // PACK + first
        else:
            visible = gl.full([ROWS], w.N_K - start_n, gl.int32, rows)

        # The rightmost tile has no P V of a tile before it.
        q_stage = turn % Q_STAGES * w.CONSUMERS + WHICH
        q_smem = w.q_bufs.index(q_stage).reshape([ROWS, HEAD_DIM])
        mbarrier.wait(w.q_ready.index(q_stage), turn // Q_STAGES & 1)
        mbarrier.wait(w.k_ready.index(i % K_STAGES), i // K_STAGES & 1)
        k_smem = w.k_bufs.index(i % K_STAGES).reshape([BLOCK_N, HEAD_DIM])
        s = warpgroup_mma(q_smem, k_smem.permute((1, 0)), zero, use_acc=False, is_async=True)
        if Q_STAGES > 1 and turn > 0:  # by now TMA has read the O of the tile before
            before = (turn - 1) % Q_STAGES * w.CONSUMERS + WHICH
            tma_store_wait(0)
            mbarrier.arrive(w.q_empty.index(before), count=1)
        s = warpgroup_mma_wait(0, [s])
        barrier_arrive(_k_empty(i % K_STAGES), THREADS)
        if n_masked > 0:
            s = _mask(s, _here(visible))
        m_log2 = gl.full([ROWS], float("-inf"), gl.float32, rows)
        l_i = gl.zeros_like(_lane_sums(zero))
        p, _, m_log2, l_i = _softmax(w, s, m_log2, l_i)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, o_layout)
        i += 1

        if w.CAUSAL:
            for _ in range(1, gl.minimum(n_masked, n_tiles)):
                visible += BLOCK_N
                acc, p, m_log2, l_i = _step(
                    w, q_smem, zero, acc, p, m_log2, l_i, visible, i, WHICH, MASKED=True
                )
                i += 1
        # Without causal only the rightmost tile, the end of the keys, can need a mask.
        for _ in range(gl.maximum(n_masked, 1), n_tiles):
            acc, p, m_log2, l_i = _step(
                w, q_smem, zero, acc, p, m_log2, l_i, visible, i, WHICH, MASKED=False
            )
            i += 1

        # P V of the leftmost tile, and meanwhile what does not need it.
        stage = (i - 1) % V_STAGES
        mbarrier.wait(w.v_ready.index(stage), (i - 1) // V_STAGES & 1)
        v_smem = w.v_bufs.index(stage).reshape([BLOCK_N, HEAD_DIM])
        a = _operand(p, w.v_desc.dtype, o_layout)
        acc = warpgroup_mma(a, v_smem, acc, is_async=True)
        # Rows that saw no key have l = 0 and m = -inf: they give 0, and lse -inf.
        l_sum = gl.convert_layout(gl.sum(l_i, 1), rows)
        inverse = gl.where(l_sum == 0.0, 0.0, 1.0 / l_sum)
        _store_lse(w, m_log2, l_sum, b_o, h, start_m)
        acc = warpgroup_mma_wait(0, [acc, a])[0]
        barrier_arrive(_v_empty(stage), THREADS)

        o = _rescale(acc, inverse)
        q_smem.store(o.to(w.o_desc.dtype))
        fence_async_shared()  # written by threads, read by TMA: another path to the same memory
        tma_store(w.o_desc, [b_o, h, start_m // PACK, 0, 0], w.q_bufs.index(q_stage))
        if Q_STAGES == 1:  # the next Q comes to where O is
            tma_store_wait(0)
            mbarrier.arrive(w.q_empty.index(q_stage), count=1)
        turn += 1
        n_tiles, n_masked, b_o, h, start_m, start_n = _next(w, turn)

    tma_store_wait(0)
    if w.PINGPONG and WHICH == 0:
        _take_turn(0)


@gluon.jit(do_not_specialize=Sizes._fields)
def _forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, drawn_ptr, scale_log2,
    H, GROUP, N_Q, N_K, diagonal, tiles, tiles_m, tiles_n, full_n, share_n, B, heads, section,
    share_tiles, section_tiles,
    CONFIG: gl.constexpr, CAUSAL: gl.constexpr, DRAW: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    CONSUMERS: gl.constexpr = CONFIG.consumers
    K_STAGES: gl.constexpr = CONFIG.k_stages
    V_STAGES: gl.constexpr = CONFIG.v_stages
    Q_BUFS: gl.constexpr = CONFIG.q_stages * CONSUMERS
    CONSUMER_REGISTERS: gl.constexpr = CONFIG.registers[0]
    PRODUCER_REGISTERS: gl.constexpr = CONFIG.registers[1]
    QUERIES: gl.constexpr = q_desc.block_shape[2]
    PACK: gl.constexpr = q_desc.block_shape[3]
    BLOCK_N: gl.constexpr = k_desc.block_shape[2]
    HEAD_DIM: gl.constexpr = k_desc.block_shape[3]
    q_shape: gl.constexpr = [Q_BUFS, 1, 1, QUERIES, PACK, HEAD_DIM]
    k_shape: gl.constexpr = [K_STAGES, 1, 1, BLOCK_N, HEAD_DIM]
    v_shape: gl.constexpr = [V_STAGES, 1, 1, BLOCK_N, HEAD_DIM]
    q_bufs = gl.allocate_shared_memory(dtype, q_shape, q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, k_shape, k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, v_shape, v_desc.layout)
    tile_bufs = gl.allocate_shared_memory(gl.int32, [12, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [Q_BUFS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_BUFS, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], mbarrier.MBarrierLayout())
    tile_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    tile_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(Q_BUFS):
        mbarrier.init(q_ready.index(n), count=1)
        mbarrier.init(q_empty.index(n), count=1)  # a buffer of Q has one consumer
    for n in gl.static_range(K_STAGES):
        mbarrier.init(k_ready.index(n), count=1)
    for n in gl.static_range(V_STAGES):
        mbarrier.init(v_ready.index(n), count=1)
    for n in gl.static_range(2):
        mbarrier.init(tile_ready.index(n), count=1)
        mbarrier.init(tile_empty.index(n), count=CONSUMERS)

    w = Work(
        q_desc, k_desc, v_desc, o_desc, lse_ptr, drawn_ptr, q_bufs, k_bufs, v_bufs, tile_bufs,
        q_ready, q_empty, k_ready, v_ready, tile_ready, tile_empty, scale_log2, H, GROUP, N_Q,
        N_K, diagonal, tiles, tiles_m, tiles_n, full_n, share_n, B, heads, section,
        share_tiles, section_tiles, CONSUMERS, CAUSAL, DRAW, CONFIG.pingpong,
    )  # fmt: skip
    declare_vote()
    # The first partition runs on the kernel's own warps and gets the registers that the others
    # leave, as many as they: the table's numbers add up to 65,536 a multiprocessor.
    if CONSUMERS == 1:
        gl.warp_specialize([(_consumer, (w, 0)), (_producer, (w,))], [1], [PRODUCER_REGISTERS])
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [(_consumer, (w, 0)), (_consumer, (w, 1)), (_producer, (w,))],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [(_consumer, (w, 0)), (_consumer, (w, 1)), (_consumer, (w, 2)), (_producer, (w,))],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )


@triton.jit(do_not_specialize=["stride_ob", "stride_oh", "stride_om", "H", "N_Q", "rows", "shares"])
def _merge_kernel(
    o_parts_ptr, lse_parts_ptr, o_ptr, lse_ptr, stride_ob, stride_oh, stride_om,
    H, N_Q, rows, shares, D: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """O = Σ exp(lse_s - lse) O_s over the shares s of a row, with lse = log Σ exp(lse_s).

    The parts O_s are rounded to half precision, as O is; they are summed in fp32.
    """
    row = tl.program_id(0).to(tl.int64)  # of B · H · N_Q
    offs_d = tl.arange(0, HEAD_DIM)
    m_i, l_i = float("-inf"), 0.0
    acc = tl.zeros([HEAD_DIM], tl.float32)
    for start_s in range(0, shares, BLOCK_S):  # many at once: a load takes as long as the sum
        offs_s = start_s + tl.arange(0, BLOCK_S)
        at = offs_s * rows.to(tl.int64) + row
        mask = (offs_s < shares)[:, None] & (offs_d < D)[None, :]
        lse = tl.load(lse_parts_ptr + at, mask=offs_s < shares, other=float("-inf"))  # [BLOCK_S]
        o = tl.load(o_parts_ptr + at[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        m_new = tl.maximum(m_i, tl.max(lse, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, p = tl.exp(m_i - m_safe), tl.exp(lse - m_safe)
        acc = acc * alpha + tl.sum(o.to(tl.float32) * p[:, None], 0)  # [HEAD_DIM]
        l_i = l_i * alpha + tl.sum(p, 0)
        m_i = m_new
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)
    b, h, m = row // N_Q // H, row // N_Q % H, row % N_Q
    at = b * stride_ob + h * stride_oh + m * stride_om
    tl.store(o_ptr + at + offs_d, acc.to(o_ptr.dtype.element_ty), mask=offs_d < D)
    tl.store(lse_ptr + row, m_i + tl.log(l_i))


def forward(q, k, v, causal, scale, allow_tf32):
    """Launch on checked tensors. Returns o, like q, and lse (B, H, N_Q) in fp32."""
    (B, H, N_Q, D), (_, H_KV, N_K, _) = q.shape, k.shape
    o = _host.empty_like(q)
    lse = torch.empty((B, H, N_Q), dtype=torch.float32, device=q.device)
    if o.numel() == 0 or N_K == 0:  # no queries, or none sees a key; TMA takes no empty tensor
        return o.zero_(), lse.fill_(float("-inf"))
    if scale <= 0:  # the kernel takes the maximum before it scales
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)

    c, pack, shares, programs, draw, sizes, q_tile, k_tile = _plan(
        B, H, H_KV, N_Q, N_K, D, causal, _gluon.multiprocessors(q.device)
    )
    o_parts, lse_parts = o, lse
    if shares > 1:
        o_parts = torch.empty((shares * B, H, N_Q, D), dtype=q.dtype, device=q.device)
        lse_parts = torch.empty((shares * B, H, N_Q), dtype=torch.float32, device=q.device)
    drawn = torch.zeros(1, dtype=torch.int32, device=q.device) if draw else lse

    q_shape, o_shape = (B, H // pack, N_Q, pack, D), (shares * B, H // pack, N_Q, pack, D)
    q_b, q_h, q_n, _ = _gluon.strides("q", q)
    o_b, o_h, o_n, _ = _gluon.strides("o", o_parts)
    _host.launch(
        _forward_kernel, (q.get_device(), q.dtype, c, pack, causal, draw), (programs, 1, 1),
        _gluon.descriptor(q, q_shape, (q_b, q_h * pack, q_n, q_h, 1), q_tile),
        _gluon.descriptor(k, k.shape, _gluon.strides("k", k), k_tile),
        _gluon.descriptor(v, v.shape, _gluon.strides("v", v), k_tile),
        _gluon.descriptor(o_parts, o_shape, (o_b, o_h * pack, o_n, o_h, 1), q_tile),
        lse_parts, drawn, scale * _host.LOG2E, *sizes,
        c, causal, draw, **_gluon.OPTIONS,
    )  # fmt: skip
    if shares > 1:
        _host.launch(
            _merge_kernel, (q.get_device(), q.dtype, D), (B * H * N_Q, 1, 1),
            o_parts, lse_parts, o, lse, *o.stride()[:3],
            H, N_Q, B * H * N_Q, shares, D, c.head_dim, MERGED,
        )  # fmt: skip
    return o, lse


_op = _host.operator("v6_persistent", forward)


def attention(q, k, v, *, causal=False, scale=None, return_lse=False, allow_tf32=False):
    """softmax(scale · Q Kᵀ) V on Hopper, for q (B, H, N_Q, D) and k, v (B, H_KV, N_K, D).

    fp16 or bf16, H_KV dividing H, any lengths, D a multiple of 8 up to 256; storage and strides in
    multiples of 16 bytes. causal is aligned bottom-right; a row that sees no key gives 0. scale is
    1/sqrt(D) unless given. With return_lse also the logarithm of each row's sum of exponentials,
    (B, H, N_Q) in fp32. allow_tf32 is there for the contract: no fp32 here.

    Raises ValueError where the arguments do not fit.
    """
    scale = _gluon.check(q, k, v, scale)
    o, lse = _op(q, k, v, causal, scale, allow_tf32)
    return (o, lse) if return_lse else o
