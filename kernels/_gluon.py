"""What the Hopper steps need from Triton that is private, renamed between versions, or absent.

Gluon is the layer of Triton in which a kernel says which warps do what and where every tile lives.
It is still experimental: names move between releases, and a few things the hardware has are not
wrapped. All of that is in this file, so that the kernels themselves read like documentation and a
new Triton breaks one place. The steps compile for sm_90 with Triton 3.6.0 to 3.9.0 without
serialised products and, but for small change in the backward (the main kernel with 3.8.0 and 3.9.0:
up to 24 bytes; the last one at head dims above 128 from 3.7.1 on: 32), without spills. They were
measured with 3.6.0. With 3.9.0, too, the GPU tests of forward and backward passed, registers
allocated as below (H200, 2026-11-27, before v7 had chains).

`why_not()` says what is missing where something is; importing this file never fails.
"""

import functools
import re

import torch

from . import _host

try:
    import triton
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language._core import builtin
    from triton.experimental.gluon.language.nvidia.hopper import tma
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from 3.9
except ImportError as e:
    MISSING = f"this Triton has no Gluon for Hopper: {e}"
else:
    MISSING = None

__all__ = [
    "OPTIONS",
    "VERSION",
    "TensorDescriptor",
    "aggregate",
    "any_above",
    "barrier_arrive",
    "barrier_sync",
    "check",
    "declare_vote",
    "descriptor",
    "multiprocessors",
    "strides",
    "tma_load",
    "tma_reduce_add",
    "tma_store",
    "tma_store_drain",
    "tma_store_wait",
    "why_not",
]


HOPPER = (9, 0)  # exactly: wgmma and setmaxnreg are sm_90a's own, later GPUs do not run them


def why_not(device=None):
    """The reason why the Hopper steps cannot run here (on CUDA device `device`), else None."""
    if MISSING is not None:
        return MISSING
    if device is not None and (have := _host.capability(device)) != HOPPER:
        return "needs compute capability 9.0 exactly (Hopper), this GPU has {}.{}".format(*have)
    return None


# -- The compiler --------------------------------------------------------------------------------

# Launch options of the Hopper steps' main kernels. From 3.7 on Triton has ptxas allocate registers
# at level 2, "to work around ptxas 13.x bug" (for sm_90 3.7.1 still has ptxas 12.8, 3.9.0 13.4).
# At that level ptxas 13.4 leaves up to ten numbers in local memory which a thread of v6 makes of
# its index; at its own level, 4, none. The last option of a kind counts: the user's.
OPTIONS = {}
VERSION = (0, 0)
if MISSING is None:
    VERSION = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
if VERSION >= (3, 7):
    user = triton.knobs.nvidia.ptxas_options  # PTXAS_OPTIONS of the environment
    OPTIONS["ptx_options"] = " ".join(["--regAllocOptLevel=4", *([user] if user else [])])


# -- Host: checks and tensor descriptors ---------------------------------------------------------


