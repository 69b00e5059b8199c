"""The backward pass on Hopper, in Gluon: five matrix products that share one walk over the tiles.

With S = scale·Q Kᵀ, P = exp(S - LSE) and delta = rowsum(dO ∘ O), the gradients are

    dV = Pᵀ dO      dP = dO Vᵀ      dS = P ∘ (dP - delta)      dQ = scale·dS K      dK = scale·dSᵀ Q

(FlashAttention-2, arXiv 2307.08691, algorithm 2: S and P lines 10 and 11, dV line 12, dP 13, dS
line 14, dQ line 15, dK line 16; delta is its line 4, here in a kernel of its own.) The forward does
not store P: LSE brings it back with one exponential an element. What this step adds to the portable
backward is the machine's own division of labour, as in FlashAttention-3 (arXiv 2407.08608, section
3): warps that only load, warps that only multiply, asynchronous products, and one pass that yields
all three gradients: five products a tile where two passes that both recompute S and dP take seven.

Tile map. A CTA owns BLOCK_N = 128 keys and walks over the query tiles that see them. dK and dV
stay in registers all the way; dQ, to which every key tile of a head contributes, is summed in fp32
in device memory.

               queries →                        consumer 0    4 warps, keys  0..63  of the tile
    keys   ┌────┬────┬────┬────┐                consumer 1    4 warps, keys 64..127
     ↓     │ ░░ │ ▒▒ │ ▓▓ │    │ ← one CTA      loader        1 warp: Q, dO, LSE, delta; K and V
           └────┴────┴────┴────┘                writer        1 warp: adds dQ, stores dV and dK
             dQ   dQ   dQ   …    each summed over the CTAs of a column

Scores are computed transposed, Sᵀ = K Qᵀ and dPᵀ = V dOᵀ, [keys, queries]: the accumulator of a
product has the layout of the register operand of the next, so Pᵀ goes from the one to dV += Pᵀ dO
and never sees memory. dQ = dS K alone sums over keys, that is over both consumers: dS goes through
shared memory, and each consumer computes half of dQ, half of its columns or of its rows.

The consumers take turns at the tensor cores, a ping-pong as in the forward: while one has its five
products computed, the other takes exponentials. Two named barriers hand the turn over, and they are
all that the exchange of dS needs: consumer 0 gets a turn when consumer 1 has ended one, consumer
1's dS of that tile is in shared memory then, and the other way round. Only consumer 0, always half
an iteration ahead, has to compute its part of dQ one query tile late.

    consumer 0                                      consumer 1
    ┌ turn ──────────────────────────────────┐
    │ dQ(j-2)  dV(j-1)  dK(j-1)  S(j)  dP(j) │      P(j-1) = exp2(scale·log2 e·S - LSE₂)
    └────────────────────────────────────────┘      dS(j-1) = P (dP - delta) → shared memory
                                                    ┌ turn ──────────────────────────────────┐
    P(j) = exp2(scale·log2 e·S - LSE₂)              │ dQ(j-1)  dV(j-1)  dK(j-1)  S(j)  dP(j) │
    dS(j) = P (dP - delta) → shared memory          └────────────────────────────────────────┘
    ┌ turn ──────────────────────────────────┐
    │ dQ(j-1)  dV(j)  dK(j)  S(j+1)  dP(j+1) │      P(j), dS(j)

Within a turn, dQ goes to shared memory while dV and dK run. When dK is done Q and dO of that tile
go back to the loader, and right after them dQ to the writer, which adds it to device memory. No
product is in flight where a loop turns: with one, ptxas serialised them all (its warnings C7510 to
C7519). The first query tile of a key tile is a turn with S and dP alone, the last one without them;
consumer 0 takes one more for its last dQ. dK leaves when the first P and dS of the next key tile
are there; in a chain (below) before them, since the sums of that tile wait for it.

That order counts, since the copy engine keeps it: behind a sum of dQ, which takes long to get rid
of, a load comes late. So loads go first. But the sum does not wait for the exponentials either, as
it did before: the way out, one buffer a consumer, must be empty again when the next dQ comes. That
is how we read these clocks of the main kernel, as a share of those with the sum behind the
exponentials (H200, D = 128, 16,384 tokens, by Nsight Compute's sm__cycles_elapsed.max; torch
2.11.0, triton 3.6.0; 2026-11-27):

                                                           N = 2048           16384
                                                           causal  full       causal  full
    sum behind the loads, dK behind the next tile's first
    exponentials: as it is                                  0.95   0.96        0.96   0.96
    sum ahead of the loads                                  1.01   1.13        1.01   1.19
    sum behind the exponentials, loads right behind the
    other consumer's sum: dK ahead of dV                    1.01    -          1.02   1.09
    a third slot of Q and dO, none for the next K           1.03   1.09        1.02   1.09

At D = 64 and N = 16384 it is 0.985 causal and 0.97 full.

Under a causal mask the query tiles that need it come first, and they have a loop of their own. At
most three of up to 256 need it, but the branch to it costs all of them: with the exponentials
behind it, ptxas has all multiplications wait in front of it. Given a mask that hides nothing, the
kernel with the branch took 3134 clocks for what the one without takes 3024 (D = 128, an iteration,
below; H200, 2026-11-28). With two loops the causal main kernel takes 0.955 of its clocks at N =
16384 and 0.98 at 2048, and 0.99 at D = 64 and 16384. Not for 16 query tiles or less, where it took
1.01, not in chains, and not with Triton 3.9, whose ptxas spills in them.

What bounds it (D = 128, one iteration of a CTA, 64 queries by 128 keys): 10.5 MFLOP take the tensor
cores 2560 clocks (4096 FLOP a clock). A wgmma has 64 rows and reads from shared memory what it does
not find in registers, 128 bytes a clock: S 64 KiB, dP 64, dV 32, dK 32, dQ 64; dS written 16, dQ
written and read by the copy engine 64, Q and dO arriving 32: 368 KiB or 2944 clocks. Shared memory
is the busier of the two. An iteration takes 3060 clocks, causal 3080 (N = 16384: the main kernel's
clocks over the iterations of a multiprocessor). A warp that issues wgmma after wgmma stands still
while most of them run: asynchronous or not, a consumer's arithmetic hides under the other's
products more than under its own. That is what the turns are for: with a barrier of both consumers
at every dS in their place, both took exponentials at the same time, and an iteration took 4100
clocks. Atomic additions of dQ straight from the registers, four numbers each (red.v4), spare shared
memory 64 KiB, and took 1.10 of the clocks.

What lives where (D = 128). Shared memory: Q 2 x 16 KiB, dO 2 x 16, K 2 x 32, V 32, dS 2 x 16, the
way out 2 x 16: 224 of 227 KiB, one CTA a multiprocessor. Registers of a consumer thread, at most
240: dK 64, dV 64, S 32, dP 32, P and dS in half precision 16 each, dQ 32 before S. Device memory:
for each 128 keys Q and dO are read once and 4 bytes an element added to dQ; L2 serves most of that.

CTAs are persistent: the loader draws the next tile from a counter and fetches it under the end of
the one before. It also decodes the place of the list for all roles, since divisions take long (with
draws that order no other memory: 353 µs for 360 in the causal call of 16,384 tokens at N = 512, D =
128, and 390 for 407 at D = 64; in turns, GPU and versions as below, 2026-11-27). The list is
ordered heaviest first where a causal mask makes tiles unequal, in sections of heads whose tensors
fit in L2. All sections have as many heads: a last one of a few has fewer long tiles than there are
multiprocessors, and while these finish, nothing follows that could fill the others. D = 128,
causal, in turns (the same day): sections of 5 heads of 32 reached 547 TFLOP/s at N = 8192, of 4
heads 578; the same took 508 to 533 at 4096, 438 to 456 at 2048 and 235 to 239 at 512.

Few tiles. A place of the list may be a part of a tile: all its keys, but some of the query tiles.
Every part leaves its dV and dK, rounded, in a slot of its own, and the last kernel adds the slots
up in fp32, in a fixed order. Three cases (`_shares`): fewer tiles than multiprocessors, of which
the others would do nothing; a causal mask and about one long tile for each, where one has twice the
average to do; and the end of a full mask's list, where 2048 tiles are 15 rounds of 132 and 68 more,
for which half the machine waits: these go in eight parts. More parts than that cost more than they
bring, since each fetches K and V and fills and drains the turns anew. A slot takes 64 KiB at D =
128: up to 17, 25 and 50 MiB on 132 multiprocessors in the three cases, whatever N. GPU time of a
causal call with batch 1, 16 heads, D = 128, replayed from a CUDA graph (in turns with the version
before, cuDNN and flash-attn 4, these in brackets; GPU and versions as below, 2026-11-27): N = 512
21.9 µs (26.9 32.8 23.2), N = 1024 43.1 (46.8 54.9 41.8), N = 2048, whole, 96.3 (98.5 162 133). Of
the 21.9 the kernel before takes 3, the last 4.5. In a run before, N = 512 took 22.3 in two parts,
25 in three or four. With D = 64 and 32 heads the tiles of N = 512 stay whole: 21.0 (22.4 26.3
17.1); what a CTA takes to begin and end counts more there.

Short sequences. Where there are heads enough for all multiprocessors, one CTA takes all key tiles
of a key head, in ascending order: a chain. It meets every query tile with the first of them, whose
dQ it stores; the next ones are added; and with the last one that a query tile sees, the consumers
add the sum to their dQ, which then leaves rounded and in its place. So nothing is cleared, nobody
converts afterwards, two kernels do for three, and each CTA has one head's worth of memory for sums,
which mostly stay in L2: at N = 512, D = 128 33 MiB, not 128, and none where there is one key tile.
And dQ has one order: it repeats bit by bit for free. A sum comes back with its consumer's way out,
that is free again, so that the consumer waits for both at once; where a key tile begins the writer
waits until the sums of the one before are in memory, not only on their way. Causal chains walk
there and back, since what was met last is in L2.

What they bring hangs on L2. 132 chains at a time have 132 heads at work, 8 bytes an element of Q,
where the list by sections has but as many as fit. Time with the list over time in chains (in turns
replayed from CUDA graphs; NVIDIA H100 with 3.35 TB/s, bf16, 16,384 tokens, hidden size 2048; torch
2.11.0, triton 3.6.0; 2026-11-27; a - was not measured; at D = 64 every key tile walked in one
direction, at D = 128 there and back):

                            N = 256    512   1024   2048
    D = 64         full        -      1.01   0.61   0.53
                   causal     1.64    1.37   0.90   0.65
    D = 128        full       1.33    0.87   0.61    -
                   causal     1.66    1.14   0.77    -

Hence `_chains`. The causal ones in µs, beside them chains that leave dQ to the last kernel:

                            list    chains    with the last kernel
    D = 64, N = 512          475       347       394
    D = 128, N = 512         455       399       485
    D = 64, N = 256          427       261       321
    D = 128, N = 256         421       254       320

There and back (D = 128, N = 512: 399 for 412 in one direction) takes registers, too, of which the
loader has none left with a full mask. On an H200, among the libraries: causal, N = 512, D = 64 270
TFLOP/s beside flash-attn 4's 217, D = 128 269 beside 241; in a run before, without chains, 219
beside 216 and 241 beside 241.

deterministic=True gives the sums of dQ an order, where chains do not: a lock for each half of a
query tile counts the key tiles that have added to it, and the writer waits for its number. Keys go
in ascending order; under a causal mask in descending order, and the list of tiles with them, since
a CTA meets the diagonal first: it seldom waits. A CTA waits only for places before its own in the
list, and those are being worked on, so the wait ends. The price: waiting, and under a causal mask
the lightest tiles first. Share of the speed without it and without chains, at N = 512, 4096 and
16384 (GPU and versions as below, in turns, 2026-11-27): D = 64 full 0.58 0.46 0.57, causal 0.80
0.61 0.59; D = 128 full 0.64 0.51 0.56, causal 0.76 0.58 0.53.

Against FlashAttention-3: turns in the backward, too, in place of a barrier for dS; persistent CTAs;
few tiles shared out; no tiles of 80 queries; grouped heads loop over the query heads of a group
inside the CTA, so that dK and dV need no accumulators in memory; chains. As there, a first kernel
computes delta and clears the accumulator of dQ, and a last one scales it, restores its order and
rounds (but for chains): 14 bytes an element, at 4 TB/s. The three launches overlap (programmatic
dependent launch): a kernel is set up while the one before still runs, and waits for it before it
reads what that has written. Both small kernels walk so that what the main one reads first, or has
summed last, is still in L2. To leave the last one to the two idle warps of the main kernel, which
convert a query tile when all its sums are in, was slower (same GPU and versions, 2026-11-27; D =
128, causal: 502 µs of GPU time for 367 at N = 512, 5.3 ms for 4.6 at 16384). The sums must be
counted, and to count one the writer waits until it has arrived in memory, not only until it has
left shared memory; and two warps with 24 registers took longer over it than the kernel that they
replaced.

Limits: fp16 and bf16, head dim up to 128 (the copy engine pads to 64 or 128 with zeros; at 256 dK
and dV alone would fill the registers: see v7_wide_heads). dK and dV are bitwise repeatable, dQ if
asked for, or in chains.

Measured, TFLOP/s with everything between dO and the finished gradients, in brackets cuDNN / flash-
attn 4, five turns of each in changing order (`bench/peers.py`; H200, bf16, 16,384 tokens, hidden
size 2048; torch 2.11.0, triton 3.6.0; 2026-11-28), at N = 512, 2048 and 16384:

    D = 64   full    378 (286 / 340)   517 (421 / 480)   571 (438 / 518)
             causal  277 (170 / 217)   446 (329 / 420)   591 (413 / 522)
    D = 128  full    405 (340 / 360)   618 (515 / 574)   681 (530 / 613)
             causal  277 (211 / 242)   513 (409 / 470)   689 (505 / 616)

The matrix product beside them reached 713 to 777: such figures move with the GPU's power limit. In
a run before, beside a product of 669, the version with one loop had 635 full and 590 causal at D =
128 and N = 16384.

What the overlap of the three launches is worth (in turns with and without it, and the two small
kernels turned round; sections of 20 MiB with it, 40 MiB without; H200, 2026-11-27): N = 512 +3 %
(D = 128, both masks) and +6 % (D = 64, causal), N = 2048 +1 %; at 16384, where the small kernels
are a fortieth of the time, 0 to -2 %.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import _gluon, _host
from ._gluon import (
    aggregate,
    barrier_arrive,
    barrier_sync,
    tma_load,
    tma_reduce_add,
    tma_store,
    tma_store_wait,
)

MAX_HEAD_DIM = 128
L2_BYTES = 40 << 20  # of 50 MiB: what a section of heads may take
CHAIN_BYTES = 70 << 20  # what the heads that chains walk at a time may take

# Named barriers, by their number in PTX (Triton keeps the low ones), and how many threads meet.
TURN = gl.constexpr(8)  # 8, 9: it is that consumer's turn at the tensor cores
EMPTY = gl.constexpr(10)  # 10, 11: both consumers are done with that slot of Q, dO; loader waits
OUT_FULL = gl.constexpr(12)  # 12, 13: that consumer's way out is full; the writer waits
SUM_BLOCK = tl.constexpr(4096)
CONSUMERS = gl.constexpr(256)
CONSUMERS_AND_LOADER = gl.constexpr(256 + 32)
CONSUMER_AND_WRITER = gl.constexpr(128 + 32)

# The threads of this role meet. Triton puts such barriers itself where shared memory is read after
# a write; one where nobody waits for anybody saves it from putting one where somebody would.
meet = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier  # the name from 3.9 on

# A shared tile under another type and shape: public, and without the underscore, from Triton 3.9.
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None)
if reinterpret is None:
    reinterpret = gl.shared_memory_descriptor._reinterpret


# fp32 in shared memory as in device memory: rows of LSE and delta, and dQ in its own order
FP32 = {rank: gl.NVMMASharedLayout(0, 32, rank=rank) for rank in (1, 2)}


class Config(NamedTuple):
    """Tiles of a head dim; `head_dim` is the padded one, a power of two."""

    block_m: int
    block_n: int
    head_dim: int
    split_rows: bool  # consumers share out dQ by rows (queries) or else by columns
    ds_registers: bool  # dS as dK's operand: from registers, or through shared memory
    dq_parts: int  # dQ of a query tile is added in so many parts
    out_rows: int  # dK and dV are stored so many rows at a time
    chains: bool  # the kernel can take the key tiles of a unit one after the other
    apart: bool  # and give the query tiles that need a mask a loop of their own


CONFIGS = {
    64: Config(128, 128, 64, True, False, 2, 64, True, True),
    128: Config(64, 128, 128, False, True, 2, 64, True, True),
}
NONE, SOME, ALL = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)  # masks of query tiles
JOINS, COMPLETES, ALONE = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)  # Work.fate
TWO_LOOPS = _gluon.VERSION < (3, 9)  # ptxas 13.4 would spill 92 bytes in them
LN_2 = gl.constexpr(0.6931471805599453)  # scale = qk_scale * LN_2
MAIL = gl.constexpr(6)  # numbers that say which tile is next
STAGES = 2  # ring slots of Q and dO; K has as many, so that the next tile's is there in time


def _config(head_dim):
    return CONFIGS[64 if head_dim <= 64 else 128]


@aggregate
class Drawn:
    """A place of the list, decoded: dividing takes a while, so the loader does it for all."""

    b: gl.tensor
    h_kv: gl.tensor  # key head
    n: gl.tensor  # key tile
    first: gl.tensor  # of its iterations, query tiles times heads: the first of this part
    count: gl.tensor  # and how many it has; 0 where the list has ended
    place: gl.tensor  # after those of whole tiles: there dV and dK of a part go; else negative

    @gluon.constexpr_function
    def __init__(self, b, h_kv, n, first, count, place):
        self.b, self.h_kv, self.n = b, h_kv, n
        self.first, self.count, self.place = first, count, place


@aggregate
class Shared:
    """Everything in shared memory: the tiles, and the barriers (of the mbarrier kind) around them.

    A `ready` barrier counts one arrival, the loader's, and the bytes that it announced; an `empty`
    one counts an arrival a partition (in chains `out_empty` counts bytes, too, where a sum comes
    with it). Who waits for `ready` the n-th time passes parity n & 1, who waits for `empty` the
    opposite, so that the first wait goes through.
    """

    q: gl.shared_memory_descriptor  # ring
    do: gl.shared_memory_descriptor  # ring, in step with q
    lse: gl.shared_memory_descriptor  # ring, travels with q
    delta: gl.shared_memory_descriptor  # ring, travels with do
    k: gl.shared_memory_descriptor  # ring, one slot a key tile
    v: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor  # two buffers in turn
    out: gl.shared_memory_descriptor  # one a consumer: the way out of dQ, dV and dK
    q_ready: gl.shared_memory_descriptor
    do_ready: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor
    v_ready: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    out_empty: gl.shared_memory_descriptor
    mail: gl.shared_memory_descriptor  # two slots: the next tile, in numbers
    mail_ready: gl.shared_memory_descriptor
    mail_empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(
        self, q, do, lse, delta, k, v, ds, out,
        q_ready, do_ready, k_ready, v_ready, k_empty, v_empty, out_empty,
        mail, mail_ready, mail_empty,
    ):  # fmt: skip
        self.q, self.do, self.lse, self.delta = q, do, lse, delta
        self.k, self.v, self.ds, self.out = k, v, ds, out
        self.q_ready, self.do_ready = q_ready, do_ready
        self.k_ready, self.v_ready = k_ready, v_ready
        self.k_empty, self.v_empty = k_empty, v_empty
        self.out_empty = out_empty
        self.mail, self.mail_ready, self.mail_empty = mail, mail_ready, mail_empty

    @gluon.jit
    def out_as(self, which, desc):
        """A consumer's way out, seen as the tile of a descriptor."""
        EACH: gl.constexpr = self.out.shape[1] * self.out.shape[2] * 4 // desc.block_type.nbytes
        # half of dV may take less room than that of dQ; Triton 3.8 wants the whole reinterpreted
        shape: gl.constexpr = [2 * EACH] + desc.block_type.shape  # noqa: RUF005
        return reinterpret(self.out, desc.dtype, shape, desc.layout).index(which * EACH)

    @gluon.jit
    def receive(self, turn, WARPS: gl.constexpr, problem):
        """The other roles: the tile that the loader has drawn for this turn."""
        slot = turn % 2
        mbarrier.wait(self.mail_ready.index(slot), (turn // 2) & 1)
        b, h_kv = self.read(slot, 0, WARPS), self.read(slot, 1, WARPS)
        n, first = self.read(slot, 2, WARPS), self.read(slot, 3, WARPS)
        count, place = self.read(slot, 4, WARPS), self.read(slot, 5, WARPS)
        mbarrier.arrive(self.mail_empty.index(slot), count=1)
        return problem.work(Drawn(b, h_kv, n, first, count, place))

    @gluon.jit
    def send(self, turn, drawn):
        """The loader: tell the others of the tile of this turn."""
        slot = turn % 2
        mbarrier.wait(self.mail_empty.index(slot), ((turn // 2) & 1) ^ 1)
        self.write(slot, 0, drawn.b)
        self.write(slot, 1, drawn.h_kv)
        self.write(slot, 2, drawn.n)
        self.write(slot, 3, drawn.first)
        self.write(slot, 4, drawn.count)
        self.write(slot, 5, drawn.place)
        mbarrier.arrive(self.mail_ready.index(slot), count=1)

    @gluon.jit
    def read(self, slot, i, WARPS: gl.constexpr):
        """A number of the mail."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        return gl.max(self.mail.index(slot * MAIL + i).load(layout), 0)

    @gluon.jit
    def write(self, slot, i, x):
        """A number of the mail."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        self.mail.index(slot * MAIL + i).store(gl.full([1], x, gl.int32, layout))


def _listed(tile, units, section, tiles_n):
    """The key head, and the number of the key tile in it, at a place of the list of tiles."""
    before = tile // (section * tiles_n)
    inside = tile % (section * tiles_n)
    width = section
    if (before + 1) * section > units:
        width = units - before * section
    return before * section + inside % width, inside // width


listed, listed_in_triton = gluon.jit(_listed), triton.jit(_listed)


@aggregate
class Problem:
    """The kernel's scalar arguments; every role computes from them what it needs of a tile."""

    H: gl.tensor
    HEADS: gl.tensor  # query heads of a unit, which is a key head with all of them
    OFFSET: gl.tensor  # N_K - N_Q
    TILES_M: gl.tensor
    TILES_N: gl.tensor
    UNITS: gl.tensor  # B * H / HEADS
    SECTION: gl.tensor  # units that run together
    WHOLE: gl.tensor  # so many key tiles are one place of the list each
    PARTS: gl.tensor  # those after them are so many, each with a part of the queries
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    HEAD_DIM: gl.constexpr
    SPLIT_ROWS: gl.constexpr
    DS_REGISTERS: gl.constexpr
    CAUSAL: gl.constexpr
    RAGGED: gl.constexpr  # the last tile reaches past N_K
    DETERMINISTIC: gl.constexpr
    CHAINED: gl.constexpr  # a CTA takes all key tiles of a unit; then N_Q = N_K where causal
    APART: gl.constexpr  # the query tiles that need the mask have a loop of their own

    @gluon.constexpr_function
    def __init__(
        self, H, HEADS, OFFSET, TILES_M, TILES_N, UNITS, SECTION, WHOLE, PARTS, BLOCK_M, BLOCK_N,
        HEAD_DIM, SPLIT_ROWS, DS_REGISTERS, CAUSAL, RAGGED, DETERMINISTIC, CHAINED, APART,
    ):  # fmt: skip
        self.H, self.HEADS, self.OFFSET = H, HEADS, OFFSET
        self.TILES_M, self.TILES_N = TILES_M, TILES_N
        self.UNITS, self.SECTION = UNITS, SECTION
        self.WHOLE, self.PARTS = WHOLE, PARTS
        self.BLOCK_M, self.BLOCK_N = gl.constexpr(BLOCK_M), gl.constexpr(BLOCK_N)
        self.HEAD_DIM = gl.constexpr(HEAD_DIM)
        self.SPLIT_ROWS = gl.constexpr(SPLIT_ROWS)
        self.DS_REGISTERS = gl.constexpr(DS_REGISTERS)
        self.CAUSAL, self.RAGGED = gl.constexpr(CAUSAL), gl.constexpr(RAGGED)
        self.DETERMINISTIC = gl.constexpr(DETERMINISTIC)
        self.CHAINED = gl.constexpr(CHAINED)
        self.APART = gl.constexpr(APART)

    @gluon.jit
    def first(self, number):
        """The first place of the list that goes with a number drawn."""
        if self.CHAINED:  # see `launch`: then the key tiles of a unit are next to one another
            number *= self.TILES_N
        return number

    @gluon.jit
    def next(self, place, next_ptr):
        """The place after this one that the CTA works at."""
        place += 1
        if not self.CHAINED or place % self.TILES_N == 0:
            place = gl.atomic_add(next_ptr, 1, sem="relaxed")
            if not self.DETERMINISTIC:  # else the first was drawn, too
                place += gl.num_programs(0)
            place = self.first(place)
        return place

    @gluon.jit
    def size(self):
        """Length of the list of tiles and parts of tiles."""
        return self.WHOLE + (self.UNITS * self.TILES_N - self.WHOLE) * self.PARTS

    @gluon.jit
    def draw(self, place):
        """The tile, or part of one, at a place of the list.

        Sections follow one another; inside one, the first key tiles of all its heads come first:
        under a causal mask those see the most queries. The heads of a section run together and find
        each other's Q, dO and dQ in L2.
        """
        beyond = gl.maximum(place - self.WHOLE, 0)
        tile = gl.minimum(place, self.WHOLE + beyond // self.PARTS)
        part = beyond % self.PARTS

        unit, n = listed(tile, self.UNITS, self.SECTION, self.TILES_N)
        if self.CAUSAL and self.DETERMINISTIC:  # nobody may wait for a later place: see `before`
            n = self.TILES_N - 1 - n
        units = self.H // self.HEADS  # of a batch entry
        b, h_kv = unit // units, unit % units

        first = gl.to_tensor(0)
        count = self.iterations(n)
        if place >= self.WHOLE:
            parts = gl.minimum(self.PARTS, count)
            end = gl.minimum(part + 1, parts) * count // parts
            first = gl.minimum(part, parts) * count // parts
            count = end - first
        if place >= self.size():
            count = gl.to_tensor(0)
        return Drawn(b, h_kv, n, first, count, place - self.WHOLE)

    @gluon.jit
    def iterations(self, n):
        """Query tiles, times heads, that meet a key tile."""
        tiles = self.TILES_M
        if self.CAUSAL:
            tiles -= gl.maximum(n * self.BLOCK_N - self.OFFSET, 0) // self.BLOCK_M
        return tiles * self.HEADS

    @gluon.jit
    def work(self, drawn):
        """What there is to do for a tile."""
        start_n = drawn.n * self.BLOCK_N
        lo = gl.to_tensor(0)
        tiles = self.TILES_M
        masked = gl.to_tensor(0)
        edge_n = gl.to_tensor(0)
        if self.CAUSAL:  # query i sees the keys up to i + OFFSET
            lo = gl.maximum(start_n - self.OFFSET, 0) // self.BLOCK_M
            tiles -= lo
            full = gl.maximum(start_n + self.BLOCK_N - 1 - self.OFFSET, 0)  # it sees them all
            masked = gl.minimum(gl.cdiv(full, self.BLOCK_M) - lo, tiles)
            edge_n = start_n - self.OFFSET - lo * self.BLOCK_M
        final = gl.to_tensor(0)
        back = gl.to_tensor(False)
        if self.CHAINED:
            final = masked * self.HEADS  # OFFSET = 0: no later key tile meets these
            if drawn.n + 1 == self.TILES_N:
                final = drawn.count
            if self.CAUSAL:  # there and back: what was met last is in L2 (full: ptxas would spill)
                back = drawn.n % 2 == 1
        return Work(
            drawn.b, drawn.h_kv * self.HEADS, drawn.h_kv, start_n, lo, masked, tiles, self.HEADS,
            edge_n, drawn.first, drawn.count, drawn.place, final, back,
        )  # fmt: skip

    @gluon.jit
    def before(self, work, m):
        """How many key tiles add to dQ of query tile m before this one, when their order counts."""
        n = work.start_n // self.BLOCK_N
        if self.CAUSAL:  # from the last that the tile sees back to the first
            last = ((m + 1) * self.BLOCK_M - 1 + self.OFFSET) // self.BLOCK_N
            n = gl.minimum(last, self.TILES_N - 1) - n
        return n


@aggregate
class Work:
    """One tile of keys, and the query tiles that see it, or a part of them."""

    b: gl.tensor
    h: gl.tensor  # first query head
    h_kv: gl.tensor  # key head
    start_n: gl.tensor
    lo: gl.tensor  # first query tile that sees these keys
    masked: gl.tensor  # so many from there need the mask
    tiles: gl.tensor  # so many from there in all
    heads: gl.tensor
    edge_n: gl.tensor  # causal: query m of tile lo sees key n of this tile where n + edge_n <= m
    first: gl.tensor  # of all iterations, query tiles times heads: the first of this part
    count: gl.tensor  # and how many it has
    slot: gl.tensor  # where dV and dK of this part go; negative for a whole tile
    final: gl.tensor  # chains: so many of its iterations, the first, complete a tile of dQ
    back: gl.tensor  # chains: the query tiles without a mask, last one first

    @gluon.constexpr_function
    def __init__(
        self, b, h, h_kv, start_n, lo, masked, tiles, heads, edge_n, first, count, slot, final,
        back,
    ):  # fmt: skip
        self.b, self.h, self.h_kv, self.start_n = b, h, h_kv, start_n
        self.lo, self.masked, self.tiles = lo, masked, tiles
        self.heads, self.edge_n = heads, edge_n
        self.first, self.count, self.slot = first, count, slot
        self.final, self.back = final, back

    @gluon.jit
    def fate(self, it):
        """Of dQ of an iteration in a chain: it joins the sum, completes it, or is all of it."""
        fate = gl.to_tensor(JOINS)
        if it < self.final:
            fate = gl.to_tensor(COMPLETES)
            if self.start_n == 0:
                fate = gl.to_tensor(ALONE)
        return fate

    @gluon.jit
    def locate(self, it):
        """Iteration -> query head and query tile: masked tiles of all heads, then full ones."""
        it += self.first
        edge = self.masked * self.heads
        if it < edge:
            h = self.h + it // self.masked
            m = self.lo + it % self.masked
        else:
            full = self.tiles - self.masked
            h = self.h + (it - edge) // full
            j = (it - edge) % full
            m = self.lo + self.masked + gl.where(self.back, full - 1 - j, j)
        return h, m


@gluon.jit
def _loader(sm, problem, next_ptr, q_desc, k_desc, v_desc, do_desc, rows_desc):
    """One warp: draws tiles from the counter and keeps the copy engine ahead of the consumers."""
    BLOCK_M: gl.constexpr = problem.BLOCK_M
    STAGES: gl.constexpr = sm.q.shape[0]
    rows = problem.UNITS * problem.HEADS * problem.TILES_M * BLOCK_M  # of LSE; then those of delta
    count = gl.to_tensor(0)  # query tiles over all key tiles: the rings never start over
    turn = gl.to_tensor(0)
    place = problem.first(gl.program_id(0))
    drawn = problem.draw(place)  # while the kernel before this one still runs
    # It must have finished: waited for here alone, since the other roles begin with what this one
    # brings.
    gdc_wait()
    gdc_launch_dependents()  # the next kernel may be set up: it finds room when CTAs end
    if problem.DETERMINISTIC:  # places in the order of arrival: before mine, all have a CTA
        place = gl.atomic_add(next_ptr, 1, sem="relaxed")
        drawn = problem.draw(place)
    while place < problem.size():
        work = problem.work(drawn)
        if work.count > 0:  # else there are more parts than iterations: nobody hears of it
            sm.send(turn, drawn)
        for it in range(work.count):
            slot = count % STAGES
            q_ready, do_ready = sm.q_ready.index(slot), sm.do_ready.index(slot)
            h, m = work.locate(it)
            coord = [work.b, h, m * BLOCK_M, 0]
            kv_coord = [work.b, work.h_kv, work.start_n, 0]
            row = ((work.b * problem.H + h) * problem.TILES_M + m) * BLOCK_M

            if it == 0:
                k_slot, k_phase = turn % STAGES, (turn // STAGES) & 1
                k_ready = sm.k_ready.index(k_slot)
                mbarrier.wait(sm.k_empty.index(k_slot), k_phase ^ 1)
                mbarrier.expect(k_ready, k_desc.block_type.nbytes)
                tma_load(k_desc, kv_coord, k_ready, sm.k.index(k_slot))
            if count >= STAGES:
                barrier_sync(EMPTY + slot, CONSUMERS_AND_LOADER)
            mbarrier.expect(q_ready, q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
            tma_load(q_desc, coord, q_ready, sm.q.index(slot))
            tma_load(rows_desc, [row], q_ready, sm.lse.index(slot))
            if it == 0:
                mbarrier.wait(sm.v_empty, (turn & 1) ^ 1)
                mbarrier.expect(sm.v_ready, v_desc.block_type.nbytes)
                tma_load(v_desc, kv_coord, sm.v_ready, sm.v.index(0))
            mbarrier.expect(do_ready, do_desc.block_type.nbytes + rows_desc.block_type.nbytes)
            tma_load(do_desc, coord, do_ready, sm.do.index(slot))
            tma_load(rows_desc, [rows + row], do_ready, sm.delta.index(slot))
            count += 1
        turn += gl.minimum(work.count, 1)
        place = problem.next(place, next_ptr)
        drawn = problem.draw(place)
    sm.send(turn, drawn)  # past the end of the list: everybody stops

    # Take the last arrivals of the consumers too: no named barrier stays half full.
    for i in range(gl.maximum(count - STAGES, 0), count):
        barrier_sync(EMPTY + i % STAGES, CONSUMERS_AND_LOADER)


@gluon.jit
def _await(asm: gl.constexpr):
    """Run an instruction that waits for stores and sums of this warp, for all of its threads."""
    gl.inline_asm_elementwise(
        asm, "=r,r,~{memory}", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )
    meet()


@gluon.jit
def _all_but_latest_done():
    """Wait until all stores and sums of this warp but the latest are in device memory."""
    _await("cp.async.bulk.wait_group 1; mov.u32 $0, $1;")


@gluon.jit
def _sums_done():
    """Wait until all of a key tile's sums are in device memory.

    It is all but the latest two, the halves of dK. What is stored, added to or fetched next comes
    after them, so that a sum has one order. Fetching it back is the copy engine's reading of what
    it has written itself; the fence is what PTX asks for between the two.
    """
    _await("cp.async.bulk.wait_group 2; fence.proxy.async; mov.u32 $0, $1;")


@gluon.jit
def _writer(sm, problem, dq_desc, grad_desc, dk_desc, dv_desc, part_desc, lock_ptr):
    """One warp: what the consumers put on their ways out, it hands to the copy engine.

    Of n query tiles a consumer hands over n + 2 things. Consumer 1: dQ of all, dV, dK; consumer 0,
    half an iteration later: dQ of all but the last, dV, dQ of the last, dK.

    Chains: with key tile 0, which meets all query tiles, dQ is stored in the CTA's own memory, with
    others added to it; with the last that a query tile sees it comes complete and rounded.
    """
    HALF: gl.constexpr = problem.BLOCK_N // 2
    ROWS: gl.constexpr = dq_desc.block_type.shape[0]
    turn = gl.to_tensor(0)
    work = sm.receive(turn, 1, problem)
    while work.count > 0:
        n = work.count
        owed = gl.to_tensor(-1)  # the lock of the latest sum, to be passed on when that is done
        if problem.CHAINED and turn > 0:  # the ways out are not given back yet
            _sums_done()
            for c in gl.static_range(1, -1, -1):
                _out_empty(sm, problem, work, 0, n, dq_desc, c)
        for it in range(n + 2):
            for c in gl.static_range(1, -1, -1):
                h, m = work.locate(gl.minimum(it, n - 1))
                part = _sum_part(problem, work, h, m, c)
                lock = gl.to_tensor(-1)
                if problem.DETERMINISTIC:  # noqa: SIM102 (this one is decided by the compiler)
                    if it != n + 1 and it != n - 1 + c:
                        lock = part
                        before = problem.before(work, m)
                        while gl.atomic_add(lock_ptr + lock, 0, sem="acquire") != before:
                            pass

                barrier_sync(OUT_FULL + c, CONSUMER_AND_WRITER)
                coord = [work.b, work.h_kv, work.start_n + c * HALF, 0]
                if it == n + 1:
                    if work.slot < 0:
                        tma_store(dk_desc, coord, sm.out_as(c, dk_desc))
                    else:
                        tma_store(part_desc, [0, work.slot, c * HALF, 0], sm.out_as(c, dk_desc))
                elif it == n - 1 + c:
                    if work.slot < 0:
                        tma_store(dv_desc, coord, sm.out_as(c, dv_desc))
                    else:
                        tma_store(part_desc, [1, work.slot, c * HALF, 0], sm.out_as(c, dk_desc))
                elif problem.CHAINED:
                    if gl.minimum(it, n - 1) < work.final:
                        row, column = m * problem.BLOCK_M, 0
                        if problem.SPLIT_ROWS:
                            row += c * (problem.BLOCK_M // 2)
                        else:
                            column += c * (problem.HEAD_DIM // 2)
                        tma_store(grad_desc, [work.b, h, row, column], sm.out_as(c, grad_desc))
                    elif work.start_n == 0:
                        tma_store(dq_desc, [part * ROWS, 0], sm.out_as(c, dq_desc))
                    else:
                        tma_reduce_add(dq_desc, [part * ROWS, 0], sm.out_as(c, dq_desc))
                else:
                    tma_reduce_add(dq_desc, [part * ROWS, 0], sm.out_as(c, dq_desc))

                if problem.DETERMINISTIC:
                    _all_but_latest_done()
                    if owed >= 0:
                        gl.atomic_add(lock_ptr + owed, 1, sem="release")
                    owed = lock
                    if c == 0 or it > 0:  # the one before this
                        mbarrier.arrive(sm.out_empty.index(1 - c), count=1)
                elif problem.CHAINED:
                    tma_store_wait(0)
                    if it < n + 1:  # else the next comes from another key tile
                        _out_empty(sm, problem, work, it + 1, n, dq_desc, c)
                else:
                    tma_store_wait(0)
                    mbarrier.arrive(sm.out_empty.index(c), count=1)
        if problem.DETERMINISTIC:
            tma_store_wait(0)  # a half of dK, which nobody waits for
            mbarrier.arrive(sm.out_empty.index(0), count=1)
        turn += 1
        work = sm.receive(turn, 1, problem)


@gluon.jit
def _sum_part(problem, work, h, m, c: gl.constexpr):
    """Which half of a query tile's sum this is, in the order of their places in memory."""
    if problem.CHAINED:  # a place for each CTA
        head = gl.program_id(0) * problem.HEADS + h - work.h
    else:
        head = work.b * problem.H + h
    return (head * problem.TILES_M + m) * 2 + c


@gluon.jit
def _out_empty(sm, problem, work, it, n, dq_desc, c: gl.constexpr):
    """Chains: give a way out back, with the sum that its next content completes, if it does.

    `it` counts what is handed over as in _writer. The sum's arrival is the barrier's, so that the
    consumer finds the way out empty, or filled with what it has to add.
    """
    ROWS: gl.constexpr = dq_desc.block_type.shape[0]
    at = gl.minimum(it, n - 1)
    if it != n + 1 and it != n - 1 + c and work.fate(at) == COMPLETES:
        h, m = work.locate(at)
        mbarrier.expect(sm.out_empty.index(c), dq_desc.block_type.nbytes)
        row = _sum_part(problem, work, h, m, c) * ROWS
        tma_load(dq_desc, [row, 0], sm.out_empty.index(c), sm.out_as(c, dq_desc))
    else:
        mbarrier.arrive(sm.out_empty.index(c), count=1)


@gluon.jit
def _hand_over(tile, sm, desc, count, WG: gl.constexpr):
    """Put a half of dV or dK before the writer.

    `count` numbers what a consumer hands over, modulo 2: n query tiles make n + 2 things, so that
    the number of query tiles before does for the first.
    """
    mbarrier.wait(sm.out_empty.index(WG), (count & 1) ^ 1)
    # count >> 30 is 0: without it the addresses would be kept in registers from tile to tile
    sm.out_as(WG + (count >> 30), desc).reshape(tile.shape).store(tile.to(desc.dtype))
    fence_async_shared()  # stores of threads before reads of the copy engine
    barrier_arrive(OUT_FULL + WG, CONSUMER_AND_WRITER)


@gluon.jit
def _hand_over_dk(dk, sm, dk_desc, qk_scale, base, WG: gl.constexpr):
    """A half of dK, the last thing of a key tile; `base` query tiles were before its end."""
    _hand_over(dk * (qk_scale * LN_2), sm, dk_desc, base + 1, WG)


@gluon.jit
def _put_dq(
    dq, fate, sm, problem, dq_desc, grad_desc, qk_scale, count, WG: gl.constexpr,
):  # fmt: skip
    """Put a part of dQ on the way out, in the order in which the registers hold it.

    In a chain, by its fate: so, or complete and in the tile's own order.
    """
    # row = (warp, i, quad) and column = (j, lane, e) of the accumulator layout: a thread owns all
    # (i, j, e) of its (warp, quad, lane). In the order (j, warp, quad, lane, i, e) it owns groups
    # of four: stores of 16 bytes, without the two-way bank conflicts of rows and columns. Moves
    # nothing between threads; _finish_kernel puts rows and columns back.
    J: gl.constexpr = dq.shape[1] // 8
    ordered = dq.reshape([4, 2, 8, J, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([2 * J, 256])
    mbarrier.wait(sm.out_empty.index(WG), (count & 1) ^ 1)
    which = WG + (count >> 30)  # as above
    if problem.CHAINED:
        if fate == JOINS:
            sm.out_as(which, dq_desc).store(ordered)
        else:
            if fate == COMPLETES:  # the sum of the others has come with the empty way out
                rest = sm.out_as(which, dq_desc).load(ordered.type.layout)
                rest = rest.reshape([J, 4, 8, 4, 2, 2]).permute((1, 4, 2, 0, 3, 5))
                dq += gl.convert_layout(rest.reshape(dq.shape), dq.type.layout)
            meet()  # all four warps have read it
            dq = dq * (qk_scale * LN_2)
            sm.out_as(which, grad_desc).reshape(dq.shape).store(dq.to(grad_desc.dtype))
    else:
        sm.out_as(which, dq_desc).store(ordered)


@gluon.jit
def _hand_over_dq(
    dq, fate, sm, problem, dq_desc, grad_desc, qk_scale, count, WG: gl.constexpr,
):  # fmt: skip
    """Put a part of dQ before the writer."""
    _put_dq(dq, fate, sm, problem, dq_desc, grad_desc, qk_scale, count, WG)
    fence_async_shared()
    barrier_arrive(OUT_FULL + WG, CONSUMER_AND_WRITER)


@gluon.jit
def _dq_part(sm, buffer, k, problem, WG: gl.constexpr):
    """Issue consumer WG's part of dQ = dS K (line 15), by rows or by columns."""
    BLOCK_M: gl.constexpr = problem.BLOCK_M
    HEAD_DIM: gl.constexpr = problem.HEAD_DIM
    ds = sm.ds.index(buffer)  # [BLOCK_N, BLOCK_M]
    if problem.SPLIT_ROWS:
        ROWS: gl.constexpr = BLOCK_M // 2
        COLUMNS: gl.constexpr = HEAD_DIM
        ds = ds.slice(WG * ROWS, ROWS, dim=1)
    else:
        ROWS: gl.constexpr = BLOCK_M
        COLUMNS: gl.constexpr = HEAD_DIM // 2
        k = k.slice(WG * COLUMNS, COLUMNS, dim=1)
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    zero = gl.zeros([ROWS, COLUMNS], gl.float32, layout)
    return warpgroup_mma(ds.permute((1, 0)), k, zero, use_acc=False, is_async=True)


@gluon.jit
def _pack(x, dtype: gl.constexpr):
    """fp32 [M, N] -> half precision, two numbers in an int32 [M, N // 2]."""
    low, high = gl.split(x.reshape([x.shape[0], x.shape[1] // 2, 2]))
    name: gl.constexpr = "f16x2" if dtype == gl.float16 else "bf16x2"
    asm: gl.constexpr = "cvt.rn." + name + ".f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(
        asm, "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _unpack(x, dtype: gl.constexpr, layout: gl.constexpr):
    """What _pack has packed, [M, N] in half precision: the same registers by another name."""
    low = x.to(gl.int16).to(dtype, bitcast=True)
    high = (x >> 16).to(gl.int16).to(dtype, bitcast=True)
    x = gl.join(low, high).reshape([x.shape[0], 2 * x.shape[1]])
    return gl.convert_layout(x, layout, assert_trivial=True)


@gluon.jit
def _operand(x, sm, problem):
    """P or dS, as _elementwise has left it, as the register operand of a product."""
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, problem.HEAD_DIM, 16])
    if problem.APART:
        x = _unpack(x, sm.q.dtype, gl.DotOperandLayout(0, acc_layout, 2))
    return x


@gluon.jit
def _elementwise(
    s, dp, sm, problem, work, it, slot, buffer, qk_scale, WG: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """From S and dP in flight to P and dS, as operands in half precision; dS to shared memory.

    MASK: no query tile needs one, ALL do, or SOME, which it looks up.

    Where two loops follow one another they pass P and dS on packed: LLVM would otherwise take the
    pairs apart and put them together again in every turn, 64 instructions of 450.
    """
    BLOCK_M: gl.constexpr = problem.BLOCK_M
    HALF: gl.constexpr = problem.BLOCK_N // 2
    dtype: gl.constexpr = sm.q.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, problem.HEAD_DIM, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    meet()  # this buffer of dS, read two turns ago, will be written
    s = warpgroup_mma_wait(1, [s])  # [HALF, BLOCK_M], line 10
    lse = sm.lse.index(slot).load(gl.SliceLayout(0, s_layout))
    s = s * qk_scale - gl.expand_dims(lse, 0)
    if MASK != NONE:
        if MASK == ALL or it < work.masked * work.heads:
            if problem.CHAINED:  # BLOCK_M divides BLOCK_N and OFFSET is 0: a power of two
                edge_n = work.edge_n - (it & (work.masked - 1)) * BLOCK_M
            else:
                edge_n = work.edge_n - it % work.masked * BLOCK_M
            offs_n = WG * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, s_layout))
            # A thread's columns agree in two bits, which are its own; the others are constants of
            # the code if they stand alone on one side. Sums would be kept in registers for good.
            offs_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, s_layout))
            own = gl.expand_dims(offs_n + edge_n, 1) - gl.expand_dims(offs_m & 6, 0)
            visible = own <= gl.expand_dims(offs_m & (BLOCK_M - 1 - 6), 0)
            s = gl.where(visible, s, float("-inf"))
    elif problem.RAGGED and not problem.CAUSAL:
        # Keys past the end are zeros. Their rows of dV and dK are not stored, and in dQ they meet
        # the zeros of K: P = exp(-LSE) does no harm there if only it is finite.
        s = gl.minimum(s, 1.0)
    p = gl.exp2(s)  # line 11
    if problem.APART:  # noqa: SIM108
        p_half = _pack(p, dtype)
    else:
        p_half = gl.convert_layout(p.to(dtype), a_layout)

    if MASK == ALL:  # delta late, or ptxas spills (D = 64)
        dp = warpgroup_mma_wait(0, [dp])
        meet()
    delta = sm.delta.index(slot).load(gl.SliceLayout(0, s_layout))
    dp = warpgroup_mma_wait(0, [dp])  # [HALF, BLOCK_M], line 13
    ds = p * (dp - gl.expand_dims(delta, 0))  # line 14
    ds_half = sm.ds.index(buffer).slice(WG * HALF, HALF, dim=0)
    if problem.APART:
        ds = _pack(ds, dtype)
        ds_half.store(_unpack(ds, dtype, s_layout))
    else:
        ds = ds.to(dtype)
        ds_half.store(ds)
        ds = gl.convert_layout(ds, a_layout)
    fence_async_shared()  # stores of threads before reads of the tensor cores
    return p_half, ds


@gluon.jit
def _tiles(
    WG: gl.constexpr, sm, problem, dq_desc, grad_desc, work, k_slot, dk, dv, p, ds, first, end,
    base, qk_scale, MASK: gl.constexpr,
):  # fmt: skip
    """Consumer WG's turns: gradients of a query tile, scores of the next, `first` to `end`."""
    BLOCK_M: gl.constexpr = problem.BLOCK_M
    BLOCK_N: gl.constexpr = problem.BLOCK_N
    HEAD_DIM: gl.constexpr = problem.HEAD_DIM
    STAGES: gl.constexpr = sm.q.shape[0]
    HALF: gl.constexpr = BLOCK_N // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])

    s_zero = gl.zeros([HALF, BLOCK_M], gl.float32, s_layout)
    for it in range(first, end):
        count = base + it
        slot, before = count % STAGES, (count - 1) % STAGES
        phase = (count // STAGES) & 1
        # Plus 0 in a form that the compiler cannot see through: it would otherwise keep a matrix
        # descriptor for each slice of K and V in registers over the loop, and spill.
        k = sm.k.index(k_slot + (it >> 30)).reshape([BLOCK_N, HEAD_DIM])
        v = sm.v.index(it >> 30).reshape([BLOCK_N, HEAD_DIM])
        q = sm.q.index(slot).reshape([BLOCK_M, HEAD_DIM])
        q_before = sm.q.index(before).reshape([BLOCK_M, HEAD_DIM])
        do = sm.do.index(slot).reshape([BLOCK_M, HEAD_DIM])
        do_before = sm.do.index(before).reshape([BLOCK_M, HEAD_DIM])

        # What a turn may rely on: the other's last turn is over but for its last product. So both
        # halves of the dS that dQ reads are written. And the other has waited for its dQ then: the
        # buffer of dS that is written after this turn is read by nobody any more.
        barrier_sync(TURN + WG, CONSUMERS)
        # dQ(it - 2) or dQ(it - 1). At it = 1 consumer 0 has none to compute, and drops what it
        # gets: with a branch around a product ptxas would serialise them all.
        dq = _dq_part(sm, (count + WG) & 1, k, problem, WG)
        p, ds = _operand(p, sm, problem), _operand(ds, sm, problem)
        dv_acc = warpgroup_mma(p, do_before, dv, is_async=True)
        if problem.DS_REGISTERS:
            dk_acc = warpgroup_mma(ds, q_before, dk, is_async=True)
        else:
            ds_half = sm.ds.index(before).slice(WG * HALF, HALF, dim=0)
            dk_acc = warpgroup_mma(ds_half, q_before, dk, is_async=True)
        dq = warpgroup_mma_wait(2, [dq])
        if WG == 0:
            if it >= 2:
                fate = work.fate(it - 2)
                _put_dq(dq, fate, sm, problem, dq_desc, grad_desc, qk_scale, count, WG)
        else:
            fate = work.fate(it - 1)
            _put_dq(dq, fate, sm, problem, dq_desc, grad_desc, qk_scale, count - 1, WG)

        mbarrier.wait(sm.q_ready.index(slot), phase)
        if problem.DS_REGISTERS:  # registers: P must be gone before S comes
            dv, p = warpgroup_mma_wait(1, [dv_acc, p])  # [HALF, HEAD_DIM], line 12
        k_half = k.slice(WG * HALF, HALF, dim=0)
        s = warpgroup_mma(k_half, q.permute((1, 0)), s_zero, use_acc=False, is_async=True)
        if problem.DS_REGISTERS:
            dk, ds = warpgroup_mma_wait(1, [dk_acc, ds])  # [HALF, HEAD_DIM], line 16
        else:
            dv, dk, p = warpgroup_mma_wait(1, [dv_acc, dk_acc, p])
        barrier_arrive(EMPTY + before, CONSUMERS_AND_LOADER)
        # The sum of dQ sets off here: behind the loads that have just been let go, and early. The
        # fence takes long, and S is being computed meanwhile.
        fence_async_shared()  # stores of threads before reads of the copy engine
        if WG == 0:
            if it >= 2:
                barrier_arrive(OUT_FULL + WG, CONSUMER_AND_WRITER)
        else:
            barrier_arrive(OUT_FULL + WG, CONSUMER_AND_WRITER)
        mbarrier.wait(sm.do_ready.index(slot), phase)
        v_half = v.slice(WG * HALF, HALF, dim=0)
        dp = warpgroup_mma(v_half, do.permute((1, 0)), s_zero, use_acc=False, is_async=True)
        barrier_arrive(TURN + (1 - WG), CONSUMERS)

        at = work.first + it
        p, ds = _elementwise(s, dp, sm, problem, work, at, slot, count & 1, qk_scale, WG, MASK)
        meet()  # before the turn rather than in it: the tensor cores read dS
    return dk, dv, p, ds


@gluon.jit
def _consumer(WG: gl.constexpr, sm, problem, dq_desc, grad_desc, dk_desc, qk_scale):
    """Four warps: keys WG * BLOCK_N / 2 and up of every tile that the CTA draws."""
    BLOCK_M: gl.constexpr = problem.BLOCK_M
    BLOCK_N: gl.constexpr = problem.BLOCK_N
    HEAD_DIM: gl.constexpr = problem.HEAD_DIM
    STAGES: gl.constexpr = sm.q.shape[0]
    HALF: gl.constexpr = BLOCK_N // 2
    DQ_M: gl.constexpr = BLOCK_M // 2 if problem.SPLIT_ROWS else BLOCK_M
    DQ_D: gl.constexpr = HEAD_DIM if problem.SPLIT_ROWS else HEAD_DIM // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_D, 16])

    s_zero = gl.zeros([HALF, BLOCK_M], gl.float32, s_layout)
    dk = gl.zeros([HALF, HEAD_DIM], gl.float32, acc_layout)
    dq = gl.zeros([DQ_M, DQ_D], gl.float32, dq_layout)
    base = gl.to_tensor(0)  # query tiles of the key tiles before this one
    turn = gl.to_tensor(0)
    work = sm.receive(turn, 4, problem)
    if work.count > 0:  # consumer 1 gives the first turn away
        if WG == 0:
            barrier_sync(TURN + WG, CONSUMERS)
        else:
            barrier_arrive(TURN + (1 - WG), CONSUMERS)
    while work.count > 0:
        total = work.count
        slot, phase = base % STAGES, (base // STAGES) & 1
        k_slot, k_phase = turn % STAGES, (turn // STAGES) & 1
        k = sm.k.index(k_slot).reshape([BLOCK_N, HEAD_DIM])
        v = sm.v.index(turn >> 30).reshape([BLOCK_N, HEAD_DIM])
        q = sm.q.index(slot).reshape([BLOCK_M, HEAD_DIM])
        do = sm.do.index(slot).reshape([BLOCK_M, HEAD_DIM])
        k_half = k.slice(WG * HALF, HALF, dim=0)
        v_half = v.slice(WG * HALF, HALF, dim=0)

        # the first query tile: scores, no gradients yet
        if WG == 1:  # consumer 0 has kept the turn of its last dQ
            barrier_sync(TURN + WG, CONSUMERS)
        mbarrier.wait(sm.k_ready.index(k_slot), k_phase)
        mbarrier.wait(sm.q_ready.index(slot), phase)
        s = warpgroup_mma(k_half, q.permute((1, 0)), s_zero, use_acc=False, is_async=True)
        mbarrier.wait(sm.v_ready, turn & 1)
        mbarrier.wait(sm.do_ready.index(slot), phase)
        dp = warpgroup_mma(v_half, do.permute((1, 0)), s_zero, use_acc=False, is_async=True)
        barrier_arrive(TURN + (1 - WG), CONSUMERS)
        s, dp = warpgroup_mma_wait(0, [s, dp])
        # the last dQ of the tile before; that of a chain has gone at its end
        if WG == 0 and base > 0 and (not problem.CHAINED or work.start_n > 0):
            _hand_over_dq(dq, JOINS, sm, problem, dq_desc, grad_desc, qk_scale, base, WG)
        if problem.CHAINED and base > 0:  # at once: the sums of the next tile wait for it
            _hand_over_dk(dk, sm, dk_desc, qk_scale, base, WG)
        at = work.first + (turn >> 30)
        p, ds = _elementwise(
            s, dp, sm, problem, work, at, slot, base & 1, qk_scale, WG,
            SOME if problem.CAUSAL else NONE,
        )  # fmt: skip
        if not problem.CHAINED and base > 0:  # behind the exponentials, which need not wait for it
            _hand_over_dk(dk, sm, dk_desc, qk_scale, base, WG)
        meet()

        dv = gl.zeros([HALF, HEAD_DIM], gl.float32, acc_layout)
        dk = gl.zeros([HALF, HEAD_DIM], gl.float32, acc_layout)
        edge = gl.to_tensor(1)
        if problem.APART:
            edge = gl.minimum(gl.maximum(work.masked * work.heads - work.first, 1), total)
            dk, dv, p, ds = _tiles(
                WG, sm, problem, dq_desc, grad_desc, work, k_slot, dk, dv, p, ds, 1, edge,
                base, qk_scale, ALL,
            )  # fmt: skip
        dk, dv, p, ds = _tiles(
            WG, sm, problem, dq_desc, grad_desc, work, k_slot, dk, dv, p, ds, edge, total,
            base, qk_scale, SOME if problem.CAUSAL and not problem.APART else NONE,
        )  # fmt: skip
        base += total

        # the last query tile: its gradients
        mbarrier.arrive(sm.v_empty, count=1)
        last = (base - 1) % STAGES
        q = sm.q.index(last).reshape([BLOCK_M, HEAD_DIM])
        do = sm.do.index(last).reshape([BLOCK_M, HEAD_DIM])
        barrier_sync(TURN + WG, CONSUMERS)
        dq = _dq_part(sm, (base + WG) & 1, k, problem, WG)
        p, ds = _operand(p, sm, problem), _operand(ds, sm, problem)
        dv_acc = warpgroup_mma(p, do, dv, is_async=True)
        if problem.DS_REGISTERS:
            dk_acc = warpgroup_mma(ds, q, dk, is_async=True)
        else:
            ds_half = sm.ds.index((base - 1) & 1).slice(WG * HALF, HALF, dim=0)
            dk_acc = warpgroup_mma(ds_half, q, dk, is_async=True)
        dq = warpgroup_mma_wait(2, [dq])
        if WG == 0:
            if total >= 2:
                fate = work.fate(total - 2)
                _hand_over_dq(dq, fate, sm, problem, dq_desc, grad_desc, qk_scale, base, WG)
        else:
            mbarrier.arrive(sm.k_empty.index(k_slot), count=1)
            fate = work.fate(total - 1)
            _hand_over_dq(dq, fate, sm, problem, dq_desc, grad_desc, qk_scale, base - 1, WG)
        barrier_arrive(TURN + (1 - WG), CONSUMERS)
        if problem.DS_REGISTERS:
            dv, dk, p, ds = warpgroup_mma_wait(0, [dv_acc, dk_acc, p, ds])
        else:
            dv, dk, p = warpgroup_mma_wait(0, [dv_acc, dk_acc, p])
        barrier_arrive(EMPTY + last, CONSUMERS_AND_LOADER)
        _hand_over(dv, sm, dk_desc, base - 1 + WG, WG)
        if WG == 0:  # its last dQ; the turn is kept for the scores of the next tile
            barrier_sync(TURN + WG, CONSUMERS)
            dq = _dq_part(sm, (base - 1) & 1, k, problem, WG)
            dq = warpgroup_mma_wait(0, [dq])
            mbarrier.arrive(sm.k_empty.index(k_slot), count=1)
            if problem.CHAINED and work.final >= total:  # later, registers would be short for a sum
                fate = work.fate(total - 1)
                _hand_over_dq(dq, fate, sm, problem, dq_desc, grad_desc, qk_scale, base, WG)
        turn += 1
        work = sm.receive(turn, 4, problem)
        if problem.CHAINED and work.count == 0:  # after the loop, ptxas would spill
            _hand_over_dk(dk, sm, dk_desc, qk_scale, base, WG)
    if not problem.CHAINED and base > 0:
        if WG == 0:
            _hand_over_dq(dq, JOINS, sm, problem, dq_desc, grad_desc, qk_scale, base, WG)
        _hand_over_dk(dk, sm, dk_desc, qk_scale, base, WG)


SIZES = ("H", "HEADS", "OFFSET", "TILES_M", "TILES_N", "UNITS", "SECTION", "WHOLE", "PARTS")


@gluon.jit(do_not_specialize=SIZES)
def _backward_kernel(
    q_desc, k_desc, v_desc, do_desc, rows_desc, dq_desc, grad_desc, dk_desc, dv_desc, part_desc,
    lock_ptr, next_ptr, qk_scale, H, HEADS, OFFSET, TILES_M, TILES_N, UNITS, SECTION, WHOLE, PARTS,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr,
    SPLIT_ROWS: gl.constexpr, DS_REGISTERS: gl.constexpr, STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, RAGGED: gl.constexpr, DETERMINISTIC: gl.constexpr, CHAINED: gl.constexpr,
    APART: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    out_layout: gl.constexpr = gl.NVMMASharedLayout(0, 32, rank=2)
    mail_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    OUT: gl.constexpr = BLOCK_M * HEAD_DIM // 2  # 4-byte elements of a consumer's dQ
    sm = Shared(
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, HEAD_DIM], q_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, HEAD_DIM], do_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], rows_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], rows_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout),
        gl.allocate_shared_memory(dtype, [1, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout),
        gl.allocate_shared_memory(dtype, [2, BLOCK_N, BLOCK_M], ds_layout),
        gl.allocate_shared_memory(gl.float32, [2, OUT // 256, 256], out_layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
        gl.allocate_shared_memory(gl.int32, [2 * MAIL, 1], mail_layout),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(sm.q_ready.index(i), count=1)
        mbarrier.init(sm.do_ready.index(i), count=1)
        mbarrier.init(sm.k_ready.index(i), count=1)
        mbarrier.init(sm.k_empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(sm.out_empty.index(i), count=1)
        mbarrier.init(sm.mail_ready.index(i), count=1)
        mbarrier.init(sm.mail_empty.index(i), count=3)  # two consumers and the writer
    mbarrier.init(sm.v_ready, count=1)
    mbarrier.init(sm.v_empty, count=2)

    problem = Problem(
        H, HEADS, OFFSET, TILES_M, TILES_N, UNITS, SECTION, WHOLE, PARTS, BLOCK_M, BLOCK_N,
        HEAD_DIM, SPLIT_ROWS, DS_REGISTERS, CAUSAL, RAGGED, DETERMINISTIC, CHAINED, APART,
    )  # fmt: skip
    # 12 warps of 168 registers are launched; the last four (loader, writer, two idle) give up all
    # but 24, and both consumers get 240. Consumer 0 runs on the kernel's own warps.
    gl.warp_specialize(
        [
            (_consumer, (0, sm, problem, dq_desc, grad_desc, dk_desc, qk_scale)),
            (_consumer, (1, sm, problem, dq_desc, grad_desc, dk_desc, qk_scale)),
            (_loader, (sm, problem, next_ptr, q_desc, k_desc, v_desc, do_desc, rows_desc)),
            (_writer, (sm, problem, dq_desc, grad_desc, dk_desc, dv_desc, part_desc, lock_ptr)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


@triton.jit(do_not_specialize=["BH"])
def _prepare_kernel(
    o_ptr, do_ptr, lse_ptr, rows_ptr, dq_acc_ptr, next_ptr,
    stride_ob, stride_oh, stride_om, stride_dob, stride_doh, stride_dom,
    stride_lb, stride_lh, stride_lm,
    H, N_Q, N_PAD, BH,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, CLEAR: tl.constexpr,
):  # fmt: skip
    """LSE in base 2 and delta = rowsum(o ∘ do) (line 4), padded to whole tiles; zeros for dQ.

    Bound by device memory: 2 + 2 bytes read and 4 written an element of O; chains need no zeros.
    """
    gdc_launch_dependents()
    tiles = tl.cdiv(N_PAD, ROWS)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # last what the next kernel takes first: in L2
    pid_m, pid_bh = pid % tiles, pid // tiles
    b, h = (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64)
    offs_m = pid_m * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, HEAD_DIM)
    real = offs_m < N_Q
    mask = real[:, None] & (offs_d < D)[None, :]

    at = offs_m[:, None].to(tl.int64) * stride_om + offs_d[None, :]
    o = tl.load(o_ptr + b * stride_ob + h * stride_oh + at, mask, 0.0)  # [ROWS, HEAD_DIM]
    at = offs_m[:, None].to(tl.int64) * stride_dom + offs_d[None, :]
    do = tl.load(do_ptr + b * stride_dob + h * stride_doh + at, mask, 0.0)  # [ROWS, HEAD_DIM]
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)

    # A row that sees no key, or does not exist, has LSE -inf; with +inf its P is exp2(-inf) = 0.
    lse = tl.load(lse_ptr + b * stride_lb + h * stride_lh + offs_m * stride_lm, real, -float("inf"))
    lse_log2 = tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)

    if pid == 0:
        tl.store(next_ptr, 0)  # the next kernel counts its tiles there
    row = (b * H + h) * N_PAD + offs_m
    inside = offs_m < N_PAD
    tl.store(rows_ptr + row, lse_log2, inside)
    tl.store(rows_ptr + BH.to(tl.int64) * N_PAD + row, delta, inside)
    if CLEAR:
        zero = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        tl.store(dq_acc_ptr + row[:, None] * HEAD_DIM + offs_d[None, :], zero, inside[:, None])


@triton.jit
def _sum_parts(
    i, part_ptr, dk_ptr, dv_ptr, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    HEADS, H_KV, N_K, OFFSET, TILES_M, TILES_N, UNITS, SECTION, WHOLE, PARTS, SUMS,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """dK or dV of some keys from the parts in which they were computed, in fp32."""
    ROWS: tl.constexpr = SUM_BLOCK // HEAD_DIM
    PIECES: tl.constexpr = BLOCK_N // ROWS
    which, i = i % 2, i // 2  # dK or dV
    piece, i = i % PIECES, i // PIECES
    unit, n = listed_in_triton(WHOLE + i, UNITS, SECTION, TILES_N)
    if CAUSAL and DETERMINISTIC:
        n = TILES_N - 1 - n
    b, h = (unit // H_KV).to(tl.int64), (unit % H_KV).to(tl.int64)
    rows = piece * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, HEAD_DIM)
    total = TILES_M * HEADS  # see Problem.iterations
    if CAUSAL:
        total -= tl.maximum(n * BLOCK_N - OFFSET, 0) // BLOCK_M * HEADS
    parts = tl.minimum(PARTS, total)

    slots = SUMS // (2 * PIECES) * PARTS
    slot = (which * slots + i * PARTS).to(tl.int64)
    part_ptr += slot * (BLOCK_N * HEAD_DIM) + rows[:, None] * HEAD_DIM + offs_d[None, :]
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for first in range(0, parts, 4):
        for j in tl.static_range(4):  # so many loads at a time, not one after the other
            part = first + j
            x = tl.load(part_ptr + part * (BLOCK_N * HEAD_DIM), part < parts, 0.0)
            acc += x.to(tl.float32)

    offs_n = n * BLOCK_N + rows
    mask = (offs_n < N_K)[:, None] & (offs_d < D)[None, :]
    offs_n = offs_n[:, None].to(tl.int64)
    if which == 0:
        at = b * stride_kb + h * stride_kh + offs_n * stride_kn + offs_d[None, :]
        tl.store(dk_ptr + at, acc.to(dk_ptr.dtype.element_ty), mask)
    else:
        at = b * stride_vb + h * stride_vh + offs_n * stride_vn + offs_d[None, :]
        tl.store(dv_ptr + at, acc.to(dv_ptr.dtype.element_ty), mask)


FINISH_SIZES = (
    "HEADS", "H_KV", "N_K", "OFFSET", "TILES_N", "UNITS", "SECTION", "WHOLE", "PARTS", "SUMS",
)  # fmt: skip


@triton.jit(do_not_specialize=FINISH_SIZES)
def _finish_kernel(
    dq_acc_ptr, dq_ptr, part_ptr, dk_ptr, dv_ptr, stride_qb, stride_qh, stride_qm,
    stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn, scale, H, N_Q, N_PAD,
    HEADS, H_KV, N_K, OFFSET, TILES_N, UNITS, SECTION, WHOLE, PARTS, SUMS,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    SPLIT_ROWS: tl.constexpr, CAUSAL: tl.constexpr, DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """dq = scale · accumulator, rows and columns put back, rounded: 4 bytes read, 2 written.

    The first SUMS programs add up dK and dV of the key tiles that were shared out; after chains
    there are no others.
    """
    tiles = N_PAD // BLOCK_M
    gdc_wait()
    if tl.program_id(0) < SUMS:
        _sum_parts(
            tl.program_id(0), part_ptr, dk_ptr, dv_ptr,
            stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
            HEADS, H_KV, N_K, OFFSET, tiles, TILES_N, UNITS, SECTION, WHOLE, PARTS, SUMS,
            D, BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, DETERMINISTIC,
        )  # fmt: skip
    else:
        pid = tl.num_programs(0) - 1 - tl.program_id(0)  # first what was summed last: still in L2
        pid_m, pid_bh = pid % tiles, pid // tiles
        b, h = (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64)
        start_m = pid_m * BLOCK_M
        tile = ((b * H + h) * N_PAD + start_m) * HEAD_DIM
        dq = tl.load(dq_acc_ptr + tile + tl.arange(0, BLOCK_M * HEAD_DIM)) * scale

        # (part, j, warp, quad, lane, i, e), see _put_dq -> (warp, i, quad) x (j, lane, e), with the
        # part before either the rows or the columns
        dq = dq.to(dq_ptr.dtype.element_ty).reshape([2, BLOCK_M * HEAD_DIM // 1024, 4, 8, 4, 2, 2])
        if SPLIT_ROWS:  # noqa: SIM108
            dq = dq.permute((0, 2, 5, 3, 1, 4, 6))
        else:
            dq = dq.permute((2, 5, 3, 0, 1, 4, 6))
        dq = dq.reshape([BLOCK_M, HEAD_DIM])

        offs_m = start_m + tl.arange(0, BLOCK_M)
        offs_d = tl.arange(0, HEAD_DIM)
        mask = (offs_m < N_Q)[:, None] & (offs_d < D)[None, :]
        at = offs_m[:, None].to(tl.int64) * stride_qm + offs_d[None, :]
        tl.store(dq_ptr + b * stride_qb + h * stride_qh + at, dq, mask)


def _tma_ready(t):
    """`t`, or a copy that the copy engine can address: 16-byte base and strides, rows apart."""
    b, h, n, d = t.stride()
    if d == 1 and b and h and n and not (t.data_ptr() | (b | h | n) << 1) & 15:  # two bytes each
        return t
    step = 16 // t.element_size()
    strides = [s for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1]
    aligned = all(s > 0 and s % step == 0 for s in strides) and t.data_ptr() % 16 == 0
    if aligned and t.stride(-1) == 1:
        return t
    padded = t.new_zeros(*t.shape[:-1], -(-t.shape[-1] // step) * step)
    padded[..., : t.shape[-1]] = t
    return padded


def _describe(t, rows, columns):
    """TMA descriptor of a half-precision (B, H, N, D) tensor in tiles [1, 1, rows, columns]."""
    strides = b, h, n, _ = t.stride()
    if (b | h | n) & 7 or not (b and h and n):
        # a dimension of size 1 may carry any stride; the descriptor wants a multiple of 16 bytes
        sizes = zip(strides[:-1], t.shape[:-1], strict=True)
        strides = [s if n > 1 else 8 * columns for s, n in sizes] + [1]
    return _gluon.descriptor(t, t.shape, strides, [1, 1, rows, columns])


def backward(do, q, k, v, o, lse, causal, scale, allow_tf32, deterministic=False):
    """Gradients of q, k and v from that of o; o and lse (natural, fp32) as the forward gave them.

    do, q and o (B, H, N_Q, D), k and v (B, H_KV, N_K, D), fp16 or bf16, D at most 128; lse
    (B, H, N_Q). Any strides; where those of q, k, v, do are not multiples of 16 bytes, at a copy.
    With `deterministic`, and in chains, dq is bitwise repeatable, as dk and dv always are.
    allow_tf32 changes nothing in half precision.

    Raises ValueError for other dtypes and larger head dims.
    """
    if (D := q.shape[3]) > MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim of at most {MAX_HEAD_DIM}, got {D}")
    return launch(_backward_kernel, _config(D), do, q, k, v, o, lse, causal, scale, deterministic)


def _shares(tiles, longest, programs, causal):
    """How the key tiles are shared out: so many of the list whole, the others in so many parts.

    longest: query tiles, times heads, that a key tile meets at most.
    """
    if tiles <= programs:  # one each, and some do nothing
        parts = programs // tiles
        if causal and longest // parts >= 16:  # twice the average: smaller ones even that out
            parts *= 2
        parts = min(parts, longest // 2)
        return (0, parts) if parts > 1 else (tiles, 1)
    if causal:  # tiles of all lengths, the short ones last
        few = 2 * tiles <= 3 * programs and longest >= 16
        return (0, 2) if few else (tiles, 1)
    rest = tiles % programs  # of the last round, which the others would wait for
    parts = min(8, longest // 4)
    few = 0 < 4 * rest <= 3 * programs and parts > 1
    return (tiles - rest, parts) if few else (tiles, 1)


def _chains(units, tiles_n, size, programs, causal):
    """Whether a CTA shall take all key tiles of a unit, one after the other.

    size: bytes of Q, dO and sums of a unit. What it brings: see `Short sequences` above.
    """
    if tiles_n == 1:
        return True
    short = tiles_n <= (4 if causal else 2)
    near = programs * size <= (CHAIN_BYTES if causal else CHAIN_BYTES // 2)  # in L2, or nearly
    even = 10 * units >= 9 * -(-units // programs) * programs  # nobody waits for long at the end
    return short and near and even


def launch(kernel, c, do, q, k, v, o, lse, causal, scale, deterministic):
    """`backward` with a kernel of this step, here or in v7_wide_heads, and its configuration."""
    B, H, N_Q, D = q.shape
    H_KV, N_K = k.shape[1:3]
    if q.dtype not in _host.HALF_DTYPES:
        names = [*map(str, _host.HALF_DTYPES)]
        raise ValueError(f"q: expected a dtype among {names}, got {q.dtype}")
    if q.numel() == 0 or k.numel() == 0:
        return tuple(_host.empty_like(t).zero_() for t in (q, k, v))

    tiles_m, tiles_n = -(-N_Q // c.block_m), -(-N_K // c.block_n)
    programs = _gluon.multiprocessors(q.device)
    units, heads = B * H_KV, H // H_KV  # a unit is a key head with its query heads
    tiles = units * tiles_n
    whole, parts = _shares(tiles, tiles_m * heads, programs, causal)
    size = heads * N_Q * c.head_dim * 8  # Q, dO and sums of dQ: 2, 2 and 4 bytes an element
    section = _gluon.section(units, L2_BYTES // size) if causal else 1
    chained = c.chains and D % 8 == 0 and (N_Q == N_K or not causal)
    chained = chained and _chains(units, tiles_n, size, programs, causal)
    if chained:
        section = 1
        if tiles_n > 1:
            whole, parts = tiles, 1
        deterministic = False  # there is one order anyway
    if D % 8:  # the copy engine cannot write these rows: the last kernel does
        whole = 0
    n_pad = tiles_m * c.block_m
    apart = c.apart and TWO_LOOPS and causal and not chained and tiles_m * heads > 16

    dq, dk, dv = (_host.empty_like(t) for t in (q, k, v))
    split = dk
    if whole < tiles:
        split = q.new_empty(2, (tiles - whole) * parts, c.block_n, c.head_dim)
    places = whole + (tiles - whole) * parts
    grid = min(places // tiles_n if chained else places, programs)
    summed = B * H  # heads that have memory for the sums of dQ
    if chained:
        summed = grid * heads if tiles_n > 1 else 1  # each CTA its own, where there are sums
    dq_acc = torch.empty(summed * n_pad * c.head_dim // 256, 256, device=q.device)
    rows = torch.empty(2 * B * H * n_pad, device=q.device)  # LSE in base 2, and delta
    counter = torch.empty(1, device=q.device, dtype=torch.int32)
    locks = counter
    if deterministic:  # one for each half of a query tile
        locks = torch.zeros(2 * B * H * tiles_m, device=q.device, dtype=torch.int32)

    q, k, v, do = (_tma_ready(t) for t in (q, k, v, do))
    o = o if o.stride(-1) == 1 else o.contiguous()
    block = 8192 // c.head_dim
    key = _host.launch_key((o, do), (*lse.stride(), H, N_Q, n_pad), D, chained)
    _host.launch(
        _prepare_kernel,
        key if lse.data_ptr() % 16 == 0 else None,
        (-(-n_pad // block) * B * H, 1, 1),
        o, do, lse, rows, dq_acc, counter,
        *o.stride()[:3], *do.stride()[:3], *lse.stride(), H, N_Q, n_pad, B * H,
        D, c.head_dim, block, not chained, num_warps=8, **_gluon.OPTIONS,
    )  # fmt: skip

    part = [c.block_m * c.head_dim // c.dq_parts // 256, 256]
    ragged = N_K % c.block_n != 0
    dk_desc, dv_desc = (_describe(t, c.out_rows, c.head_dim) for t in (dk, dv))
    part_desc = dk_desc
    if whole < tiles:
        part_desc = _describe(split, c.out_rows, c.head_dim)
        if whole == 0:
            dk_desc = dv_desc = part_desc  # not used, and D may not suit the copy engine
    grad_desc = dk_desc
    if chained:  # a consumer's part of dQ
        shape = (c.block_m // 2, c.head_dim) if c.split_rows else (c.block_m, c.head_dim // 2)
        grad_desc = _describe(dq, *shape)
    _host.launch(
        kernel,
        (q.get_device(), q.dtype, c, causal, ragged, deterministic, chained, apart),
        (grid, 1, 1),
        _describe(q, c.block_m, c.head_dim),
        _describe(k, c.block_n, c.head_dim),
        _describe(v, c.block_n, c.head_dim),
        _describe(do, c.block_m, c.head_dim),
        _gluon.descriptor(rows, rows.shape, (1,), [c.block_m], FP32[1]),
        _gluon.descriptor(dq_acc, dq_acc.shape, (256, 1), part, FP32[2]),
        grad_desc, dk_desc, dv_desc, part_desc,
        locks, counter, scale * _host.LOG2E,
        H, heads, N_K - N_Q, tiles_m, tiles_n, units, section, whole, parts,
        c.block_m, c.block_n, c.head_dim, c.split_rows, c.ds_registers, STAGES,
        causal, ragged, deterministic, chained, apart,
        num_warps=4, launch_pdl=True, **_gluon.OPTIONS,
    )  # fmt: skip
    sums = (tiles - whole) * 2 * (c.block_n * c.head_dim // SUM_BLOCK.value)
    if chained and sums == 0:
        return dq, dk, dv
    _host.launch(
        _finish_kernel,
        _host.launch_key((dq, dk, dv), (H, N_Q, n_pad), c, D, causal, deterministic),
        (sums + (0 if chained else tiles_m * B * H), 1, 1),
        dq_acc, dq, split, dk, dv, *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        scale, H, N_Q, n_pad, heads, H_KV, N_K, N_K - N_Q, tiles_n, units, section, whole, parts,
        sums, D, c.block_m, c.block_n, c.head_dim, c.split_rows, causal, deterministic,
        num_warps=8, launch_pdl=True, **_gluon.OPTIONS,
    )  # fmt: skip
    return dq, dk, dv
