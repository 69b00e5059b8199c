"""Hopper, first step: some warps only load, the others only compute.

In a portable kernel every warp does everything: it asks for a tile, waits, multiplies and
exponentiates. Hopper has two engines that work on their own once asked, the tensor memory
accelerator (TMA) that copies tiles and the tensor cores under `wgmma`, and one thread is enough to
ask the first. So give the copying to a warp of its own, and let two warpgroups (4 warps, what a
wgmma is issued by) do nothing but arithmetic. This step is written in Gluon, Triton's lower layer:
the compiler no longer decides which warps do what, where a tile lives or when to wait. The file
does.

    one program = one tile of 128 queries of a head

     ┌────────────┐  Q, K, V tiles     ┌───────── shared memory ─────────┐
     │ producer   │ ─────────────────> │ q_bufs[2]  k_bufs[2]  v_bufs[2] │
     │ 1 warp     │     TMA            └──┬──────────────────────────┬───┘
     └────────────┘                       │                          │
                                 ┌────────┴─────────┐       ┌────────┴─────────┐
                                 │ consumer 0       │       │ consumer 1       │
                                 │ rows 0 to 63     │       │ rows 64 to 127   │
                                 │ wgmma, softmax   │       │ wgmma, softmax   │
                                 └──────────────────┘       └──────────────────┘

**The ring.** K has two buffers, V too. The producer fills them in turn, 0, 1, 0, 1, …, ahead by as
many tiles as there are buffers; the consumers follow in the same order. Tile i lives in stage
i % STAGES. Each stage needs two messages: *ready*, from the producer, "the tile is here", and
*empty*, from the consumers, "we have read it, overwrite it".

**The barriers.** A message is an mbarrier, 8 bytes in shared memory that count arrivals. `ready`
expects one arrival, and a number of bytes: TMA subtracts what it has copied, and the barrier
completes when nothing is left. `empty` expects one arrival of each consumer.

**The phase.** A barrier is used again and again, so a waiter must say which completion it means.
It counts them modulo 2: phase 0 is the first completion, phase 1 the second, phase 0 the third. The
stage of tile i has been used i // STAGES times before, hence (i // STAGES) & 1. `wait(b, p)`
returns once phase p has completed; a new barrier behaves as if phase 1 just had, which is why the
producer, waiting for phase ^ 1 of `empty`, finds the whole ring free at first, without a special
case.

    tile i     0        1        2        3        4        STAGES = 2
    stage      0        1        0        1        0
    phase      0        0        1        1        0        consumers wait(ready[stage], phase)
                                                            producer wait(empty[stage], phase ^ 1)

    producer   K0 V0 K1 V1 ······ K2 V2 ············ K3 V3    · waits for `empty`
    consumers  ·· QK0 softmax PV0 QK1 softmax PV1 QK2 …       · waits for `ready`

Within a consumer nothing overlaps yet: QKᵀ, wait, softmax, PV, wait, and so the tensor cores stand
still while a consumer exponentiates, unless the other happens to multiply just then. `v5_pingpong`
sees to that.

The maths is the one of `v1_flash` (FlashAttention-2, arXiv 2307.08691, algorithm 1); the roles are
those of FlashAttention-3 (arXiv 2407.08608, algorithm 1). K tiles go right to left, so that those
that need a mask, on the diagonal or at the end of the keys, come first.

What lives where: Q, K and V tiles in shared memory (D=128: 32 + 64 + 64 KiB), scores, probabilities
and output in registers: the accumulator of QKᵀ is, value by value, where the A operand of PV is
expected, so P never leaves them. O goes back through the shared memory of Q, and by TMA to the
device. HBM traffic as in `v1_flash`.

Limits: Hopper only (compute capability 9.0); fp16 and bf16; head dims that are multiples of 8,
computed as the next of 64, 128, 256; no backward.

Measured on an H200 (bf16, 16,384 tokens, hidden size 2048, torch 2.11.0, Triton 3.6.0, 2026-11-22),
TFLOP/s at N = 512 / 2048 / 16384, D=128: full 406 / 522 / 576, causal 258 / 427 / 587. cuDNN in the
same run, 519 / 620 / 651 and 327 / 499 / 586.

Alone the division of labour does not beat `v3_tma`, whose small programs on an SM cover for one
another, and which leaves out most maxima: 0.91 of its speed at D=128 and 0.79 at D=64, 1.03 at
D=256 (geometric means over both masks and N = 512, 4096, 16384; same GPU and versions, 2026-11-27,
`python bench/ladder.py`). One program with all of the SM to itself is the ground that the next
steps build on: there the two consumers can be made to cover for one another on purpose.
"""

