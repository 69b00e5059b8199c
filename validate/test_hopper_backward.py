"""The Hopper backward: its machine code, read without a GPU, and its gradients on one.

An edit or another ptxas can serialise the products, spill, or pull a wait forward, and nothing
fails but the speed. So each shipped configuration is compiled for sm_90 and its loops are read.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
import triton
from flashstudy.kernels import _gluon, v7_hopper_backward, v7_wide_heads
from flashstudy.validate import errors
from flashstudy.validate.machine_code import read_before_written
from flashstudy.validate.test_hopper_forward import main_loops, positions

STEP = "v7_hopper_backward"
# D, dtype, causal, length, query heads a key head: both tiles, each with and without a masked loop
CASES = [
    (64, "bfloat16", False, 512, 1),
    (64, "bfloat16", False, 500, 1),
    (64, "float16", True, 512, 1),
    (128, "bfloat16", False, 512, 1),
    (128, "bfloat16", False, 500, 1),
    (128, "bfloat16", True, 512, 1),
    (96, "bfloat16", True, 300, 1),
]
TWO_LOOP_CASES = [  # more than 16 query tiles: those that need the mask have a loop of their own
    (64, "bfloat16", True, 2500, 1),
    (64, "float16", True, 700, 3),
    (128, "bfloat16", True, 1200, 1),
    (128, "float16", True, 500, 4),
]
CHAIN_CASES = [  # and batches: enough for a CTA to take all key tiles of a head; a single key tile
    (64, "bfloat16", False, 256, 1, 66),
    (64, "float16", True, 500, 1, 66),
    (128, "bfloat16", False, 250, 1, 66),
    (128, "bfloat16", True, 512, 1, 66),
    (96, "float16", True, 128, 4, 99),
]
ALL_CASES = [*CASES, *TWO_LOOP_CASES, *CHAIN_CASES]
WIDE_CASES = [  # of v7_wide_heads
    (256, "bfloat16", False, 512, 1),
    (256, "bfloat16", False, 500, 1),
    (256, "bfloat16", True, 512, 1),
    (192, "float16", True, 500, 4),
]
# Bytes by kernel. None with the Triton it was written and measured with; with 3.7 the last kernel
# spills where the head dim is padded to 256, with 3.9 the main one, too, where causal.
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
LATER = {"_backward_kernel": 24, "_finish_kernel": 32}
SPILLS = {(3, 6): {}, (3, 7): {"_finish_kernel": 32}}.get(VERSION, LATER)
PROGRAM = """
import json, sys, torch
from flashstudy.validate import compiled
spills = {"any": 0} | json.loads(sys.argv[2])
for d, dtype, causal, *size in json.loads(sys.argv[1]):
    kernels = compiled.compile_step(
        "v7_hopper_backward", 90, d, getattr(torch, dtype), causal, True, [size])
    faults = [f for k in kernels for f in compiled.faults(
        k, 90, tuned=True, spills=spills.get(k.name, spills["any"]))]
    main, = (k for k in kernels if k.name == "_backward_kernel")
    finish = "".join(k.asm["ptx"] for k in kernels if k.name == "_finish_kernel")
    print(json.dumps(dict(sass=main.sass, ptx=main.asm["ptx"], warps=main.warps, faults=faults,
                          finish=finish, names=sorted(k.name for k in kernels))))
