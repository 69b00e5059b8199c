"""Hopper, second step: the tensor cores multiply while the warps exponentiate.

In `v4_warp_specialized` a consumer multiplies, waits, exponentiates, multiplies, waits. A tile of
D=128 takes the tensor cores 1024 clocks (64 rows, 128 keys, both products), its softmax some 450
issue slots of each scheduler. One after the other, each engine idles while the other works. The
data allow better, in two ways (FlashAttention-3, arXiv 2407.08608).

**Overlap within a consumer** (its algorithm 2). The scores of tile i do not depend on the product
of P and V of tile i - 1. So issue both together, and do the softmax of tile i as soon as the first
of them is done:

    issue   S = Q K[i]ᵀ            wgmma runs in the background, in order; `warpgroup_mma_wait(1)`
    issue   O = O + P V[i-1]       returns when all but the newest one have finished: S is there,
    wait(1) softmax of S           PV may still run
    wait(0) rescale O, P = new P

The state that a step hands to the next is P, not yet multiplied; the first tile has no PV before it
and the last needs one after it.

**Ping-pong between consumers** (section 3.1). Two warpgroups that both want the tensor cores at the
same time also both exponentiate at the same time afterwards. Make them take turns: a consumer
issues its two products only when the other has issued its own. Then each softmax lies under the
other's products.

    tensor cores │ QK₀ PV₀ │ QK₁ PV₁ │ QK₀ PV₀ │ QK₁ PV₁ │ …        ₀ ₁: of which consumer
    consumer 0   │         softmax   │         softmax   │
    consumer 1   │ softmax │         softmax   │         softmax
                           ^ turn passes to 1  ^ to 0    ^ to 1

A turn is a named barrier of the CTA, counted in threads: 128 that wait plus 128 that have arrived
without waiting make 256. Barrier WHICH means "consumer WHICH may issue". Consumer 1 gives the first
turn away before it starts; from then on each turn is taken once and given once, and at the end
consumer 0 takes the one that is left over, so that no barrier is left half full. Both make the same
number of steps, or the turns would stop coming: that number belongs to the tile, not to the rows.

ptxas moves the second wait up in front of most exponentials: P V is waited for early, and what is
left of the overlap is the one between consumers. A basic block between the two, which keeps the
order of the source, gained nothing on an H200: with turns, the other consumer's products fill that
time.

At D=256 a tile has 64 keys, hence half the exponentials for the same products: little to hide, and
the turns cost more than they bring. They are off there.

Also new: the sum of a row stays in pieces, one for each of the 4 lanes that hold the row, and is
added up once at the end rather than by shuffles in every step.

Otherwise as `v4_warp_specialized`: one program a tile of 128 queries, a producer warp, rings of two
K and two V tiles, phases, masks. Limits and memory traffic are the same.

Measured on an H200 (bf16, 16,384 tokens, hidden size 2048, torch 2.11.0, Triton 3.6.0, 2026-11-22),
TFLOP/s at N = 512 / 2048 / 16384, D=128: full 427 / 607 / 658, causal 265 / 504 / 656. In the same
run `v4_warp_specialized` had 406 / 522 / 576 and 258 / 427 / 587.
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
from ._gluon import (
    aggregate,
    barrier_arrive,
    barrier_sync,
    tma_load,
    tma_store,
    tma_store_wait,
)

CONSUMERS, ROWS = 2, 64  # warpgroups that compute, and the rows of each: the M of a wgmma


class Config(NamedTuple):
    head_dim: int  # of the tile: the tensor's, or more, filled with zeros
    block_n: int  # keys a tile
    stages: int  # tiles in the ring
    pingpong: bool  # the consumers take turns


# By head dim of the tile. 227 KiB of shared memory and 240 registers a thread of a consumer are the
# bounds: an accumulator is ROWS × (block_n + head_dim) / 128 of them.
CONFIGS = {
    64: Config(64, 128, 2, True),
    128: Config(128, 128, 2, True),
    256: Config(256, 64, 2, False),
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
    PINGPONG: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, q_desc, k_desc, v_desc, o_desc, lse_ptr, q_bufs, k_bufs, v_bufs, q_ready, k_ready,
        k_empty, v_ready, v_empty, scale_log2, b, h, h_kv, start_m, n_tiles, n_masked, N_Q, N_K, H,
        CAUSAL, PINGPONG,
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
        self.CAUSAL, self.PINGPONG = gl.constexpr(CAUSAL), gl.constexpr(PINGPONG)


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
def _lane_sums(p):
    """[ROWS, BLOCK_N] -> [ROWS, 4]: sum what each of the 4 lanes of a row holds, no shuffles."""
    parts = gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2])  # columns 8j + 2 · lane + {0, 1}
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def _softmax(w, s, m_i, l_i, MASKED: gl.constexpr):
    """Online softmax of a tile (algorithm 1 of FlashAttention-2, line 9): p, alpha, m_i, l_i."""
    m_new = gl.maximum(m_i, gl.max(s, 1))
    m_log2 = m_new * w.scale_log2
    if MASKED:  # a row that has seen no key yet: -inf - -inf would be NaN
        m_log2 = gl.where(m_new == float("-inf"), 0.0, m_log2)
    alpha = gl.exp2(m_i * w.scale_log2 - m_log2)
    p = gl.exp2(s * w.scale_log2 - gl.expand_dims(m_log2, 1))  # [ROWS, BLOCK_N]
    sums = _lane_sums(p)
    l_rows: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    l_i = l_i * gl.expand_dims(gl.convert_layout(alpha, l_rows), 1) + sums  # [ROWS, 4]
    return p, alpha, m_new, l_i


@gluon.jit
def _operand(p, dtype: gl.constexpr, o_layout: gl.constexpr):
    """P as the A operand of PV: the same registers under another name, no data moves."""
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, o_layout, 2))


@gluon.jit
def _packed(p):
    """Keep pairs of half-precision values in one register across a loop's edge.

    LLVM would carry them apart and pack them anew in every iteration, 32 instructions of 450.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [p], dtype=p.dtype, is_pure=False, pack=2
    )


