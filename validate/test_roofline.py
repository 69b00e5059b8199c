"""bench/roofline.py and its figure: canned counters, made-up clocks, records with known answers."""

import stat
import subprocess
import sys
import time

import pytest
import torch
from flashstudy.backends import naive
from flashstudy.bench import common, roofline, rounds
from flashstudy.figures import grid, records
from flashstudy.figures import roofline as figure

CELL = grid.Cell("forward", 128, False, 1024, 4, 16)
# As ncu prints it: messages, the names of the columns, their units, a line for each kernel.
CANNED = """\
==PROF== Connected to process 4242 (/usr/bin/python3.12)
==PROF== Profiling "spin_kernel" - 0: 0%....50%....100% - 1 pass
==PROF== Profiling "nvjet_sm90" - 1: 0%....50%....100% - 1 pass
==PROF== Disconnected from process 4242
"ID","Process ID","Kernel Name","Grid Size","dram__bytes_read.sum","gpu__time_duration.sum","x.pct"
"","","","","byte","ns","%"
"0","4242","spin_kernel","(1, 1, 1)","64","1,216","0"
"1","4242","nvjet_sm90","(64, 1, 1)","1,000,000","3,000","80.5"
"2","4242","softmax_warp","(64, 1, 1)","2,000,000","1,000","0.5"
"3","4242","spin_kernel","(1, 1, 1)","0","1,216","0"
"4","4242","_attend","(132, 1, 1)","512","2,000","n/a"
==WARNING== something at the end
"""
TIME = roofline.Counter("ncu_ms", "ms", (("gpu__time_duration.sum", 1e-6),))
READ = roofline.Counter("dram_read_bytes", "B", (("dram__bytes_read.sum", 1),))
SHARE = roofline.Counter("share", "%", (("x.pct", 1),), mean=True)
CHOSEN = {c: c.names[0] for c in (TIME, READ, SHARE)}


# Counters


def test_ncus_table_is_found_between_its_messages():
    kernels, passes = roofline.parse_ncu(CANNED)
    assert [k["Kernel Name"] for k in kernels] == [
        "spin_kernel", "nvjet_sm90", "softmax_warp", "spin_kernel", "_attend",
    ]  # fmt: skip
    assert kernels[1]["dram__bytes_read.sum"] == "1,000,000"
    assert passes == 1
    assert (
        roofline.parse_ncu(CANNED.replace("- 1 pass\n==PROF== D", "- 3 passes\n==PROF== D"))[1] == 3
    )
    assert roofline.parse_ncu("==ERROR== The user does not have permission\n") == ([], 0)


def test_kernels_are_summed_per_call():
    first, second = roofline.split_calls(roofline.parse_ncu(CANNED)[0])
    found = roofline.add_up(first, CHOSEN)
    assert found[READ] == (3e6, [["nvjet_sm90", 1e6], ["softmax_warp", 2e6]])
    assert found[TIME][0] == pytest.approx(4e-3)
    assert found[SHARE][0] == pytest.approx((80.5 * 3 + 0.5 * 1) / 4)  # weighted with the times
    found = roofline.add_up(second, CHOSEN)
    assert found[READ] == (512.0, [["_attend", 512.0]])
    assert SHARE not in found  # n/a is no number
    assert roofline.add_up([], CHOSEN) == {}


def test_a_kernel_before_the_first_mark_belongs_to_no_call():
    with pytest.raises(ValueError, match="before the first mark"):
        roofline.split_calls(roofline.parse_ncu(CANNED)[0][1:])


def test_the_first_metric_that_ncu_knows_is_taken():
    counter = roofline.Counter("l2_bytes", "B", (("new__sectors.sum", 32), ("old__bytes.sum", 1)))
    assert roofline.choose({"new__sectors", "old__bytes"}, [counter])[0] == {
        counter: ("new__sectors.sum", 32)
    }
    assert roofline.choose({"old__bytes"}, [counter])[0] == {counter: ("old__bytes.sum", 1)}
    assert roofline.choose({"other"}, [counter]) == ({}, [counter])