"""


@pytest.fixture(scope="module")
def kernels():
    """{case: what the compiler made of it}, from a process of its own that does not interpret."""
    got = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(ALL_CASES + WIDE_CASES), json.dumps(SPILLS)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        timeout=900,
    )
    assert got.returncode == 0, got.stderr[-4000:]
    return dict(zip(ALL_CASES + WIDE_CASES, map(json.loads, got.stdout.splitlines()), strict=True))


def config(d):
    return v7_hopper_backward._config(d)


def cases(some):
    return pytest.mark.parametrize("case", some, ids=lambda c: "-".join(map(str, c)))


@cases(ALL_CASES + WIDE_CASES)
class TestMachineCode:
    def test_no_fault(self, kernels, case):
        """No spills, no C75xx (serialised products), shared memory within bounds; three kernels.

        Chains have dQ ready with the second.
        """
        assert kernels[case]["faults"] == []
        names = ["_backward_kernel", "_finish_kernel", "_prepare_kernel"]
        if case in CHAIN_CASES:
            names.remove("_finish_kernel")
        assert kernels[case]["names"] == names

    def test_products_are_asynchronous(self, kernels, case):
        """One arrival a product: serialised ones would have one an instruction."""
        products = 2 * (2 + 5 + 3) + 1  # consumers x (first tile, loop, last), a late dQ
        two = two_loops(case)
        products += 2 * 5 * two
        if case in WIDE_CASES:  # S or dP; dQ in two
            products = 2 * (1 + 5 + 4)
        sass = kernels[case]["sass"]
        assert len(re.findall(r"WARPGROUP\.ARRIVE", sass)) == products
        assert len(re.findall(r"WARPGROUP\.DEPBAR", sass)) <= products + 2 * two
        assert len(re.findall(r"\bHGMMA", sass)) >= 4 * products

    def test_no_loop_relies_on_the_one_before(self, kernels, case):
        """The masked loop may not run at all: see `read_before_written`, ptxas has assumed it."""
        if not two_loops(case):
            pytest.skip("one loop")
        assert read_before_written(kernels[case]["sass"]) == []

    def test_registers_are_reallocated(self, kernels, case):
        """Both consumers get 240 registers, loader and writer keep 24: unchecked by Triton."""
        got = re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", kernels[case]["ptx"])
        assert got.count("240") == 2  # consumer 0 comes down from its 256, consumer 1 goes up
        assert got.count("24") >= 2
        assert set(got) == {"24", "120", "240", "256"}
        assert kernels[case]["warps"] == 12

    def test_named_barriers_do_not_collide(self, kernels, case):
        """Triton's ids grow from 0, ours start at 8: see `_gluon`."""
        used = re.findall(r"^\s*bar\.(?:sync|arrive)\s+(\d+)", kernels[case]["ptx"], re.M)
        used += re.findall(r"^\s*barrier\.sync\s+(\d+)", kernels[case]["ptx"], re.M)
        assert used
        assert max(map(int, used)) < 8

    def test_copy_engine_does_the_copying(self, kernels, case):
        """Q, LSE, dO, delta, K, V arrive by TMA, dQ is added and dV and dK stored by it."""
        sass = kernels[case]["sass"]
        assert len(re.findall(r"UTMAREDG\S*ADD", sass)) >= 2  # a part of dQ from each consumer
        assert len(re.findall(r"UTMASTG", sass)) >= 2  # one a consumer, dV and dK may share it
        assert len(re.findall(r"UTMALDG", sass)) >= 6
        assert not re.findall(r"\bSTG|\bREDG|\bLDG", sass)

    def test_launches_wait_before_they_read(self, kernels, case):
        """They overlap: nothing is read before the kernel that writes it is known to have ended."""
        for name, read in (
            ("ptx", r"bulk\.tensor\.[14]d\.shared::\w+\.global"),  # 2d: its own sums, fetched back
            ("finish", r"ld\.global"),
        )[: 1 if case in CHAIN_CASES else 2]:
            ptx = kernels[case][name]
            assert ptx.count("griddepcontrol.wait") == 1
            assert ptx.index("griddepcontrol.wait") < re.search(read, ptx).start()


def two_loops(case):
    """Whether the query tiles that need the mask have a loop of their own."""
    return case in TWO_LOOP_CASES and v7_hopper_backward.TWO_LOOPS


def loops_of_five(sass, each=1):
    """The main loops of two consumers: of five products each, with no trip to local memory."""
    loops = main_loops(sass)
    assert len(loops) == 2 * each
    for loop in loops:
        assert VERSION > (3, 7) or not positions(loop, "LDL")
        assert VERSION > (3, 7) or not positions(loop, "STL")
        assert len(positions(loop, "WARPGROUP.ARRIVE")) == 5
    return loops


