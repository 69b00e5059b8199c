"""The machine code of the Hopper forward steps, read without a GPU.

What these kernels are for is easily lost without an error: an edit or another ptxas can serialise
the products, spill, or move a release in front of the wait that it must follow. So each shipped
configuration is compiled for sm_90 and its main loops are read.
"""

import json
import math
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from flashstudy.validate.machine_code import read_before_written

# step, D, causal, length, heads of q a head of k, batch: every row of the steps' tables, every
# variant. Two heads of k; v6 takes one consumer where there is little to do.
CASES = [
    ("v4_warp_specialized", 64, True, 600, 1, 1),
    ("v4_warp_specialized", 128, True, 600, 1, 1),
    ("v4_warp_specialized", 256, False, 600, 1, 1),
    ("v5_pingpong", 64, True, 600, 1, 1),
    ("v5_pingpong", 128, False, 600, 1, 1),
    ("v5_pingpong", 128, True, 600, 1, 1),
    ("v5_pingpong", 256, True, 600, 1, 1),
    ("v6_persistent", 64, False, 600, 1, 1),  # one consumer
    ("v6_persistent", 64, True, 600, 1, 1),
    ("v6_persistent", 64, False, 600, 1, 99),
    ("v6_persistent", 64, True, 600, 1, 99),  # dealt
    ("v6_persistent", 64, True, 2048, 1, 33),  # drawn
    ("v6_persistent", 64, False, 2048, 1, 99),  # three consumers
    ("v6_persistent", 64, True, 16384, 1, 9),  # three consumers, drawn
    ("v6_persistent", 128, False, 600, 1, 1),  # one consumer
    ("v6_persistent", 128, True, 600, 1, 1),
    ("v6_persistent", 128, False, 2048, 1, 99),
    ("v6_persistent", 128, True, 16384, 1, 9),
    ("v6_persistent", 128, True, 5, 8, 1),  # one consumer, packed
    ("v6_persistent", 128, True, 50, 8, 99),  # packed
    ("v6_persistent", 256, False, 600, 1, 1),  # one consumer
    ("v6_persistent", 256, True, 600, 1, 1),
    ("v6_persistent", 256, False, 2048, 1, 99),
    ("v6_persistent", 256, True, 16384, 1, 9),
    ("v6_persistent", 256, True, 5, 8, 1),  # one consumer, packed
    ("v6_persistent", 256, True, 50, 8, 99),
]
PROGRAM = """
import json, sys, torch
from flashstudy.validate import compiled
for step, d, causal, *size in json.loads(sys.argv[1]):
    k, *more = compiled.compile_step(step, 90, d, torch.bfloat16, causal, sizes=[size])
    faults = [f for x in (k, *more) for f in compiled.faults(x, 90, tuned=True)]
    print(json.dumps(dict(sass=k.sass, ptx=k.asm["ptx"], warps=k.warps, faults=faults)))
"""


@pytest.fixture(scope="module")
def kernels():
    """{case: what the compiler made of it}, from a process of its own that does not interpret."""
    got = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(CASES)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        timeout=900,
    )
    assert got.returncode == 0, got.stderr[-4000:]
    return dict(zip(CASES, map(json.loads, got.stdout.splitlines()), strict=True))


def instructions(sass):
    """(label or None, opcode, operands) of each line of machine code, predicates left out."""
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            yield label[1], "", ""
        elif op := re.search(r"\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Za-z0-9_.]+)\s*([^;]*);?", line):
            yield None, op[1], op[2].strip()


def main_loops(sass):
    """The innermost loops that multiply, as lists of (opcode, operands)."""
    code = list(instructions(sass))
    at = {label: i for i, (label, _, _) in enumerate(code) if label}
    spans = []
    for i, (_, op, operands) in enumerate(code):
        to = re.search(r"\.L_x_\d+", operands)
        if op.startswith("BRA") and to and at.get(to[0], i) < i:
            spans.append((at[to[0]], i))
    inner = [a for a in spans if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in spans)]
    loops = [[(op, x) for _, op, x in code[a : b + 1] if op] for a, b in inner]
    return [loop for loop in loops if any(op.startswith("HGMMA") for op, _ in loop)]


def positions(loop, opcode, operand=""):
    return [i for i, (op, x) in enumerate(loop) if op.startswith(opcode) and re.search(operand, x)]


