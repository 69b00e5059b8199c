"""bench/seqlen.py and bench/doctor.py as their users meet them, on tiny shapes on the CPU."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from flashstudy import backends
from flashstudy.bench import common, doctor, seqlen
from flashstudy.figures import records

GIB = 2**30
TINY = [
    "--device",
    "cpu",
    "--embed",
    "32",
    "--heads",
    "2",
    "--quick",
    "--no-charts",
    "--no-progress",
]
TWO = [*TINY, "--backends", "naive", "sdpa-flash", "--lengths", "16,32"]
FIELDS = {
    "backend", "direction", "metric", "value", "unit", "B", "H", "H_KV", "N_Q", "N_K", "D", "E",
    "dtype", "causal", "scope", "p50", "p20", "p80", "samples", "status", "reason", "sdpa_kernel",
    "device", "gpu", "driver", "cuda", "cudnn", "torch", "triton", "flash_attn", "flash_attn_4",
    "commit", "source", "utc", "seed", "protocol", "effort",
}  # fmt: skip


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def cells_of(path):
    return {
        (
            m["time_ms"]["backend"],
            m["time_ms"]["scope"],
            m["time_ms"]["dtype"],
            m["time_ms"]["N_Q"],
        ): m
        for m in records.gather(records.read(path)).values()
    }


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny shapes on several threads measure how threads wait for each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the processes that tests start
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def counted(monkeypatch):
    """The functions that were timed, a list that grows."""
    calls, samples = [], common.samples

    def count(fn, *rest):
        calls.append(fn)
        return samples(fn, *rest)

    monkeypatch.setattr(common, "samples", count)
    return calls


def replace(monkeypatch, name, function):
    """Make backend `name` run `function(original, q, k, v, **rest)`."""
    original, load = backends.load(name), backends.load

    def attention(q, k, v, **rest):
        if q.device.type == "meta":  # the prediction of memory, which runs nothing
            return original(q, k, v, **rest)
        return function(original, q, k, v, **rest)

    monkeypatch.setattr(backends, "load", lambda n: attention if n == name else load(n))


def test_a_run_records_every_cell_and_the_same_command_measures_nothing(tmp_path, counted, capsys):
    out = tmp_path / "r.jsonl"
    assert seqlen.main([*TWO, "--out", str(out)]) == 0
    first = capsys.readouterr().out
    assert "8 cells, 0 recorded already, 8 to measure" in first
    assert "Inside the block" in first.split("\n\n")[-3]  # the answer comes last
    assert "Attention alone" in first.split("\n\n")[-2]
    assert len(cells_of(out)) == len(counted) == 8
    assert {r["command"] for r in rows_of(out)} == {
        "python bench/seqlen.py --device cpu --embed 32 --heads 2 --quick --no-charts --no-progress"
        " --backends naive sdpa-flash --lengths 16,32"
    }
    before = out.read_bytes()
    assert seqlen.main([*TWO, "--out", str(out)]) == 0
    assert "8 recorded already, 0 to measure" in capsys.readouterr().out
    assert len(counted) == 8
    assert out.read_bytes() == before


def test_a_backend_may_be_limited_to_some_lengths(tmp_path, counted):
    out = tmp_path / "r.jsonl"
    command = [*TWO, "--scope", "block", "--limit", "naive=32", "--out", str(out)]
    assert seqlen.main(command) == 0
    assert {(b, n) for b, _, _, n in cells_of(out)} == {
        ("naive", 32), ("sdpa-flash", 16), ("sdpa-flash", 32),
    }  # fmt: skip


def test_more_lengths_measure_only_what_is_new(tmp_path, counted):
    out = tmp_path / "r.jsonl"
    block = [*TINY, "--backends", "naive", "--scope", "block", "--out", str(out)]
    seqlen.main([*block, "--lengths", "16"])
    seqlen.main([*block, "--lengths", "16", "24"])
    assert len(counted) == 2
    seqlen.main([*block, "--lengths", "16", "24", "--no-causal"])
    assert len(counted) == 4


def test_fp32_products_of_another_precision_are_another_measurement(tmp_path, counted):
    command = [*TINY, "--backends", "naive", "--scope", "block", "--lengths", "16"]
    command += ["--out", str(tmp_path / "r.jsonl")]
    before = torch.get_float32_matmul_precision()
    try:
        for precision, times in (("highest", 1), ("high", 2), ("highest", 2)):
            torch.set_float32_matmul_precision(precision)
            seqlen.main(command)
            assert len(counted) == times
    finally:
        torch.set_float32_matmul_precision(before)


def test_records_carry_their_provenance_and_consistent_values(tmp_path):
    out = tmp_path / "r.jsonl"
    seqlen.main([*TWO, "--batch", "3", "--out", str(out)])
    for (backend, scope, _, n), cell in cells_of(out).items():
        for row in cell.values():
            assert row.keys() >= FIELDS
            assert row["status"] == "ok"
            assert row["value"] == row["p50"]
            assert row["p20"] <= row["p50"] <= row["p80"]
            assert row["samples"] >= 1
            assert row["unit"] == seqlen.UNITS[row["metric"]]
            assert (row["B"], row["H"], row["H_KV"], row["D"], row["N_K"]) == (3, 2, 2, 16, n)
            assert row["gpu"] is None
            assert row["device"]
        ms = cell["time_ms"]["p50"]
        if scope == "block":
            assert cell["tokens_per_s"]["value"] == pytest.approx(3 * n / (ms * 1e-3))
            assert cell["tokens_per_s"]["p20"] == pytest.approx(3e3 * n / cell["time_ms"]["p80"])
        else:
            flops = 4 * 3 * 2 * n * n * 16 / 2
            assert cell["tflops"]["value"] == pytest.approx(flops / (ms * 1e-3) / 1e12)
        assert cell["peak_delta_mib"]["value"] > 0, backend


def test_a_last_line_cut_off_is_dropped_alone_and_its_cell_measured_again(
    tmp_path, counted, capsys
):
    out = tmp_path / "r.jsonl"
    seqlen.main([*TWO, "--out", str(out)])
    data = out.read_bytes().splitlines(keepends=True)
    last = max(i for i, line in enumerate(data) if b'"time_ms"' in line)
    out.write_bytes(b"".join(data[:last]) + data[last][:100])
    counted.clear()
    assert seqlen.main([*TWO, "--out", str(out)]) == 0
    assert "dropped a last line cut off in writing (100 bytes)" in capsys.readouterr().out
    assert len(counted) == 1
    assert out.read_bytes().startswith(b"".join(data[:last]))
    assert len(cells_of(out)) == 8


def test_ctrl_c_loses_no_record_and_the_same_command_goes_on(tmp_path):
    out = tmp_path / "r.jsonl"
    command = [sys.executable, seqlen.__file__, *TINY, "--backends", "naive,sdpa-flash,sdpa-math"]
    command += ["--lengths", ",".join(map(str, range(16, 80, 16))), "--out", str(out)]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A shell that runs the tests in the background has its children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and run.poll() is None:
            if out.exists() and out.read_text().count('"time_ms"') >= 6:
                break
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        said, _ = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, said
    assert "the same command goes on from there" in said
    assert "Traceback" not in said
    kept = cells_of(out)
    assert 6 <= len(kept) < 24
    assert f"{len(kept)} of 24 cells" in said
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"24 cells, {len(kept)} recorded already, {24 - len(kept)} to measure" in done.stdout
    seen = [(records.key(r), r["metric"]) for r in rows_of(out) if "backend" in r]
    assert len(seen) == len(set(seen))
    assert len(cells_of(out)) == 24


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--backends", "nave"], "--backends: no backend 'nave'; there are naive, naive-compiled"),
        (["--backends", ","], "--backends: expected at least one name"),
        (["--lengths", "-5"], "--lengths: expected a whole number from 1 up, got '-5'"),
        (["--lengths", "0"], "--lengths: expected a whole number from 1 up, got '0'"),
        (["--lengths", "128,x"], "--lengths: expected a whole number from 1 up, got 'x'"),
        (["--limit", "nave=8"], "--limit: no backend 'nave'"),
        (["--batch", "0"], "--batch: expected a whole number from 1 up, got '0'"),
        (["--embed", "100", "--heads", "3"], "--heads: 3 does not divide --embed 100"),
        (["--heads", "4", "--kv-heads", "3"], "--kv-heads: 3 does not divide --heads 4"),
        (["--dtype", "float8"], "--dtype: invalid choice: 'float8'"),
        (["--device", "tpu"], "--device: expected cpu, cuda or cuda:INDEX, got 'tpu'"),
        (["--protocol", "mixed", "--dtype", "float32"], "--dtype: --protocol mixed compares"),
        (["--out", "/dev/null/x.jsonl"], "--out: cannot append to /dev/null/x.jsonl"),
        (["--out", "/"], "--out: cannot append to /"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_measured(arguments, says, capsys, counted):
    with pytest.raises(SystemExit) as stop:
        seqlen.main([*TINY[:2], *arguments])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
    assert not counted


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA GPU")
def test_cuda_without_a_gpu_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        seqlen.main(["--device", "cuda"])
    assert stop.value.code == 2
    assert "--device: 'cuda' asked for, but torch sees no CUDA GPU" in capsys.readouterr().err


def test_a_file_of_something_else_is_left_alone(tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    out.write_text('{"a": 1}\nnot a record\n{"b": 2}\n')
    with pytest.raises(SystemExit) as stop:
        seqlen.main([*TWO, "--out", str(out)])
    assert stop.value.code == 2
    assert "r.jsonl:2: not a record" in capsys.readouterr().err
    assert out.read_text() == '{"a": 1}\nnot a record\n{"b": 2}\n'


def test_two_runs_do_not_write_one_file(tmp_path):
    held = common.Records(tmp_path / "r.jsonl")
    with pytest.raises(OSError, match="another process is writing"):
        common.Records(tmp_path / "r.jsonl")
    held.close()
    common.Records(tmp_path / "r.jsonl").close()


def test_a_store_that_did_not_open_holds_no_lock(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("not a record\n")
    with pytest.raises(ValueError, match="not a record") as kept:  # and with it, what was open
        common.Records(path)
    path.write_text("")
    common.Records(path).close()
    assert kept.value is not None


def test_out_of_memory_is_a_row_with_the_predicted_size(tmp_path, monkeypatch, capsys):
    def starved(original, q, k, v, **rest):
        if q.shape[2] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")
        return original(q, k, v, **rest)

    replace(monkeypatch, "naive", starved)
    out = tmp_path / "r.jsonl"
    assert seqlen.main([*TWO, "--out", str(out)]) == 0
    cells = cells_of(out)
    assert len(cells) == 8
    for (backend, _, _, n), cell in cells.items():
        row = cell["time_ms"]
        if (backend, n) == ("naive", 32):
            assert set(cell) == {"time_ms"}
            assert (row["status"], row["value"], row["samples"]) == ("oom", None, 0)
            assert "CUDA out of memory" in row["reason"]
            assert row["predicted_mib"] * 2**20 >= 2 * 2 * 32 * 32 * 4  # S and P
        else:
            assert row["status"] == "ok"
    assert "Naive ran out of memory at 32 tokens: at 32 it would have" in capsys.readouterr().out


def test_a_failing_cell_does_not_end_the_run_but_shows_in_the_exit_code(tmp_path, monkeypatch):
    def broken(original, q, k, v, **rest):
        if q.shape[2] > 16:
            raise RuntimeError("no kernel image is available. Consider this and that")
        return original(q, k, v, **rest)

    replace(monkeypatch, "naive", broken)
    out = tmp_path / "r.jsonl"
    assert seqlen.main([*TWO, "--out", str(out)]) == 1
    found = {(b, n): m["time_ms"] for (b, _, _, n), m in cells_of(out).items()}
    assert found["naive", 32]["status"] == "failed"
    assert found["naive", 32]["reason"] == "RuntimeError: no kernel image is available"
    assert found["naive", 16]["status"] == found["sdpa-flash", 32]["status"] == "ok"


def test_a_wrong_backend_is_not_timed(tmp_path, monkeypatch, counted, capsys):
    replace(
        monkeypatch, "naive", lambda original, q, k, v, **rest: original(q, k, v, **rest) * 1.01
    )
    out = tmp_path / "r.jsonl"
    assert seqlen.main([*TWO, "--out", str(out)]) == 1
    statuses = {b: m["time_ms"]["status"] for (b, *_), m in cells_of(out).items()}
    assert statuses == {"naive": "wrong", "sdpa-flash": "ok"}
    assert len(counted) == 4
    assert "Naive was wrong and not timed: at its check, at N = 16" in capsys.readouterr().out


def test_memory_beyond_the_machine_is_not_tried_on_a_cpu(tmp_path, monkeypatch, counted):
    monkeypatch.setattr(common, "available_bytes", lambda: 0)
    out = tmp_path / "r.jsonl"
    assert seqlen.main([*TWO, "--out", str(out)]) == 0
    rows = [m["time_ms"] for m in cells_of(out).values()]
    assert {r["status"] for r in rows} == {"oom"}
    assert "not tried" in rows[0]["reason"]
    assert not counted


def test_what_cannot_run_here_is_a_row_and_interpreted_kernels_are_never_timed(
    tmp_path, monkeypatch, counted, capsys
):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "r.jsonl"
    names = ["naive", "sdpa-cudnn", "v1_flash"]
    seqlen.main([*TINY, "--backends", *names, "--lengths", "16", "--out", str(out)])
    reasons = {b: m["time_ms"]["reason"] for (b, *_), m in cells_of(out).items()}
    assert reasons["naive"] is None
    assert reasons["sdpa-cudnn"] == "needs a CUDA GPU"
    assert "never timed beside real ones" in reasons["v1_flash"]
    assert len(counted) == 2
    assert "not run (forward, float32): v1 flash: Triton" in capsys.readouterr().out


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("scope", ["block", "attention"])
@pytest.mark.parametrize("causal", [False, True])
def test_predicted_memory_is_what_the_allocator_was_asked_for(scope, direction, causal):
    cell = seqlen.Cell("naive", scope, direction, "float32", causal, 2, 64, 4, 2, 192)
    predicted, floor = seqlen.predict(cell)
    result = seqlen.Result()
    seqlen.Bench(torch.device("cpu"), seqlen.EFFORTS["cpu", "quick"], 0).prepare(cell, result)
    assert floor is None
    assert predicted == pytest.approx(result.bytes["peak_delta_mib"], rel=0.01)
    if (scope, direction) == ("attention", "forward"):
        b, h, n, d = 2, 4, 192, 16
        repeated = 2 * b * h * n * d * 4  # K and V for every query head
        assert predicted == 2 * b * h * n * n * 4 + b * h * n * d * 4 + repeated


def test_flash_memory_of_the_block_lies_on_its_analytic_line():
    for n in (256, 1024):
        cell = seqlen.Cell("sdpa-flash", "block", "forward", "float32", True, 2, 64, 4, 4, n)
        predicted, floor = seqlen.predict(cell)
        # q, k, v, the heads joined, the projection and the sum: six of the size of x.
        assert predicted is None
        assert floor == 6 * 2 * n * 64 * 4
        result = seqlen.Result()
        seqlen.Bench(torch.device("cpu"), seqlen.EFFORTS["cpu", "quick"], 0).prepare(cell, result)
        assert result.bytes["peak_delta_mib"] == pytest.approx(floor, rel=0.25)


@pytest.mark.parametrize("scope", ["block", "attention"])
def test_flash_memory_of_forward_and_backward_is_known_too(scope):
    cell = seqlen.Cell("sdpa-flash", scope, "backward", "float32", True, 2, 64, 4, 4, 1024)
    predicted, floor = seqlen.predict(cell)
    assert predicted is None
    result = seqlen.Result()
    seqlen.Bench(torch.device("cpu"), seqlen.EFFORTS["cpu", "quick"], 0).prepare(cell, result)
    assert floor <= result.bytes["peak_delta_mib"] <= 2 * floor  # torch's CPU kernel holds more
    # What the joined Hopper steps hold beside: sums of dQ in fp32, and lse once more.
    halves = [
        cell._replace(backend=n, dtype="bfloat16") for n in ("sdpa-flash", "v7_hopper_backward")
    ]
    without, summed = (seqlen.predict(c)[1] for c in halves)
    if scope == "attention":
        assert summed == without + 2 * 4 * 1024 * (16 * 4 + 4)
    else:
        assert without <= summed <= without + 2 * 4 * 1024 * (16 * 4 + 4)


def test_the_mixed_protocol_measures_both_precisions_of_standard_attention(tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    assert seqlen.main([*TWO, "--protocol", "mixed", "--out", str(out)]) == 0
    kinds = {(b, dtype) for b, _, dtype, _ in cells_of(out)}
    assert kinds == {("naive", "float32"), ("naive", "float16"), ("sdpa-flash", "float16")}
    said = capsys.readouterr().out
    assert "speed-up = precision × algorithm" in said
    assert "× is the precision" in said


def test_tf32_is_a_precision_of_its_own(monkeypatch, tmp_path):
    """Between fp32 and half in the mixed protocol; asked of torch by its flag, of ours by name."""
    args = argparse.Namespace(protocol="mixed", dtype="float16", device=torch.device("cuda"))
    monkeypatch.setattr(seqlen, "has_tf32", lambda device: device.type == "cuda")
    assert seqlen.precisions("naive", args) == ["float32", "tf32", "float16"]
    assert seqlen.precisions("flash-attn", args) == ["float16"]
    assert seqlen.attention_of("v1_flash", "tf32").keywords == {"allow_tf32": True}
    assert seqlen.attention_of("v1_flash", "float32") is backends.load("v1_flash")
    with common.products("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"

    out = tmp_path / "r.jsonl"
    arguments = ["--backends", "naive", "--lengths", "32", "--embed", "32", "--heads", "2"]
    assert seqlen.main([*arguments, "--dtype", "tf32", "--no-charts", "--out", str(out)]) == 0
    found = [m["time_ms"] for m in records.gather(records.read(out)).values()]
    assert {(r["dtype"], r["float32_matmul"], r["status"]) for r in found} == {
        ("tf32", "high", "unsupported")
    }
    assert "compute capability 8.0" in found[0]["reason"]


def test_backward_is_measured(tmp_path):
    out = tmp_path / "r.jsonl"
    arguments = [*TWO, "--direction", "both", "--kv-heads", "1", "--out", str(out)]
    assert seqlen.main(arguments) == 0
    rows = [m for m in records.gather(records.read(out)).values()]
    assert len(rows) == 16
    both = {
        m["time_ms"]["direction"]: m["peak_delta_mib"]["value"]
        for m in rows
        if m["time_ms"]["backend"] == "naive" and m["time_ms"]["N_Q"] == 32
        if m["time_ms"]["scope"] == "attention"
    }
    assert both["backward"] > both["forward"]


def test_charts_are_drawn_beside_the_records(tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    arguments = [a for a in TWO if a != "--no-charts"]
    assert seqlen.main([*arguments, "--scope", "block", "--out", str(out)]) == 0
    made = {p.relative_to(tmp_path / "r").as_posix() for p in (tmp_path / "r").rglob("*.*")}
    for name in ("runtime", "memory", "throughput", "speedup"):
        assert {f"block-{name}.png", f"block-{name}.svg"} <= made
    for name in ("runtime", "memory", "throughput"):
        report = f"perf_report/block-forward-float32-{name}"
        assert {f"{report}.png", f"{report}.csv"} <= made
    assert str(tmp_path / "r") in capsys.readouterr().out


def test_the_order_is_random_and_fixed_by_the_seed(tmp_path):
    def order(seed):
        args, store = seqlen.parse([*TWO, "--seed", seed, "--out", str(tmp_path / "r.jsonl")])
        store.close()
        return [(g[0].N, g[0].scope) for g in seqlen.plan(args)]

    assert order("0") == order("0")
    assert len({tuple(order(str(s))) for s in range(8)}) > 1


def test_doctor_names_every_backend_and_why(capsys):
    assert doctor.main(["--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for name in backends.BACKENDS:
        assert name in said
    assert "needs a CUDA GPU" in said
    assert torch.__version__ in said


def test_it_runs_from_elsewhere_as_a_module(tmp_path):
    names = ["--backends", "sdpa-flash", "--lengths", "16", "--scope", "block"]
    command = [sys.executable, "-m", "flashstudy.bench.seqlen", *TINY, *names]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "seqlen-cpu.jsonl").exists()
    assert os.listdir(tmp_path) == ["results"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_short_cells_have_three_clocks_and_absolute_memory(tmp_path):
    out = tmp_path / "r.jsonl"
    names = ["--backends", "naive", "sdpa", "--lengths", "128", "--scope", "attention"]
    sizes = ["--embed", "128", "--heads", "2", "--quick", "--no-charts", "--no-progress"]
    assert seqlen.main([*names, *sizes, "--out", str(out)]) == 0
    for cell in records.gather(records.read(out)).values():
        assert {"time_ms", "graph_ms", "host_ms", "peak_delta_mib", "peak_abs_mib"} <= set(cell)
        assert cell["graph_ms"]["status"] == "ok", cell["graph_ms"]["reason"]
        assert cell["peak_abs_mib"]["value"] > cell["peak_delta_mib"]["value"] > 0
    kernels = {c["time_ms"]["sdpa_kernel"] for c in cells_of(out).values()}
    assert len(kernels - {None}) == 1


def test_a_copy_can_be_told_which_commit_it_is(monkeypatch):
    monkeypatch.setenv("FLASHSTUDY_COMMIT", "0123456789ab+")
    assert common.environment(torch.device("cpu"))["commit"] == "0123456789ab+"
    monkeypatch.delenv("FLASHSTUDY_COMMIT")
    assert common.environment(torch.device("cpu"))["commit"] != "0123456789ab+"


def test_other_processes_compile_every_shape_only_of_what_needs_it(monkeypatch):
    names = ["naive", "naive-compiled", "flex", "flash-attn-4", "v0_naive", "v1_flash"]
    cells = [
        seqlen.Cell(name, scope, "forward", "bfloat16", True, 4, 2048, 16, 16, n)
        for n in (512, 128, 16384)
        for scope in ("block", "attention")
        for name in names
    ]
    monkeypatch.delenv(common.FA4_CACHE, raising=False)
    tasks = seqlen.to_compile(cells, 140 * GIB)
    found = [c for task in tasks for c in task]
    shapes = {(scope, n) for n in (128, 512, 16384) for scope in ("attention", "block")}
    for name in ("flex", "naive-compiled"):
        assert {(c.scope, c.N) for c in found if c.backend == name} == shapes
    # 32 GiB of scores at 16,384 tokens, twice: more than two processes may take at a time.
    assert [(c.backend, c.N) for c in tasks[0]] == [("naive-compiled", 16384)] * 2
    # One step may launch another kernel for much work than for little, but not v0: it stores all.
    assert [[c.N for c in task] for task in tasks if task[0].backend == "v1_flash"] == [
        [16384, 128]
    ]
    assert [[c.N for c in task] for task in tasks if task[0].backend == "v0_naive"] == [[128]]
    assert all(
        len(task) == 1 for task in tasks[1:] if task[0].backend in ("flex", "naive-compiled")
    )
    assert {c.backend for c in found} == {"naive-compiled", "flex", "v0_naive", "v1_flash"}
    monkeypatch.setenv(common.FA4_CACHE, "1")
    with_fa4 = [c for task in seqlen.to_compile(cells, 140 * GIB) for c in task]
    assert {c.N for c in with_fa4 if c.backend == "flash-attn-4"} == {128, 16384}
    # What would not fit even alone is not tried anywhere.
    found = [c for task in seqlen.to_compile(cells, 60 * GIB) for c in task]
    assert {c.N for c in found if c.backend == "naive-compiled"} == {128, 512}


def test_compiled_naive_is_not_tried_where_its_scores_do_not_fit_twice(monkeypatch):
    """The first call would fill the host's memory, too, before it failed."""
    called = []
    replace(monkeypatch, "naive-compiled", lambda attention, *qkv, **rest: called.append(1))
    monkeypatch.setattr(common, "memory_bytes", lambda device: 140 * GIB)
    bench = seqlen.Bench(torch.device("cuda"), seqlen.EFFORTS["cuda", "quick"], 0)
    cell = seqlen.Cell(
        "naive-compiled", "block", "forward", "bfloat16", True, 4, 2048, 16, 16, 32768
    )
    result = seqlen.Result()
    bench.prepare(cell, result)
    assert (result.status, called) == ("oom", [])
    assert result.reason.startswith("needs 256 GiB of 140 GiB")
    assert "not tried" in result.reason
    (row,) = seqlen.rows(cell, result, {})
    assert (row["status"], row["predicted_mib"]) == ("oom", 256 * 1024)
    assert seqlen.rows(cell, seqlen.Result("failed"), {})[0]["predicted_mib"] is None
    assert seqlen.tuning_bytes(cell._replace(N=16384)) == 64 * GIB
    assert seqlen.tuning_bytes(cell._replace(dtype="float32", N=16384)) == 128 * GIB
    assert seqlen.tuning_bytes(cell._replace(backend="naive")) == 0


