"""Compile the shipped kernels for GPUs that this machine does not have, and read the machine code.

    python validate/compiled.py                      # every kernel step, sm_80 and sm_90
    python validate/compiled.py --steps v1_flash --arch 90 --dtypes bfloat16 --head-dims 64 128

Each step's own `forward` and `backward` launchers run on small CPU tensors, every launch turned
into a compilation for the named architecture, so that what is read here is what a GPU would run:
the same configuration table, the same specialisations. One line a kernel: registers, spilled bytes,
shared memory, and the numbers of ptxas' performance warnings (C7510 and its neighbours: matrix
instructions that should overlap were serialised). Exit code 1 where a kernel spills, needs more
shared memory than the GPU has, mixes two generations of matrix instructions, overwrites an operand,
or fails to compile, where a step written for one architecture draws a warning, and where nothing
was compiled.
"""

import argparse
import contextlib
import functools
import importlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from flashstudy.validate.machine_code import lost_operands

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block may use


# Spills that are known and stay, by (step, D, dtype, kernel): bytes at most with Triton 3.6, which
# the tiles were chosen and measured with, and with later versions, which ask ptxas for a lesser
# allocation of registers (--regAllocOptLevel=2; the steps in Gluon turn that back). v2's tile at
# D = 256 was faster on an H200 than those tried that do not spill. What later versions spill has
# not been timed.
KNOWN_SPILLS = {
    ("v2_lean", 256, "bfloat16", "_forward_kernel"): (0, 24),
    ("v2_lean", 256, "bfloat16", "_dkdv_kernel"): (224, 696),
    ("v3_tma", 128, "bfloat16", "_dkdv_kernel"): (0, 16),
    ("v3_tma", 256, "bfloat16", "_dq_kernel"): (0, 8),
    ("v3_tma", 256, "bfloat16", "_dkdv_kernel"): (0, 304),
    ("v7_hopper_backward", 64, "bfloat16", "_backward_kernel"): (0, 8),
    ("v7_hopper_backward", 128, "bfloat16", "_backward_kernel"): (0, 24),
}
WIDER = {"v7_hopper_backward": "v7_wide_heads"}  # the file that takes head dims above a step's own
LENGTHS = (512, 8192, 16384)  # some launchers take another kernel for much work than for little
# lengths and batches: several turns for everyone, and of short sequences as many heads as there are
# multiprocessors, or twice as many
MANY = ((512, 99), (2048, 33), (8192, 16), (256, 66), (512, 132))


class Kernel(NamedTuple):
    """What ptxas made of one kernel."""

    name: str
    registers: int
    spills: int  # bytes stored and loaded
    shared: int  # bytes
    warps: int  # launched, with those of warp-specialised workers
    warnings: tuple  # numbers of ptxas' performance warnings, such as C7510
    asm: dict  # ptx, ttgir, cubin, … by name

    @property
    def sass(self):
        """The machine code as text (nvdisasm)."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
            f.write(self.asm["cubin"])
            f.flush()
            return _tool("nvdisasm", "-c", f.name).stdout


def _tool(path, *args):
    """Run one of the CUDA tools that Triton ships, by its name or path."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / path
    return subprocess.run([path, *args], capture_output=True, text=True, check=True)


@functools.cache
def _ptxas(arch, options):
    """The assembler that Triton uses for an architecture, and how it calls it for a kernel with
    these `ptx_options`.
    """
    from triton.backends.nvidia import compiler

    call = [compiler.get_ptxas(arch).path, "-lineinfo", "-v"]
    if "--regAllocOptLevel=2" in inspect.getsource(compiler.CUDABackend.make_cubin):
        call.append("--regAllocOptLevel=2")  # newer versions
    return *call, *(options or "").split()


