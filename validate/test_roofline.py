"""bench/roofline.py and its figure: canned counters, made-up clocks, records with known answers."""

import stat
import subprocess
import sys
import time

import pytest
import torch
from flashstudy.backends import naive
from flashstudy.bench import common, ladder, roofline, rounds
from flashstudy.figures import grid, records, table, trim
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
    assert roofline.parse_ncu("==ERROR== The user does not have permission\n") == ([], None)


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
    again = {"counted_bytes": found["counted_bytes"] + 2 * scores}  # its softmax reads S twice
    assert roofline.counted(causal, "v0_naive", "bfloat16") == found | again  # masks on the way
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
    monkeypatch.setattr(ladder, "load", lambda name: naive.attention)
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
        assert 0 < seconds <= 75
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


def test_traffic_is_counted_first_and_each_kind_in_one_go():
    plan = roofline.plan_of(roofline.parse(roofline.parser(), []))
    first, second = roofline.batches(plan)
    assert {t[0] for t in first[0]} == set(roofline.DEFAULT)
    assert {t[2] for t in first[0]} == {128}
    assert {t[2] for t in second[0]} == {64, 128, 256}
    assert [c for _, c in (first, second)] == [roofline.TRAFFIC, roofline.UNITS]


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


# The figure: a GPU of 1 PFLOP/s, 4 TB/s, 10 TB/s in L2, 4·10¹² exponentials a second, 64 MiB of L2


CEILINGS = {"matmul": 1e15, "copy": 4e12, "l2": 1e13, "exp": 4e12}
ABOUT = {
    "study": "roofline", "direction": "forward", "scope": "attention", "dtype": "bfloat16",
    "device": "Test GPU", "gpu": "Test GPU", "torch": "2.11", "cuda": "13.0", "triton": "3.6",
    "utc": "2026-01-02T", "effort": "turns", "run": "1",
}  # fmt: skip


def ceilings(**change):
    return [
        ABOUT | {"metric": "ceiling", "ceiling": name, "sms": 100, "l2_cache_bytes": 2**26}
        | {"best": rate, "p50": rate, "p20": rate, "p80": rate, "status": "ok"}
        for name, rate in (CEILINGS | change).items()
    ]  # fmt: skip


def call(backend, n, ms, *, d=128, causal=False, more=(), **counts):
    """The records of a call: batch 4, hidden size 2048, full tiles; `counts` replace or add."""
    heads = 2048 // d
    cell = grid.Cell("forward", d, causal, n, 4, heads)
    shape = {"B": 4, "H": heads, "H_KV": heads, "D": d, "E": 2048, "N_Q": n, "N_K": n}
    base = ABOUT | shape | {"backend": backend, "causal": causal, "status": "ok", "reason": None}

    def row(metric, value, **rest):
        return (
            base | {"metric": metric} | dict.fromkeys(("value", "p50", "p20", "p80"), value) | rest
        )

    known = roofline.counted(cell, backend, "bfloat16")
    rows = [row(m, v) for m, v in counts.items()]
    return [*rows, *(row(m, sum(v for _, v in k), kernels=k) for m, k in more),
            row("time_ms", ms, **known)]  # fmt: skip


def scores(n):
    return 4 * 16 * n * n * 2  # bytes of S


def flash_ms(n, causal=False, of_peak=0.8):
    cell = grid.Cell("forward", 128, causal, n, 4, 16)
    flops = roofline.counted(cell, "v1_flash", "bfloat16")["counted_flops"]
    return flops / (of_peak * 1e15) * 1e3


@pytest.fixture
def rows():
    """Naive at half the copy's rate; its scores in L2 up to 512 tokens. Flash at 80 % of products,
    causal at 71 %; at D = 64 at 60 %."""
    made = ceilings()
    for n in (128, 256, 512, 1024, 2048, 4096):
        whole = 4 * scores(n) + 4 * 4 * 16 * n * 128 * 2
        dram = whole * (1.0 if n > 512 else 0.1)
        small = {"graph_ms": 0.01, "host_ms": 0.05} if n <= 256 else {}
        parts = [["nvjet_a", 0.25], ["softmax_x", 0.5], ["nvjet_b", 0.25]]
        ms = whole / 2e12 * 1e3
        more = [
            ("ncu_ms", [[k, ms * f] for k, f in parts]),
            ("dram_read_bytes", [[k, dram / 2 * f] for k, f in parts]),
            ("dram_write_bytes", [[k, dram / 2 * f] for k, f in parts]),
        ]
        made += call("naive", n, ms, more=more, l2_bytes=2 * whole, **small)
        moved = 4 * 4 * 16 * n * 128 * 2
        made += call(
            "v1_flash", n, flash_ms(n), dram_read_bytes=moved * 0.75, dram_write_bytes=moved * 0.25,
            l2_bytes=10 * moved, xu_threads=4 * 16 * n**2 * 1.5, tensor_share=75.0,
            **({"graph_ms": 0.004, "host_ms": 0.04} if small else {}),
        )  # fmt: skip
        if n in (512, 4096):
            made += call("v1_flash", n, flash_ms(n, True, 0.71 if n == 512 else 0.8), causal=True)
    units = {"xu_threads": 4 * 32 * 4096**2 * 1.25, "tensor_share": 55.0}
    made += call("v1_flash", 4096, flash_ms(4096, of_peak=0.6), d=64, **units)
    return made


