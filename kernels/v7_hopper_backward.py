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
stay in registers all the way; dQ, to which every CTA of a head contributes, is summed in fp32 in
device memory.

               queries →                        consumer 0    4 warps, keys  0..63  of the tile
    keys   ┌────┬────┬────┬────┐                consumer 1    4 warps, keys 64..127
     ↓     │ ░░ │ ▒▒ │ ▓▓ │    │ ← one CTA      loader        1 warp: Q, dO, LSE, delta; K and V
           └────┴────┴────┴────┘                writer        1 warp: adds dQ, stores dV and dK
             dQ   dQ   dQ   …    each summed over the CTAs of a column

Scores are computed transposed, Sᵀ = K Qᵀ and dPᵀ = V dOᵀ, [keys, queries]: the accumulator of a
product has the layout of the register operand of the next, so Pᵀ goes from the one to dV += Pᵀ dO
and never sees memory. dQ = dS K alone sums over keys, that is over both consumers. dS goes through
shared memory, and one barrier of 256 threads an iteration says that both halves are there; then
consumer w computes half w of the columns of dQ.

One iteration of a consumer. Products of query tile j wait for nothing but data; those that need dS
belong to the tile before, so that each elementwise part has products to run under:

    tensor cores, in order of issue   threads meanwhile                       waits for
    dQ(j-1) = dS K                                                            dS: the barrier below
    Sᵀ(j) = K Q(j)ᵀ                                                           Q from the loader
    dK += dSᵀ Q(j-1)                  dQ(j-1) to shared memory → writer       the writer
    dPᵀ(j) = V dO(j)ᵀ                 P = exp2(scale·log2 e·S - LSE₂)         dO from the loader
    dV += Pᵀ dO(j)                    Q(j-1) back to the loader
                                      dS = P (dP - delta) to shared memory
    ────────── named barrier: both halves of dS(j) are written ──────────     the other consumer
                                      dO(j) back to the loader

The first query tile of a key tile has no tile before it and the last none after it: a prologue with
the score half and an epilogue with the gradient half of the iteration. No product is in flight
where the loop turns: with one, ptxas serialised them all (its warnings C7510 to C7519).

What bounds it (D = 128, one iteration of a CTA, 64 queries by 128 keys): 10.5 MFLOP take the tensor
cores 2560 clocks (4096 FLOP a clock). A wgmma has 64 rows and reads from shared memory what it does
not find in registers, 128 bytes a clock: S 64 KiB, dP 64, dV 32, dK 48, dQ 64; dS written 16, dQ
written and read by the copy engine 64, Q and dO arriving 32: 384 KiB or 3072 clocks. Shared memory
is the busier of the two; exponentials (512 clocks) and instruction issue (800) could hide. The SM's
clock counts 4100 an iteration: a warp that issues wgmma after wgmma stands still while most of
them run, so a consumer's own arithmetic hides under the other's products more than its own.

What lives where (D = 128). Shared memory: Q 3 x 16 KiB, dO 2 x 16, K 32, V 32, dS 2 x 16, the way
out 2 x 16: 208 of 227 KiB, one CTA a multiprocessor. Registers of a consumer thread, at most 240:
dK 64, dV 64, S 32, dP 32 (the ones of dQ before), P in half precision 16. Device memory: for each
128 keys Q and dO are read once and 4 bytes an element added to dQ; L2 serves most of that.

CTAs are persistent: the loader draws the next tile from a counter and fetches it under the end of
the one before. The list is ordered heaviest first where a causal mask makes tiles unequal, in
sections of heads whose tensors fit in L2.

Against FlashAttention-3: no clusters; tiles of 64 queries also at D = 64; dQ of the tile before is
computed in the iteration of the next; grouped heads loop over the query heads of a group inside the
CTA, so that dK and dV need no accumulators in memory. A first kernel computes delta and clears the
accumulator of dQ, a last one scales it, restores its order and rounds: 14 bytes an element of Q.

Limits: fp16 and bf16, head dim up to 128 (the copy engine pads to 64 or 128 with zeros; at 256 dK
and dV alone would fill the registers). dK and dV are bitwise repeatable; dQ is not: CTAs add to it
in the order in which they come.

Measured, TFLOP/s with everything between dO and the finished gradients, this step / cuDNN in the
same run (H200, bf16, 16,384 tokens, hidden size 2048; torch 2.11.0, triton 3.6.0; 2026-11-22):

    N                  512        2048       16384
    D = 128 full     371/333    499/476    559/518
    D = 128 causal   175/212    423/382    586/536
    D = 64 full      301/285    383/398    419/449
    D = 64 causal    196/170    339/324    423/426

Since that run the word that names the next tile has shrunk to one, and the small kernels have grids
of one axis. In this form the step is compiled and its machine code tested; it has not been run.
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

from ._gluon import (
    TensorDescriptor,
    aggregate,
    barrier_arrive,
    barrier_sync,
    multiprocessors,
    tma_load,
    tma_reduce_add,
    tma_store,
    tma_store_wait,
)
from ._host import HALF_DTYPES, LOG2E

MAX_HEAD_DIM = 128
L2_BYTES = 40 << 20  # of 50 MiB: what a section of heads may take