@cases(ALL_CASES)
class TestMainLoops:
    def test_a_turn(self, kernels, case):
        """A turn: five products and their waits in the order of the source, and two fences."""
        d, _, causal, *_ = case
        registers = config(d).ds_registers  # dS as an operand: dV is waited for alone
        turns = []
        two = two_loops(case)
        for loop in loops_of_five(kernels[case]["sass"], 1 + two):
            masked = bool(positions(loop, "FSEL"))
            late = two and masked  # delta is read late: behind dP, and a barrier
            waits = positions(loop, "WARPGROUP.DEPBAR")
            depths = [int(re.search(r"gsb0, 0x(\d)", loop[i][1])[1]) for i in waits]
            # for dQ, (dV), dK, S, dP
            assert depths == ([2, 1, 1, 1, 0] if registers else [2, 1, 1, 0]) + [0] * late
            # Products whose A operand sits in registers: dV, and dK where dS does.
            product = [i for i in positions(loop, "HGMMA") if re.match(r"R\d+, R\d+", loop[i][1])]
            assert len(product) == (8 if registers else 4) * config(d).block_m // 64
            assert max(product) < waits[0]
            # The turn comes before the products, is given away after them, before the exponentials.
            (turn,) = positions(loop, "BAR.SYNC", ", 0x100")
            (given,) = positions(loop, "BAR.ARV", ", 0x100")
            turns.append((loop[turn][1].split(",")[0], masked))
            exps = positions(loop, "MUFU.EX2")
            assert len(exps) == 64 * config(d).block_m // 128
            hgmma = positions(loop, "HGMMA")
            assert turn < min(hgmma) < max(hgmma) < given < min(exps)
            assert waits[-2 - late] < min(exps)
            # dQ goes to shared memory 16 bytes at a time, while dV and dK run.
            stores = positions(loop, "STS.128")
            assert len(stores) == 8
            assert waits[0] < min(stores) < max(stores) < waits[1]
            # It sets off behind the loads of a tile that the turn lets go, before dP is issued; the
            # other fence is for dS.
            before, after = positions(loop, "FENCE.VIEW.ASYNC")
            (empty,) = positions(loop, "BAR.ARV", ", 0x120")
            (full,) = positions(loop, "BAR.ARV", ", 0xa0")
            assert waits[1 + registers] < empty < before < full < max(hgmma) < given
            assert max(exps) < after
            # Or it comes with the sum so far, by 16 bytes, and leaves rounded, while they run.
            chained = case in CHAIN_CASES
            sums = positions(loop, "LDS.128")
            rounded = [i for i in positions(loop, "STSM") if i < waits[1]]
            assert (len(sums), len(rounded)) == ((8, 4) if chained else (0, 0))
            assert all(waits[0] < i < waits[1] for i in sums + rounded)
            # Not more barriers of a consumer with itself than the source has.
            assert len(positions(loop, "BAR.SYNC")) == 3 + chained + late
            # It compares with constants: columns in registers would be kept from turn to turn.
            compares = positions(loop, "ISETP")
            held = [i for i in compares if not re.search(r"0x|RZ", loop[i][1])]
            assert len(compares) - len(held) >= masked * len(exps)
            assert len(held) <= (2 if VERSION == (3, 6) else 3)  # the bounds of the loop itself
        # Each consumer has its turn. A mask is in its loop, or under a branch in the only one.
        names = {name for name, _ in turns}
        assert len(names) == 2
        masks = [False, True] if two else [causal]
        assert sorted(turns) == [(name, mask) for name in sorted(names) for mask in masks]


