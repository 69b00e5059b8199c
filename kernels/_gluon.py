"""What the Hopper steps need from Triton that is private, renamed between versions, or absent.

Gluon is the layer of Triton in which a kernel says which warps do what and where every tile lives.
It is still experimental: names move between releases, and a few things the hardware has are not
wrapped. All of that is in this file, so that the kernels themselves read like documentation and a
new Triton breaks one place. Compiled for sm_90 with Triton 3.6.0 and 3.9.0; run on 3.6.0.

`why_not()` says what is missing where something is; importing this file never fails.
"""

try:
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
    "TensorDescriptor",
    "aggregate",
    "barrier_arrive",
    "barrier_sync",
    "tma_load",
    "tma_reduce_add",
    "tma_store",
    "tma_store_drain",
    "tma_store_wait",
    "why_not",
]


def why_not(device=None):
    """The reason why the Hopper kernels cannot run here (on `device`, a CUDA one), else None."""
    if MISSING is not None:
        return MISSING
    if device is not None:
        import torch

        # wgmma and setmaxnreg belong to sm_90a alone: later GPUs do not run this machine code.
        if (have := torch.cuda.get_device_capability(device)) != (9, 0):
            return "needs compute capability 9.0 exactly (Hopper), this GPU has {}.{}".format(*have)
    return None


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
    # one per further 4-warp partition; one-warp partitions use none): with at most three further
    # partitions 8 to 15 are free. `threads` counts all participants, those that sync and those that
    # only arrive, and is a multiple of 32. Called by every thread of a partition. Values may be
    # run-time integers; compile-time ones become immediates.

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