from typing import NamedTuple

import torch
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
from ._gluon import aggregate, tma_load, tma_store, tma_store_wait

CONSUMERS, ROWS = 2, 64  # warpgroups that compute, and the rows of each: the M of a wgmma


class Config(NamedTuple):
    head_dim: int  # of the tile: the tensor's, or more, filled with zeros
    block_n: int  # keys a tile
    stages: int  # tiles in the ring


# By head dim of the tile. 227 KiB of shared memory and 240 registers a thread of a consumer are the
# bounds: an accumulator is ROWS × (block_n + head_dim) / 128 of them.
CONFIGS = {
    64: Config(64, 128, 2),
    128: Config(128, 128, 2),
    256: Config(256, 64, 2),
}


def _config(head_dim):
    return CONFIGS[64 if head_dim <= 64 else 128 if head_dim <= 128 else 256]


@aggregate
class Work:
    """What every partition gets: tensors, buffers, barriers, and the tile of this program."""

    q_desc: tma.tensor_descriptor
    k_desc: tma.tensor_descriptor
    v_desc: tma.tensor_descriptor
    o_desc: tma.tensor_descriptor
    lse_ptr: gl.tensor
    q_bufs: gl.shared_memory_descriptor  # [CONSUMERS, 1, 1, ROWS, HEAD_DIM]
    k_bufs: gl.shared_memory_descriptor  # [STAGES, 1, 1, BLOCK_N, HEAD_DIM]
    v_bufs: gl.shared_memory_descriptor  # likewise
    q_ready: gl.shared_memory_descriptor  # one barrier
    k_ready: gl.shared_memory_descriptor  # STAGES barriers, as the next three
    k_empty: gl.shared_memory_descriptor
    v_ready: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    scale_log2: gl.tensor
    b: gl.tensor
    h: gl.tensor
    h_kv: gl.tensor
    start_m: gl.tensor  # first query
    n_tiles: gl.tensor  # tiles of keys to visit, at least one
    n_masked: gl.tensor  # the first so many, from the right, need a mask
    N_Q: gl.tensor
    N_K: gl.tensor
    H: gl.tensor
    CAUSAL: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, q_desc, k_desc, v_desc, o_desc, lse_ptr, q_bufs, k_bufs, v_bufs, q_ready, k_ready,
        k_empty, v_ready, v_empty, scale_log2, b, h, h_kv, start_m, n_tiles, n_masked, N_Q, N_K, H,
        CAUSAL,
    ):  # fmt: skip
        self.q_desc, self.k_desc, self.v_desc, self.o_desc = q_desc, k_desc, v_desc, o_desc
        self.lse_ptr = lse_ptr
        self.q_bufs, self.k_bufs, self.v_bufs = q_bufs, k_bufs, v_bufs
        self.q_ready = q_ready
        self.k_ready, self.k_empty, self.v_ready, self.v_empty = k_ready, k_empty, v_ready, v_empty
        self.scale_log2 = scale_log2
        self.b, self.h, self.h_kv, self.start_m = b, h, h_kv, start_m
        self.n_tiles, self.n_masked = n_tiles, n_masked
        self.N_Q, self.N_K, self.H = N_Q, N_K, H
        self.CAUSAL = gl.constexpr(CAUSAL)