@cases(WIDE_CASES)
class TestWideLoops:
    def test_an_iteration(self, kernels, case):
        """Five products, none from registers; dQ leaves in two parts, each while products run."""
        loops = loops_of_five(kernels[case]["sass"])
        (scores,) = (x for x in loops if positions(x, "MUFU.EX2"))
        for loop in loops:
            waits = positions(loop, "WARPGROUP.DEPBAR")
            depths = [int(re.search(r"gsb0, 0x(\d)", loop[i][1])[1]) for i in waits]
            assert depths == [1, 1, 0]  # dK runs on, S or dP runs on, nothing does
            # dV, dK and two parts of dQ sum over 64 queries or keys, S or dP over 256 columns
            hgmma = positions(loop, "HGMMA")
            assert len(hgmma) == 4 * 4 + 16
            assert not [i for i in hgmma if re.match(r"R\d+, R\d+", loop[i][1])]
            assert len([i for i in hgmma if i < waits[0]]) == 3 * 4
            assert len([i for i in hgmma if waits[0] < i < waits[1]]) == 4 + 16
            # dQ goes 16 bytes at a time
            stores = positions(loop, "STS.128")
            assert len([i for i in stores if waits[0] < i < waits[1]]) == 8
            assert len([i for i in stores if waits[1] < i < waits[2]]) == 8
            # P is told and dS waited for, or the other way round; dQ is told of twice
            (told,) = positions(loop, "BAR.ARV", ", 0x100")
            (waited,) = positions(loop, "BAR.SYNC", ", 0x100")
            assert loop[told][1].split(",")[0] != loop[waited][1].split(",")[0]
            first, second = positions(loop, "BAR.ARV", ", 0x120")
            assert waits[0] < first < waits[1] < second
            exps = positions(loop, "MUFU.EX2")
            if loop is scores:  # only dV does not need dS
                assert len([i for i in hgmma if i < waited]) == 4
                assert len(exps) == 64 * 64 // 128
                assert waits[2] < exps[0] < exps[-1] < told < second
            else:  # dQ is out of the way when it has to wait for P
                assert second < waits[2] < waited < told
            assert len(positions(loop, "FENCE.VIEW.ASYNC")) == (2 if loop is scores else 3)
            # A mask is computed under a branch, where the tile needs one.
            causal = case[2]
            assert bool(positions(loop, "FSEL")) == (causal and loop is scores)
            held = [i for i in positions(loop, "ISETP") if not re.search(r"0x|RZ", loop[i][1])]
            assert len(held) <= 2


gpu = pytest.mark.gpu
SHAPES = [
    # B, H, H_KV, N_Q, N_K
    (1, 2, 2, 64, 128),
    (1, 1, 1, 128, 128),
    (2, 3, 3, 512, 512),
    (1, 2, 2, 1000, 1000),
    (1, 2, 2, 100, 300),
    (1, 2, 2, 300, 100),
    (1, 2, 1, 1, 239),
    (1, 1, 1, 239, 1),
    (1, 6, 2, 257, 391),
    (2, 8, 2, 640, 1024),
    (40, 4, 2, 256, 256),
]


def _hopper_only():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0 exactly (Hopper)")


def _step(d):
    """The file of the step that takes this head dim."""
    return v7_hopper_backward if d <= v7_hopper_backward.MAX_HEAD_DIM else v7_wide_heads


def _attention(q, k, v, *, causal=False, scale=None):
    """The reference's forward, rounded, joined with the step's backward."""
    step = _step(q.shape[-1])

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            got = errors.compute(q, k, v, causal=causal, scale=scale)
            o = got["o"].to(q.dtype)
            ctx.save_for_backward(q, k, v, o, got["lse"].float())
            return o

        @staticmethod
        def backward(ctx, do):
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            return step.backward(do, *ctx.saved_tensors, causal, factor, False)

    return Attention.apply(q, k, v)


def _inputs(b, h, h_kv, n_q, n_k, d, dtype=torch.bfloat16, layout="bhnd"):
    def one(heads, n):
        if layout == "bnhd":
            return torch.randn(b, n, heads, d, device="cuda", dtype=dtype).transpose(1, 2)
        return torch.randn(b, heads, n, d, device="cuda", dtype=dtype)

    q, do = one(h, n_q), one(h, n_q)
    return q, one(h_kv, n_k), one(h_kv, n_k), do


@gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_gradients(shape, d, causal):
    _hopper_only()
    verdict = errors.check(_attention, *_inputs(*shape, d), causal=causal)
    assert verdict.ok, verdict.reasons