def test_backends_are_checked_while_other_processes_compile(tmp_path, monkeypatch):
    log = []
    real = seqlen.errors.run

    def run(attention, *rest, **more):
        log.append("check")
        return real(attention, *rest, **more)

    class Compiling:
        def __init__(self, tasks, work):
            assert work is seqlen.first_calls
            self.tasks = tasks
            log.append("begin")

        def wait(self, seconds):
            log.append("wait")
            return []

    monkeypatch.setattr(seqlen.errors, "run", run)
    monkeypatch.setattr(seqlen.rounds, "Precompiler", Compiling)
    monkeypatch.setattr(seqlen.rounds, "compile_alone", lambda: log.append("alone"))
    monkeypatch.setattr(seqlen.rounds, "helped", lambda name: name == "sdpa-flash")
    monkeypatch.setattr(seqlen, "to_compile", lambda cells, memory: [(cells[0],)] * 4)
    precompile = seqlen.Bench.precompile

    def on_a_gpu(bench, cells):
        bench.device = torch.device("cuda", 0)
        precompile(bench, cells)
        bench.device = torch.device("cpu")

    monkeypatch.setattr(seqlen.Bench, "precompile", on_a_gpu)
    out = tmp_path / "r.jsonl"
    assert seqlen.main([*TWO, "--scope", "attention", "--out", str(out)]) == 0
    assert log == ["begin", "check", "alone", "wait", "check"]