def _read(kernel, arch):
    """Assemble the kernel's PTX once more, verbosely, and parse what ptxas says of it."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "k.ptx")
        ptx.write_text(kernel.asm["ptx"])
        target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.M).group(1)
        call = *_ptxas(arch, kernel.metadata.ptx_options), f"--gpu-name={target}"
        log = _tool(*call, ptx, "-o", f"{ptx}.cubin").stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return Kernel(
        name=kernel.metadata.name,
        registers=int(re.search(r"Used (\d+) registers", log).group(1)),
        spills=int(spills.group(1)) + int(spills.group(2)),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        warnings=tuple(sorted(set(re.findall(r"\(?(C7\d\d\d)\)?", log)))),
        asm=dict(kernel.asm.items()),
    )


@contextlib.contextmanager
def compile_only(arch):
    """Within this context every Triton launch compiles for sm_<arch> and launches nothing.

    Yields the list that the compiled kernels are appended to, as triton's CompiledKernel. The
    process must not have TRITON_INTERPRET set: interpreted functions are never compiled.
    """
    import triton
    from flashstudy.kernels import _host
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1: the kernels are interpreted, not compiled")

    class Driver:  # the parts of a driver that compiling asks for
        def get_current_target(self):
            return GPUTarget("cuda", arch, 32)

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_current_device(self):
            return arch  # a key of its own in the caches of compiled kernels

        def get_current_stream(self, device):
            return 0

    kernels, run, active = [], JITFunction.run, triton.runtime.driver._active

    @functools.wraps(run)
    def compile_instead(self, *args, warmup, **kwargs):
        kernels.append(run(self, *args, warmup=True, **kwargs))
        return kernels[-1]

    capability = _host.capability
    modules = [m for n, m in sys.modules.items() if n.startswith("flashstudy.kernels.")]
    holders = [m for m in modules if getattr(m, "capability", None) is capability]
    try:
        triton.runtime.driver.set_active(Driver())
        JITFunction.run = compile_instead
        for m in holders:
            m.capability = lambda device: (arch // 10, arch % 10)
        yield kernels
    finally:
        triton.runtime.driver._active = active
        JITFunction.run = run
        for m in holders:
            m.capability = capability


def compile_step(step, arch, head_dim, dtype, causal, backward=False, sizes=None):
    """Compile the kernels that `kernels/<step>.py` launches; a list of Kernel.

    sizes: (N, query heads to a key head, B), B = 1 where left out; by default LENGTHS without
    grouping.
    """
    module = _module(step, head_dim)
    with compile_only(arch) as kernels:
        for n, group, *batch in sizes or [(n, 1) for n in LENGTHS]:
            b = batch[0] if batch else 1
            q, do, o = (torch.empty(b, 2 * group, n, head_dim, dtype=dtype) for _ in range(3))
            k, v = (torch.empty(b, 2, n, head_dim, dtype=dtype) for _ in range(2))
            if backward:
                lse = torch.empty(q.shape[:3], dtype=torch.float32)
                module.backward(do, q, k, v, o, lse, causal, head_dim**-0.5, False)
            else:
                module.forward(q, k, v, causal, head_dim**-0.5, False)
    return [_read(k, arch) for k in {k.hash: k for k in kernels}.values()]


def faults(kernel, arch, tuned, spills=0):
    """Why a compiled kernel must not ship: a list of reasons, empty where there is none.

    tuned: the step is written for this architecture alone, so that a warning is a regression.
    spills: bytes that it may spill.
    """
    found = [f"ptxas warns: {w}" for w in kernel.warnings if tuned]
    # A product with fewer than 64 rows falls back to the tensor cores' older instructions. In a
    # pipelined loop that also has the newer, asynchronous ones, Triton 3.6 gives the streamed tile
    # one buffer too few: the next copy overwrites it while a wgmma still reads (seen on an H200 as
    # gradients that differ from run to run).
    if {"2", "3"} <= set(re.findall(r"nvidia_mma<\{versionMajor = (\d)", kernel.asm["ttgir"])):
        found.append("mixes mma and wgmma")
    if "wgmma" in kernel.asm.get("ptx", "") and (lost := lost_operands(kernel.sass)):
        found.append(f"overwrites an operand: R{lost[0]}")
    if kernel.spills > spills:
        found.append(f"spills {kernel.spills} bytes")
    if kernel.shared > SHARED_LIMIT[arch]:
        found.append(f"{kernel.shared} bytes of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
    return found


def known_spills(step, head_dim, dtype, kernel):
    """Bytes that a kernel may spill with the Triton at hand."""
    import triton

    tuned_for, later = KNOWN_SPILLS.get((step, head_dim, dtype, kernel), (0, 0))
    return tuned_for if triton.__version__.startswith("3.6.") else later


def steps():
    """The ladder's steps in order, as {step: row of the table of backends}."""
    from flashstudy.backends import BACKENDS

    return {name: row for name, row in BACKENDS.items() if row.target.startswith("kernels.")}


def _module(step, head_dim):
    """The module of a step, or of its file for head dims as wide as this one."""
    module = importlib.import_module(f"flashstudy.kernels.{step}")
    if head_dim > getattr(module, "MAX_HEAD_DIM", head_dim):
        module = importlib.import_module(f"flashstudy.kernels.{WIDER[step]}")
    return module


def has(step, direction):
    """Whether a step launches "forward" or "backward" kernels."""
    return hasattr(importlib.import_module(f"flashstudy.kernels.{step}"), direction)


def main(argv=None):
    from tabulate import tabulate
    from tqdm import tqdm

    dtypes = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", choices=list(steps()), default=list(steps()))
    parser.add_argument("--arch", nargs="+", type=int, choices=list(SHARED_LIMIT), default=[80, 90])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=["bfloat16", "float32"])
    parser.add_argument("--group", type=int, default=1, help="query heads to a key head")
    args = parser.parse_args(argv)

    rows, bad = [], 0
    cases = [
        (step, arch, d, dtype, causal, backward)
        for step in args.steps
        for arch in args.arch
        for d in args.head_dims
        for dtype in args.dtypes
        for causal in (False, True)
        for backward in (False, True)
    ]
    progress = tqdm(cases, disable=None, leave=False)  # none where stderr is not a terminal
    for step, arch, d, dtype, causal, backward in progress:
        row = steps()[step]
        lowest = row.capability[0] * 10 + row.capability[1]
        if (
            arch < lowest
            or (row.needs and arch != lowest)
            or dtypes[dtype] not in row.dtypes
            or not has(step, "backward" if backward else "forward")
        ):
            continue
        what = [step, f"sm_{arch}", d, dtype, "causal" if causal else "full"]
        progress.set_description(" ".join(map(str, what)))
        sizes = [(n, args.group) for n in LENGTHS]
        sizes += [(n, args.group, b) for n, b in MANY if row.needs]
        for kernel in compile_step(step, arch, d, dtypes[dtype], causal, backward, sizes):
            known = known_spills(step, d, dtype, kernel.name)
            why = faults(kernel, arch, tuned=row.needs is not None, spills=known)
            bad += bool(why)
            numbers = [kernel.registers, kernel.spills, kernel.shared, " ".join(kernel.warnings)]
            rows.append([*what, kernel.name, *numbers, "; ".join(why)])
    head = [
        "step",
        "GPU",
        "D",
        "dtype",
        "mask",
        "kernel",
        "registers",
        "spills",
        "shared",
        "ptxas",
        "fault",
    ]
    print(tabulate(rows, headers=[*head, "ptxas", "fault"]))
    print(f"\n{len(rows)} kernels compiled, {bad} at fault")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
