"""The backward pass on Hopper for head dims above 128: v7 again, its work shared out otherwise.

`v7_hopper_backward` is the text to read first: the five products and their lines in the paper, the
roles, the transposed scores, the list of tiles and the two small kernels are the same here, and
imported from there. What it cannot do is hold two accumulators of 256 columns: dK and dV of its 64
keys a consumer would be 256 registers a thread, of 240 for everything. So here

- a CTA owns 64 keys instead of 128, and both consumers work at all of them;
- each consumer keeps *half of the columns*, 128 of 256, of dK, dV and dQ;
- scores are shared out as a whole: consumer 0 computes S and P, consumer 1 dP and dS.

               queries →                  consumer 0   4 warps: S, P; columns 0..127 of dQ, dK, dV
    keys   ┌────┬────┬────┬────┐          consumer 1   4 warps: dP, dS; columns 128..255
     ↓     │ ░░ │ ▒▒ │ ▓▓ │    │          loader       1 warp: Q, dO, LSE, delta; K and V
           └────┴────┴────┴────┘          writer       1 warp: adds dQ, stores dV and dK

P and dS are made by one consumer and multiplied by both: they go through shared memory. Two named
barriers say when they are there, and keep the consumers in step. There are no turns: that consumer
1 waits for P(j), and consumer 0 for dS(j), has one compute while the other takes exponentials.

    consumer 0                                     consumer 1
    dV(j-1)                                        dS(j-1) = P (dP - delta) → shared memory
    ──────────────────────────────── dS(j-1) is there ────────────────────────────────
    dQ(j-1)'  dK(j-1)                              dV(j-1)  dQ(j-1)'  dK(j-1)
      under dK: dQ' → where dO(j-1) was              the same
    dQ(j-1)"  S(j)                                 dQ(j-1)"  dP(j)
      under S: dQ" → where Q(j-1) was                under dP: the same
    P(j) = exp2(scale·log2 e·S - LSE₂)
    ────────────────────────────────── P(j) is there ──────────────────────────────────
    dV(j)                                          dS(j)

**Nothing has a place of its own on its way out.** dQ of a query tile is 64 KiB in fp32, dV and dK
of a key tile are 32 KiB each, and shared memory is full without them (below). But when dQ(j) comes,
Q(j) and dO(j) have been read for the last time, 64 KiB together; and at the end of a key tile so
have V and K. So the first half of a consumer's dQ (' above) goes where its own columns of dO were,
the second half (") where its columns of Q were, and dV and dK where V and K were. With rows of 128
bytes, swizzled, 64 columns of a tile are one block of memory and 128 columns are two in a row: half
of a slot, 16 KiB, exactly what half of a consumer's dQ needs. What it relies on:

- dO(j), own columns: the own dV(j) is done, and dP(j), which read all of dO(j), was before dS(j).
- Q(j), own columns: the own dK(j) is done, and S(j) was before P(j).
- V and K, own columns: the same for the last query tile, and the own last dQ is done.
- Between a product and what overwrites its operands all four warps of the consumer meet.
- P and dS have two buffers each. P(j+1) is written when dS(j) is there: then consumer 1 has waited
  for dV(j-1), the last to read that buffer. dS(j+1) is written when P(j+1) is there: consumer 0 has
  waited for dQ(j)" before.
- A named barrier is not arrived at twice before its waiter has come: `DO_FULL` and `Q_FULL` of a
  slot stand for one query tile, the next in that slot is loaded when the writer has seen both.

The writer has the copy engine add or store what it finds, waits until that has been *read*, and
gives the place back to the loader: an `empty` barrier. At the end of a key tile dV and dK go first,
since the next K and V wait for them; the next Q and dO are on their way by then.

**What bounds it** is, as the variants below say, the way through L2. One iteration of a CTA (64
queries by 64 keys) is 10.5 MFLOP, 2560 clocks of the tensor cores. Shared memory at 128 bytes a
clock: S 64 KiB, dP 64, dV 48, dK 48, dQ 64, P and dS 24, dQ written and read by the copy engine
128, Q and dO arriving 64: 504 KiB, 4032 clocks. And for each 64 keys (v7: 128) Q and dO are read
and 4 bytes an element added to dQ: 128 KiB through L2, at 500 TFLOP/s 6.2 TB/s over 132
multiprocessors. So a slot's way, dQ out and the next tile in, is long, and the order of an
iteration is the one that leaves it time: dO's place is given back at once, Q's with P, and S(j) is
asked for late. What was tried, at N = 16384 and in turns with this order, TFLOP/s (full mask):

    S(j) before the second half of dQ                                379 for 509
      the same with dQ not added; with Q and dO loaded once          550; 559
    dQ in one product, its halves handed over together, S(j) last    387 for 507
    S(j) an iteration ahead, half of dQ added from registers         401 for 507

What lives where. Shared memory: Q 2 x 32 KiB, dO 2 x 32, K 32, V 32, P 2 x 8, dS 2 x 8: 224 of 227
KiB. Registers of a consumer thread, at most 240: dK 64, dV 64, half of its dQ 32, S or dP 32. All
of its dQ in one product, 64, beside S in flight would serialise everything.

deterministic=True: as in v7, with one lock a query tile. The writer waits for its number, and the
slot with it.

Limits: fp16 and bf16, head dim up to 256; the copy engine pads to 256 with zeros, so that 136 costs
as much. dK and dV are bitwise repeatable, dQ if asked for.

Measured, TFLOP/s with everything between dO and the finished gradients, in brackets cuDNN /
flash-attn 4 in turns with it (H200, bf16, D = 256, 16,384 tokens, hidden size 2048; torch 2.11.0,
triton 3.6.0; 2026-11-27), at N = 512, 2048, 4096 and 16384:

    full    303 (236 / 250)   445 (351 / 345)   477 (379 / 367)   487 (351 / 382)
    causal  207 (177 / 176)   400 (321 / 303)   460 (355 / 328)   494 (382 / 372)

`v3_tma`, with kernels of its own for dK, dV and dQ, reached 239 305 320 324 and 186 291 315 331.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import v7_hopper_backward as v7
from ._gluon import (
    aggregate,
    barrier_arrive,
    barrier_sync,
    tma_load,
    tma_reduce_add,
    tma_store,
    tma_store_drain,
    tma_store_wait,
)

MAX_HEAD_DIM = 256

# Named barriers, by their number in PTX (Triton keeps the low ones), and how many threads meet.
P_READY = gl.constexpr(8)  # P has been written; consumer 1 waits
DS_READY = gl.constexpr(9)  # dS has been written; consumer 0 waits
DO_FULL = gl.constexpr(10)  # 10, 11: half of dQ is where dO was, in that slot; the writer waits
Q_FULL = gl.constexpr(12)  # 12, 13: the other half is where Q was; the writer waits
KV_FULL = gl.constexpr(14)  # dV and dK are where V and K were; the writer waits
CONSUMERS = gl.constexpr(256)
CONSUMERS_AND_WRITER = gl.constexpr(256 + 32)

CONFIG = v7.Config(
    64, 64, 256, split_rows=False, ds_registers=False, dq_parts=4, out_rows=64, chains=False,
    apart=False,
)  # fmt: skip

meet = v7.meet
reinterpret = v7.reinterpret


@aggregate
class Shared:
    """Everything in shared memory: the tiles, and the barriers (of the mbarrier kind) around them.

    Every barrier counts one arrival (`mail_empty` three): a `ready` one the loader's, with the
    bytes that it announced, an `empty` one the writer's. Who waits for `ready` the n-th time passes
    parity n & 1, who waits for `empty` the opposite, so that the first wait goes through.
    """

    q: gl.shared_memory_descriptor  # ring; afterwards the second quarters of dQ
    do: gl.shared_memory_descriptor  # ring, in step with q; afterwards the first quarters of dQ
    lse: gl.shared_memory_descriptor  # ring, travels with q
    delta: gl.shared_memory_descriptor  # ring, travels with do
    k: gl.shared_memory_descriptor  # afterwards dK
    v: gl.shared_memory_descriptor  # afterwards dV
    p: gl.shared_memory_descriptor  # two buffers in turn, by slot
    ds: gl.shared_memory_descriptor  # two buffers in turn, by slot
    q_ready: gl.shared_memory_descriptor
    do_ready: gl.shared_memory_descriptor
    k_ready: gl.shared_memory_descriptor
    v_ready: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    do_empty: gl.shared_memory_descriptor
    kv_empty: gl.shared_memory_descriptor
    mail: gl.shared_memory_descriptor  # two slots: the next tile, in numbers
    mail_ready: gl.shared_memory_descriptor
    mail_empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(
        self, q, do, lse, delta, k, v, p, ds,
        q_ready, do_ready, k_ready, v_ready, q_empty, do_empty, kv_empty,
        mail, mail_ready, mail_empty,
    ):  # fmt: skip
        self.q, self.do, self.lse, self.delta = q, do, lse, delta
        self.k, self.v, self.p, self.ds = k, v, p, ds
        self.q_ready, self.do_ready = q_ready, do_ready
        self.k_ready, self.v_ready = k_ready, v_ready
        self.q_empty, self.do_empty, self.kv_empty = q_empty, do_empty, kv_empty
        self.mail, self.mail_ready, self.mail_empty = mail, mail_ready, mail_empty

    receive = v7.Shared.receive
    send = v7.Shared.send
    read, write = v7.Shared.read, v7.Shared.write

    @gluon.jit
    def quarter(self, PART: gl.constexpr, half, desc):
        """Half of a slot of dO (PART 0) or Q (1), 16 KiB, seen as a quarter of a tile of dQ.

        half = 2 * slot + consumer: columns 0..127 of a slot, or 128..255.
        """
        HALVES: gl.constexpr = 2 * self.q.shape[0]
        ring = self.q if PART else self.do
        ROWS: gl.constexpr = desc.block_type.shape[0]
        return reinterpret(ring, desc.dtype, [HALVES, ROWS, 256], desc.layout).index(half)


@gluon.jit
def _loader(sm, problem, next_ptr, q_desc, k_desc, v_desc, do_desc, rows_desc):
    """One warp: draws tiles from the counter and keeps the copy engine ahead of the consumers."""
    BLOCK_M: gl.constexpr = problem.BLOCK_M
    STAGES: gl.constexpr = sm.q.shape[0]
    rows = problem.UNITS * problem.HEADS * problem.TILES_M * BLOCK_M  # of LSE; then those of delta
    count = gl.to_tensor(0)  # query tiles over all key tiles: the rings never start over
    turn = gl.to_tensor(0)
    place = problem.first(gl.program_id(0))
    drawn = problem.draw(place)
    gdc_wait()  # here alone, see v7_hopper_backward
    gdc_launch_dependents()
    if problem.DETERMINISTIC:  # places in the order of arrival: before mine, all have a CTA
        place = gl.atomic_add(next_ptr, 1, sem="relaxed")
        drawn = problem.draw(place)
    while place < problem.size():
        work = problem.work(drawn)
        if work.count > 0:
            sm.send(turn, drawn)
        for it in range(work.count):
            slot, phase = count % STAGES, (count // STAGES) & 1
            q_ready, do_ready = sm.q_ready.index(slot), sm.do_ready.index(slot)
            h, m = work.locate(it)
            coord = [work.b, h, m * BLOCK_M, 0]
            kv_coord = [work.b, work.h_kv, work.start_n, 0]
            row = ((work.b * problem.H + h) * problem.TILES_M + m) * BLOCK_M

            # dO before Q: it is the first that comes back
            mbarrier.wait(sm.do_empty.index(slot), phase ^ 1)
            mbarrier.expect(do_ready, do_desc.block_type.nbytes + rows_desc.block_type.nbytes)
            tma_load(do_desc, coord, do_ready, sm.do.index(slot))
            tma_load(rows_desc, [rows + row], do_ready, sm.delta.index(slot))
            mbarrier.wait(sm.q_empty.index(slot), phase ^ 1)
            mbarrier.expect(q_ready, q_desc.block_type.nbytes + rows_desc.block_type.nbytes)
            tma_load(q_desc, coord, q_ready, sm.q.index(slot))
            tma_load(rows_desc, [row], q_ready, sm.lse.index(slot))
            if it == 0:  # last: the key tile before this one may still be at work, its slot is free
                mbarrier.wait(sm.kv_empty, (turn & 1) ^ 1)
                mbarrier.expect(sm.k_ready, k_desc.block_type.nbytes)
                tma_load(k_desc, kv_coord, sm.k_ready, sm.k.index(0))
                mbarrier.expect(sm.v_ready, v_desc.block_type.nbytes)
                tma_load(v_desc, kv_coord, sm.v_ready, sm.v.index(0))
            count += 1
        turn += gl.minimum(work.count, 1)
        place = problem.next(place, next_ptr)
        drawn = problem.draw(place)
    sm.send(turn, drawn)  # past the end of the list: everybody stops


@gluon.jit
def _writer(sm, problem, dq_desc, dk_desc, dv_desc, part_desc, lock_ptr):
    """One warp: what the consumers leave in used tiles, it hands to the copy engine.

    Of n query tiles: dQ of n - 1, then dV and dK, then the last dQ.
    """
    STAGES: gl.constexpr = sm.q.shape[0]
    ROWS: gl.constexpr = dq_desc.block_type.shape[0]
    count = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    work = sm.receive(turn, 1, problem)
    while work.count > 0:
        n = work.count
        for it in range(n):
            if it == n - 1:  # before dQ: the next key tile waits for K and V
                barrier_sync(KV_FULL, CONSUMERS_AND_WRITER)
                if work.slot < 0:
                    coord = [work.b, work.h_kv, work.start_n, 0]
                    tma_store(dv_desc, coord, sm.v.index(0))
                    tma_store(dk_desc, coord, sm.k.index(0))
                else:  # a part: see v7_hopper_backward
                    tma_store(part_desc, [1, work.slot, 0, 0], sm.v.index(0))
                    tma_store(part_desc, [0, work.slot, 0, 0], sm.k.index(0))
                tma_store_wait(0)
                mbarrier.arrive(sm.kv_empty, count=1)

            slot = count % STAGES
            h, m = work.locate(it)
            tile = (work.b * problem.H + h) * problem.TILES_M + m
            if problem.DETERMINISTIC:
                before = problem.before(work, m)
                while gl.atomic_add(lock_ptr + tile, 0, sem="acquire") != before:
                    pass
            barrier_sync(DO_FULL + slot, CONSUMERS_AND_WRITER)
            for c in gl.static_range(2):
                row = (tile * 4 + 2 * c) * ROWS
                tma_reduce_add(dq_desc, [row, 0], sm.quarter(0, 2 * slot + c, dq_desc))
            tma_store_wait(0)
            mbarrier.arrive(sm.do_empty.index(slot), count=1)
            barrier_sync(Q_FULL + slot, CONSUMERS_AND_WRITER)
            for c in gl.static_range(2):
                row = (tile * 4 + 2 * c + 1) * ROWS
                tma_reduce_add(dq_desc, [row, 0], sm.quarter(1, 2 * slot + c, dq_desc))
            tma_store_wait(0)
            mbarrier.arrive(sm.q_empty.index(slot), count=1)
            if problem.DETERMINISTIC:
                tma_store_drain()
                meet()
                gl.atomic_add(lock_ptr + tile, 1, sem="release")
            count += 1
        turn += 1
        work = sm.receive(turn, 1, problem)


@gluon.jit
def _matrix(tile):
    """A tile [1, 1, rows, HEAD_DIM] without the dims of batch and head."""
    ROWS: gl.constexpr = tile.shape[2]
    COLUMNS: gl.constexpr = tile.shape[3]
    return tile.reshape([ROWS, COLUMNS])


@gluon.jit
def _half(tile, WG: gl.constexpr):
    """A consumer's columns of a tile [1, 1, rows, HEAD_DIM]."""
    HALF: gl.constexpr = tile.shape[3] // 2
    return _matrix(tile).slice(WG * HALF, HALF, dim=1)