@functools.cache
def multiprocessors(device):
    """Of a GPU; of an H200 where there is none to ask, for compiling without one."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def check(q, k, v, scale=None):
    """_host.check, and half precision and a head dim divisible by 8 on top; returns the scale."""
    if q.device.type != "cuda":  # also under TRITON_INTERPRET=1: Gluon has no interpreter
        raise ValueError(f"q: expected a CUDA tensor, got one on {q.device}")
    scale = _host.check(q, k, v, scale, _host.HALF_DTYPES)
    if q.shape[3] % 8:
        raise ValueError(f"q: expected a head dim that is a multiple of 8, got {q.shape[3]}")
    return scale


def strides(name, t):
    """The strides of a half-precision (B, H, N, D) tensor, in a form that TMA takes.

    The copy engine addresses in steps of 16 bytes: base and strides must be multiples of that.

    Raises ValueError where they are not; t.contiguous() is.
    """
    b, h, n, _ = t.stride()
    if (t.data_ptr() | (b | h | n) << 1) & 15:  # << 1: two bytes an element
        b, h, n = (8 if size == 1 else x for size, x in zip(t.shape, (b, h, n), strict=False))
        if (t.data_ptr() | (b | h | n) << 1) & 15:
            raise ValueError(
                f"{name}: expected storage and strides (B, H, N) in multiples of 16 bytes, got"
                f" address {t.data_ptr():#x} and element strides {t.stride()}"
            )
    return b, h, n, 1


if MISSING is None:

    class _Layout(gl.NVMMASharedLayout):
        """Rows of 128 bytes, swizzled: what TMA writes and wgmma reads without bank conflicts.

        Triton asks for the repr of every descriptor's layout at every launch, and a dataclass takes
        a microsecond for it: keep the text.
        """

        def __repr__(self):
            return self._text

    @functools.cache
    def _layout(rank):
        layout = _Layout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)
        plain = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)
        object.__setattr__(layout, "_text", repr(plain))
        return layout

    class descriptor(TensorDescriptor):
        """Describe a tensor to TMA as tiles of `block_shape`, last dim contiguous; half precision
        unless a layout is given.

        A tile may reach past the end of any dim: loads fill with zeros, stores leave out. So keep
        one dim per head and per batch, then a ragged tail never touches its neighbour, and a head
        dim smaller than the tile's is padded for free. Built anew for every call: a cache would be
        keyed by address, shape and strides, whose look-up costs what it saves. Without Triton's own
        checks, a microsecond less each: `strides` made them.
        """

        round_f32_to_tf32 = False

        def __init__(self, base, shape, strides, block_shape, layout=None):
            self.base, self.shape, self.strides = base, shape, strides
            self.block_shape, self.layout = block_shape, layout or _layout(len(shape))


if MISSING is None:
    # -- TMA: one thread asks for a whole tile, the copy engine moves it ---------------------------
    # load(desc, coord, barrier, smem, pred=True), store(desc, coord, smem). Renamed in 3.9.
    if hasattr(tma, "async_load"):
        tma_load, tma_store = tma.async_load, tma.async_store
    else:
        tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global

    # store_wait(pendings): at most so many stores of this thread still *read* shared memory. Enough
    # to overwrite the buffer; not enough to tell another CTA that the data has arrived.
    tma_store_wait = tma.store_wait

    if hasattr(tma, "async_atomic_add"):  # 3.9
        tma_reduce_add = tma.async_atomic_add
    else:
        # The binding is in the wheel from 3.6 on, only its Python wrapper is not.
        @builtin
        def tma_reduce_add(tensor_desc, coord, src, _semantic=None):
            """Add a tile in shared memory to global memory, atomically per element."""
            from triton._C.libtriton import ir

            coord = _semantic._convert_to_ir_values(coord, require_i64=False)
            kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
            _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)

    @gluon.jit
    def tma_store_drain():
        """Wait until all stores and reductions of this thread are *visible* in global memory."""
        gl.inline_asm_elementwise(
            "cp.async.bulk.wait_group 0; mov.u32 $0, $1;",
            "=r,r,~{memory}",
            [gl.to_tensor(0)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )

    # -- Named barriers: `bar` of PTX, 16 a CTA, counted in threads --------------------------------
    # Triton takes ids from 0 upwards (0: the default partition, 1: the switch into partitions, 2..:
    # one per further 4-warp partition; one-warp partitions use none), we from 15 downwards; a test
    # looks at the machine code for an overlap. `threads` counts all participants, those that sync
    # and those that only arrive, and is a multiple of 32. Called by every thread of a partition.
    # Values may be run-time integers; compile-time ones become immediates.

    @gluon.jit
    def barrier_sync(barrier, threads):
        """Arrive at the named barrier, and wait until `threads` threads have."""
        gl.inline_asm_elementwise(
            "bar.sync $1, $2; mov.u32 $0, $1;",
            "=r,r,r,~{memory}",
            [gl.to_tensor(barrier), gl.to_tensor(threads)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )

    @gluon.jit
    def barrier_arrive(barrier, threads):
        """Arrive at the named barrier and go on: others wait for us, we wait for nobody."""
        gl.inline_asm_elementwise(
            "bar.arrive $1, $2; mov.u32 $0, $1;",
            "=r,r,r,~{memory}",
            [gl.to_tensor(barrier), gl.to_tensor(threads)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )

    # -- Votes: what a warp's lanes hold in sum, without shared memory -----------------------------
    # Gluon reduces over all warps of a partition, through shared memory and a barrier. One warp can
    # go its own way with an instruction, vote, but inline assembly takes tensors and returns such;
    # nothing makes a number of them. So the result goes from one piece of assembly to the next by a
    # name in the PTX, a predicate that is declared once a kernel. LLVM keeps such pieces in order.

    @gluon.jit
    def declare_vote():
        """Once in a kernel, before its partitions, where it calls any_above."""
        gl.inline_asm_elementwise(
            ".reg .pred any_above; mov.u32 $0, $1;",
            "=r,r",
            [gl.to_tensor(0)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )

    @gluon.jit
    def any_above(x, bound):
        """Whether a lane of this warp holds a value above `bound`, or NaN; two values of x a lane.

        Warps differ. What depends on it must need no other warp: no barrier, no shared memory.
        """
        gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gtu.f32 p, $2, $4; setp.gtu.or.f32 p, $3, $5, p;"
            " vote.sync.any.pred any_above, p, 0xffffffff; } mov.b32 $0, $2; mov.b32 $1, $3;",
            "=r,=r,r,r,r,r",
            [x, bound],
            dtype=gl.float32,
            is_pure=False,
            pack=2,
        )
        voted = gl.inline_asm_elementwise(
            "selp.u32 $0, 1, $1, any_above;",
            "=r,r",
            [gl.to_tensor(0)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
        return voted != 0


def section(units, most):
    """Heads in a section of a list that is ordered heaviest tile first within sections: at most so
    many, and in every section as many.

    A last section of few heads has fewer long tiles than there are multiprocessors, and while these
    are at work no section follows to fill the others.
    """
    most = max(1, min(units, most))
    for size in range(most, most // 2, -1):
        if units % size == 0:
            return size
    return -(-units // -(-units // most))
