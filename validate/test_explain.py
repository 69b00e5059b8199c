"""bench/explain.py: its formulas by hand, its limits, and its promise on the committed records."""

import itertools
import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
from flashstudy import backends
from flashstudy.bench import common, explain, seqlen
from flashstudy.figures import records

ROOT = Path(backends.__file__).resolve().parents[1]
REFERENCE = [ROOT / "figures" / "reference" / f"{name}.jsonl" for name in ("seqlen", "mixed")]
H200 = explain.GPUS["h200"]
CELL = seqlen.Cell("v6_persistent", "attention", "forward", "bfloat16", True, 2, 256, 4, 4, 256)
FLASH = [n for n, row in backends.BACKENDS.items() if row.family != "standard"]


@pytest.fixture
def tame(monkeypatch):
    """No GPU, whatever the machine has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# ---- Formulas by hand: B 2, H 4, N 256, D 64, causal ---------------------------------------------


def test_naive_by_hand():
    found, scores = explain.naive(CELL, H200), 2 * 4 * 256 * 256
    assert found.flops == 4 * scores * 64
    assert found.exps == scores
    tensor = 2 * 4 * 256 * 64 * 2  # q, k, v or o in bytes
    assert found.bytes == 6 * scores * 2 + 4 * tensor
    assert found.memory == 2 * scores * 2 + tensor  # S, P and o
    memory_s = (6 * scores * 2 / 0.45 + 4 * tensor) / 4.26e12
    expected = found.flops / 745e12 + memory_s + 4 * 2.5e-6
    assert found.gpu_ms == pytest.approx(expected * 1e3)
    assert found.time_ms == pytest.approx(expected * 1e3 + 4e-3)


def test_flash_by_hand():
    found = explain.flash(CELL, H200)
    visits = 8 * (1 + 2)  # two tiles of queries a head, the second sees two of keys
    assert found.flops == 4 * 128 * 128 * 64 * visits
    assert found.exps == 128 * 128 * visits
    tensor = 2 * 4 * 256 * 64 * 2
    assert found.bytes == 4 * tensor + 8 * 256 * 4
    assert found.memory == tensor + 8 * 256 * 4  # o and lse
    # 16 tiles leave most SMs idle: the time is that of the longest tile.
    visit = 4 * 128 * 128 * 64 / (745e12 / 132) + 0.6 * 128 * 128 / (16 * 1.9e9)
    assert found.gpu_ms == pytest.approx((2 * visit + 1.3e-6 + 2.5e-6) * 1e3)
    assert "16 tiles" in found.note
    assert "116 have nothing to do" in found.note


def test_full_attention_has_no_mask_and_all_tiles():
    full = CELL._replace(causal=False)
    assert explain.naive(full, H200).bytes < explain.naive(CELL, H200).bytes
    assert explain.flash(full, H200).exps == 2 * 4 * 256 * 256


def test_the_block_adds_its_projections():
    plain, block = (explain.flash(CELL._replace(scope=s), H200) for s in ("attention", "block"))
    assert block.flops - plain.flops == 2 * (2 * 256) * 256 * (3 * 256 + 256)
    assert block.gpu_ms > plain.gpu_ms
    assert block.host_ms > plain.host_ms


def test_flash_backward_memory_holds_the_gradients():
    cell = CELL._replace(direction="backward")
    tensor = 2 * 4 * 256 * 64 * 2
    row = 2 * 4 * 256 * 4
    assert explain.flash_bytes(cell) == tensor + row + row + 3 * tensor  # o lse delta dq dk dv
    assert explain.flash_bytes(CELL) == tensor + row


@pytest.mark.parametrize("scope", ["attention", "block"])
def test_naive_memory_in_the_records_is_the_predicted_one(scope):
    cell = CELL._replace(B=4, E=2048, H=16, H_KV=16, N=8192, scope=scope)
    mib = {"attention": 16512, "block": 17280}[scope]  # figures/reference/seqlen.jsonl
    assert explain.naive_bytes(cell) == mib * 2**20


# ---- What must hold of any prediction ------------------------------------------------------------


@pytest.mark.parametrize("model", [explain.naive, explain.flash])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_more_work_takes_longer(model, direction):
    cell = CELL._replace(direction=direction, N=1024)
    for field, values in (("N", (1, 127, 128, 129, 1000, 4096)), ("B", (1, 4, 64))):
        found = [model(cell._replace(**{field: v}), H200) for v in values]
        for small, large in itertools.pairwise(found):
            assert small.gpu_ms <= large.gpu_ms
            assert small.memory < large.memory
            assert small.flops <= large.flops
    every = [x for x in found[0].parts.values()] + [found[0].time_ms]
    assert all(math.isfinite(x) and x >= 0 for x in every)


def test_the_reasons_change_with_the_shape():
    """Launches bind short calls; then naive is bound by memory and flash by products."""
    short, long = CELL._replace(N=64), CELL._replace(N=16384, E=512)
    assert "launches" in explain.naive(short, H200).bound
    assert "launches" in explain.flash(short, H200).bound
    assert explain.naive(long, H200).bound == "memory bandwidth"
    assert explain.flash(long, H200).bound == "matrix products"
    assert explain.flash(long._replace(E=128), H200).bound == "exponentials"  # head dim 32


def test_the_last_length_is_the_last():
    cell = CELL._replace(B=4, E=2048, H=16, H_KV=16)
    last = explain.last_length(cell, H200)
    assert 16384 < last < 32768  # as measured
    assert explain.fits(cell._replace(N=last), H200)
    assert not explain.fits(cell._replace(N=last + 1), H200)
    assert explain.last_length(cell, H200._replace(memory_mib=0)) == 0


def test_constants_are_of_flash_backends():
    assert set(explain.HOST_US) <= set(FLASH)
    assert set(explain.KINDS) <= set(FLASH)
    assert {explain.kind(n, "bfloat16") for n in FLASH} == set(explain.EXPOSED)


# ---- Against measurements ------------------------------------------------------------------------


def test_the_promise_on_the_committed_records(capsys):
    assert explain.main(["--check", *map(str, REFERENCE)]) == 0
    said = capsys.readouterr().out
    assert said.count("kept:") == 3
    assert "38 of 38" in said


def test_forward_rates_outside_of_the_fit():
    """cuDNN's forward on the papers' grid at D = 128, full and causal; none of it was fitted."""
    rows = records.read(ROOT / "figures" / "reference" / "peers.jsonl")
    errors = []
    for row in rows:
        if (row["backend"], row["direction"], row["D"]) == ("sdpa-cudnn", "forward", 128):
            cell = seqlen.Cell(
                "sdpa-cudnn", "attention", "forward", row["dtype"], row["causal"], row["B"],
                row["E"], row["H"], row["H_KV"], row["N_Q"],
            )  # fmt: skip
            errors.append(abs(explain.flash(cell, H200).time_ms / row["p50"] - 1))
    assert len(errors) == 12
    assert statistics.median(errors) <= 0.15
    assert max(errors) <= explain.PROMISE["time"]


@pytest.fixture
def altered(tmp_path):
    """Writes reference records of one sweep, changed by a function, and returns the file."""

    def write(change):
        rows = [
            r for r in records.read(REFERENCE[0])
            if r.get("backend") in ("naive", "v1_flash") and r["scope"] == "attention"
        ]  # fmt: skip
        for r in rows:
            change(r)
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        return str(path)

    return write


def scaled(backend, metric, factor):
    def change(row):
        if (row["backend"], row["metric"]) == (backend, metric) and row["status"] == "ok":
            row["value"] *= factor

    return change


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (scaled("naive", "time_ms", 2), "time error"),
        (scaled("v1_flash", "time_ms", 0.5), "time error"),
        (scaled("naive", "time_ms", 1e-3), "winner"),
        (scaled("naive", "peak_delta_mib", 1.1), "memory"),
        (scaled("v1_flash", "peak_delta_mib", 0.9), "memory"),
        (lambda row: row.update(status="ok", value=400.0) if row["status"] == "oom" else 0, "memo"),
    ],
)
def test_the_check_can_fail(altered, capsys, change, broken):
    assert explain.main(["--check", altered(lambda row: None)]) == 0
    capsys.readouterr()
    assert explain.main(["--check", altered(change)]) == 1
    said = capsys.readouterr().out
    assert any(broken in line for line in said.splitlines() if line.startswith("BROKEN"))


def test_an_unknown_gpu_in_the_records_is_an_error(altered, capsys):
    path = altered(lambda row: row.update(gpu="NVIDIA B9000"))
    with pytest.raises(SystemExit) as stop:
        explain.main(["--check", path])
    assert stop.value.code == 2
    assert "no ceilings for 'NVIDIA B9000'" in capsys.readouterr().err


@pytest.mark.parametrize(("scope", "direction"), [("attention", "forward"), ("block", "backward")])
def test_measure_prints_both(monkeypatch, capsys, scope, direction):
    """On the CPU: naive's memory is the predicted one there as well; times are not its business."""
    monkeypatch.setitem(seqlen.EFFORTS, ("cpu", "full"), seqlen.Effort(1, 0.001, 2, 2))
    cell = CELL._replace(
        backend="sdpa-flash", dtype="float32", N=128, E=64, scope=scope, direction=direction
    )
    assert explain.measure(cell, H200, torch.device("cpu")) == 0
    said = capsys.readouterr().out
    if direction == "forward":
        assert re.search(r"Naive +memory +([\d.]+) MiB +\1 MiB +[+-]0%", said)
    else:  # a CPU's softmax does without the matrix that a GPU's makes
        found = re.search(r"Naive +memory +([\d.]+) MiB +([\d.]+) MiB", said)
        extra = cell.B * cell.H * cell.N**2 * 4 / 2**20
        assert float(found[1]) - float(found[2]) == pytest.approx(extra, abs=0.02)
    assert re.search(r"SDPA flash +time +[\d.]+ .?s +[\d.]+ .?s", said)