def test_what_hangs_in_another_process_is_not_called(tmp_path, monkeypatch, capsys):
    def hung(bench, seconds):
        bench.verdicts["sdpa-flash", "float32", "forward"] = "failed", "did not return"

    called = []
    replace(monkeypatch, "sdpa-flash", lambda attention, *qkv, **rest: called.append(1))
    monkeypatch.setattr(seqlen.Bench, "wait", hung)
    monkeypatch.setattr(seqlen.rounds, "helped", lambda name: name == "sdpa-flash")
    out = tmp_path / "r.jsonl"
    assert seqlen.main([*TWO, "--scope", "attention", "--out", str(out)]) == 1
    found = {k[0]: m["time_ms"]["status"] for k, m in cells_of(out).items()}
    assert found == {"naive": "ok", "sdpa-flash": "failed"}
    assert not called


def test_a_budget_leaves_whole_lengths_to_the_next_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(seqlen, "takes", lambda group, memory: 1e9 if group[0].N == 32 else 0.0)
    out = tmp_path / "r.jsonl"
    assert seqlen.main([*TWO, "--budget", "600", "--out", str(out)]) == 0
    assert {k[3] for k in cells_of(out)} == {16}
    said = capsys.readouterr().out
    assert "--budget left no time for the block at 32, forward" in said
    assert "measured 4 cells" in said
    assert seqlen.main([*TWO, "--out", str(out)]) == 0  # without one, all of it
    assert {k[3] for k in cells_of(out)} == {16, 32}


def test_long_lengths_take_longer():
    cells = [
        seqlen.Cell(name, "attention", "forward", "bfloat16", True, 4, 2048, 16, 16, 32768)
        for name in ("naive", "flash-attn")
    ]
    memory, flops = 10**12, 4 * 4 * 16 * 32768**2 * 128 / 2
    assert seqlen.takes(cells[1:], memory) == pytest.approx(13 * flops / 400e12 + 0.2)
    assert seqlen.takes(cells[:1], memory) > 5 * seqlen.takes(cells[1:], memory)
    assert seqlen.takes([c._replace(N=128) for c in cells], memory) < 0.5
    wide = seqlen.takes([c._replace(dtype="float32") for c in cells[1:]], memory)
    assert wide > 5 * seqlen.takes(cells[1:], memory)
    # What does not fit is over at once.
    assert seqlen.takes(cells[:1], 140 * GIB) == pytest.approx(0.2)
    compiled = cells[0]._replace(backend="naive-compiled")
    assert seqlen.takes([compiled], 140 * GIB) == pytest.approx(0.2)
    assert seqlen.takes([compiled], 300 * GIB) > 5
