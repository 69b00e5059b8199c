"""The gate that compiles the shipped kernels without a GPU: it reads right, and it can say no."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compiled.py")


def run(*args, program=PROGRAM):
    """Run the gate, or another program, in a process of its own that does not interpret."""
    command = [sys.executable, program]
    env = {"PATH": "/usr/bin:/bin", "TRITON_INTERPRET": "0"}

    return subprocess.run(
        [*map(str, command), *args],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=240,
    )


def test_text_book_step_compiles_clean():
    got = run("--steps", "v1_flash", "--dtypes", "float16", "--head-dims", "64", "--arch", "90")
    assert got.returncode == 0, got.stdout + got.stderr
    assert ", 0 at fault" in got.stdout
    for kernel in ("_forward_kernel", "_delta_kernel", "_dq_kernel", "_dkdv_kernel"):
        assert kernel in got.stdout


def test_spills_are_seen(tmp_path):
    """A kernel that keeps far more values alive than a thread has registers must be rejected."""
    program = tmp_path / "hog.py"
    program.write_text(
        textwrap.dedent("""
        import torch, triton, triton.language as tl
        from flashstudy.validate import compiled

        @triton.jit
        def hog(x_ptr, y_ptr, N: tl.constexpr):
            x = tl.load(x_ptr + tl.arange(0, N))
            for _ in range(tl.load(y_ptr).to(tl.int32)):  # x lives through the loop
                x = x * x + tl.sum(x)
            tl.store(y_ptr + tl.arange(0, N), x)

        t = torch.empty(2048)
        with compiled.compile_only(90) as kernels:
            hog[(1,)](t, t, 2048, num_warps=1, maxnreg=32)
        kernel = compiled._read(kernels[0], 90)
        print(kernel.spills > 0, compiled.faults(kernel, 90, tuned=False))
        """)
    )
    got = run(program=program)
    assert got.returncode == 0, got.stderr
    assert got.stdout.startswith("True ['spills"), got.stdout


def test_shared_memory_limit_is_enforced():
    from flashstudy.validate.compiled import Kernel, faults

    fits = Kernel("k", 64, 0, 163 * 1024, 4, (), {"ttgir": ""})
    assert faults(fits, 80, tuned=True) == []
    assert "shared memory" in faults(fits._replace(shared=163 * 1024 + 1), 80, tuned=False)[0]


def test_warnings_count_only_where_the_step_is_made_for_the_architecture():
    from flashstudy.validate.compiled import Kernel, faults

    serialised = Kernel("k", 64, 0, 0, 4, ("C7510",), {"ttgir": ""})
    assert faults(serialised, 90, tuned=False) == []
    assert faults(serialised, 90, tuned=True) == ["ptxas warns: C7510"]


@pytest.mark.parametrize("args", [("--steps", "v99"), ("--arch", "12"), ("--dtypes", "int8")])
def test_bad_arguments(args):
    got = run(*args)
    assert got.returncode == 2
    assert args[0] in got.stderr


def test_mixing_two_generations_of_matrix_instructions_is_a_fault():
    from flashstudy.validate.compiled import Kernel, faults

    one = "#ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0}>"
    two = one + "#ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0}>"
    assert faults(Kernel("k", 64, 0, 0, 4, (), {"ttgir": one}), 90, tuned=False) == []
    assert "mma" in faults(Kernel("k", 64, 0, 0, 4, (), {"ttgir": two}), 90, tuned=False)[0]


LOOP = """
.L_x_1:
        /*0100*/                   WARPGROUP.ARRIVE ;                                    /* 0x1 */
        /*0110*/                   HGMMA.64x64x16.F32.BF16 R24, {same}, gdesc[UR4], RZ, !UPT ;
        /*0120*/              @!P0 BRA `(.L_x_2) ;
        /*0130*/                   F2FP.BF16.F32.PACK_AB R132, R25, R24 ;
.L_x_2:
        /*0140*/                   STS.128 [R120], R24 ;
        /*0150*/                   HGMMA.64x64x16.F32.BF16 R88, R132, gdesc[UR8].tnspB, R88, gsb0 ;
        /*0160*/               @P1 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(
    ("same", "lost"),
    [("R132", [132]), ("R129", [132]), ("R128", []), ("R136", []), ("gdesc[UR16]", [])],
)
def test_an_operand_that_a_loop_overwrites_is_seen(same, lost):
    """R132 is computed in the loop; an operand of four registers that stays must keep clear."""
    from flashstudy.validate.machine_code import lost_operands

    assert lost_operands(LOOP.format(same=same)) == lost


def test_an_operand_from_the_turn_before_is_none_that_is_lost():
    """Who computes an operand for the next turn has no other product take it in this one."""
    from flashstudy.validate.machine_code import lost_operands

    one = LOOP.format(same="R132").replace("R88, R132, gdesc", "R88, gdesc")
    assert lost_operands(one) == []


def test_such_an_operand_is_a_fault(monkeypatch):
    from flashstudy.validate.compiled import Kernel, faults

    kernel = Kernel("k", 64, 0, 0, 4, (), {"ttgir": "", "ptx": "wgmma.mma_async"})
    for same, found in ("R128", []), ("R132", ["overwrites an operand: R132"]):
        monkeypatch.setattr(Kernel, "sass", LOOP.format(same=same))
        assert faults(kernel, 90, tuned=False) == found


STAYS = """
import re, torch
from flashstudy.kernels import v3_tma
from flashstudy.validate import compiled

for d in (64, 40):
    for dtype in (torch.bfloat16, torch.float16):
        for causal in (False, True):
            for kernel in compiled.compile_step("v3_tma", 90, d, dtype, causal, True, [(16384, 1)]):
                if kernel.name == "_dkdv_kernel":
                    operands = re.findall(r"HGMMA.64x32x16.F32\\S* R\\d+, (R|gdesc)", kernel.sass)
                    where = set(operands)
                    three = kernel.registers <= 65536 // 3 // 128 // 8 * 8  # programs on an SM
                    faults = compiled.faults(kernel, 90, tuned=False)
                    print(len(operands), *where, three, kernel.spills, faults)
"""


def test_k_and_v_stay_in_registers(tmp_path):
    """At head dim 64, where nothing else gets them; not with a Triton that was not looked at."""
    from flashstudy.kernels import v3_tma

    program = tmp_path / "stays.py"
    program.write_text(STAYS)
    got = run(program=program)
    assert got.returncode == 0, got.stderr
    rows = [line.split(maxsplit=4) for line in got.stdout.splitlines()]
    assert len(rows) == 8
    where = "R" if v3_tma.STAY.value else "gdesc"
    for operands, *rest in rows:
        assert int(operands) >= 8  # S and dP, 64 columns by 16
        assert rest == [where, "True", "0", "[]"]


TURNS = """
import torch
from flashstudy.validate import compiled
from flashstudy.validate.machine_code import product_loops

cases = [(16384, 128, torch.bfloat16), (16384, 128, torch.float16), (16384, 64, torch.bfloat16)]
for n, d, dtype in [*cases, (1024, 128, torch.bfloat16)]:
    for causal in (False, True):
        for kernel in compiled.compile_step(
            "v7_hopper_backward", 90, d, dtype, causal, True, [(n, 1)]
        ):
            if kernel.name == "_backward_kernel":
                for loop in product_loops(kernel.sass):
                    line = "".join(loop)
                    if line.count("HGMMA") == 32:  # five products of 4 or 8 instructions
                        print(n, d, causal, line.count("FSEL"), line.count("PRMT"))
"""


def test_query_tiles_without_a_mask_have_a_loop_without_one(tmp_path):
    """The branch that it would hide behind costs every tile; and no loop takes pairs of P apart."""
    from flashstudy.kernels import v7_hopper_backward as v7

    program = tmp_path / "turns.py"
    program.write_text(TURNS)
    got = run(program=program)
    assert got.returncode == 0, got.stderr
    loops = [line.split() for line in got.stdout.splitlines()]
    # of two consumers, two dtypes at (16384, 128); a thread's scores
    for case, count, scores in ("16384 128", 4, "32"), ("16384 64", 2, "64"), ("1024 128", 2, "32"):
        full, causal = (
            sorted(row[3:] for row in loops if row[:3] == [*case.split(), mask])
            for mask in ("False", "True")
        )
        without, masked = [["0", "0"]] * count, [[scores, "0"]] * count
        assert full == without
        two = v7.TWO_LOOPS and case != "1024 128"  # for 16 query tiles at most, one
        assert causal == without * two + masked


KEYS = """
import contextlib, importlib, sys, torch
from flashstudy.kernels import _host
from flashstudy.validate import compiled

launch, found, stack = _host.launch, {}, contextlib.ExitStack()

def note(kernel, key, grid, *args, **options):
    launch(kernel, key, grid, *args, **options)
    if key is not None:
        found.setdefault((kernel.__name__, key), set()).add(kernels[-1].hash)

_host.launch = note
step = importlib.import_module("flashstudy.kernels." + sys.argv[1])
kernels = stack.enter_context(compiled.compile_only(90))
D = 64
for b, h, h_kv, n_q, n_k, fused in [
    (1, 2, 2, 48, 48, False), (1, 2, 2, 48, 48, True), (2, 3, 3, 64, 64, True),
    (1, 16, 1, 48, 47, False), (1, 1, 1, 1, 33, True), (3, 4, 2, 1, 160, False),
    (1, 2, 2, 61, 48, False), (1, 2, 2, 50, 48, False),
]:
    if fused:  # slices of a projection
        qkv = torch.empty(b, max(n_q, n_k), h + 2 * h_kv, D, dtype=torch.bfloat16).transpose(1, 2)
        q, k, v = qkv.split((h, h_kv, h_kv), 1)
        q, k, v = q[:, :, :n_q], k[:, :, :n_k], v[:, :, :n_k]
    else:
        q = torch.empty(b, h, n_q, D, dtype=torch.bfloat16)
        k, v = (torch.empty(b, h_kv, n_k, D, dtype=torch.bfloat16) for _ in range(2))
    o, do = torch.empty_like(q), torch.empty(b, n_q, h, D, dtype=q.dtype).transpose(1, 2)
    lse = torch.empty(b, h, n_q)
    if hasattr(step, "forward"):
        step.forward(q, k, v, True, 0.125, False)
    if hasattr(step, "backward"):
        step.backward(do, q, k, v, o, lse, True, 0.125, False)
for (name, key), kernels in found.items():
    print(name, len(kernels), key)
"""


@pytest.mark.parametrize(
    ("step", "kernels"),
    [
        ("v2_lean", {"_forward_kernel"}),
        ("v3_tma", {"_forward_kernel", "_dq_kernel", "_dkdv_kernel"}),
        ("v7_hopper_backward", {"_prepare_kernel", "_backward_kernel", "_finish_kernel"}),
    ],
)
def test_a_launch_key_means_one_kernel(step, kernels, tmp_path):
    """What Triton compiles anew for is in the key: else a later call would run the wrong kernel."""
    program = tmp_path / "keys.py"
    program.write_text(KEYS)
    got = run(step, program=program)
    assert got.returncode == 0, got.stderr[-3000:]
    lines = [line.split(" ", 2) for line in got.stdout.splitlines() if line.startswith("_")]
    assert {name for name, *_ in lines} == kernels
    assert [line for line in lines if line[1] != "1"] == []
    assert any(sum(name == n for n, *_ in lines) > 1 for name in kernels)  # keys that differ


SHARING = """
import torch
from flashstudy.validate.compiled import compile_step
for d, programs in ((64, 3), (128, 3), (256, 2)):
    for causal in (False, True):
        (kernel,) = compile_step("v3_tma", 90, d, torch.bfloat16, causal, sizes=[(16384, 1)])
        registers = -(-kernel.registers // 8) * 8 * 32 * kernel.warps
        assert programs * registers <= 65536, (d, causal, kernel.registers)
        assert programs * (kernel.shared + 1024) <= 228 * 1024, (d, causal, kernel.shared)
print("shared")
"""


def test_forward_programs_of_v3_share_an_sm(tmp_path):
    """Three at head dims 64 and 128, two at 256: with one register more it would be one fewer."""
    program = tmp_path / "sharing.py"
    program.write_text(SHARING)
    got = run(program=program)
    assert got.stdout == "shared\n", got.stdout + got.stderr