# ---- The command ---------------------------------------------------------------------------------


def test_a_page(tame, capsys):
    assert explain.main(["--length", "32768", "--scope", "block", "--kv-heads", "4"]) == 0
    said = capsys.readouterr().out
    assert "NVIDIA H200" in said.splitlines()[0]
    for word in ("what binds", "4·B·H·N²·D", "naive attention does not fit", "4 KV heads", "GiB"):
        assert word in said
    assert max(map(len, said.splitlines())) <= 140


@pytest.mark.parametrize("dtype", common.DTYPES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_pages_of_every_kind(tame, capsys, dtype, direction):
    for more in ([], ["--scope", "block", "--kv-heads", "2"], ["--no-causal", "--head-dim", "40"]):
        argv = ["--length", "100", "--dtype", dtype, "--direction", direction, *more]
        assert explain.main([*argv, "--heads", "4"]) == 0
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "either --length or --check"),
        (["--length", "0"], "whole number from 1 up"),
        (["--length", "1" + "0" * 9], "no computer's memory"),
        (["--length", "9", "--heads", "6", "--kv-heads", "4"], "4 does not divide --heads 6"),
        (["--length", "9", "--heads", "6", "--embed", "32"], "6 does not divide --embed 32"),
        (["--length", "9", "--embed", "64", "--head-dim", "4"], "not allowed with"),
        (["--length", "9", "--gpu", "b9000"], "row: matrix product"),
        (["--length", "9", "--dtype", "float32", "--backend", "v5_pingpong"], "does not take"),
        (["--length", "9", "--direction", "backward", "--backend", "v5_pingpong"], "no backward"),
        (["--length", "9", "--backend", "naive"], "invalid choice"),
        (["--length", "9", "--measure"], "needs a CUDA GPU"),
        (["--check", "x", "--measure"], "goes with --length"),
        (["--check", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--check", __file__], "not a record"),
    ],
)
def test_bad_input_is_an_error_that_says_why(tame, capsys, argv, said):
    with pytest.raises(SystemExit) as stop:
        explain.main(argv)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_a_gpu_is_known_by_its_cuda_name():
    assert explain.of_device("NVIDIA H200") is H200
    with pytest.raises(LookupError, match="SMs, clock, memory"):
        explain.of_device("NVIDIA H200 NVL")  # another clock and power limit


@pytest.mark.gpu
def test_measure_on_a_gpu(capsys):
    name = torch.cuda.get_device_name()
    if not any(gpu.name == name for gpu in explain.GPUS.values()):
        pytest.skip(f"no ceilings for {name}")
    assert explain.main(["--length", "2048", "--measure"]) == 0
    assert "Predicted beside measured" in capsys.readouterr().out