@gluon.jit
def _scores(sm, slot, phase, zero, WG: gl.constexpr):
    """Issue S = K Qᵀ (line 10, consumer 0) or dP = V dOᵀ (line 13, consumer 1), all of it."""
    if WG == 0:
        mbarrier.wait(sm.q_ready.index(slot), phase)
        a = _matrix(sm.k.index(zero))  # [BLOCK_N, HEAD_DIM]
        b = _matrix(sm.q.index(slot))  # [BLOCK_M, HEAD_DIM]
    else:
        mbarrier.wait(sm.do_ready.index(slot), phase)
        a = _matrix(sm.v.index(zero))
        b = _matrix(sm.do.index(slot))
    BLOCK_N: gl.constexpr = a.shape[0]
    BLOCK_M: gl.constexpr = b.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    none = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout)
    return warpgroup_mma(a, b.permute((1, 0)), none, use_acc=False, is_async=True)


@gluon.jit
def _dv_part(dv, sm, slot, WG: gl.constexpr):
    """Issue this consumer's columns of dV += Pᵀ dO (line 12)."""
    return warpgroup_mma(sm.p.index(slot), _half(sm.do.index(slot), WG), dv, is_async=True)


@gluon.jit
def _dk_part(dk, sm, slot, WG: gl.constexpr):
    """Issue this consumer's columns of dK += dSᵀ Q (line 16)."""
    return warpgroup_mma(sm.ds.index(slot), _half(sm.q.index(slot), WG), dk, is_async=True)