NCU = """#!{python}
import sys, time
if "--query-metrics" in sys.argv:
    print("Device NVIDIA H200 (GH100)")
    print("-" * 20)
    for name in {known}:
        print(name.ljust(40), "Counter     byte      # of bytes")
    sys.exit()
if {error!r} == "sleep":
    time.sleep(60)
if {error!r}:
    print({error!r})
    sys.exit(1)
log = sys.argv[sys.argv.index("--log-file") + 1]
names = sys.argv[sys.argv.index("--metrics") + 1].split(",")
assert "--clock-control" in sys.argv and "none" in sys.argv
with open(log, "w") as f:
    f.write('==PROF== Profiling "k" - 0: 0%....100% - {passes} pass\\n')
    f.write(",".join('"%s"' % n for n in ["ID", "Kernel Name", *names]) + "\\n")
    f.write(",".join('""' for n in range(2 + len(names))) + "\\n")
    kernels = []
    for call in range({calls}):
        kernels += ["spin_kernel", "one", "two"]
    for i, k in enumerate(kernels):
        f.write(",".join('"%s"' % v for v in [i, k, *["1,024"] * len(names)]) + "\\n")
"""
KNOWN = ["gpu__time_duration", "dram__bytes_read", "dram__bytes_write", "lts__t_bytes"]


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """Puts a program called ncu in front of the path."""

    def install(known=tuple(KNOWN), calls=2, passes=1, error=""):
        path = tmp_path / "ncu"
        about = {"known": list(known), "calls": calls, "passes": passes, "error": error}
        path.write_text(NCU.format(python=sys.executable, **about))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return install


TASKS = [("naive", *CELL), ("v1_flash", *CELL)]


def count(counters=roofline.TRAFFIC, seconds=30):
    return roofline.count(TASKS, counters, roofline.ncu_knows(), "bfloat16", 0, seconds)


def test_ncu_is_asked_for_what_it_knows_and_its_answer_read(ncu):
    ncu()
    found, passes, said = count()
    assert [task for task, _ in found] == TASKS
    values = {c.metric: v for c, (v, _) in found[1][1].items()}
    assert values == {
        "ncu_ms": pytest.approx(2 * 1024e-6), "dram_read_bytes": 2048, "dram_write_bytes": 2048,
        "l2_bytes": 2048,
    }  # fmt: skip
    assert (passes, said) == (1, [])
    assert any("ncu has no xu_threads" in line for line in count(roofline.UNITS)[2])


def test_several_passes_are_said(ncu):
    ncu(passes=4)
    _, passes, said = count()
    assert passes == 4
    assert any("4 passes" in line for line in said)


def test_of_a_run_that_breaks_off_the_whole_calls_count(ncu):
    ncu(calls=1)
    with pytest.raises(roofline.NoCounters, match="1 of 2 calls"):
        count()
    tasks = [*TASKS, *TASKS]
    ncu(calls=3)
    names = roofline.ncu_knows()
    found, _, said = roofline.count(tasks, roofline.TRAFFIC, names, "bfloat16", 0, 30)
    assert [t for t, _ in found] == TASKS  # the last of the three may be half of one
    assert any("3 of 4 calls" in line for line in said)


def test_no_counters_say_why(ncu, monkeypatch, tmp_path):
    ncu(error="==ERROR== ERR_NVGPUCTRPERM - no permission")
    with pytest.raises(roofline.NoCounters, match="0 of 2 calls: ERR_NVGPUCTRPERM"):
        count()
    ncu(error="sleep")
    with pytest.raises(roofline.NoCounters, match="did not end within 1 s"):
        count(seconds=1)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(roofline.NoCounters, match="not installed"):
        count()


# Counted work


def test_counted_work_by_hand():
    scores, tensor = 4 * 16 * 1024**2, 4 * 16 * 1024 * 128 * 2
    found = roofline.counted(CELL, "naive", "bfloat16")
    assert found["counted_flops"] == 4 * scores * 128
    assert found["counted_exps"] == scores
    assert found["counted_bytes"] == 4 * scores * 2 + 4 * tensor
    assert found["scores_bytes"] == scores * 2
    causal = CELL._replace(causal=True)
    assert roofline.counted(causal, "v0_naive", "bfloat16") == found  # masks on the way
    masked = roofline.counted(causal, "naive", "bfloat16")
    assert masked["counted_bytes"] == 6 * scores * 2 + 4 * tensor
    flash = roofline.counted(causal, "v1_flash", "bfloat16")
    assert flash["counted_flops"] == 4 * 64 * (8 * 9 / 2) * 128 * 128 * 128  # tiles of 128
    assert flash["scores_bytes"] == 0