@gluon.jit
def _producer(w):
    STAGES: gl.constexpr = w.k_bufs.shape[0]
    BLOCK_N: gl.constexpr = w.k_bufs.shape[3]
    CONSUMERS: gl.constexpr = w.q_bufs.shape[0]
    ROWS: gl.constexpr = w.q_bufs.shape[3]

    mbarrier.expect(w.q_ready, CONSUMERS * w.q_desc.block_type.nbytes)
    for c in gl.static_range(CONSUMERS):
        tma_load(w.q_desc, [w.b, w.h, w.start_m + c * ROWS, 0], w.q_ready, w.q_bufs.index(c))

    for i in range(w.n_tiles):
        stage = i % STAGES
        phase = i // STAGES & 1
        start_n = (w.n_tiles - 1 - i) * BLOCK_N
        # `expect` is the one arrival that `ready` counts. It precedes the copy: bytes that arrive
        # unannounced would complete the phase too early.
        mbarrier.wait(w.k_empty.index(stage), phase ^ 1)
        mbarrier.expect(w.k_ready.index(stage), w.k_desc.block_type.nbytes)
        tma_load(w.k_desc, [w.b, w.h_kv, start_n, 0], w.k_ready.index(stage), w.k_bufs.index(stage))
        mbarrier.wait(w.v_empty.index(stage), phase ^ 1)
        mbarrier.expect(w.v_ready.index(stage), w.v_desc.block_type.nbytes)
        tma_load(w.v_desc, [w.b, w.h_kv, start_n, 0], w.v_ready.index(stage), w.v_bufs.index(stage))


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
def _step(w, q_smem, zero, acc, m_i, l_i, visible, i, MASKED: gl.constexpr):
    """One tile of keys (algorithm 1 of FlashAttention-2, lines 8 to 10)."""
    STAGES: gl.constexpr = w.k_bufs.shape[0]
    BLOCK_N: gl.constexpr = w.k_bufs.shape[3]
    HEAD_DIM: gl.constexpr = w.k_bufs.shape[4]
    o_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    stage = i % STAGES
    phase = i // STAGES & 1

    mbarrier.wait(w.k_ready.index(stage), phase)
    k_smem = w.k_bufs.index(stage).reshape([BLOCK_N, HEAD_DIM])
    s = warpgroup_mma(q_smem, k_smem.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])  # [ROWS, BLOCK_N]
    mbarrier.arrive(w.k_empty.index(stage), count=1)

    if MASKED:
        s = _mask(s, visible - (w.n_tiles - 1 - i) * BLOCK_N)
    m_new = gl.maximum(m_i, gl.max(s, 1))
    m_log2 = m_new * w.scale_log2
    if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
        m_log2 = gl.where(m_new == float("-inf"), 0.0, m_log2)
    alpha = gl.exp2(m_i * w.scale_log2 - m_log2)
    p = gl.exp2(s * w.scale_log2 - gl.expand_dims(m_log2, 1))
    l_i = l_i * alpha + gl.sum(p, 1)
    acc = acc * gl.expand_dims(gl.convert_layout(alpha, o_rows), 1)

    # The same registers under another name: no data moves.
    p = gl.convert_layout(p.to(w.v_desc.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    mbarrier.wait(w.v_ready.index(stage), phase)
    v_smem = w.v_bufs.index(stage).reshape([BLOCK_N, HEAD_DIM])
    acc = warpgroup_mma(p, v_smem, acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc, p])[0]  # p among them: its registers are read until then
    mbarrier.arrive(w.v_empty.index(stage), count=1)
    return acc, m_new, l_i


@gluon.jit
def _consumer(w, WHICH: gl.constexpr):
    BLOCK_N: gl.constexpr = w.k_bufs.shape[3]
    ROWS: gl.constexpr = w.q_bufs.shape[3]
    HEAD_DIM: gl.constexpr = w.q_bufs.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)

    offs_m = w.start_m + WHICH * ROWS + gl.arange(0, ROWS, layout=rows)
    visible = gl.full([ROWS], w.N_K, gl.int32, rows)  # keys that a row sees, from 0 on
    if w.CAUSAL:  # query i sees the keys up to i + N_K - N_Q
        visible = gl.minimum(offs_m + (w.N_K - w.N_Q + 1), visible)

    m_i = gl.full([ROWS], float("-inf"), gl.float32, rows)
    l_i = gl.zeros([ROWS], gl.float32, rows)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, o_layout)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)  # a name only: use_acc=False reads none

    mbarrier.wait(w.q_ready, 0)
    q_smem = w.q_bufs.index(WHICH).reshape([ROWS, HEAD_DIM])
    # Both consumers make the same number of steps, the tile's, not their own rows': `empty` counts
    # on an arrival of each for every tile.
    for i in range(0, w.n_masked):
        acc, m_i, l_i = _step(w, q_smem, zero, acc, m_i, l_i, visible, i, MASKED=True)
    for i in range(w.n_masked, w.n_tiles):
        acc, m_i, l_i = _step(w, q_smem, zero, acc, m_i, l_i, visible, i, MASKED=False)

    # Rows that saw no key have l = 0 and m = -inf: they give 0, and lse -inf.
    inverse = gl.where(l_i == 0.0, 0.0, 1.0 / l_i)
    o = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, o_layout)), 1)
    lse = (m_i * w.scale_log2 + gl.log2(l_i)) * 0.6931471805599453  # ln 2: the natural logarithm

    # This consumer's rows of Q are read for the last time: O takes their place.
    q_smem.store(o.to(w.o_desc.dtype))
    fence_async_shared()  # written by threads, read by TMA: another path to the same memory
    tma_store(w.o_desc, [w.b, w.h, w.start_m + WHICH * ROWS, 0], w.q_bufs.index(WHICH))
    lse_ptr = w.lse_ptr + (w.b * w.H + w.h).to(gl.int64) * w.N_Q
    gl.store(lse_ptr + offs_m, lse, mask=offs_m < w.N_Q)
    tma_store_wait(0)