@gpu
@pytest.mark.parametrize(
    ("d", "dtype", "layout"),
    [
        (32, torch.bfloat16, "bhnd"),
        (59, torch.bfloat16, "bhnd"),  # rows that the copy engine cannot address: copied
        (96, torch.float16, "bhnd"),
        (123, torch.bfloat16, "bhnd"),
        (64, torch.float16, "bnhd"),
        (128, torch.bfloat16, "bnhd"),
        (136, torch.bfloat16, "bhnd"),
        (192, torch.float16, "bnhd"),
        (201, torch.bfloat16, "bhnd"),
        (256, torch.float16, "bnhd"),
    ],
)
def test_other_head_dims_and_strides(d, dtype, layout):
    _hopper_only()
    inputs = _inputs(1, 4, 2, 333, 333, d, dtype, layout)
    verdict = errors.check(_attention, *inputs, causal=True, scale=0.3)
    assert verdict.ok, verdict.reasons


@gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("n", [64, 128, 192, 1000, 2048])  # 1, 2, 3 query tiles; ragged; many
def test_dk_and_dv_repeat_bit_by_bit(n, d, causal):
    """A hundred calls into memory full of NaN, with another stream at work beside them."""
    _hopper_only()
    step = _step(d)
    q, k, v, do = _inputs(2, 8, 8, n, n, d)
    got = errors.compute(q, k, v, causal=causal)
    args = (do, q, k, v, got["o"].to(q.dtype), got["lse"].float(), causal, d**-0.5, False)
    _, dk, dv = step.backward(*args)
    beside, noise = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    for _ in range(100):
        dirt = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(8)]
        del dirt
        with torch.cuda.stream(beside):
            noise @ noise
        dq, *again = step.backward(*args)
        assert torch.equal(dk, again[0])
        assert torch.equal(dv, again[1])
        assert dq.isfinite().all()


@gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 8, 1024, 1024), (1, 8, 2, 500, 900), (1, 2, 2, 900, 500)])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_dq_repeats_bit_by_bit_if_asked_for(d, shape, causal):
    _hopper_only()
    step = _step(d)
    q, k, v, do = _inputs(*shape, d)
    got = errors.compute(q, k, v, causal=causal)
    args = (do, q, k, v, got["o"].to(q.dtype), got["lse"].float(), causal, d**-0.5, False)
    want = step.backward(*args, deterministic=True)
    free = step.backward(*args)
    assert (want[0] - free[0]).abs().max() <= 4 * torch.finfo(q.dtype).eps * free[0].abs().max()
    beside, noise = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    for _ in range(30):
        with torch.cuda.stream(beside):
            noise @ noise
        for a, b in zip(step.backward(*args, deterministic=True), want, strict=True):
            assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [59, 64, 128, 256])
