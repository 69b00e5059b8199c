"""bench/ladder.py, bench/peers.py and their figures, with a timer that needs no GPU."""

import collections
import itertools
import json
import math
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from flashstudy.backends import BACKENDS, naive
from flashstudy.bench import cells, common, decode, ladder, peers, rounds
from flashstudy.figures import grid, records, table, trim
from flashstudy.figures import ladder as ladder_figure
from flashstudy.figures import peers as peers_figure

TINY = ["--tokens", "64", "--hidden", "32", "--head-dims", "16", "--lengths", "32"]
FIELDS = {
    "backend", "direction", "metric", "value", "unit", "B", "H", "H_KV", "N_Q", "N_K", "D", "E",
    "dtype", "causal", "scope", "p50", "p20", "p80", "samples", "status", "reason", "study", "run",
    "device", "gpu", "driver", "cuda", "cudnn", "torch", "triton", "flash_attn", "flash_attn_4",
    "commit", "source", "utc", "seed", "effort", "flops", "turns", "command", "error_over_budget",
    "gpu_before", "gpu_after",
}  # fmt: skip


class FakeTimer:
    """Runs calls, and says that they took 1 ms and a little more each time."""

    device, flush_s = "cpu", 0.0

    def __init__(self):
        self.turns = []  # calls asked for, in order

    def once(self, call):
        call()
        return 1.01e-3, 1e-5

    def turn(self, call, calls, idle):
        self.turns.append(calls)
        call()
        return [1.0 + i / 100 for i in range(calls)]


class Clock(FakeTimer):
    """A timer in whose world every call takes `cost` seconds and nothing else any time."""

    def __init__(self, cost):
        super().__init__()
        self.now, self.cost = 0.0, cost

    def once(self, call):
        self.now += self.cost
        return self.cost, 0.0

    def turn(self, call, calls, idle):
        self.turns.append(calls)
        self.now += self.cost * calls
        return [self.cost * 1e3] * calls