# The run


class FakeTimer:
    """Runs calls, and says that they took `ms`."""

    device, flush_s = "cpu", 0.0

    def __init__(self, ms=1.0):
        self.ms = ms

    def once(self, call):
        call()
        return self.ms / 1e3, 1e-5

    def turn(self, call, calls, idle):
        call()
        return [self.ms] * calls


@pytest.fixture
def tame(monkeypatch):
    """Every backend runs here, as Naive; ceilings of 1 unit a ms; no ncu."""
    monkeypatch.setattr(rounds, "why_not", lambda *_: None)
    monkeypatch.setattr(rounds, "load", lambda name: naive.attention)
    environment = common.environment(torch.device("cpu"))
    monkeypatch.setattr(common, "environment", lambda device: environment)
    made = {name: roofline.Ceiling(lambda: None, 1.0, "1/s") for name in figure.CEILINGS}
    monkeypatch.setattr(roofline, "ceiling_calls", lambda *_: made)
    monkeypatch.setattr(roofline.shutil, "which", lambda name: None)
    monkeypatch.setattr(roofline, "HEAD_DIM", 16)
    monkeypatch.setattr(roofline, "HEAD_DIMS", ())
    monkeypatch.setattr(roofline, "CAUSAL_LENGTHS", (32,))
    return monkeypatch


TINY = ["--lengths", "32,64", "--batch", "1", "--hidden", "32", "--backends", "naive,v1_flash"]