DO_STAGES = gl.constexpr(2)  # ring slots of dO; those of Q are in the table of configurations

# Named barriers, by their number in PTX (Triton keeps the low ones), and how many threads meet.
EXCHANGE = gl.constexpr(8)  # both consumers have written their half of dS
Q_EMPTY = gl.constexpr(9)  # 9 to 11: both consumers are done with that slot of Q; the loader waits
DO_EMPTY = gl.constexpr(12)  # 12, 13: the same for dO
OUT_FULL = gl.constexpr(14)  # 14, 15: that consumer's way out is full; the writer waits
CONSUMERS = gl.constexpr(256)
CONSUMERS_AND_LOADER = gl.constexpr(256 + 32)
CONSUMER_AND_WRITER = gl.constexpr(128 + 32)


# A shared tile under another type and shape: public, and without the underscore, from Triton 3.9.
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None)
if reinterpret is None:
    reinterpret = gl.shared_memory_descriptor._reinterpret


class Config(NamedTuple):
    """Tiles of a head dim; `head_dim` is the padded one, a power of two."""

    block_m: int
    block_n: int
    head_dim: int
    q_stages: int  # Q of the tile before is still in use while the next one arrives: three slots


CONFIGS = {64: Config(64, 128, 64, q_stages=3), 128: Config(64, 128, 128, q_stages=3)}


def _config(head_dim):
    return CONFIGS[64 if head_dim <= 64 else 128]


@aggregate
class Shared:
    """Everything in shared memory: the tiles, and the barriers (of the mbarrier kind) around them.

    A `ready` barrier counts one arrival, the loader's, and the bytes that it announced; an `empty`
    one counts an arrival a partition. Who waits for `ready` the n-th time passes parity n & 1, who
    waits for `empty` the opposite, so that the first wait goes through.
    """

    q: gl.shared_memory_descriptor  # ring
    do: gl.shared_memory_descriptor  # ring
    lse: gl.shared_memory_descriptor  # ring, travels with q
    delta: gl.shared_memory_descriptor  # ring, travels with do
    k: gl.shared_memory_descriptor
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
    mail: gl.shared_memory_descriptor  # two slots: where in the list the next tile stands
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
    def out_as(self, WG: gl.constexpr, desc):
        """A consumer's way out, seen as the tile of a descriptor."""
        return reinterpret(self.out.index(WG), desc.dtype, desc.block_type.shape, desc.layout)

    @gluon.jit
    def receive(self, turn, WARPS: gl.constexpr):
        """The other roles: the place that the loader has drawn for this turn."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        slot = turn % 2
        mbarrier.wait(self.mail_ready.index(slot), (turn // 2) & 1)
        place = gl.max(self.mail.index(slot).load(layout), 0)
        mbarrier.arrive(self.mail_empty.index(slot), count=1)
        return place

    @gluon.jit
    def send(self, turn, place):
        """The loader: tell the others where in the list the tile of this turn stands."""
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        slot = turn % 2
        mbarrier.wait(self.mail_empty.index(slot), ((turn // 2) & 1) ^ 1)
        self.mail.index(slot).store(gl.full([1], place, gl.int32, layout))
        mbarrier.arrive(self.mail_ready.index(slot), count=1)


@aggregate
class Problem:
    """The kernel's scalar arguments; every role computes from them what it needs of a tile."""

    H: gl.tensor
    H_KV: gl.tensor
    N_Q: gl.tensor
    N_K: gl.tensor
    N_PAD: gl.tensor  # N_Q in whole tiles
    UNITS: (
        gl.tensor
    )  # B * H_KV * SPLIT; a unit is a key head with its query heads, or a share of them
    SECTION: gl.tensor  # units that run together
    SPLIT: gl.tensor  # units that share a key head
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    CAUSAL: gl.constexpr
    RAGGED: gl.constexpr  # the last tile reaches past N_K

    @gluon.constexpr_function
    def __init__(
        self, H, H_KV, N_Q, N_K, N_PAD, UNITS, SECTION, SPLIT, BLOCK_M, BLOCK_N, CAUSAL, RAGGED
    ):
        self.H, self.H_KV, self.N_Q, self.N_K, self.N_PAD = H, H_KV, N_Q, N_K, N_PAD
        self.UNITS, self.SECTION, self.SPLIT = UNITS, SECTION, SPLIT
        self.BLOCK_M = gl.constexpr(BLOCK_M)
        self.BLOCK_N = gl.constexpr(BLOCK_N)
        self.CAUSAL = gl.constexpr(CAUSAL)
        self.RAGGED = gl.constexpr(RAGGED)

    @gluon.jit
    def size(self):
        """Length of the list of tiles."""
        return self.UNITS * gl.cdiv(self.N_K, self.BLOCK_N)

    @gluon.jit
    def work(self, place):
        """The tile at a place of the list.

        Sections follow one another; inside one, the first key tiles of all its heads come first:
        under a causal mask those see the most queries. The heads of a section run together and find
        each other's Q, dO and dQ in L2.
        """
        tiles_n = gl.cdiv(self.N_K, self.BLOCK_N)
        section = place // (self.SECTION * tiles_n)
        inside = place % (self.SECTION * tiles_n)
        width = gl.minimum(self.SECTION, self.UNITS - section * self.SECTION)
        unit = section * self.SECTION + inside % width
        start_n = inside // width * self.BLOCK_N
        h_out = unit % (self.H_KV * self.SPLIT)
        b = unit // (self.H_KV * self.SPLIT)
        heads = self.H // (self.H_KV * self.SPLIT)

        offset = self.N_K - self.N_Q
        lo = gl.to_tensor(0)
        tiles = gl.cdiv(self.N_Q, self.BLOCK_M)
        masked = gl.to_tensor(0)
        edge_n = self.N_K - start_n
        if self.CAUSAL:  # query i sees the keys up to i + offset
            lo = gl.maximum(start_n - offset, 0) // self.BLOCK_M
            tiles -= lo
            masked = gl.cdiv(gl.maximum(start_n + self.BLOCK_N - 1 - offset, 0), self.BLOCK_M) - lo
            masked = gl.minimum(masked, tiles)
            edge_n = start_n - offset - lo * self.BLOCK_M
        elif self.RAGGED:  # noqa: SIM102 (this one is decided by the compiler)
            if edge_n < self.BLOCK_N:
                masked = tiles
        h_kv = h_out // self.SPLIT
        return Work(b, h_out * heads, h_kv, h_out, start_n, lo, masked, tiles, heads, edge_n)