def config(case):
    """What v6 takes for a case."""
    from flashstudy.kernels import v6_persistent as v6

    _, d, causal, n, group, b = case
    return v6._plan(b, 2 * group, 2, n, n, d, causal, 132).config


def consumers(case):
    return config(case).consumers if case[0][:2] == "v6" else 2


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
class TestMachineCode:
    def test_no_fault(self, kernels, case):
        """No spills, no C75xx (serialised products), shared memory within bounds."""
        assert kernels[case]["faults"] == []

    def test_products_are_asynchronous(self, kernels, case):
        """One arrival a product, and many wgmmas to each: serialised ones would arrive singly."""
        step, _, causal, *_ = case
        # v4: two products in each of two loops. Then: the first QKᵀ, two in each loop, the last PV.
        products = 4 if step[:2] == "v4" else 2 + 2 * (1 + causal)
        sass = kernels[case]["sass"]
        assert len(re.findall(r"WARPGROUP\.ARRIVE", sass)) == products * consumers(case)
        assert len(re.findall(r"\bHGMMA", sass)) >= 4 * products * consumers(case)

    def test_registers_are_reallocated(self, kernels, case):
        want = {1: {"24"}, 2: {"240", "24"}, 3: {"160", "32"}}[consumers(case)]
        got = set(re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", kernels[case]["ptx"]))
        assert want <= got
        assert kernels[case]["warps"] == 4 * (consumers(case) + 1)

    def test_named_barriers_do_not_collide(self, kernels, case):
        """Triton's ids grow from 0, ours start at 9: see `_gluon`."""
        used = re.findall(r"^\s*bar\.(?:sync|arrive)\s+(\d+)", kernels[case]["ptx"], re.M)
        used += re.findall(r"^\s*barrier\.sync\s+(\d+)", kernels[case]["ptx"], re.M)
        triton = {int(i) for i in used}
        assert triton
        assert max(triton) < 9

    def test_no_register_is_read_before_it_is_written(self, kernels, case):
        assert read_before_written(kernels[case]["sass"]) == []

    def test_main_loops(self, kernels, case):
        """Two products and two waits in the order of the source; no trip through local memory."""
        step, d, causal, *_ = case
        loops = main_loops(kernels[case]["sass"])
        masked = causal or step[:2] == "v4"
        assert len(loops) == (1 + masked) * consumers(case)
        for loop in loops:
            assert not positions(loop, "LDL")
            assert not positions(loop, "STL")
            assert len(positions(loop, "WARPGROUP.ARRIVE")) == 2
            exps = positions(loop, "MUFU.EX2")
            online = (64 if d == 256 else 128) // 2 + 2  # of p, and two of alpha
            if step[:2] == "v6":  # p comes first, all the rest only where the vote says so
                (vote,) = positions(loop, "VOTE")
                assert len([i for i in exps if i < vote]) == online - 2
                assert len([i for i in exps if i > vote]) == online
                for rest in ("FMNMX", "FMUL", "SHFL"):
                    assert vote < min(positions(loop, rest))
            else:
                assert len(exps) == online
            products = positions(loop, "HGMMA")
            one, zero = (positions(loop, "WARPGROUP.DEPBAR", f"gsb0, 0x{n}") for n in (1, 0))
            if step[:2] == "v4":
                assert len(one) == 0
                assert len(zero) == 2
                assert zero[0] < min(exps)
                continue
            assert len(one) == len(zero) == 1
            # Both products are under way before either is waited for, S is there before it is used.
            assert max(products) < one[0] < zero[0]
            assert one[0] < min(exps)
            # The turn, where they take some: before the first product, given after the last.
            if d < 256 and consumers(case) > 1:
                assert positions(loop, "BAR.SYNC", "0x100")[0] < min(products)
                given = positions(loop, "BAR.ARV", "0x100")
                assert len(given) == 1
                assert max(products) < given[0] < one[0]
            if step[:2] == "v6":  # K and V are given back after the wait for their reader
                k_empty, v_empty = positions(loop, "BAR.ARV", "0xa0|0x120|0x1a0")
                assert one[0] < k_empty
                assert zero[0] < v_empty
            else:
                k_empty, v_empty = positions(loop, "SYNCS.ARRIVE")
                assert one[0] < k_empty
                assert zero[0] < v_empty


def test_the_reader_follows_every_path():
    """An address computed in front of a loop that may not run is not there behind it."""
    sass = """
        /*0000*/                   UMOV UR6, 0x400 ;
        /*0010*/               @!P0 BRA `(.L_x_2) ;
        /*0020*/                   UIADD3.64 UR4, UR6, 0x2, URZ ;
.L_x_1:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR2].tnspB, R24 ;
        /*0040*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR2].tnspB, R24 ;
        /*0060*/                   EXIT ;
"""
    assert [registers for _, registers in read_before_written(sass)] == [[4, 5]]
    assert read_before_written(sass.replace("BRA `(.L_x_2)", "NOP")) == []


def test_plans():
    """Every share has keys and every tile a program, whatever the shapes."""
    from flashstudy.kernels import v6_persistent as v6

    draw = random.Random(0)
    for _ in range(2000):
        group, h_kv, b = draw.choice((1, 1, 2, 3, 4, 8, 64)), draw.randint(1, 9), draw.randint(1, 9)
        n_q, n_k = (max(1, int(2 ** draw.uniform(0, 17))) for _ in range(2))
        d, causal = draw.choice((8, 64, 72, 128, 136, 256)), draw.random() < 0.5
        plan = v6._plan(b, h_kv * group, h_kv, n_q, n_k, d, causal, 132)
        c, sizes = plan.config, plan.sizes
        rows = c.consumers * v6.ROWS
        assert d <= c.head_dim
        assert v6.ROWS % plan.pack == 0
        assert sizes.H * plan.pack == h_kv * group
        assert h_kv == sizes.H // sizes.GROUP
        assert sizes.heads == b * sizes.H
        assert (sizes.tiles_m - 1) * rows < n_q * plan.pack <= sizes.tiles_m * rows
        assert (sizes.tiles_n - 1) * c.block_n < n_k <= sizes.tiles_n * c.block_n
        assert (plan.shares - 1) * sizes.share_n < sizes.tiles_n <= plan.shares * sizes.share_n
        assert sizes.tiles == sizes.tiles_m * sizes.heads * plan.shares
        assert plan.programs == min(sizes.tiles, 132)
        assert 1 <= sizes.section <= sizes.heads


def test_how_many_consumers():
    """One where tiles of two would leave multiprocessors empty, three at D = 64 for long keys."""
    from flashstudy.kernels import v6_persistent as v6

    def consumers(b, h, n_q, d, causal=False, n_k=None, h_kv=None):
        return v6._plan(b, h, h_kv or h, n_q, n_k or n_q, d, causal, 132).config.consumers

    for d in (64, 128, 256):
        for causal in (False, True):
            assert consumers(1, 16, 512, d, causal) == 1  # 64 tiles of two, 128 of one
            assert consumers(1, 16, 64, d, causal) == 1  # half of a tile of two would be empty
            assert consumers(9, 99, 64, d, causal) == 1
            assert consumers(1, 32, 1024, d, causal) == 2
            assert consumers(32, 16, 512, d, causal) == 2
        assert consumers(1, 16, 1024, d, True) == 1  # a long tile and a short one each
        assert consumers(1, 16, 1024, d, False) == 2
        assert consumers(1, 16, 1024, d, True, 4096) == 2  # all of them long
        assert consumers(1, 32, 1, d, n_k=8192, h_kv=8) == 1  # decoding
        assert consumers(1, 32, 128, d, n_k=131072, h_kv=8) == 2  # shares for all as it is
    assert consumers(8, 32, 2048, 64) == 3
    assert consumers(4, 32, 4096, 64, True) == 3
    assert consumers(1, 16, 2048, 64) == 2  # two turns either way


def test_two_turns_pair_long_tiles_with_short_ones():
    """Dealt back and forth: nobody has more to do than the longest tile, or the average and two."""
    from flashstudy.kernels import v6_persistent as v6

    cells = [(16, 1024, 128), (16, 2048, 128), (24, 1024, 64), (17, 1000, 256), (3, 11000, 64)]
    for h, n, d in [*cells, (32, 512, 128), (32, 1024, 128)]:
        plan = v6._plan(1, h, h, n, n, d, True, 132)
        sizes, c = plan.sizes, plan.config
        assert not plan.draw
        assert 132 < sizes.tiles <= 264
        assert sizes.section == (1 if h == 32 else h)  # 32: 8 tiles a head, each has a counterpart
        keys, seen = [0] * 132, set()
        for program in range(132):
            tile, turn = program, 0
            while 0 <= tile < sizes.tiles:  # as in `_producer` and `_tile`
                seen.add(tile)
                pid_m = sizes.tiles_m - 1 - tile % sizes.section_tiles // sizes.section
                first = pid_m * c.consumers * v6.ROWS
                keys[program] += -(-min(n, first + c.consumers * v6.ROWS) // c.block_n)
                turn += 1
                tile = 2 * turn * 132 - 1 - tile
        assert len(seen) == sizes.tiles
        assert max(keys) <= max(sizes.tiles_n, sum(keys) / 132 + 2)


def test_the_reader_sees_a_loop():
    """main_loops finds the inner of two nested loops, and only if it multiplies."""
    sass = """
.L_x_1:
        /*0000*/                   MOV R1, R2 ;
.L_x_2:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, !UPT ;
        /*0020*/              @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0030*/                   FADD R1, R2, R3 ;
        /*0040*/              @!P1 BRA `(.L_x_3) ;
        /*0050*/              @P1 BRA `(.L_x_1) ;
"""
    assert [[op for op, _ in loop] for loop in main_loops(sass)] == [
        ["HGMMA.64x128x16.F32.BF16", "BRA"]
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("consumers", [1, 2, 3])
@pytest.mark.parametrize("growth", [-20, 3, 12, 40, 300, "one key", "one row"])
def test_the_maximum_may_come_late(growth, consumers, causal, d, dtype, monkeypatch):
    """v6 computes P with the maximum so far: scores that grow by powers of two from tile to tile.

    It goes through the keys from the right to the left. Up to a bound it may go on, beyond it must
    not, and one row that must not takes its warp along. N_Q > N_K: rows that see no key.
    """
    from flashstudy.backends import why_not

    if (reason := why_not("v6_persistent")) is not None:
        pytest.skip(reason)
    from flashstudy.kernels import v6_persistent as v6

    if not (configs := [c for c in v6.CONFIGS[d] if c.consumers == consumers]):
        pytest.skip("no such configuration")
    monkeypatch.setattr(v6, "_plan", v6._plan.__wrapped__)  # without its memory
    monkeypatch.setattr(v6, "CONFIGS", {d: configs})
    monkeypatch.setattr(v6, "LONG", {False: 1, True: 1})
    for n_q, n_k in ((1100, 1100), (300, 1500), (500, 200), (3, 3000)):
        q, k, v = (torch.randn(1, 4, n, d, device="cuda") for n in (n_q, n_k, n_k))
        if isinstance(growth, int):
            grow = growth * math.log(2) / 128 * d**0.5
            left = grow * torch.arange(n_k - 1, -1, -1, device="cuda")
            q[..., 0], k[..., 0] = 1, left.clamp(max=60000)  # fp16 ends at 65,504
        elif growth == "one key":
            k[:, :, n_k // 5] *= 30
        else:
            q[:, :, n_q // 3] *= 100
        q, k, v = (x.to(dtype) for x in (q, k[:, ::2].contiguous(), v[:, ::2].contiguous()))
        o, lse = v6.forward(q, k, v, causal, d**-0.5, False)

        q, k, v = q.double(), *(x.double().repeat_interleave(2, 1) for x in (k, v))
        s = q @ k.mT * d**-0.5
        if causal:
            hidden = torch.ones(n_q, n_k, dtype=torch.bool, device="cuda").triu(n_k - n_q + 1)
            s = s.masked_fill(hidden, float("-inf"))
        want = torch.softmax(s, -1).nan_to_num(0.0) @ v  # 0 where a row sees no key
        assert (o - want).norm() <= (5e-3 if dtype == torch.bfloat16 else 1e-3) * want.norm()
        want = torch.logsumexp(s, -1)
        assert torch.equal(lse == float("-inf"), want == float("-inf"))
        seen = want > float("-inf")
        assert ((lse - want)[seen].abs() <= 4e-6 * (10 + want[seen].abs().max())).all()