# Named barriers 14 and 15: whose turn it is.


@gluon.jit
def _take_turn(WHICH: gl.constexpr):
    barrier_sync(14 + WHICH, 256)


@gluon.jit
def _give_turn(WHICH: gl.constexpr):
    barrier_arrive(14 + WHICH, 256)


@gluon.jit
def _step(w, q_smem, zero, acc, p, m_i, l_i, visible, i, WHICH: gl.constexpr, MASKED: gl.constexpr):
    """Scores and softmax of tile i, and P V of tile i - 1."""
    STAGES: gl.constexpr = w.k_bufs.shape[0]
    BLOCK_N: gl.constexpr = w.k_bufs.shape[3]
    HEAD_DIM: gl.constexpr = w.k_bufs.shape[4]
    o_layout: gl.constexpr = acc.type.layout
    k_stage = i % STAGES
    v_stage = (i - 1) % STAGES
    k_smem = w.k_bufs.index(k_stage).reshape([BLOCK_N, HEAD_DIM])
    v_smem = w.v_bufs.index(v_stage).reshape([BLOCK_N, HEAD_DIM])

    mbarrier.wait(w.k_ready.index(k_stage), i // STAGES & 1)
    if w.PINGPONG:
        _take_turn(WHICH)
    s = warpgroup_mma(q_smem, k_smem.permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(w.v_ready.index(v_stage), (i - 1) // STAGES & 1)
    acc = warpgroup_mma(p, v_smem, acc, is_async=True)
    if w.PINGPONG:
        _give_turn(1 - WHICH)

    s = warpgroup_mma_wait(1, [s])  # [ROWS, BLOCK_N]
    mbarrier.arrive(w.k_empty.index(k_stage), count=1)
    if MASKED:
        s = _mask(s, visible - (w.n_tiles - 1 - i) * BLOCK_N)
    p_next, alpha, m_i, l_i = _softmax(w, s, m_i, l_i, MASKED)

    # p among what is waited for: its registers are read until PV has finished.
    acc = warpgroup_mma_wait(0, [acc, p])[0]
    mbarrier.arrive(w.v_empty.index(v_stage), count=1)
    acc = acc * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, o_layout)), 1)
    return acc, _operand(p_next, w.v_desc.dtype, o_layout), m_i, l_i