@gluon.jit
def _dq_part(PART: gl.constexpr, sm, slot, zero, WG: gl.constexpr):
    """Issue a half of this consumer's columns of dQ = dS K (line 15)."""
    k = _half(sm.k.index(zero), WG)
    COLUMNS: gl.constexpr = k.shape[1] // 2
    ds = sm.ds.index(slot).permute((1, 0))
    BLOCK_M: gl.constexpr = ds.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    none = gl.zeros([BLOCK_M, COLUMNS], gl.float32, layout)
    k = k.slice(PART * COLUMNS, COLUMNS, dim=1)
    return warpgroup_mma(ds, k, none, use_acc=False, is_async=True)


@gluon.jit
def _put_dq(dq, PART: gl.constexpr, sm, dq_desc, slot, WG: gl.constexpr):
    """Leave a quarter of dQ in a used tile, in the order in which the registers hold it."""
    J: gl.constexpr = dq.shape[1] // 8  # see v7_hopper_backward's _put_dq
    dq = dq.reshape([4, 2, 8, J, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([2 * J, 256])
    sm.quarter(PART, 2 * slot + WG, dq_desc).store(dq)


@gluon.jit
def _probabilities(s, sm, problem, work, it, slot, qk_scale):
    """From S to P (line 11) in half precision."""
    BLOCK_M: gl.constexpr = problem.BLOCK_M
    layout: gl.constexpr = s.type.layout
    lse = sm.lse.index(slot).load(gl.SliceLayout(0, layout))
    s = s * qk_scale - gl.expand_dims(lse, 0)  # [BLOCK_N, BLOCK_M]
    if problem.CAUSAL:
        if it < work.masked * work.heads:
            edge_n = work.edge_n - it % work.masked * BLOCK_M
            offs_n = gl.arange(0, problem.BLOCK_N, layout=gl.SliceLayout(1, layout))
            # compared with constants of the code, see v7_hopper_backward
            offs_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
            own = gl.expand_dims(offs_n + edge_n, 1) - gl.expand_dims(offs_m & 6, 0)
            visible = own <= gl.expand_dims(offs_m & (BLOCK_M - 1 - 6), 0)
            s = gl.where(visible, s, float("-inf"))
    elif problem.RAGGED:
        s = gl.minimum(s, 1.0)  # keys past the end: finite is enough, see there
    return gl.exp2(s).to(sm.q.dtype)


@gluon.jit
def _gradient(dp, sm, slot):
    """From dP and P to dS (line 14) in half precision."""
    layout: gl.constexpr = dp.type.layout
    delta = sm.delta.index(slot).load(gl.SliceLayout(0, layout))
    p = sm.p.index(slot).load(layout)
    return (p.to(gl.float32) * (dp - gl.expand_dims(delta, 0))).to(sm.q.dtype)


@gluon.jit
def _consumer(WG: gl.constexpr, sm, problem, dq_desc, dk_desc, qk_scale):
    """Four warps: columns 128 * WG and up of every tile of dQ, dK and dV."""
    STAGES: gl.constexpr = sm.q.shape[0]
    HALF: gl.constexpr = problem.HEAD_DIM // 2
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])

    base = gl.to_tensor(0)  # query tiles of the key tiles before this one
    turn = gl.to_tensor(0)
    work = sm.receive(turn, 4, problem)
    while work.count > 0:
        total = work.count
        slot, phase = base % STAGES, (base // STAGES) & 1
        dv = gl.zeros([problem.BLOCK_N, HALF], gl.float32, acc_layout)
        dk = gl.zeros([problem.BLOCK_N, HALF], gl.float32, acc_layout)

        # the first query tile: scores, no gradients yet
        mbarrier.wait(sm.k_ready, turn & 1)
        if WG == 1:
            mbarrier.wait(sm.v_ready, turn & 1)
        x = _scores(sm, slot, phase, turn >> 30, WG)
        x = warpgroup_mma_wait(0, [x])
        if WG == 0:
            at = work.first + (turn >> 30)
            p = _probabilities(x, sm, problem, work, at, slot, qk_scale)
            sm.p.index(slot).store(p)
            fence_async_shared()  # stores of threads before reads of the tensor cores
            barrier_arrive(P_READY, CONSUMERS)
            mbarrier.wait(sm.do_ready.index(slot), phase)
        else:
            barrier_sync(P_READY, CONSUMERS)
            sm.ds.index(slot).store(_gradient(x, sm, slot))
            fence_async_shared()
            barrier_arrive(DS_READY, CONSUMERS)
            mbarrier.wait(sm.q_ready.index(slot), phase)
        meet()

        for it in range(1, total):
            count = base + it
            slot, before = count % STAGES, (count - 1) % STAGES
            phase = (count // STAGES) & 1
            # it >> 30 is 0: the compiler would otherwise keep a matrix descriptor for each slice of
            # K and V in registers over the loop
            zero = it >> 30
            dv_acc = _dv_part(dv, sm, before, WG)
            if WG == 0:
                barrier_sync(DS_READY, CONSUMERS)
            dq = _dq_part(0, sm, before, zero, WG)
            dk_acc = _dk_part(dk, sm, before, WG)
            dv, dq = warpgroup_mma_wait(1, [dv_acc, dq])
            meet()  # all four warps' dV: their columns of dO may be overwritten
            _put_dq(dq, 0, sm, dq_desc, before, WG)
            fence_async_shared()  # stores of threads before reads of the copy engine
            barrier_arrive(DO_FULL + before, CONSUMERS_AND_WRITER)

            dq = _dq_part(1, sm, before, zero, WG)
            x = _scores(sm, slot, phase, zero, WG)
            dk, dq = warpgroup_mma_wait(1, [dk_acc, dq])
            meet()  # all four warps' dK: their columns of Q
            _put_dq(dq, 1, sm, dq_desc, before, WG)
            if WG == 0:
                x = warpgroup_mma_wait(0, [x])
                p = _probabilities(x, sm, problem, work, work.first + it, slot, qk_scale)
                sm.p.index(slot).store(p)
                mbarrier.wait(sm.do_ready.index(slot), phase)
                fence_async_shared()  # it takes long: one for P and dQ
                barrier_arrive(P_READY, CONSUMERS)
                barrier_arrive(Q_FULL + before, CONSUMERS_AND_WRITER)
            else:
                fence_async_shared()
                barrier_arrive(Q_FULL + before, CONSUMERS_AND_WRITER)
                x = warpgroup_mma_wait(0, [x])
                mbarrier.wait(sm.q_ready.index(slot), phase)
                barrier_sync(P_READY, CONSUMERS)
                sm.ds.index(slot).store(_gradient(x, sm, slot))
                fence_async_shared()
                barrier_arrive(DS_READY, CONSUMERS)
            meet()
        base += total

        # the last query tile: its gradients
        last = (base - 1) % STAGES
        dv_acc = _dv_part(dv, sm, last, WG)
        if WG == 0:
            barrier_sync(DS_READY, CONSUMERS)
        dk_acc = _dk_part(dk, sm, last, WG)
        dq = _dq_part(0, sm, last, turn >> 30, WG)
        rest = _dq_part(1, sm, last, turn >> 30, WG)
        dv, dk, dq, rest = warpgroup_mma_wait(0, [dv_acc, dk_acc, dq, rest])
        meet()
        dk = dk * (qk_scale * 0.6931471805599453)  # scale = qk_scale / log2(e)
        _half(sm.v.index(turn >> 30), WG).store(dv.to(dk_desc.dtype))
        _half(sm.k.index(turn >> 30), WG).store(dk.to(dk_desc.dtype))
        fence_async_shared()
        barrier_arrive(KV_FULL, CONSUMERS_AND_WRITER)
        _put_dq(dq, 0, sm, dq_desc, last, WG)
        _put_dq(rest, 1, sm, dq_desc, last, WG)
        fence_async_shared()
        barrier_arrive(DO_FULL + last, CONSUMERS_AND_WRITER)
        barrier_arrive(Q_FULL + last, CONSUMERS_AND_WRITER)
        turn += 1
        work = sm.receive(turn, 4, problem)


@gluon.jit(do_not_specialize=v7.SIZES)
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
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], dtype)
    mail_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sm = Shared(
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, HEAD_DIM], q_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, HEAD_DIM], do_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], rows_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], rows_desc.layout),
        gl.allocate_shared_memory(dtype, [1, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout),
        gl.allocate_shared_memory(dtype, [1, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_M], p_layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_M], p_layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [1], barrier),
        gl.allocate_shared_memory(gl.int32, [2 * v7.MAIL, 1], mail_layout),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
        gl.allocate_shared_memory(gl.int64, [2, 1], barrier),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(sm.q_ready.index(i), count=1)
        mbarrier.init(sm.do_ready.index(i), count=1)
        mbarrier.init(sm.q_empty.index(i), count=1)
        mbarrier.init(sm.do_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(sm.mail_ready.index(i), count=1)
        mbarrier.init(sm.mail_empty.index(i), count=3)  # two consumers and the writer
    mbarrier.init(sm.k_ready, count=1)
    mbarrier.init(sm.v_ready, count=1)
    mbarrier.init(sm.kv_empty, count=1)

    problem = v7.Problem(
        H, HEADS, OFFSET, TILES_M, TILES_N, UNITS, SECTION, WHOLE, PARTS, BLOCK_M, BLOCK_N,
        HEAD_DIM, SPLIT_ROWS, DS_REGISTERS, CAUSAL, RAGGED, DETERMINISTIC, CHAINED, APART,
    )  # fmt: skip
    # Registers as in v7_hopper_backward: 240 for a thread of a consumer, 24 for the others.
    gl.warp_specialize(
        [
            (_consumer, (0, sm, problem, dq_desc, dk_desc, qk_scale)),
            (_consumer, (1, sm, problem, dq_desc, dk_desc, qk_scale)),
            (_loader, (sm, problem, next_ptr, q_desc, k_desc, v_desc, do_desc, rows_desc)),
            (_writer, (sm, problem, dq_desc, dk_desc, dv_desc, part_desc, lock_ptr)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )


def backward(do, q, k, v, o, lse, causal, scale, allow_tf32, deterministic=False):
    """Gradients of q, k and v as v7_hopper_backward's, for head dims up to 256.

    Raises ValueError for other dtypes and larger head dims.
    """
    if (D := q.shape[3]) > MAX_HEAD_DIM:
        raise ValueError(f"q: expected a head dim of at most {MAX_HEAD_DIM}, got {D}")
    return v7.launch(_backward_kernel, CONFIG, do, q, k, v, o, lse, causal, scale, deterministic)