def test_shares_are_work_over_ceilings_and_time(rows):
    study = figure.Study(rows)
    assert study.champion() == "v1_flash"
    c = study.calls("v1_flash")[-1]
    assert study.shares(c)["products"] == pytest.approx(0.8)
    assert study.shares(c)["exps"] == pytest.approx(c.exps / 4e12 / c.seconds)
    assert study.shares(c)["memory"] == pytest.approx(4 * 4 * 16 * 4096 * 256 / 4e12 / c.seconds)
    c = study.calls("naive")[-1]
    assert study.shares(c)["memory"] == pytest.approx(0.5)  # 2 of 4 TB/s
    assert study.bound(c) == ("memory", pytest.approx(0.5))
    assert study.shares(c)["L2"] == pytest.approx(0.4)
    assert study.edge() == pytest.approx((2**26 / 128) ** 0.5)


def test_without_counters_bytes_are_the_counted_ones(rows):
    study = figure.Study([r for r in rows if not r["metric"].startswith(("dram", "l2", "ncu"))])
    assert study.counted_only()
    c = study.calls("naive")[-1]
    assert study.shares(c)["memory"] == pytest.approx(0.5)
    said = figure.paragraphs(study)
    assert "(counted bytes)" in said["Why naive attention is memory-bound"]
    assert "When its scores stop fitting in L2" not in said


def test_naive_is_memory_bound_from_where_its_scores_leave_l2(rows):
    study = figure.Study(rows)
    said = figure.paragraphs(study)["Why naive attention is memory-bound"]
    c = study.calls("naive")[-1]
    assert f"{c.flops / c.dram:.0f} at 4,096 tokens (measured bytes)" in said
    assert "needs 250 before" in said  # 1 PFLOP/s over 4 TB/s
    assert "A copy of as many bytes would take 50% of that time" in said
    assert "S = Q Kᵀ 25% of the time at 2 TB/s, softmax 50% of the time at 2 TB/s" in said
    assert "the softmax, moves its bytes at 50% of a copy's rate" in said
    assert "from 1,024 tokens on (at 512 it is" in said


def test_the_edge_of_the_cache_is_where_traffic_jumps(rows):
    said = figure.paragraphs(figure.Study(rows))["When its scores stop fitting in L2"]
    assert "10% went through device memory at 512 tokens (each matrix of scores 32 MiB)" in said
    assert "100% at 1,024 (128 MiB)" in said
    assert "outgrows it at 724 tokens for 64 heads" in said
    assert "moves 256 MiB through device memory, 1 times its q, k, v and o" in said


@pytest.mark.parametrize(
    ("exp", "words"),
    [
        (8e12, "neither unit is full"),  # 60 % products, 29 % exponentials
        (4e12, "neither unit is the limit alone"),
        (3e12, "the exponentials bind"),
    ],
)
def test_the_verdict_on_exponentials_follows_the_shares(rows, exp, words):
    rows = [r for r in rows if r.get("ceiling") != "exp"]
    rows += [r for r in ceilings(exp=exp) if r["ceiling"] == "exp"]
    said = figure.paragraphs(figure.Study(rows))["What exponentials cost at small head dims"]
    share = 0.6 * 1e15 / 256 / exp
    assert f"{share:.0%} of the exponentials'" in said
    assert words in said
    assert "worked in 55% of the cycles at D = 64 and in 75% at 128" in said
    assert "issued 1.25 and 1.50 instructions a score" in said
    assert f"{1e15 / (256 * exp):.0%} at D = 64" in said
    # Time a score: 512 / 0.8 at D = 128, 256 / 0.6 at D = 64, in units of 1e-15 s.
    per = {128: 512 / 0.8, 64: 256 / 0.6}
    assert f"a score still takes {per[64] / per[128]:.0%} of the time" in said
    assert f"{(2 * per[64] - per[128]) / per[64]:.0%} of it at D = 64 does not depend" in said