@gluon.jit(do_not_specialize=["H", "GROUP", "N_Q", "N_K"])
def _forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, scale_log2, H, GROUP, N_Q, N_K,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    ROWS: gl.constexpr = q_desc.block_shape[2]
    BLOCK_N: gl.constexpr = k_desc.block_shape[2]
    HEAD_DIM: gl.constexpr = k_desc.block_shape[3]
    CONSUMERS: gl.constexpr = 2

    # Which tile: heads one after the other, their tiles share K and V in L2. Causal: the longest
    # tiles first, the short ones then fill the gaps at the end.
    tiles_m = gl.cdiv(N_Q, CONSUMERS * ROWS)
    pid_bh = gl.program_id(0) // tiles_m
    pid_m = gl.program_id(0) % tiles_m
    if CAUSAL:
        pid_m = tiles_m - 1 - pid_m
    start_m = pid_m * CONSUMERS * ROWS

    n_tiles = gl.cdiv(N_K, BLOCK_N)
    n_full = N_K // BLOCK_N
    if CAUSAL:
        first = gl.maximum(start_m + N_K - N_Q + 1, 0)  # keys that the first row sees
        last = gl.maximum(start_m + N_K - N_Q + CONSUMERS * ROWS, 0)  # and the last
        n_tiles = gl.minimum(n_tiles, gl.cdiv(last, BLOCK_N))
        n_full = gl.minimum(n_full, first // BLOCK_N)
    n_tiles = gl.maximum(n_tiles, 1)  # all rows empty: one tile, all of it masked

    q_bufs = gl.allocate_shared_memory(dtype, [CONSUMERS, 1, 1, ROWS, HEAD_DIM], q_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(v_ready.index(stage), count=1)
        # An arrival is one for the whole partition: Triton gathers its threads, then one arrives.
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)

    w = Work(
        q_desc, k_desc, v_desc, o_desc, lse_ptr, q_bufs, k_bufs, v_bufs, q_ready, k_ready,
        k_empty, v_ready, v_empty, scale_log2, pid_bh // H, pid_bh % H, pid_bh % H // GROUP,
        start_m, n_tiles, n_tiles - n_full, N_Q, N_K, H, CAUSAL,
    )  # fmt: skip
    # The first partition runs on the kernel's own warps and gets the registers that the others
    # leave: 12 warps at 168 are launched (the producer's one counts as four), then the producer
    # falls to 24 and the consumers rise to 240.
    gl.warp_specialize(
        [(_consumer, (w, 0)), (_consumer, (w, 1)), (_producer, (w,))], [4, 1], [240, 24]
    )


def forward(q, k, v, causal, scale, allow_tf32):
    """Launch on checked tensors. Returns o, like q, and lse (B, H, N_Q) in fp32."""
    (B, H, N_Q, D), (_, H_KV, N_K, _) = q.shape, k.shape
    o = _host.empty_like(q)
    lse = torch.empty((B, H, N_Q), dtype=torch.float32, device=q.device)
    if o.numel() == 0 or N_K == 0:  # no queries, or none sees a key; TMA takes no empty tensor
        return o.zero_(), lse.fill_(float("-inf"))
    if scale <= 0:  # the kernel takes the maximum before it scales
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)

    c = _config(D)
    q_tile, k_tile = [1, 1, ROWS, c.head_dim], [1, 1, c.block_n, c.head_dim]
    tiles = -(-N_Q // (CONSUMERS * ROWS)) * B * H
    _host.launch(
        _forward_kernel, (q.get_device(), q.dtype, c, causal), (tiles, 1, 1),
        _gluon.descriptor(q, q.shape, _gluon.strides("q", q), q_tile),
        _gluon.descriptor(k, k.shape, _gluon.strides("k", k), k_tile),
        _gluon.descriptor(v, v.shape, _gluon.strides("v", v), k_tile),
        _gluon.descriptor(o, o.shape, _gluon.strides("o", o), q_tile),
        lse, scale * _host.LOG2E, H, H // H_KV, N_Q, N_K, c.stages, causal,
        **_gluon.OPTIONS,
    )  # fmt: skip
    return o, lse


_op = _host.operator("v4_warp_specialized", forward)


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