@pytest.mark.parametrize(
    ("shape", "whole", "parts"),
    [
        ((2, 3, 3, 1000, 1000), 0, 2),
        ((2, 3, 3, 1024, 1024), -11, 5),  # so many of the list's last tiles
        ((1, 6, 2, 257, 391), 0, 3),
        ((1, 2, 2, 100, 300), 0, 4),
        ((1, 2, 1, 300, 100), 0, 2),
        ((1, 2, 2, 64, 200), 0, 6),  # more parts than query tiles
        ((8, 16, 16, 512, 512), -40, 3),
    ],
    ids=str,
)
def test_parts_of_key_tiles(monkeypatch, shape, whole, parts, d, causal):
    """However the key tiles are shared out, the gradients are right, and dK and dV repeat."""
    _hopper_only()
    shares = lambda tiles, *_: (tiles + whole if whole < 0 else whole, parts)  # noqa: E731
    monkeypatch.setattr(v7_hopper_backward, "_shares", shares)
    monkeypatch.setattr(v7_hopper_backward, "_chains", lambda *_: False)
    q, k, v, do = _inputs(*shape, d)
    verdict = errors.check(_attention, q, k, v, do, causal=causal)
    assert verdict.ok, verdict.reasons

    got = errors.compute(q, k, v, causal=causal)
    args = (do, q, k, v, got["o"].to(q.dtype), got["lse"].float(), causal, d**-0.5, False)
    free, ordered = (_step(d).backward(*args, deterministic=x) for x in (False, True))
    for _ in range(10):
        dirt = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(8)]
        del dirt
        for a, b in zip(_step(d).backward(*args)[1:], free[1:], strict=True):
            assert torch.equal(a, b)
        for a, b in zip(_step(d).backward(*args, deterministic=True), ordered, strict=True):
            assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [40, 64, 96, 128])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 128, 128),
        (1, 8, 2, 500, 500),
        (2, 3, 3, 1000, 1000),
        (1, 6, 2, 257, 391),
        (1, 2, 1, 1, 239),
        (1, 2, 2, 300, 100),
        (40, 8, 4, 256, 256),
        (9, 32, 32, 512, 512),
    ],
    ids=lambda s: "x".join(map(str, s)),
)
def test_chains_of_key_tiles(monkeypatch, shape, d, causal):
    """In memory full of NaN, which nothing clears, and the same bits whether asked for or not."""
    _hopper_only()
    monkeypatch.setattr(v7_hopper_backward, "_chains", lambda *_: True)
    q, k, v, do = _inputs(*shape, d)
    if shape[0] < 9:  # the reference in fp64 takes much memory
        verdict = errors.check(_attention, q, k, v, do, causal=causal)
        assert verdict.ok, verdict.reasons
    got = errors.compute(q, k, v, causal=causal)
    args = (do, q, k, v, got["o"].to(q.dtype), got["lse"].float(), causal, d**-0.5, False)
    want = v7_hopper_backward.backward(*args)
    chained = not causal or q.shape[2] == k.shape[2]
    for i in range(10):
        dirt = [torch.full((1 << 22,), torch.nan, device="cuda") for _ in range(8)]
        del dirt
        again = v7_hopper_backward.backward(*args, deterministic=chained and i % 2 == 1)
        for a, b in list(zip(again, want, strict=True))[not chained :]:
            assert torch.equal(a, b)
        assert again[0].isfinite().all()


@gpu
def test_gradients_have_the_strides_of_their_tensors():
    """As the operators promise: those of dense (B, N, H, D) views stay, slices come out dense."""
    _hopper_only()
    from flashstudy.kernels import _host
    from flashstudy.kernels import v7_hopper_backward as step

    qkv = torch.randn(2, 256, 3, 4, 64, device="cuda", dtype=torch.float16)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    got = errors.compute(q, k, v, causal=True)
    o = got["o"].to(q.dtype)
    for t, g in zip(
        (q, k, v),
        step.backward(o, q, k, v, o, got["lse"].float(), True, 0.125, False),
        strict=True,
    ):
        assert g.stride() == _host.empty_like(t).stride()


@gpu
@pytest.mark.parametrize("d", [64, 256])
def test_a_row_without_keys_gives_zero(d):
    _hopper_only()
    step = _step(d)
    q, k, v, do = _inputs(1, 2, 2, 300, 100, d)
    got = errors.compute(q, k, v, causal=True)
    lse = got["lse"].float()
    assert torch.isneginf(lse[..., :200]).all()
    dq, dk, dv = step.backward(do, q, k, v, got["o"].to(q.dtype), lse, True, 0.125, False)
    assert not dq[..., :200, :].any()
    assert all(t.isfinite().all() for t in (dq, dk, dv))


def test_what_the_copy_engine_cannot_address_is_copied():
    from flashstudy.kernels.v7_hopper_backward import _tma_ready

    whole = torch.randn(2, 40, 3, 64, dtype=torch.float16)
    view = whole.transpose(1, 2)
    assert _tma_ready(view) is view
    odd = torch.randn(2, 3, 40, 59, dtype=torch.float16)
    for t in (odd, whole[..., 1:].transpose(1, 2), whole[:, :1].expand(2, 40, 3, 64), view.mT):
        copy = _tma_ready(t)
        assert copy.shape[-1] % 8 == 0
        assert copy.is_contiguous()
        assert torch.equal(copy[..., : t.shape[-1]], t)