def test_causal_is_split_into_tiles_and_the_rest(rows):
    said = figure.paragraphs(figure.Study(rows))["Why causal gains less than twice"]
    assert "1.42 at 512 tokens (its tiles allow 1.60)" in said  # 2 · 4 / 5, at 71/80 of the speed
    assert "1.94 at 4,096 tokens (its tiles allow 1.94)" in said
    assert "89% of the full mask's speed per FLOP at 512 tokens (256 tiles of queries for" in said
    assert "at 100% at 4,096 (2,048 tiles)" in said


def test_short_calls_wait_for_the_host(rows):
    said = figure.paragraphs(figure.Study(rows))["Why short calls are launch-bound"]
    assert "busy for 4.0 µs with a call of v1 flash" in said
    assert "40 µs to launch it" in said
    assert "leaves the GPU idle 90% of the time: the quickest launcher wins" in said
    assert "64 tiles of 128 queries for 100 SMs are 0.64 for each" in said
    assert "still does not exceed the host's (4 and 40 µs)" in said


def test_of_nothing_nothing_is_said():
    study = figure.Study([])
    assert (study.tables(), figure.paragraphs(study)) == ([], {})
    assert figure.paragraphs(figure.Study(ceilings())) == {}


def test_stages_are_told_by_their_names_and_products_by_their_order():
    assert figure.stages(["nvjet_1", "softmax_warp_forward", "nvjet_2"]) == [
        "S = Q Kᵀ", "softmax", "O = P V",
    ]  # fmt: skip
    own = ["_scores_kernel", "_softmax_kernel", "_weighted_sum_kernel"]
    assert figure.stages(own) == ["S = Q Kᵀ", "softmax", "O = P V"]
    assert figure.stages(["gemm", "masked_fill_kernel", "cunn_SoftMax", "gemm", "other"]) == [
        "S = Q Kᵀ", "mask", "softmax", "O = P V", "other",
    ]  # fmt: skip


def test_pictures_are_drawn_and_repeat(rows, tmp_path):
    paths = figure.draw(rows, tmp_path / "a")
    assert {p.stem for p in paths} == {"roofline", "roofline-traffic", "roofline-head-dims"}
    again = figure.draw(rows, tmp_path / "b")
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(paths, again, strict=True))
    few = [r for r in rows if not r["metric"].startswith("dram")]
    assert not any("traffic" in p.stem for p in figure.draw(few, tmp_path / "c"))
    assert figure.draw([], tmp_path / "d") == []


def test_the_roofline_is_the_ceilings_and_the_points_the_calls(rows):
    fig = figure.draw_roofline(figure.Study(rows))
    lines = {line.get_label(): line for line in fig.axes[0].lines}
    x, y = (list(v) for v in lines["v1 flash"].get_data())
    assert y == pytest.approx([800] * 6)
    assert x[-1] == pytest.approx(4 * 64 * 4096**2 * 128 / (4 * 4 * 16 * 4096 * 256))
    roof = next(line for line in lines.values() if line.get_color() == "black")
    assert list(roof.get_ydata())[1:] == [1000, 1000]
    assert list(roof.get_xdata())[1] == 250
    figure.style.plt.close(fig)


def test_the_readmes_parts_are_made_from_the_reference(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "REFERENCE", tmp_path)
    with pytest.raises(table.TableError, match=r"roofline\.jsonl"):
        table.TABLES["why"]()
    (tmp_path / "roofline.jsonl").write_text("".join(line + "\n" for line in trim.trim(rows)))
    made = {name: table.TABLES[name]() for name in ("why", "ceilings", "limits", "head-dims")}
    for title in figure.WHY:
        assert f"**{title}.** " in made["why"]
    assert "| matrix product, 8192³ | 1,000 TFLOP/s |" in made["ceilings"]
    assert "| products 80% |\n" in made["limits"]
    assert "| v1 flash | 600: 60% + 59% | 800: 80% + 39% |" in made["head-dims"]
    assert all("Test GPU; torch 2.11" in text for text in made.values())
    assert all("`python bench/roofline.py`" in text for text in made.values())


def test_trimmed_records_show_the_same(rows, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(line + "\n" for line in trim.trim(rows)))
    short, full = figure.Study(records.read(path)), figure.Study(rows)
    assert figure.paragraphs(short) == figure.paragraphs(full)
    assert short.digests() == full.digests()