def test_it_records_ceilings_times_and_why_there_are_no_counters(tame, tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    assert roofline.main([*TINY, "--out", str(path)], FakeTimer()) == 0
    rows = records.read(path)
    ceilings = {r["ceiling"]: r["p50"] for r in rows if r["metric"] == "ceiling"}
    assert ceilings == dict.fromkeys(figure.CEILINGS, pytest.approx(1e3))
    timed = [r for r in rows if r["metric"] == "time_ms"]
    assert {(r["backend"], r["N_Q"], r["causal"]) for r in timed} == {
        ("naive", 32, False), ("naive", 64, False), ("v1_flash", 32, False),
        ("v1_flash", 64, False), ("v1_flash", 32, True),
    }  # fmt: skip
    assert all(r["p50"] == 1.0 and r["counted_flops"] > 0 for r in timed)
    (without,) = [r for r in rows if r["metric"] == "counters"]
    assert without["status"] == "unsupported"
    assert "not installed" in without["reason"]
    assert "This GPU's ceilings" in capsys.readouterr().out
    assert roofline.main([*TINY, "--out", str(path), "--no-counters"], FakeTimer()) == 0
    assert records.read(path) == rows  # nothing was missing
    assert "cells are in" in capsys.readouterr().out


def test_short_calls_are_timed_on_all_clocks(tame, tmp_path):
    tame.setattr(common, "graph_samples", lambda fn: [0.004])
    tame.setattr(common, "host_samples", lambda fn: [0.04])
    path = tmp_path / "r.jsonl"
    roofline.main([*TINY, "--no-counters", "--out", str(path)], FakeTimer(0.05))
    found = records.gather(records.read(path))
    assert all(
        m["graph_ms"]["p50"] == 0.004 and m["host_ms"]["p50"] == 0.04 for m in found.values()
    )
    assert len(found) == 5


def test_counters_join_the_calls_that_have_none(tame, tmp_path, capsys):
    def count(tasks, counters, known, dtype, seed, seconds):
        assert known == {"known"}
        assert 0 < seconds <= 85
        values = {roofline.TIME: (0.5, [["k", 0.5]]), READ: (2.0**20, [["k", 2.0**20]])}
        found = [(t, values if t[0] == "naive" else {}) for t in tasks]
        return found, 1, ["a remark"] if counters is roofline.TRAFFIC else []

    tame.setattr(roofline, "count", count)
    tame.setattr(roofline, "ncu_knows", lambda: {"known"})
    tame.setattr(roofline, "HEAD_DIMS_AT", 64)
    path = tmp_path / "r.jsonl"
    roofline.main([*TINY, "--out", str(path)], FakeTimer())
    out = capsys.readouterr().out
    assert "a remark" in out
    assert "no counters of v1_flash" in out
    for metrics in records.gather(records.read(path)).values():
        if metrics["time_ms"]["backend"] == "naive":
            assert metrics["dram_read_bytes"]["p50"] == 2**20
            assert metrics["dram_read_bytes"]["kernels"] == [["k", 2**20]]
            assert metrics["dram_read_bytes"]["unit"] == "B"
            assert metrics["dram_read_bytes"]["ncu_passes"] == 1
            assert metrics["ncu_ms"]["p50"] == 0.5
        else:
            assert "dram_read_bytes" not in metrics
    asked = []
    tame.setattr(roofline, "count", lambda tasks, *_: (asked.extend(tasks), ([], 1, []))[1])
    roofline.main([*TINY, "--out", str(path)], FakeTimer())
    assert {t[0] for t in asked} == {"v1_flash"}
    assert not any(t[3] for t in asked)  # causal calls are not counted


def test_what_is_counted_first_is_ours():
    plan = roofline.plan_of(roofline.parse(roofline.parser(), []))
    first, second, third = roofline.batches(plan)
    assert {t[0] for t in first[0]} == {"naive", "v0_naive", "v1_flash", "v3_tma", "v6_persistent"}
    assert {t[0] for t in third[0]} == {"sdpa-cudnn", "flash-attn"}
    assert {t[2] for t in second[0]} == {32, 64, 128, 256}
    assert [c for _, c in (first, second, third)] == [
        roofline.TRAFFIC, roofline.UNITS, roofline.TRAFFIC,
    ]  # fmt: skip


def test_time_that_is_up_is_said(tame, tmp_path, capsys):
    tame.setattr(roofline, "ncu_knows", lambda: {"known"})
    tame.setattr(roofline, "LEAST_SECONDS", 86)
    path = tmp_path / "r.jsonl"
    assert roofline.main([*TINY, "--out", str(path)], FakeTimer()) == 0
    assert "left no time to count 4 calls" in capsys.readouterr().out


def test_a_command_that_takes_too_long_is_ended_with_its_children():
    start = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        roofline.run_within(["sh", "-c", "sleep 60 & wait"], 0.5)
    assert time.monotonic() - start < 10
    assert roofline.run_within(["sh", "-c", "echo yes; exit 3"], 10) == (3, "yes\n")


def test_the_plan_adds_lengths_for_what_stores_scores():
    args = roofline.parse(roofline.parser(), [])
    plan = roofline.plan_of(args)
    of_n = {c.length: names for c, names in plan.items() if (c.head_dim, c.causal) == (128, False)}
    assert set(of_n[roofline.BETWEEN[0]]) == {"naive", "v0_naive"}
    assert of_n[128] == args.backends
    assert all("naive" not in names for c, names in plan.items() if c.causal or c.head_dim != 128)
    assert {c.heads * c.head_dim for c in plan} == {2048}


def test_ceilings_are_amounts_over_times():
    calls = {
        "a": roofline.Ceiling(lambda: None, 3e9, "B/s"),
        "b": roofline.Ceiling(lambda: None, 5.0, "x/s"),
    }
    found = roofline.measure_ceilings(calls, FakeTimer(2.0))
    assert found["a"]["best"] == pytest.approx(1.5e12)
    assert found["a"]["p50"] == pytest.approx(1.5e12)
    assert found["b"]["p50"] == pytest.approx(2.5e3)


@pytest.mark.gpu
def test_a_gpus_ceilings_are_plausible():
    timer = rounds.GpuTimer()
    device = torch.device("cuda", 0)
    calls = roofline.ceiling_calls(
        torch.bfloat16, timer.device, 0, roofline.chip(device)["sms"]
    )  # fmt: skip
    found = {n: r["p50"] for n, r in roofline.measure_ceilings(calls, timer, 1, 0.01).items()}
    assert found["l2"] > found["copy"] > 1e11
    assert found["matmul"] > found["exp"] > 1e11