@pytest.fixture
def tame(monkeypatch):
    """Every backend runs here, as Naive; a small matrix product; one environment for a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(rounds, "MATMUL_SIZE", 8)
    monkeypatch.setattr(rounds, "why_not", lambda *_: None)
    monkeypatch.setattr(rounds, "load", lambda name: naive.attention)
    monkeypatch.setattr(ladder, "load", lambda name: naive.attention)
    environment = common.environment(torch.device("cpu"))  # of now: somebody may edit a kernel
    monkeypatch.setattr(common, "environment", lambda device: environment)
    yield monkeypatch
    torch.set_num_threads(threads)


def row(cell, backend, speed=None, *, run="1", status="ok", flops=None, **fields):
    """A record of a cell: `speed` TFLOP/s, or a status."""
    flops = cell.flops if flops is None else flops
    ms = None if speed is None else flops / speed / 1e9
    about = dict.fromkeys(records.ENVIRONMENT, "same") | {"study": "peers", "metric": "time_ms"}
    about |= {"backend": backend, "direction": cell.direction, "D": cell.head_dim, "run": run}
    about |= {"causal": cell.causal, "B": cell.batch, "H": cell.heads}
    about |= {"H_KV": cell.kv_heads or cell.heads}
    about |= {"N_Q": cell.queries or cell.length, "N_K": cell.length}
    about |= {"E": 2048, "dtype": "bfloat16", "utc": "2026-01-01T00:00:00Z", "reason": "why"}
    return about | {"p50": ms, "flops": flops, "status": status} | fields


CELL = grid.Cell("forward", 64, False, 512, 32, 32)


# Arithmetic


def test_flops_count_the_products_of_visible_scores():
    b, h, n, d = 2, 3, 8, 16
    full = sum(2 * 2 * d for _ in range(b * h * n * n))  # q·k and p·v: D multiplications, D sums
    cell = grid.Cell("forward", d, False, n, b, h)
    assert cell.flops == full
    assert cell._replace(causal=True).flops == full / 2
    assert cell._replace(direction="backward").flops == 2.5 * full  # s again, dP, dV, dQ, dK
    assert grid.Cell("forward", 128, False, 16384, 1, 16).flops == 4 * 16384**2 * 2048


def test_few_queries_and_grouped_heads_are_a_cell_of_their_own():
    cell = grid.Cell("forward", 128, False, 8192, 2, 32, 8, 16)
    assert cell.flops == 4 * 2 * 32 * 16 * 8192 * 128
    q, k, v, do = rounds.inputs(cell._replace(length=64), torch.float16, "cpu", 0)
    assert q.shape == do.shape == (2, 32, 16, 128)
    assert k.shape == v.shape == (2, 8, 64, 128)
    assert grid.cell_of(row(cell, "v1_flash", 100)) == cell
    assert grid.cell_of(row(CELL, "v1_flash", 100)) == CELL
    assert rounds.smallest(cell, [CELL, cell, cell._replace(length=512, queries=1)]) == (
        cell._replace(length=4096, batch=1)
    )
    assert str(cell) == "forward D=128 full N=8192 N_Q=16 B=2"
    assert grid.kv_bytes(row(cell, "v1_flash", 100)) == 2 * 2 * (2 * 8 * 8192 * 128)


def test_grid_is_that_of_the_papers():
    made = grid.cells(grid.DIRECTIONS, grid.HEAD_DIMS, (False, True), grid.LENGTHS)
    assert len(made) == len(set(made)) == 2 * 3 * 2 * 6
    assert {c.batch * c.length for c in made} == {16384}
    assert {c.heads * c.head_dim for c in made} == {2048}
    assert made == sorted(made, key=grid.order)
    long = grid.cells(["forward"], [128], [True], grid.LONG_LENGTHS)
    assert [(c.length, c.batch, c.heads) for c in long] == [
        (32768, 1, 16), (65536, 1, 16), (131072, 1, 16),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="96"):
        grid.cells(["forward"], [96], [True], [512])


def test_ratio_is_to_the_best_peer_that_ran():
    found = {
        "v1_flash": row(CELL, "v1_flash", 540),
        "sdpa-cudnn": row(CELL, "sdpa-cudnn", 500),
        "flash-attn-4": row(CELL, "flash-attn-4", 450),
        "flex": row(CELL, "flex", status="failed"),
    }
    theirs = ["flex", "sdpa-cudnn", "flash-attn-4", "flash-attn"]
    assert grid.best(found, theirs) == ("sdpa-cudnn", pytest.approx(500))
    assert grid.ratio(found, "v1_flash", theirs) == pytest.approx(1.08)
    assert grid.ratio(found, "v0_naive", theirs) is None
    assert grid.ratio(found, "v1_flash", ["flex", "flash-attn"]) is None
    assert grid.ratio(found, "flex", ["sdpa-cudnn"]) is None


def test_geometric_mean():
    assert grid.geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
    assert grid.geometric_mean([1.1, 1.2, 1.3]) == pytest.approx((1.1 * 1.2 * 1.3) ** (1 / 3))
    assert grid.geometric_mean([]) is None


def test_gain_is_over_the_nearest_step_before_that_ran():
    found = {
        "a": row(CELL, "a", 100),
        "b": row(CELL, "b", status="unsupported"),
        "c": row(CELL, "c", 150),
    }
    assert grid.gain(found, "a", "abc") is None
    assert grid.gain(found, "b", "abc") is None
    assert grid.gain(found, "c", "abc") == pytest.approx(1.5)


def test_a_cell_is_shown_from_one_run():
    rows = [
        row(CELL, "v1_flash", 100, run="1"),
        row(CELL, "sdpa-cudnn", 200, run="1"),
        row(CELL, "v1_flash", 110, run="2"),
        row(CELL, "sdpa-cudnn", 220, run="2"),
        row(CELL, "v1_flash", 300, run="3"),  # later, but has nothing to compare with
        row(CELL, "v1_flash", 400, run="4", dtype="float16"),
        row(CELL, "v1_flash", 500, run="4", metric="graph_ms"),
        row(CELL, "flex", 600, run="2"),  # not asked for
    ]
    found = grid.by_cell(rows, ["v1_flash", "sdpa-cudnn"])
    assert {n: round(grid.tflops(r)) for n, r in found[CELL].items()} == {
        "v1_flash": 110, "sdpa-cudnn": 220,
    }  # fmt: skip


def test_rows_of_other_software_are_not_mixed_in():
    old = row(CELL, "v1_flash", 100)
    new = row(CELL, "v1_flash", 90, source="newer", utc="2026-01-02T00:00:00Z")
    assert grid.newest([new, old]) == [new]
    assert grid.newest([]) == []


def test_our_best_are_the_last_portable_and_the_last_newer_step(monkeypatch):
    step = BACKENDS["v1_flash"]
    table = {
        "v1": step,
        "v2": step._replace(backward=False),
        "v3": step._replace(capability=(9, 0)),
        "v4": step._replace(capability=(9, 0)),
    }
    monkeypatch.setattr(records, "table", lambda: table)
    monkeypatch.setattr(peers, "BACKENDS", table)
    assert peers.our_best() == ["v1", "v2", "v4"]


# Turns


@pytest.mark.parametrize(("field", "rounds_"), [("ABC", 2), ("ABCDEFGH", 3), ("ABCDEFGH", 5)])
def test_backends_take_turns_and_none_follows_on_the_same_one_twice(field, rounds_):
    for seed in range(20):
        order = []
        rounds.take_turns(field, rounds_, order.append, random.Random(seed))
        turns = [order[i : i + len(field)] for i in range(0, len(order), len(field))]
        assert [sorted(turn) for turn in turns] == [list(field)] * rounds_
        pairs = collections.Counter(itertools.pairwise(order))
        assert sum(n - 1 for n in pairs.values()) <= len(order) // 10  # by chance, a few


def test_a_cell_takes_turns_and_pools_all_rounds(tame):
    order, timer = [], FakeTimer()
    tame.setattr(rounds, "closure", lambda attention, *_: lambda: order.append(attention))
    tame.setattr(rounds, "load", lambda name: name)
    tame.setattr(rounds.Session, "verdict", lambda self, name, cell: ("ok", None, 0.5))
    cell = grid.Cell("forward", 16, False, 32, 1, 2)
    names = ["sdpa-cudnn", "flex", "v1_flash"]
    session = rounds.Session(
        {cell: names}, timer, torch.bfloat16, seconds=None, slot=4.5e-3, rounds=3, seed=0,
        report=print,
    )  # fmt: skip
    written = {}
    assert session.run(lambda c, field: written.update({c: field})) == ([], [])
    made = [order[-9:][i : i + 3] for i in (0, 3, 6)]
    assert all(sorted(turn) == sorted(names) for turn in made)
    assert len({tuple(turn) for turn in made}) > 1
    timed = timer.turns[-9:]
    assert set(timed) == {4}  # of 1.01 ms each, in a slot of 4.5 ms
    record = cells.row(cell, written[cell][0], torch.bfloat16, {})
    assert record["samples"] == 6  # the first half of a turn begins with the clocks of another
    assert len(record["turns"]) == 3
    assert record["p50"] == statistics.median([1.02, 1.03] * 3)


@pytest.mark.parametrize(("cost", "calls", "counted"), [(1e-3, 90, 60), (1e-2, 9, 6), (0.2, 1, 1)])
def test_the_start_of_a_turn_does_not_count(tame, cost, calls, counted):
    tame.setattr(rounds.Session, "verdict", lambda self, name, cell: ("ok", None, 0.5))
    tame.setattr(rounds, "LEAD_S", 0.03)
    tame.setattr(rounds, "closure", lambda *_: None)
    cell = grid.Cell("forward", 16, False, 32, 1, 2)
    session = rounds.Session(
        {cell: ["v1_flash"]}, Clock(cost), torch.bfloat16, seconds=None, slot=0.0901, rounds=1,
        seed=0, report=print,
    )  # fmt: skip
    written = []
    session.run(lambda c, field: written.extend(field))
    assert session.timer.turns[-1] == calls
    assert len(written[0].turns[0]) == counted


def test_a_failing_backend_is_a_row_and_the_others_go_on(tame):
    count = itertools.count()

    def flaky(q, k, v, *, causal=False, scale=None):
        if next(count) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34 GiB")
        return naive.attention(q, k, v, causal=causal, scale=scale)

    tame.setattr(rounds, "load", lambda name: flaky if name == "flex" else naive.attention)
    cell = grid.Cell("forward", 16, True, 32, 1, 2)
    session = rounds.Session(
        {cell: ["flex", "v1_flash"]}, FakeTimer(), torch.bfloat16, seconds=None, slot=1e-3,
        rounds=3, seed=0, report=print,
    )  # fmt: skip
    written = []
    session.run(lambda c, field: written.extend(field))
    assert [it.status for it in written] == ["oom", "ok"]
    assert "34 GiB" in written[0].reason
    assert written[0].turns == []
    assert len(written[1].turns) == 3


@pytest.mark.parametrize(("seconds", "complete"), [(10, True), (1.5, False)])
def test_a_budget_is_kept(tame, seconds, complete):
    clock = Clock(cost=0.01)
    tame.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: clock.now))
    tame.setattr(rounds.Session, "verdict", lambda self, name, cell: ("ok", None, 0.5))
    tame.setattr(rounds, "closure", lambda *_: None)
    plan = {
        c: ["sdpa-cudnn", "v1_flash"]
        for c in grid.cells(["forward"], [16, 32], [False, True], (8, 16, 24, 32), 64, 32)
    }
    session = rounds.Session(
        plan, clock, torch.bfloat16, seconds=seconds, slot=0.5, rounds=3, seed=0, report=print
    )
    written = []
    not_set_up, not_measured = session.run(lambda c, field: written.append(c))
    # What a sweep's short lengths cost follows from its longest; here they cost as much.
    assert clock.now <= seconds * 1.02
    assert not not_set_up
    assert len(written) + len(not_measured) == len(plan)
    assert (not not_measured) == complete
    assert len(written) > 0
    if complete:  # and the time is used, evenly
        assert clock.now > 0.7 * seconds
        turns = [n for n in clock.turns if n > 1]
        assert max(turns) <= 2 * min(turns)


def test_short_of_time_the_slow_peers_are_left_out_first(tame):
    clock = Clock(cost=0.01)
    tame.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: clock.now))
    tame.setattr(rounds.Session, "verdict", lambda self, name, cell: ("ok", None, 0.5))
    tame.setattr(rounds, "closure", lambda *_: None)
    cells_ = grid.cells(["forward"], [16], [False, True], range(8, 80, 8), 64, 32)
    names = ["flex", "flash-attn-4", "sdpa-cudnn", "v1_flash"]
    session = rounds.Session(
        dict.fromkeys(cells_, names), clock, torch.bfloat16, seconds=0.2, slot=0.5, rounds=3,
        seed=0, report=print,
    )  # fmt: skip
    left_out = session.set_up_all(lambda pairs: pairs)
    left = collections.Counter(name for name, _ in left_out)
    assert left["flex"] == len(cells_)  # the last of them
    assert [c for name, c in left_out if name == "flash-attn-4"] == [c for c in cells_ if c.causal]
    assert len(left) == 2
    assert {name for _, name in session.ready} >= {"sdpa-cudnn", "v1_flash"}


def test_one_call_a_sweep_tells_what_its_cells_cost(tame):
    """All but what compiles every shape: that is called in each."""
    made, timer = [], FakeTimer()
    tame.setattr(rounds, "closure", lambda attention, cell, *_: made.append(cell))
    tame.setattr(rounds.Session, "verdict", lambda self, name, cell: ("ok", None, 0.5))
    tame.setattr(rounds, "matmul_closure", lambda *_: made.append("matmul"))
    tame.setattr(timer, "once", lambda call: (0.04, 0.001), raising=False)
    some = grid.cells(["forward"], [16], [True], (32, 64, 128), 128, 32)
    session = rounds.Session(
        dict.fromkeys(some, ("v1_flash", "matmul")), timer, torch.bfloat16, seconds=None,
        slot=1e-3, rounds=1, seed=0,
    )  # fmt: skip
    assert session.set_up_all(lambda pairs: pairs) == []
    assert made == ["matmul", some[-1]]
    costs = {name: [session.ready[c, name].cost for c in some] for name in ("v1_flash", "matmul")}
    assert costs == {"v1_flash": [0.01, 0.02, 0.04], "matmul": [0.04] * 3}
    made.clear()
    session.plan = dict.fromkeys(some, ("flex",))
    session.set_up_all(lambda pairs: pairs)
    assert made == some


def test_flash_attn_4_is_not_left_out_once_other_processes_compile_it(monkeypatch):
    monkeypatch.delenv(common.FA4_CACHE, raising=False)
    assert not rounds.helped("flash-attn-4")
    assert rounds.slow("flex") > rounds.slow("flash-attn-4") > rounds.slow("v1_flash") == 0
    monkeypatch.setenv(common.FA4_CACHE, "1")
    assert rounds.helped("flash-attn-4")
    assert rounds.slow("flash-attn-4") == 0 < rounds.slow("flex")
    cell = grid.Cell("forward", 16, False, 8192, 1, 2)
    session = rounds.Session(
        {cell: ["flash-attn-4", "flex"]}, FakeTimer(), torch.bfloat16, seconds=None, slot=1e-3,
        rounds=1, seed=0,
    )  # fmt: skip
    monkeypatch.setattr(rounds.Session, "why_not", lambda *_: None)
    tasks = [(name, at.length) for name, at, *_ in session.to_compile()]
    where = (rounds.VERIFY_LENGTH, 8192)  # it is verified at the one and called at the other
    assert sorted(tasks) == [(name, n) for name in ("flash-attn-4", "flex") for n in where]


def test_the_gpu_timer_flushes_idles_and_brackets_the_call(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, other):
            return 2.0

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device, **k: empty(1, dtype=torch.int8))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"idle {cycles}"))
    timer = rounds.GpuTimer()
    timer.flush = SimpleNamespace(zero_=lambda: log.append("flush"))
    log.clear()
    assert timer.turn(lambda: log.append("call"), 2, 1e-4) == [2.0, 2.0]
    assert log == ["flush", "idle 200000", "event", "call", "event"] * 2 + ["wait"]
    log.clear()
    timer.turn(lambda: log.append("call"), 1, 0.0)
    assert log == ["flush", "event", "call", "event", "wait"]


def hang_on_two(n):
    if n == 2:
        time.sleep(600)


def test_what_never_returns_is_found_and_ended():
    some = rounds.Precompiler([(n,) for n in range(4)], hang_on_two, start="fork")
    began = time.monotonic()
    assert some.wait(patience=1.5) == [(2,)]
    assert time.monotonic() - began < 30
    assert rounds.Precompiler([(0,), (1,)], hang_on_two, start="fork").wait() == []


def test_our_steps_wait_for_their_compilation_and_none_that_hangs_is_called(tame):
    events = []
    cell = grid.Cell("forward", 16, False, 32, 1, 2)
    hung = ("v1_flash", cell, torch.bfloat16, 0)

    class Compiling:
        tasks = (hung,)

        def wait(self, seconds):
            events.append("wait")
            assert 50 < seconds <= 60  # of the budget of 100
            return [hung]

    def attention(name):
        def call(q, k, v, *, causal=False, scale=None):
            events.append(name)
            return naive.attention(q, k, v, causal=causal, scale=scale)

        return call

    tame.setattr(rounds, "load", attention)
    tame.setattr(rounds.Session, "precompile", lambda self: Compiling())
    tame.setattr(rounds.Session, "inputs", lambda self, c: rounds.inputs(c, self.dtype, "cpu", 0))
    tame.setattr(rounds, "matmul_closure", lambda *_: lambda: None)
    tame.setattr(rounds, "recover", lambda *_: None)
    names = ["v0_naive", "v1_flash", "flex", "sdpa-cudnn", "matmul"]
    session = rounds.Session(
        {cell: names}, FakeTimer(), torch.bfloat16, seconds=100, slot=1e-3, rounds=3, seed=0,
        report=lambda line: None,
    )  # fmt: skip
    session.timer.device = "cuda"
    session.set_up_all(lambda pairs: pairs)
    assert "v1_flash" not in events
    assert {"v0_naive", "flex", "sdpa-cudnn"} < set(events)
    assert "sdpa-cudnn" not in events[events.index("wait") :]
    assert not {"v0_naive", "flex"} & set(events[: events.index("wait")])
    assert session.ready[cell, "v1_flash"].status == "failed"
    assert "did not return" in session.ready[cell, "v1_flash"].reason


# The programs


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_peers_measures_records_and_resumes(tame, tmp_path, capsys):
    out = tmp_path / "peers.jsonl"
    names = ["--backends", "sdpa-cudnn,flash-attn", "v1_flash"]
    command = [*TINY, *names, "--out", str(out)]
    assert peers.main(command, FakeTimer()) == 0
    rows = rows_of(out)
    assert len(rows) == 2 * 2 * 4  # directions, masks; three backends and the matrix product
    for r in rows:
        assert set(r) >= FIELDS
        assert r["status"] == "ok"
        assert r["study"] == "peers"
        assert r["command"].startswith("python bench/peers.py")
        assert r["p20"] <= r["p50"] <= r["p80"]
        assert (r["B"], r["H"], r["N_Q"], r["N_K"], r["D"], r["E"]) == (2, 2, 32, 32, 16, 32)
    assert len({r["run"] for r in rows}) == 1
    assert {r["flops"] for r in rows if r["backend"] == "matmul"} == {rounds.MATMUL_FLOPS}
    text = capsys.readouterr().out
    assert "geometric mean 1.000 of the best peer over 2 cells" in text

    timer = FakeTimer()
    assert peers.main(command, timer) == 0
    assert timer.turns == []
    assert rows_of(out) == rows
    assert "4 of 4 cells are in" in capsys.readouterr().out

    out.write_text("".join(json.dumps(r) + "\n" for r in rows[:-1]))  # its last cell lacks a row
    assert peers.main(command, FakeTimer()) == 0
    assert len(rows_of(out)) == len(rows) - 1 + 4
    assert peers.main([*command, "--again"], FakeTimer()) == 0
    assert len(rows_of(out)) == 2 * len(rows) - 1 + 4


def test_decode_measures_records_and_resumes(tame, tmp_path, capsys):
    out = tmp_path / "decode.jsonl"
    tiny = ["--queries", "1,4", "--lengths", "32,64", "--head-dim", "16", "--heads", "4"]
    command = [*tiny, "--kv-heads", "2", "--backends", "flash-attn", "v1_flash", "--out", str(out)]
    assert decode.main(command, FakeTimer()) == 0
    rows = rows_of(out)
    assert len(rows) == 2 * 2 * 2
    for r in rows:
        assert set(r) >= FIELDS
        assert (r["status"], r["study"]) == ("ok", "decode")
        assert (r["B"], r["H"], r["H_KV"], r["D"]) == (1, 4, 2, 16)
        assert r["flops"] == 4 * 4 * r["N_Q"] * r["N_K"] * 16
    assert {(r["N_Q"], r["N_K"]) for r in rows} == {(1, 32), (1, 64), (4, 32), (4, 64)}
    text = capsys.readouterr().out
    assert "K, V TB/s" in text
    assert "geometric mean 1.000 of the best peer over 4 cells" in text
    timer = FakeTimer()
    assert decode.main(command, timer) == 0
    assert timer.turns == []
    with pytest.raises(SystemExit):
        decode.main(["--heads", "4", "--kv-heads", "3"], FakeTimer())
    assert "argument --kv-heads: 3 does not divide" in capsys.readouterr().err


def test_what_measures_is_part_of_the_sources(monkeypatch, tmp_path):
    """A record of another clock, or of another kernel, is no reason not to measure."""
    for name in ("kernels", "backends", "bench"):
        shutil.copytree(common.ROOT / name, tmp_path / name)
    shutil.copy(common.ROOT / "block.py", tmp_path)
    monkeypatch.setattr(common, "ROOT", tmp_path)

    def sources():
        common.source.cache_clear()
        found = {s: cells.Provenance(s, FakeTimer(), 0).about["source"] for s in grid.STUDIES}
        common.source.cache_clear()
        return found

    for file, studies in (
        ("bench/rounds.py", {"ladder", "peers", "decode", "crossover"}),
        ("kernels/v1_flash.py", {"ladder", "peers", "decode", "crossover"}),
        ("bench/ladder.py", {"ladder"}),
        ("bench/seqlen.py", set()),
    ):
        before = sources()
        with open(tmp_path / file, "a") as f:
            f.write("# another\n")
        after = sources()
        assert {s for s in before if before[s] != after[s]} == studies


def test_a_wrong_step_is_not_timed(tame, tmp_path, capsys):
    def off_by_a_fifth(q, k, v, *, causal=False, scale=None):
        return naive.attention(q, k, v, causal=causal, scale=scale) * 1.2

    tame.setattr(rounds, "load", lambda n: off_by_a_fifth if n == "v1_flash" else naive.attention)
    out = tmp_path / "ladder.jsonl"
    assert ladder.main([*TINY, "--out", str(out)], FakeTimer()) == 1
    rows = rows_of(out)
    bad = [r for r in rows if r["backend"] == "v1_flash"]
    assert {r["status"] for r in bad} == {"wrong"}
    assert all(r["p50"] is None and r["samples"] == 0 for r in bad)
    assert all(r["error_over_budget"] > common.GROSS for r in bad)
    assert "max error" in bad[0]["reason"]
    assert {r["status"] for r in rows if r["backend"] == "v0_naive"} == {"ok"}
    assert "wrong" in capsys.readouterr().out


def test_a_peer_called_with_the_wrong_mask_is_not_timed(tame, tmp_path):
    def never_causal(q, k, v, *, causal=False, scale=None):
        return naive.attention(q, k, v, scale=scale)

    tame.setattr(rounds, "load", lambda n: never_causal if n == "flex" else naive.attention)
    out = tmp_path / "peers.jsonl"
    command = [*TINY, "--backends", "flex,v1_flash", "--masks", "causal", "--out", str(out)]
    assert peers.main(command, FakeTimer()) == 0
    assert {(r["backend"], r["status"]) for r in rows_of(out)} == {
        ("flex", "wrong"), ("v1_flash", "ok"), ("matmul", "ok"),
    }  # fmt: skip


def test_what_cannot_run_is_a_row_with_its_reason(tame, tmp_path, capsys):
    tame.setattr(rounds, "why_not", lambda n, *_: "not today" if n == "flex" else None)
    out = tmp_path / "peers.jsonl"
    assert (
        peers.main([*TINY, "--backends", "flex", "v1_flash", "--out", str(out)], FakeTimer()) == 0
    )
    bad = [r for r in rows_of(out) if r["backend"] == "flex"]
    assert {(r["status"], r["reason"]) for r in bad} == {("unsupported", "not today")}
    assert "not today" in capsys.readouterr().out


def test_nothing_measured_is_a_failure(tame, tmp_path):
    tame.setattr(rounds, "why_not", lambda *_: "no")
    assert ladder.main([*TINY, "--out", str(tmp_path / "x.jsonl")], FakeTimer()) == 1


def test_a_limited_backend_takes_part_at_its_lengths_only(tame, tmp_path):
    out = tmp_path / "peers.jsonl"
    command = [*TINY, "16", "--backends", "flex", "v1_flash", "--limit", "flex=16"]
    assert peers.main([*command, "--out", str(out)], FakeTimer()) == 0
    seen = {(r["backend"], r["N_Q"]) for r in rows_of(out) if r["backend"] != "matmul"}
    assert seen == {("flex", 16), ("v1_flash", 16), ("v1_flash", 32)}


def test_ladder_shows_shares_and_gains(tame, tmp_path, capsys):
    out = tmp_path / "ladder.jsonl"
    timer = FakeTimer()
    assert ladder.main([*TINY, "--direction", "forward", "--out", str(out)], timer) == 0
    text = capsys.readouterr().out
    assert "×1.00" in text
    assert "forward, D=16, gain over the step before" in text
    assert {r["backend"] for r in rows_of(out)} == {*grid.steps(), "matmul"}


def test_small_calls_are_on_two_clocks(tame, tmp_path, capsys):
    out, order = tmp_path / "ladder.jsonl", []
    clocks = {
        "host_ms": lambda call: order.append("host") or [0.05],
        "graph_ms": lambda call: order.append("graph") or [0.006],
    }
    command = ["--small-calls", "--backends", "sdpa-flash", "v1_flash", "--out", str(out)]
    assert ladder.main(command, FakeTimer(), clocks) == 0
    rows = rows_of(out)
    directions = ("forward", grid.BOTH)
    assert {(r["backend"], r["metric"], r["N_Q"], r["direction"]) for r in rows} == set(
        itertools.product(("sdpa-flash", "v1_flash"), clocks, ladder.SMALL_LENGTHS, directions)
    )
    assert {(r["B"], r["H"], r["D"], r["causal"]) for r in rows} == {(1, 16, 64, True)}
    assert order == (["host"] * 6 + ["graph"] * 6) * 4
    text = capsys.readouterr().out
    assert "50.0" in text
    assert "6.0" in text
    order.clear()
    assert ladder.main(command, FakeTimer(), clocks) == 0
    assert order == []


def test_the_recorded_command_can_be_repeated_elsewhere():
    given = ["--budget", "9", "--out", "/somewhere/x.jsonl", "--masks", "full", "--out=/y"]
    assert cells.command("peers", given) == "python bench/peers.py --budget 9 --masks full"


@pytest.mark.parametrize("program", [ladder, peers])
@pytest.mark.parametrize(
    "arguments",
    [
        ("--backends", "nope"),
        ("--head-dims", "96"),
        ("--head-dims", "x"),
        ("--masks", "left"),
        ("--lengths", "0"),
        ("--lengths", ","),
        ("--limit", "flex"),
        ("--limit", "nope=3"),
        ("--budget", "-1"),
        ("--rounds", "0"),
        ("--direction", "up"),
        ("--dtype", "float32"),
    ],
)
def test_errors_name_the_argument(program, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(list(arguments), FakeTimer())
    assert stop.value.code == 2
    assert f"argument {arguments[0]}:" in capsys.readouterr().err


def test_the_ladder_refuses_what_is_no_step(capsys):
    with pytest.raises(SystemExit) as stop:
        ladder.main(["--backends", "sdpa-cudnn"], FakeTimer())
    assert stop.value.code == 2
    assert "sdpa-cudnn is no step of the ladder" in capsys.readouterr().err


def test_a_record_file_that_is_none_is_refused(tame, tmp_path, capsys):
    path = tmp_path / "notes.txt"
    path.write_text("not a record\n")
    with pytest.raises(SystemExit) as stop:
        peers.main([*TINY, "--out", str(path)], FakeTimer())
    assert stop.value.code == 2
    assert "argument --out:" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_still_plans(capsys):
    for program in (ladder, peers):
        assert program.main([]) == 2
        assert "no CUDA GPU" in capsys.readouterr().err
        assert program.main(["--plan"]) == 0
        assert "forward D=64 full N=512" in capsys.readouterr().out
    assert peers.main(["--plan", "--long", "--head-dims", "128", "--masks", "full"]) == 0
    text = capsys.readouterr().out
    assert "N=131072" in text
    assert "N=512" not in text


def test_help_teaches_as_a_script():
    done = subprocess.run(
        [sys.executable, common.ROOT / "bench" / "peers.py", "--help"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    for word in ("--budget", "--limit", "--long", "take turns", "figures/peers.py", "Exit code"):
        assert word in done.stdout


# Pictures


def synthetic(study, names, lengths, speed=lambda cell, name: 500.0):
    made = []
    for cell in grid.cells(grid.DIRECTIONS, (64, 128), (False, True), lengths):
        for name in names:
            made.append(row(cell, name, speed(cell, name), study=study))
        made.append(row(cell, "matmul", 700, flops=rounds.MATMUL_FLOPS, study=study))
    return made


def texts(fig):
    return [t.get_text() for ax in fig.axes for t in ax.texts]


def test_peers_picture_shows_the_ratios(tmp_path):
    names = ["sdpa-cudnn", "flash-attn", "v1_flash"]
    speeds = {"sdpa-cudnn": 500.0, "flash-attn": 300.0, "v1_flash": 540.0}
    rows = synthetic("peers", names, (512, 1024), lambda cell, name: speeds[name])
    found = {
        c: f for c, f in grid.by_cell(rows, [*names, "matmul"]).items() if c.direction == "forward"
    }
    fig = peers_figure.draw_one(found, "forward", "bfloat16")
    assert len(fig.axes) == 4  # two head dims, two masks
    assert texts(fig).count("1.08") == 8
    assert sum(len(ax.patches) for ax in fig.axes) == 3 * 8
    peers_figure.style.plt.close(fig)

    path = tmp_path / "peers.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert peers_figure.main([str(path), "--out", str(tmp_path)]) == 0
    made = sorted(p.name for p in tmp_path.glob("peers-*"))
    assert made == [f"peers-{d}.{k}" for d in ("backward", "forward") for k in ("png", "svg")]
    before = (tmp_path / "peers-forward.png").read_bytes()
    assert grid.digest(found).encode() in before
    assert peers_figure.main([str(path), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "peers-forward.png").read_bytes() == before


def test_ladder_picture_shows_the_gains(tmp_path):
    names = ["v0_naive", "v1_flash"]
    speeds = {"v0_naive": 50.0, "v1_flash": 300.0}
    rows = synthetic("ladder", names, (512, 4096), lambda cell, name: speeds[name])
    rows = [
        r | {"status": "oom", "p50": None}
        if (r["backend"], r["direction"], r["D"]) == ("v0_naive", "backward", 128)
        else r
        for r in rows
    ]
    found = {c: f for c, f in grid.by_cell(rows, [*names, "matmul"]).items() if c.length == 4096}
    fig = ladder_figure.draw_one(found, names, 4096, "bfloat16")
    assert len(fig.axes) == 4  # two head dims, two directions
    assert texts(fig).count("×6.00") == 3
    assert texts(fig).count("oom") == 2
    ladder_figure.style.plt.close(fig)

    path = tmp_path / "ladder.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert ladder_figure.main([str(path), "--out", str(tmp_path), "--length", "512"]) == 0
    assert sorted(p.name for p in tmp_path.glob("ladder-*")) == ["ladder-512.png", "ladder-512.svg"]


@pytest.mark.parametrize("program", [ladder_figure, peers_figure])
def test_the_committed_pictures_show_the_reference_records(program, tmp_path):
    name = program.__name__.rsplit(".", 1)[1]
    folder = common.ROOT / "figures"
    path = folder / "reference" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("no such reference records")
    fresh = program.draw(records.read(path), tmp_path)
    assert fresh
    for picture in fresh:
        shown = re.search(rb"records ([0-9a-f]{16})", picture.read_bytes())[1]
        stale = f"stale: python figures/{name}.py {path.relative_to(common.ROOT)} --out figures"
        assert shown in (folder / picture.name).read_bytes(), stale


@pytest.mark.parametrize("program", [ladder_figure, peers_figure])
def test_pictures_of_nothing_are_refused(program, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for path in (empty, tmp_path / "absent.jsonl"):
        with pytest.raises(SystemExit) as stop:
            program.main([str(path), "--out", str(tmp_path)])
        assert stop.value.code == 2
        assert "argument records:" in capsys.readouterr().err


def test_readme_tables_come_from_trimmed_records(tmp_path, monkeypatch):
    speeds = {"sdpa-cudnn": 500.0, "v0_naive": 50.0, "v1_flash": 540.0}
    for study in grid.STUDIES:
        old = synthetic(study, speeds, (512,), lambda cell, name: 1.0)
        rows = [r | {"run": "0"} for r in old]
        rows += synthetic(study, speeds, (512, 4096), lambda cell, name: speeds[name])
        rows += [
            row(ladder.small_plan([]).popitem()[0], n, metric=m, study=study) | {"p50": 0.0123}
            for n in speeds
            for m in ("host_ms", "graph_ms")
        ]
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (tmp_path / "full.jsonl").write_text(text)
        short = tmp_path / f"{study}.jsonl"
        if study == "ladder":  # its small calls have a file of their own
            (tmp_path / "small-calls.jsonl").write_text(text)
        assert trim.main([str(tmp_path / "full.jsonl"), str(short)]) == 0
        assert len(short.read_text()) < len(text) / 2
        names = [*speeds, grid.MATMUL]
        assert grid.digest(grid.by_cell(records.read(short), names)) == grid.digest(
            grid.by_cell(rows, names)
        )
    monkeypatch.setattr(table, "REFERENCE", tmp_path)
    text = table.TABLES["peers-forward"]()
    assert "| full | 64 | 512 | 50 | 540 | 500 * | 700 | 0.10 | 1.08 |" in text
    assert "geometric mean 1.080 of the best peer over 8 cells" in text
    assert "`python bench/peers.py`" in text
    assert "×10.80" in table.TABLES["ladder-backward"]()
    assert "| v1 flash | 12.3 | 12.3 |" in table.TABLES["small-calls"]()
    assert "| 32 | 512 | 512 |" in table.TABLES["decode"]()
    (tmp_path / "peers.jsonl").unlink()
    with pytest.raises(table.TableError, match=r"peers.jsonl"):
        table.TABLES["peers-forward"]()


def test_tables_mark_the_best_peer_and_what_is_missing():
    found = {
        CELL: {
            "sdpa-cudnn": row(CELL, "sdpa-cudnn", 500),
            "flash-attn-4": row(CELL, "flash-attn-4", 512),
            "flex": row(CELL, "flex", status="unsupported"),
            "v0_naive": row(CELL, "v0_naive", status="oom"),
            "v1_flash": row(CELL, "v1_flash", 256),
        }
    }
    names = ["sdpa-cudnn", "flex", "flash-attn-4", "v0_naive", "v1_flash", "matmul"]
    head, [line] = grid.peers_table(found, names)
    assert len(head) == len(line)
    assert " ".join(line).split() == [
        "forward",
        "full",
        "64",
        "512",
        "oom",
        "256",
        "500",
        "–",
        "512",
        "*",
        "0.50",
    ]
    assert grid.peers_verdicts(found, names) == [
        "v1 flash, forward: geometric mean 0.500 of the best peer over 1 cells, behind in 1,"
        " least 0.500 (forward D=64 full N=512)"
    ]
    assert math.isclose(grid.tflops(found[CELL]["v1_flash"]), 256)