@gluon.jit
def _consumer(w, WHICH: gl.constexpr):
    STAGES: gl.constexpr = w.k_bufs.shape[0]
    BLOCK_N: gl.constexpr = w.k_bufs.shape[3]
    ROWS: gl.constexpr = w.q_bufs.shape[3]
    HEAD_DIM: gl.constexpr = w.q_bufs.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    if w.PINGPONG and WHICH == 1:
        _give_turn(0)

    offs_m = w.start_m + WHICH * ROWS + gl.arange(0, ROWS, layout=rows)
    visible = gl.full([ROWS], w.N_K, gl.int32, rows)  # keys that a row sees, from 0 on
    if w.CAUSAL:  # query i sees the keys up to i + N_K - N_Q
        visible = gl.minimum(offs_m + (w.N_K - w.N_Q + 1), visible)

    # Tile 0 has no P V of a tile before it.
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)  # a name only: use_acc=False reads none
    mbarrier.wait(w.q_ready, 0)
    q_smem = w.q_bufs.index(WHICH).reshape([ROWS, HEAD_DIM])
    mbarrier.wait(w.k_ready.index(0), 0)
    k_smem = w.k_bufs.index(0).reshape([BLOCK_N, HEAD_DIM])
    s = warpgroup_mma(q_smem, k_smem.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    mbarrier.arrive(w.k_empty.index(0), count=1)
    if w.n_masked > 0:
        s = _mask(s, visible - (w.n_tiles - 1) * BLOCK_N)
    m_i = gl.full([ROWS], float("-inf"), gl.float32, rows)
    l_i = gl.zeros_like(_lane_sums(zero))
    p, _, m_i, l_i = _softmax(w, s, m_i, l_i, MASKED=True)
    p = _packed(_operand(p, w.v_desc.dtype, o_layout))
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, o_layout)

    if w.CAUSAL:
        for i in range(1, w.n_masked):
            acc, p, m_i, l_i = _step(
                w, q_smem, zero, acc, p, m_i, l_i, visible, i, WHICH, MASKED=True
            )
        p = _packed(p)
    # Without causal only tile 0, the last of the keys, can need a mask.
    for i in range(gl.maximum(w.n_masked, 1), w.n_tiles):
        acc, p, m_i, l_i = _step(w, q_smem, zero, acc, p, m_i, l_i, visible, i, WHICH, MASKED=False)

    # P V of the last tile.
    stage = (w.n_tiles - 1) % STAGES
    mbarrier.wait(w.v_ready.index(stage), (w.n_tiles - 1) // STAGES & 1)
    v_smem = w.v_bufs.index(stage).reshape([BLOCK_N, HEAD_DIM])
    acc = warpgroup_mma(p, v_smem, acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc, p])[0]
    mbarrier.arrive(w.v_empty.index(stage), count=1)

    # Rows that saw no key have l = 0 and m = -inf: they give 0, and lse -inf.
    l_i = gl.convert_layout(gl.sum(l_i, 1), rows)
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
    if w.PINGPONG and WHICH == 0:
        _take_turn(0)


@gluon.jit(do_not_specialize=["H", "GROUP", "N_Q", "N_K"])
def _forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, scale_log2, H, GROUP, N_Q, N_K,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, PINGPONG: gl.constexpr,
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
        start_m, n_tiles, n_tiles - n_full, N_Q, N_K, H, CAUSAL, PINGPONG,
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
        lse, scale * _host.LOG2E, H, H // H_KV, N_Q, N_K, c.stages, causal, c.pingpong,
        **_gluon.OPTIONS,
    )  # fmt: skip
    return o, lse


_op = _host.operator("v5_pingpong", forward)


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