def test_refuses_what_it_cannot_take():
    narrow, wide = v7_hopper_backward, v7_wide_heads

    def call(step, d, dtype):
        t = torch.empty(1, 1, 8, d, dtype=dtype)
        return step.backward(t, t, t, t, t, torch.empty(1, 1, 8), False, 1.0, False)

    with pytest.raises(ValueError, match="q: expected a head dim of at most 128, got 192"):
        call(narrow, 192, torch.float16)
    with pytest.raises(ValueError, match="q: expected a head dim of at most 256, got 264"):
        call(wide, 264, torch.float16)
    for step, d in ((narrow, 64), (wide, 256)):
        with pytest.raises(ValueError, match="q: expected a dtype among"):
            call(step, d, torch.float32)


@pytest.mark.parametrize(
    ("tiles", "longest", "causal", "shares"),
    [
        (64, 8, False, (0, 2)),  # two for each of 132 multiprocessors
        (64, 8, True, (0, 2)),
        (64, 32, True, (0, 4)),  # unequal ones
        (16, 8, True, (0, 4)),  # of two query tiles at least
        (16, 4, False, (0, 2)),
        (1, 1, False, (1, 1)),
        (128, 16, False, (128, 1)),  # one each
        (128, 16, True, (0, 2)),
        (128, 8, True, (128, 1)),  # too short to be worth it
        (160, 16, True, (0, 2)),
        (256, 32, True, (256, 1)),  # enough to even each other out
        (2048, 64, False, (1980, 8)),  # fifteen rounds and half a one
        (2048, 64, True, (2048, 1)),
        (4096, 16, False, (4092, 4)),
        (264, 64, False, (264, 1)),  # two rounds
        (260, 64, False, (260, 1)),  # nearly so
    ],
)
def test_key_tiles_are_shared_out(tiles, longest, causal, shares):
    """Into parts where multiprocessors would have nothing to do, and else not."""
    assert v7_hopper_backward._shares(tiles, longest, 132, causal) == shares


@pytest.mark.parametrize(
    ("units", "n", "d", "heads", "full", "causal"),
    [
        (512, 512, 128, 1, False, True),
        (1024, 512, 64, 1, False, True),
        (1000, 512, 64, 1, False, True),  # the last of 8 rounds is nearly full
        (288, 512, 64, 1, False, False),  # three rounds for a little more than two
        (32, 512, 64, 1, False, False),  # not enough for all multiprocessors
        (264, 512, 128, 2, False, False),  # more than L2 holds
        (264, 512, 64, 2, False, True),
        (512, 1024, 64, 1, False, False),
        (1024, 256, 128, 1, True, True),
        (1024, 256, 128, 2, False, True),
        (7, 128, 128, 8, True, True),  # nothing to add up
    ],
)
def test_chains_where_they_pay(units, n, d, heads, full, causal):
    """Short sequences, whose Q, dO and sums stay in L2, in equal numbers for all."""
    size = heads * n * d * 8
    for mask, chains in ((False, full), (True, causal)):
        assert v7_hopper_backward._chains(units, -(-n // 128), size, 132, mask) == chains


@pytest.mark.parametrize(("units", "tiles_n"), [(1, 1), (7, 4), (12, 5), (64, 3)])
@pytest.mark.parametrize("section", [1, 4, 5, 64])
def test_the_list_has_every_tile_once(units, tiles_n, section):
    """Section after section, and in each the first key tiles of all heads first."""
    listed = [
        v7_hopper_backward._listed(i, units, min(section, units), tiles_n)
        for i in range(units * tiles_n)
    ]
    assert sorted(listed) == [(u, n) for u in range(units) for n in range(tiles_n)]
    order = [(unit // min(section, units), n, unit) for unit, n in listed]
    assert order == sorted(order)


@pytest.mark.parametrize(
    ("units", "most", "size"),
    [
        (32, 5, 4),
        (64, 10, 8),
        (32, 2, 2),
        (12, 5, 4),
        (13, 5, 5),
        (11, 4, 4),
        (7, 100, 7),
        (9, 0, 1),
    ],
)
def test_sections_have_as_many_heads(units, most, size):
    """No section is much shorter than the others, and none takes more than L2 has."""
    assert _gluon.section(units, most) == size
    assert size <= max(1, most)
    assert units % size == 0 or units % size >= size / 2