@aggregate
class Work:
    """One tile of keys, and the query tiles that see it."""

    b: gl.tensor
    h: gl.tensor  # first query head
    h_kv: gl.tensor  # key head to read
    h_out: gl.tensor  # head of dK and dV to write
    start_n: gl.tensor
    lo: gl.tensor  # first query tile that sees these keys
    masked: gl.tensor  # so many from there need the mask
    tiles: gl.tensor  # so many from there in all
    heads: gl.tensor
    # causal: query m of tile lo sees key n of this tile where n + edge_n <= m; else key n exists
    # where n < edge_n
    edge_n: gl.tensor

    @gluon.constexpr_function
    def __init__(self, b, h, h_kv, h_out, start_n, lo, masked, tiles, heads, edge_n):
        self.b, self.h, self.h_kv, self.h_out = b, h, h_kv, h_out
        self.start_n, self.lo, self.masked = start_n, lo, masked
        self.tiles, self.heads, self.edge_n = tiles, heads, edge_n

    @gluon.jit
    def locate(self, it):
        """Iteration -> query head and query tile: masked tiles of all heads, then full ones."""
        edge = self.masked * self.heads
        if it < edge:
            h = self.h + it // self.masked
            m = self.lo + it % self.masked
        else:
            full = self.tiles - self.masked
            h = self.h + (it - edge) // full
            m = self.lo + self.masked + (it - edge) % full
        return h, m


@gluon.jit
def _loader(sm, problem, next_ptr, q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc):
    """One warp: draws tiles from the counter and keeps the copy engine ahead of the consumers."""
    BLOCK_M: gl.constexpr = problem.BLOCK_M
    Q_STAGES: gl.constexpr = sm.q.shape[0]
    count = gl.to_tensor(0)  # query tiles over all key tiles: the rings never start over
    turn = gl.to_tensor(0)
    place = gl.program_id(0)
    while place < problem.size():
        sm.send(turn, place)
        work = problem.work(place)
        for it in range(work.tiles * work.heads):
            stage = count % Q_STAGES
            h, m = work.locate(it)
            row = (work.b * problem.H + h) * problem.N_PAD + m * BLOCK_M
            q_ready = sm.q_ready.index(stage)
            if count >= Q_STAGES:
                barrier_sync(Q_EMPTY + stage, CONSUMERS_AND_LOADER)
            mbarrier.expect(q_ready, q_desc.block_type.nbytes + lse_desc.block_type.nbytes)
            tma_load(q_desc, [work.b, h, m * BLOCK_M, 0], q_ready, sm.q.index(stage))
            tma_load(lse_desc, [row], q_ready, sm.lse.index(stage))
            if it == 0:  # V is free before K: dP of the last query tile comes before its dQ
                coord = [work.b, work.h_kv, work.start_n, 0]
                mbarrier.wait(sm.v_empty, (turn & 1) ^ 1)
                mbarrier.expect(sm.v_ready, v_desc.block_type.nbytes)
                tma_load(v_desc, coord, sm.v_ready, sm.v.index(0))
                mbarrier.wait(sm.k_empty, (turn & 1) ^ 1)
                mbarrier.expect(sm.k_ready, k_desc.block_type.nbytes)
                tma_load(k_desc, coord, sm.k_ready, sm.k.index(0))
            stage = count % DO_STAGES
            do_ready = sm.do_ready.index(stage)
            if count >= DO_STAGES:
                barrier_sync(DO_EMPTY + stage, CONSUMERS_AND_LOADER)
            mbarrier.expect(do_ready, do_desc.block_type.nbytes + delta_desc.block_type.nbytes)
            tma_load(do_desc, [work.b, h, m * BLOCK_M, 0], do_ready, sm.do.index(stage))
            tma_load(delta_desc, [row], do_ready, sm.delta.index(stage))
            count += 1
        turn += 1
        place = gl.num_programs(0) + gl.atomic_add(next_ptr, 1)
    sm.send(turn, place)  # past the end of the list: everybody stops

    # Take the last arrivals of the consumers too: no named barrier stays half full.
    for i in range(gl.maximum(count - Q_STAGES, 0), count):
        barrier_sync(Q_EMPTY + i % Q_STAGES, CONSUMERS_AND_LOADER)
    for i in range(gl.maximum(count - DO_STAGES, 0), count):
        barrier_sync(DO_EMPTY + i % DO_STAGES, CONSUMERS_AND_LOADER)


@gluon.jit
def _writer(sm, problem, dq_desc, dk_desc, dv_desc):
    """One warp: what the consumers put on their ways out, it hands to the copy engine."""
    HALF: gl.constexpr = problem.BLOCK_N // 2
    ROWS: gl.constexpr = dq_desc.block_type.shape[0]
    turn = gl.to_tensor(0)
    place = sm.receive(turn, 1)
    while place < problem.size():
        work = problem.work(place)
        n = work.tiles * work.heads
        # What comes out, in order: dQ of all query tiles but the last, dV, dQ of the last, dK.
        for it in range(n + 2):
            if it < n - 1 or it == n:
                h, m = work.locate(gl.minimum(it, n - 1))
                row = ((work.b * problem.H + h) * problem.N_PAD // problem.BLOCK_M + m) * (2 * ROWS)
                for c in gl.static_range(2):
                    barrier_sync(OUT_FULL + c, CONSUMER_AND_WRITER)
                    tma_reduce_add(dq_desc, [row + c * ROWS, 0], sm.out_as(c, dq_desc))
            elif it == n - 1:
                for c in gl.static_range(2):
                    barrier_sync(OUT_FULL + c, CONSUMER_AND_WRITER)
                    coord = [work.b, work.h_out, work.start_n + c * HALF, 0]
                    tma_store(dv_desc, coord, sm.out.index(c))
            else:
                for c in gl.static_range(2):
                    barrier_sync(OUT_FULL + c, CONSUMER_AND_WRITER)
                    coord = [work.b, work.h_out, work.start_n + c * HALF, 0]
                    tma_store(dk_desc, coord, sm.out.index(c))
            tma_store_wait(1)
            mbarrier.arrive(sm.out_empty.index(0), count=1)
            tma_store_wait(0)
            mbarrier.arrive(sm.out_empty.index(1), count=1)
        turn += 1
        place = sm.receive(turn, 1)


@gluon.jit
def _probabilities(
    s, sm, stage, qk_scale, edge_n,
    WG: gl.constexpr, BLOCK_M: gl.constexpr, HALF: gl.constexpr, CAUSAL: gl.constexpr,
    MASKED: gl.constexpr, s_layout: gl.constexpr,
):  # fmt: skip
    """Pᵀ = exp(Sᵀ - LSE) of half a tile, [HALF, BLOCK_M] (line 11)."""
    lse = sm.lse.index(stage).load(gl.SliceLayout(0, s_layout))
    s = s * qk_scale - gl.expand_dims(lse, 0)
    if MASKED:
        offs_n = WG * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, s_layout))
        if CAUSAL:
            offs_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, s_layout))
            visible = gl.expand_dims(offs_n + edge_n, 1) <= gl.expand_dims(offs_m, 0)
        else:
            visible = gl.expand_dims(offs_n, 1) < edge_n
        s = gl.where(visible, s, float("-inf"))
    return gl.exp2(s)


@gluon.jit
def _hand_over_dq(dq, sm, dq_desc, count, WG: gl.constexpr):
    """Put a part of dQ, in the order in which the registers hold it, before the writer."""
    # row = (warp, i, quad) and column = (j, lane, e) of the accumulator layout: a thread owns all
    # (i, j, e) of its (warp, quad, lane). In the order (j, warp, quad, lane, i, e) it owns groups
    # of four: stores of 16 bytes, without the two-way bank conflicts of rows and columns. Moves
    # nothing between threads; _finish_kernel puts rows and columns back.
    J: gl.constexpr = dq.shape[1] // 8
    dq = dq.reshape([4, 2, 8, J, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([2 * J, 256])
    mbarrier.wait(sm.out_empty.index(WG), (count & 1) ^ 1)
    sm.out_as(WG, dq_desc).store(dq)
    fence_async_shared()  # stores of threads before reads of the copy engine
    barrier_arrive(OUT_FULL + WG, CONSUMER_AND_WRITER)


@gluon.jit
def _hand_over(tile, sm, count, WG: gl.constexpr):
    """Put a half of dV or dK before the writer.

    `count` numbers what a consumer hands over, modulo 2: dQ(it) of a tile is base + it; dV comes
    before the last dQ and dK after it, so n query tiles make n + 2 and parity carries over.
    """
    mbarrier.wait(sm.out_empty.index(WG), (count & 1) ^ 1)
    sm.out.index(WG).reshape(tile.shape).store(tile.to(sm.out.dtype))
    fence_async_shared()
    barrier_arrive(OUT_FULL + WG, CONSUMER_AND_WRITER)


@gluon.jit
def _tiles(
    WG: gl.constexpr, sm, dq_desc, dk, dv, first, last, base, qk_scale, edge_n, masked,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr,
    CAUSAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Consumer WG's iterations first..last of a tile, as drawn at the top of the file."""
    dtype: gl.constexpr = sm.q.dtype
    Q_STAGES: gl.constexpr = sm.q.shape[0]
    HALF: gl.constexpr = BLOCK_N // 2
    DQ_D: gl.constexpr = HEAD_DIM // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)

    s_zero = gl.zeros([HALF, BLOCK_M], gl.float32, s_layout)
    dq_zero = gl.zeros([BLOCK_M, DQ_D], gl.float32, dq_layout)
    for it in range(first, last):
        count = base + it
        slot, before = count % Q_STAGES, (count - 1) % Q_STAGES
        stage = count % DO_STAGES
        # Always buffer 0, in a form that the compiler cannot see through: it would otherwise keep a
        # matrix descriptor for each slice of K and V in registers over the loop, and spill.
        k = sm.k.index(it >> 30).reshape([BLOCK_N, HEAD_DIM])
        v = sm.v.index(it >> 30).reshape([BLOCK_N, HEAD_DIM])
        k_half = k.slice(WG * HALF, HALF, dim=0)
        v_half = v.slice(WG * HALF, HALF, dim=0)
        q = sm.q.index(slot).reshape([BLOCK_M, HEAD_DIM])
        q_before = sm.q.index(before).reshape([BLOCK_M, HEAD_DIM])
        do = sm.do.index(stage).reshape([BLOCK_M, HEAD_DIM])

        ds = sm.ds.index(stage ^ 1)  # [BLOCK_N, BLOCK_M], of the tile before
        k_part = k.slice(WG * DQ_D, DQ_D, dim=1)
        dq = warpgroup_mma(ds.permute((1, 0)), k_part, dq_zero, use_acc=False, is_async=True)
        mbarrier.wait(sm.q_ready.index(slot), (count // Q_STAGES) & 1)
        s = warpgroup_mma(k_half, q.permute((1, 0)), s_zero, use_acc=False, is_async=True)
        dk_acc = warpgroup_mma(ds.slice(WG * HALF, HALF, dim=0), q_before, dk, is_async=True)

        dq = warpgroup_mma_wait(2, [dq])  # [BLOCK_M, DQ_D], line 15
        _hand_over_dq(dq, sm, dq_desc, count - 1, WG)

        mbarrier.wait(sm.do_ready.index(stage), (count // DO_STAGES) & 1)
        dp = warpgroup_mma(v_half, do.permute((1, 0)), s_zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(2, [s])  # [HALF, BLOCK_M], line 10
        edge = edge_n
        if MASKED and CAUSAL:
            edge = edge_n - it % masked * BLOCK_M
        p = _probabilities(s, sm, slot, qk_scale, edge, WG, BLOCK_M, HALF, CAUSAL, MASKED, s_layout)
        p_half = gl.convert_layout(p.to(dtype), a_layout)
        # dV consumes P, so ptxas cannot move the exponentials behind the wait for dP
        dv_acc = warpgroup_mma(p_half, do, dv, is_async=True)
        dk = warpgroup_mma_wait(2, [dk_acc])  # [HALF, HEAD_DIM], line 16
        barrier_arrive(Q_EMPTY + before, CONSUMERS_AND_LOADER)

        delta = sm.delta.index(stage).load(gl.SliceLayout(0, s_layout))
        dp = warpgroup_mma_wait(1, [dp])  # [HALF, BLOCK_M], line 13
        ds_half = (p * (dp - gl.expand_dims(delta, 0))).to(dtype)  # line 14
        # One barrier an iteration does for two buffers: who writes dS(j) has passed the barrier of
        # j - 1, and before that one both consumers had waited for all that read dS(j - 2).
        sm.ds.index(stage).slice(WG * HALF, HALF, dim=0).store(ds_half)
        fence_async_shared()  # stores of threads before reads of the tensor cores
        barrier_sync(EXCHANGE, CONSUMERS)
        dv, p_half = warpgroup_mma_wait(0, [dv_acc, p_half])  # [HALF, HEAD_DIM], line 12
        barrier_arrive(DO_EMPTY + stage, CONSUMERS_AND_LOADER)
    return dk, dv


@gluon.jit
def _consumer(
    WG: gl.constexpr, sm, problem, dq_desc, qk_scale,
    HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """Four warps: keys WG * BLOCK_N / 2 and up of every tile that the CTA draws."""
    dtype: gl.constexpr = sm.q.dtype
    BLOCK_M: gl.constexpr = problem.BLOCK_M
    BLOCK_N: gl.constexpr = problem.BLOCK_N
    Q_STAGES: gl.constexpr = sm.q.shape[0]
    CAUSAL: gl.constexpr = problem.CAUSAL
    MASKED: gl.constexpr = problem.CAUSAL or problem.RAGGED
    HALF: gl.constexpr = BLOCK_N // 2
    DQ_D: gl.constexpr = HEAD_DIM // 2
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ_D, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)

    base = gl.to_tensor(0)  # query tiles of the key tiles before this one
    turn = gl.to_tensor(0)
    place = sm.receive(turn, 4)
    while place < problem.size():
        work = problem.work(place)
        edge = work.masked * work.heads
        total = work.tiles * work.heads
        slot = base % Q_STAGES
        stage = base % DO_STAGES
        k = sm.k.index(turn >> 30).reshape([BLOCK_N, HEAD_DIM])
        v = sm.v.index(turn >> 30).reshape([BLOCK_N, HEAD_DIM])
        q = sm.q.index(slot).reshape([BLOCK_M, HEAD_DIM])
        do = sm.do.index(stage).reshape([BLOCK_M, HEAD_DIM])
        k_half = k.slice(WG * HALF, HALF, dim=0)
        v_half = v.slice(WG * HALF, HALF, dim=0)
        s_zero = gl.zeros([HALF, BLOCK_M], gl.float32, s_layout)
        dv = gl.zeros([HALF, HEAD_DIM], gl.float32, acc_layout)
        dk = gl.zeros([HALF, HEAD_DIM], gl.float32, acc_layout)

        # the first query tile: scores, no gradients yet
        mbarrier.wait(sm.k_ready, turn & 1)
        mbarrier.wait(sm.q_ready.index(slot), (base // Q_STAGES) & 1)
        s = warpgroup_mma(k_half, q.permute((1, 0)), s_zero, use_acc=False, is_async=True)
        mbarrier.wait(sm.v_ready, turn & 1)
        mbarrier.wait(sm.do_ready.index(stage), (base // DO_STAGES) & 1)
        dp = warpgroup_mma(v_half, do.permute((1, 0)), s_zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, [s])
        p = _probabilities(
            s, sm, slot, qk_scale, work.edge_n, WG, BLOCK_M, HALF, CAUSAL, MASKED, s_layout
        )
        p_half = gl.convert_layout(p.to(dtype), a_layout)
        dv_acc = warpgroup_mma(p_half, do, dv, is_async=True)
        delta = sm.delta.index(stage).load(gl.SliceLayout(0, s_layout))
        dp = warpgroup_mma_wait(1, [dp])
        ds_half = (p * (dp - gl.expand_dims(delta, 0))).to(dtype)
        sm.ds.index(stage).slice(WG * HALF, HALF, dim=0).store(ds_half)
        fence_async_shared()
        barrier_sync(EXCHANGE, CONSUMERS)
        dv, p_half = warpgroup_mma_wait(0, [dv_acc, p_half])
        barrier_arrive(DO_EMPTY + stage, CONSUMERS_AND_LOADER)

        if MASKED:
            dk, dv = _tiles(
                WG, sm, dq_desc, dk, dv, 1, edge, base, qk_scale, work.edge_n, work.masked,
                BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, True,
            )  # fmt: skip
            dk, dv = _tiles(
                WG, sm, dq_desc, dk, dv, gl.maximum(edge, 1), total, base, qk_scale, work.edge_n,
                work.masked, BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, False,
            )  # fmt: skip
        else:
            dk, dv = _tiles(
                WG, sm, dq_desc, dk, dv, 1, total, base, qk_scale, work.edge_n, work.masked,
                BLOCK_M, BLOCK_N, HEAD_DIM, CAUSAL, False,
            )  # fmt: skip
        base += total

        # the last query tile: its gradients
        mbarrier.arrive(sm.v_empty, count=1)
        last = (base - 1) % Q_STAGES
        ds = sm.ds.index((base - 1) % DO_STAGES)
        k_part = k.slice(WG * DQ_D, DQ_D, dim=1)
        dq_zero = gl.zeros([BLOCK_M, DQ_D], gl.float32, dq_layout)
        dq = warpgroup_mma(ds.permute((1, 0)), k_part, dq_zero, use_acc=False, is_async=True)
        q = sm.q.index(last).reshape([BLOCK_M, HEAD_DIM])
        dk_acc = warpgroup_mma(ds.slice(WG * HALF, HALF, dim=0), q, dk, is_async=True)
        _hand_over(dv, sm, base - 1, WG)
        dq = warpgroup_mma_wait(1, [dq])
        mbarrier.arrive(sm.k_empty, count=1)
        _hand_over_dq(dq, sm, dq_desc, base, WG)
        dk = warpgroup_mma_wait(0, [dk_acc])
        barrier_arrive(Q_EMPTY + last, CONSUMERS_AND_LOADER)
        # scale = qk_scale / log2(e)
        _hand_over(dk * (qk_scale * 0.6931471805599453), sm, base + 1, WG)
        turn += 1
        place = sm.receive(turn, 4)


SIZES = ("H", "H_KV", "N_Q", "N_K", "N_PAD", "UNITS", "SECTION", "SPLIT")


@gluon.jit(do_not_specialize=SIZES)
def _backward_kernel(
    q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc, dq_desc, dk_desc, dv_desc,
    next_ptr, qk_scale, H, H_KV, N_Q, N_K, N_PAD, UNITS, SECTION, SPLIT,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, Q_STAGES: gl.constexpr,
    CAUSAL: gl.constexpr, RAGGED: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    mail_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sm = Shared(
        gl.allocate_shared_memory(dtype, [Q_STAGES, 1, 1, BLOCK_M, HEAD_DIM], q_desc.layout),
        gl.allocate_shared_memory(dtype, [DO_STAGES, 1, 1, BLOCK_M, HEAD_DIM], do_desc.layout),
        gl.allocate_shared_memory(gl.float32, [Q_STAGES, BLOCK_M], lse_desc.layout),
        gl.allocate_shared_memory(gl.float32, [DO_STAGES, BLOCK_M], delta_desc.layout),
        gl.allocate_shared_memory(dtype, [1, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout),
        gl.allocate_shared_memory(dtype, [1, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout),
        gl.allocate_shared_memory(dtype, [2, BLOCK_N, BLOCK_M], ds_layout),
        gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK_N // 2, HEAD_DIM], dv_desc.layout),
        gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [DO_STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
        gl.allocate_shared_memory(gl.int32, [2, 1], mail_layout),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
    )
    for i in gl.static_range(Q_STAGES):
        mbarrier.init(sm.q_ready.index(i), count=1)
    for i in gl.static_range(DO_STAGES):
        mbarrier.init(sm.do_ready.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(sm.out_empty.index(i), count=1)
        mbarrier.init(sm.mail_ready.index(i), count=1)
        mbarrier.init(sm.mail_empty.index(i), count=3)  # two consumers and the writer
    mbarrier.init(sm.k_ready, count=1)
    mbarrier.init(sm.v_ready, count=1)
    mbarrier.init(sm.k_empty, count=2)
    mbarrier.init(sm.v_empty, count=2)

    problem = Problem(
        H, H_KV, N_Q, N_K, N_PAD, UNITS, SECTION, SPLIT, BLOCK_M, BLOCK_N, CAUSAL, RAGGED
    )
    # 12 warps of 168 registers are launched; the last four (loader, writer, two idle) give up all
    # but 24, and both consumers get 240. Consumer 0 runs on the kernel's own warps.
    gl.warp_specialize(
        [
            (_consumer, (0, sm, problem, dq_desc, qk_scale, HEAD_DIM)),
            (_consumer, (1, sm, problem, dq_desc, qk_scale, HEAD_DIM)),
            (
                _loader,
                (sm, problem, next_ptr, q_desc, k_desc, v_desc, do_desc, lse_desc, delta_desc),
            ),
            (_writer, (sm, problem, dq_desc, dk_desc, dv_desc)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


@triton.jit
def _prepare_kernel(
    o_ptr, do_ptr, lse_ptr, lse_log2_ptr, delta_ptr, dq_acc_ptr, next_ptr,
    stride_ob, stride_oh, stride_om, stride_dob, stride_doh, stride_dom,
    stride_lb, stride_lh, stride_lm,
    H, N_Q, N_PAD,
    D: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(o ∘ do) (line 4) and LSE in base 2, padded to whole tiles; zeros for dQ.

    Bound by device memory: 2 + 2 bytes read and 4 written an element of O.
    """
    tiles = tl.cdiv(N_PAD, ROWS)
    pid_m, pid_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
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

    if tl.program_id(0) == 0:
        tl.store(next_ptr, 0)  # the next kernel counts its tiles there
    row = (b * H + h) * N_PAD + offs_m
    inside = offs_m < N_PAD
    tl.store(lse_log2_ptr + row, lse_log2, inside)
    tl.store(delta_ptr + row, delta, inside)
    zero = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    tl.store(dq_acc_ptr + row[:, None] * HEAD_DIM + offs_d[None, :], zero, inside[:, None])


@triton.jit
def _finish_kernel(
    dq_acc_ptr, dq_ptr, stride_qb, stride_qh, stride_qm, scale, H, N_Q, N_PAD,
    D: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """dq = scale · accumulator, rows and columns put back, rounded: 4 bytes read, 2 written."""
    tiles = N_PAD // BLOCK_M
    pid_m, pid_bh = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, h = (pid_bh // H).to(tl.int64), (pid_bh % H).to(tl.int64)
    start_m = pid_m * BLOCK_M
    tile = ((b * H + h) * N_PAD + start_m) * HEAD_DIM
    dq = tl.load(dq_acc_ptr + tile + tl.arange(0, BLOCK_M * HEAD_DIM)) * scale

    # (part, j, warp, quad, lane, i, e), see _hand_over_dq -> (warp, i, quad) x (part, j, lane, e)
    dq = dq.to(dq_ptr.dtype.element_ty).reshape([2, BLOCK_M * HEAD_DIM // 1024, 4, 8, 4, 2, 2])
    dq = dq.permute((2, 5, 3, 0, 1, 4, 6)).reshape([BLOCK_M, HEAD_DIM])

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)
    mask = (offs_m < N_Q)[:, None] & (offs_d < D)[None, :]
    at = offs_m[:, None].to(tl.int64) * stride_qm + offs_d[None, :]
    tl.store(dq_ptr + b * stride_qb + h * stride_qh + at, dq, mask)


def _tma_ready(t):
    """`t`, or a copy that the copy engine can address: 16-byte base and strides, rows apart."""
    step = 16 // t.element_size()
    strides = [s for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1]
    aligned = all(s > 0 and s % step == 0 for s in strides) and t.data_ptr() % 16 == 0
    if aligned and t.stride(-1) == 1:
        return t
    padded = t.new_zeros(*t.shape[:-1], -(-t.shape[-1] // step) * step)
    padded[..., : t.shape[-1]] = t
    return padded


def _describe(t, rows, columns):
    """TMA descriptor of a (B, H, N, D) tensor in tiles [1, 1, rows, columns].

    One dimension a head: past the end of a head the copy engine reads zeros and writes nothing.
    """
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    # a dimension of size 1 may carry any stride; the descriptor wants a multiple of 16 bytes
    sizes = zip(t.stride()[:-1], t.shape[:-1], strict=True)
    strides = [s if n > 1 else 8 * columns for s, n in sizes] + [1]
    return TensorDescriptor(t, list(t.shape), strides, [1, 1, rows, columns], layout)


def backward(do, q, k, v, o, lse, causal, scale, allow_tf32):
    """Gradients of q, k and v from that of o; o and lse (natural, fp32) as the forward gave them.

    do, q and o (B, H, N_Q, D), k and v (B, H_KV, N_K, D), fp16 or bf16, D at most 128; lse
    (B, H, N_Q). Any strides; where those of q, k, v, do are not multiples of 16 bytes, at a copy.
    allow_tf32 changes nothing in half precision.

    Raises ValueError for other dtypes and larger head dims.
    """
    B, H, N_Q, D = q.shape
    H_KV, N_K = k.shape[1:3]
    if q.dtype not in HALF_DTYPES:
        raise ValueError(f"q: expected a dtype among {[*map(str, HALF_DTYPES)]}, got {q.dtype}")
    if D > MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim of at most {MAX_HEAD_DIM}, got {D}")
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    c = _config(D)

    # A unit is a key head with its query heads. Where that gives fewer tiles than multiprocessors,
    # the query heads are split over several units and their dK and dV summed afterwards.
    tiles_n = triton.cdiv(N_K, c.block_n)
    programs = multiprocessors(q.device)
    split = 1
    while B * H_KV * split * tiles_n < programs and H // H_KV % (2 * split) == 0:
        split *= 2
    units, heads = B * H_KV * split, H // (H_KV * split)
    section = 1
    if causal:  # Q, dO and the accumulator of dQ take 2, 2 and 4 bytes an element
        section = max(1, min(units, L2_BYTES // (heads * N_Q * c.head_dim * 8)))
    n_pad = triton.cdiv(N_Q, c.block_m) * c.block_m

    dq = torch.empty_like(q)
    width = -(-D // 8) * 8  # of a row that the copy engine can address
    dk, dv = (q.new_empty(B, H_KV * split, N_K, width) for _ in range(2))
    dq_acc = torch.empty(B * H * n_pad, c.head_dim, device=q.device, dtype=torch.float32)
    counter = torch.empty(1, device=q.device, dtype=torch.int32)
    lse_log2, delta = torch.empty(2, B * H * n_pad, device=q.device, dtype=torch.float32)
    o, do = (t if t.stride(-1) == 1 else t.contiguous() for t in (o, do))
    rows = 8192 // c.head_dim
    _prepare_kernel[(triton.cdiv(n_pad, rows) * B * H,)](
        o, do, lse, lse_log2, delta, dq_acc, counter,
        *o.stride()[:3], *do.stride()[:3], *lse.stride(), H, N_Q, n_pad,
        D, c.head_dim, rows, num_warps=8,
    )  # fmt: skip

    q, k, v, do = (_tma_ready(t) for t in (q, k, v, do))
    vector = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    part = [c.block_m * c.head_dim // 2 // 256, 256]  # a consumer's of dQ
    _backward_kernel[(min(units * tiles_n, programs),)](
        _describe(q, c.block_m, c.head_dim),
        _describe(k, c.block_n, c.head_dim),
        _describe(v, c.block_n, c.head_dim),
        _describe(do, c.block_m, c.head_dim),
        TensorDescriptor.from_tensor(lse_log2, [c.block_m], vector),
        TensorDescriptor.from_tensor(delta, [c.block_m], vector),
        TensorDescriptor.from_tensor(dq_acc.view(-1, 256), part, flat),
        _describe(dk, c.block_n // 2, c.head_dim),
        _describe(dv, c.block_n // 2, c.head_dim),
        counter, scale * LOG2E, H, H_KV, N_Q, N_K, n_pad, units, section, split,
        c.block_m, c.block_n, c.head_dim, c.q_stages, causal, N_K % c.block_n != 0,
        num_warps=4,
    )  # fmt: skip
    _finish_kernel[(n_pad // c.block_m * B * H,)](
        dq_acc, dq, *dq.stride()[:3], scale, H, N_Q, n_pad, D,
        c.block_m, c.head_dim, num_warps=8,
    )  # fmt: skip

    if split > 1:
        dk, dv = (t.unflatten(1, (H_KV, split)).sum(2, dtype=torch.float32) for t in (dk, dv))
        dk, dv = dk.to(q.dtype), dv.to(q.dtype)
    if width != D:
        dk, dv = dk[..., :D].contiguous(), dv[..., :D].contiguous()
    return dq, dk, dv
