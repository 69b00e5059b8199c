"""bench/crossover.py and its figures: known crossings, known noise, and a run without a GPU."""

import contextlib
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flashstudy.backends import BACKENDS, naive, naive_compiled
from flashstudy.bench import common, crossover, rounds
from flashstudy.figures import crossings, grid, records, table, trim
from flashstudy.figures import crossover as figure

LENGTHS = (16, 32, 64, 128, 256, 512, 1024)
BASE = grid.Cell("forward", 64, True, 0, 4, 16)
QUICK = ["--device", "cpu", "--heads", "2", "--head-dim", "16", "--fills", "1,2", "--turns", "3"]


def row(cell, backend, metric, turns, **fields):
    """A record: the medians of a backend's turns in a cell, ms."""
    about = dict.fromkeys(records.ENVIRONMENT, "same") | {"study": "crossover", "device": "GPU"}
    about |= {"direction": cell.direction, "B": cell.batch, "H": cell.heads, "H_KV": cell.heads}
    about |= {"N_Q": cell.length, "N_K": cell.length, "D": cell.head_dim, "causal": cell.causal}
    about |= {"dtype": "bfloat16", "status": "ok", "reason": None, "run": "1", "slice": "base"}
    about |= {"utc": "2026-01-01T00:00:00Z", "backend": backend, "metric": metric, "unit": "ms"}
    p50 = float(np.median(turns)) if len(turns) else None
    return about | {"value": p50, "p50": p50, "samples": 9, "turns": list(turns)} | fields


def rows_of(times, *, condition=BASE, noise=0.0, seed=0, turns=9, metrics=crossings.CLOCKS, **more):
    """Records of {backend: function of the length} at LENGTHS, with log-normal noise a turn."""
    rng = np.random.default_rng(seed)
    return [
        row(
            condition._replace(length=n), name, metric,
            ms(n) * np.exp(rng.normal(0, noise, turns)), **more,
        )
        for n in LENGTHS
        for name, ms in times.items()
        for metric in metrics
    ]  # fmt: skip


def sweep(rows):
    (found,) = crossings.sweeps(rows)
    return found


def crossing(rows, backend="v1_flash", rival="naive", metric="time_ms"):
    return crossings.crossing(sweep(rows), backend, rival, metric)


# Crossings


@pytest.mark.parametrize(
    ("ratios", "start"),
    [
        ((1.5, 2, 3), crossings.EVERYWHERE),
        ((0.5, 0.7, 1.0), crossings.NEVER),  # equally fast is not faster
        ((0.5, 2, 4), 10 * math.sqrt(10)),  # half way between 10 and 100, on logarithmic scales
        ((0.5, 0.5, 4), 100 * 10 ** (1 / 3)),
        ((2, 0.5, 2), 100 * math.sqrt(10)),  # lost in between: the count restarts
        ((4, 2, 0.5), crossings.NEVER),  # not at the longest
        ((1.0, 2, 4), 10),
    ],
)
def test_a_crossing_is_where_it_is_ahead_for_good(ratios, start):
    assert crossings.starts((10, 100, 1000), [ratios]) == pytest.approx([start])


def test_power_laws_cross_where_they_do():
    """naive ~ N², flash ~ 300 N: equal at 300, between two measured lengths."""
    found = crossing(rows_of({"naive": lambda n: n * n / 1e3, "v1_flash": lambda n: 0.3 * n}))
    assert found.start == pytest.approx(300)
    assert (found.low, found.high) == (found.start, found.start)  # no noise, no interval
    assert found.ratio == pytest.approx(1024 / 300)
    assert found.words() == "300"


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Of 200 runs with known noise; 95 % is promised of the median of nine turns, roughly."""
    times = {"naive": lambda n: n * n / 1e3, "v1_flash": lambda n: 0.3 * n}
    found = [
        crossing(rows_of(times, noise=0.05, seed=seed, metrics=["time_ms"])) for seed in range(200)
    ]
    covered = sum(c.low <= 300 <= c.high for c in found) / len(found)
    assert 0.88 <= covered <= 0.995
    wide = np.median([c.high / c.low for c in found])
    assert 1.02 < wide < 1.3  # 5 % of noise on both, and slopes that differ by one
    again = crossing(rows_of(times, noise=0.05, seed=3, metrics=["time_ms"]))
    assert again == found[3]  # the same records, the same answer


def test_no_crossing_in_range_is_an_answer_and_so_is_a_doubtful_one():
    quick = rows_of({"naive": lambda n: 2.0, "v1_flash": lambda n: 1.0})
    assert crossing(quick).words() == "≤ 16"
    slow = rows_of({"naive": lambda n: 1.0, "v1_flash": lambda n: 2.0})
    assert crossing(slow).words() == "> 1024"
    even = rows_of({"naive": lambda n: 1.0, "v1_flash": lambda n: 1.0}, noise=0.05)
    found = crossing(even)
    assert (found.low, found.high) == (crossings.EVERYWHERE, crossings.NEVER) or found.low > 16
    assert "to > 1024)" in found.words() or found.words() == "> 1024"


def test_drift_that_both_share_is_no_noise():
    """A run that heats up slows both: turn by turn the ratio stays, and so does the crossing."""
    drift = np.linspace(1.0, 1.5, 9)
    rows = []
    for n in LENGTHS:
        cell = BASE._replace(length=n)
        rows.append(row(cell, "naive", "time_ms", n * n / 1e3 * drift))
        rows.append(row(cell, "v1_flash", "time_ms", 0.3 * n * drift))
    found = crossing(rows)
    assert found.low == pytest.approx(300)
    assert found.high == pytest.approx(300)


def test_a_backend_that_is_sdpa_s_own_kernel_is_not_held_against_it():
    rows = rows_of({n: lambda n: 1.0 for n in ("naive", "sdpa", "sdpa-cudnn", "v1_flash")})
    rows = [r | {"sdpa_kernel": "cudnn"} if r["backend"] == "sdpa" else r for r in rows]
    found = crossings.crossings(sweep(rows), "sdpa", "host_ms")
    assert {c.backend: c.same for c in found} == {"sdpa-cudnn": True, "v1_flash": False}
    assert found[0].words() == "same kernel"
    assert "SDPA ran the kernel of SDPA cuDNN" in " ".join(crossings.words([sweep(rows)]))


def test_a_cell_without_a_time_takes_no_part():
    rows = rows_of({"naive": lambda n: n * n / 1e3, "v1_flash": lambda n: 0.3 * n})
    lost = [
        r | {"status": "oom", "turns": [], "p50": None, "value": None}
        if (r["backend"], r["N_Q"]) == ("naive", 1024)
        else r
        for r in rows
    ]
    found = crossing(lost)
    assert (found.start, found.last) == (pytest.approx(300), 512)
    assert crossing([r for r in lost if r["N_Q"] >= 512]) is None


# Conditions, tables, words, pictures


@pytest.fixture
def varied():
    """A base with every kind of variation; flash is launched slowly and computes quickly."""
    times = {
        "naive": lambda n: 0.02 + n * n / 5e6,
        "naive-compiled": lambda n: 0.015 + n * n / 1e7,
        "sdpa": lambda n: 0.01 + n / 1e5,
        "sdpa-flash": lambda n: 0.012 + n / 1e5,
        "v1_flash": lambda n: 0.013 + n / 9e4,
    }
    few = {n: times[n] for n in ("naive", "sdpa-flash", "v1_flash")}
    rows = rows_of(times, noise=0.02)
    rows += rows_of(times, condition=BASE._replace(direction=grid.BOTH), slice="training")
    for fill in (1, 16, 256):
        at = BASE._replace(batch=max(1, fill // 16), heads=min(16, fill))
        scaled = {k: lambda n, f=f, fill=fill: f(n) * fill / 64 for k, f in few.items()}
        scaled["v1_flash"] = lambda n, fill=fill: times["v1_flash"](n) * (fill / 64) ** 0.8
        rows += rows_of(scaled, condition=at, noise=0.02, slice="fill")
    rows += rows_of(few, condition=BASE._replace(causal=False), slice="mask")
    rows += rows_of(few, condition=BASE._replace(head_dim=128), slice="head-dim")
    rows += [r | {"dtype": "float16"} for r in rows_of(few, slice="dtype")]
    return rows


def test_the_base_and_what_varies_it(varied):
    found = crossings.sweeps(varied)
    assert crossings.base(found).condition == ("forward", "bfloat16", True, 64, 4, 16)
    assert crossings.training(found).condition.direction == grid.BOTH
    assert [s.condition.fill for s in crossings.fillings(found)] == [1, 16, 64, 256]
    assert [text for text, _ in crossings.variations(found)] == [
        "base", "forward+backward", "not causal", "D = 128", "float16", "B·H = 1", "B·H = 16",
        "B·H = 256",
    ]  # fmt: skip


def test_the_map_is_the_ratio_of_the_medians(varied):
    found = crossings.sweeps(varied)
    sizes, lengths, values = crossings.heat(found, "sdpa-flash", "naive", "time_ms")
    assert (sizes, tuple(lengths)) == ([1, 16, 64, 256], LENGTHS)
    of_map = [r for r in varied if (r["B"], r["H"], r["N_Q"], r["metric"]) == (1, 1, 32, "time_ms")]
    by_name = {r["backend"]: np.median(r["turns"]) for r in of_map}
    assert values[0, 1] == pytest.approx(by_name["naive"] / by_name["sdpa-flash"])
    drawn = [edge for edge in figure.borders(np.array([[0.5, 2.0], [0.5, 0.9]]))]
    assert drawn == [((1, 1), (0, 1)), ((1, 2), (1, 1))]


def test_tables_have_a_column_a_direction_and_clock(varied):
    found = crossings.sweeps(varied)
    header, lines = crossings.table(found, "naive")
    assert header[:3] == ["backend", "forward: GPU time", "forward: graph replay"]
    assert len(header) == 7
    assert [line[0] for line in lines] == ["SDPA", "SDPA flash", "v1 flash"]
    assert all(len(line) == 7 for line in lines)
    header, lines = crossings.conditions_table(found)
    assert header == ["", "clock", "SDPA flash", "v1 flash"]
    assert len(lines) == 8 * 3
    text = " ".join(crossings.words(found))
    assert text.startswith("Forward, bfloat16, causal, batch 4, 16 heads of 64; GPU.")
    for part in (
        "Faster than Naive: by GPU time all",
        "Faster than Naive compiled",
        "in one call.",
        "to fill the machine",
    ):
        assert part in text


def test_pictures_show_the_records_and_survive_trimming(varied, tmp_path):
    full, short = tmp_path / "full.jsonl", tmp_path / "crossover.jsonl"
    full.write_text("".join(json.dumps(r) + "\n" for r in varied))
    assert trim.main([str(full), str(short)]) == 0
    assert short.stat().st_size < full.stat().st_size / 2
    found, kept = (crossings.sweeps(records.read(p)) for p in (full, short))
    assert crossings.digest(found) == crossings.digest(kept)
    assert figure.main([str(short), "--out", str(tmp_path / "a")]) == 0
    made = sorted(p.stem for p in (tmp_path / "a").glob("*.png"))
    assert made == [
        f"crossover-{k}" for k in ("conditions", "map", "naive", "naive-compiled", "sdpa")
    ]
    for path in (tmp_path / "a").iterdir():
        assert crossings.digest(found).encode() in path.read_bytes()
    before = (tmp_path / "a" / "crossover-map.png").read_bytes()
    assert figure.main([str(full), "--out", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "crossover-map.png").read_bytes() == before


def test_readme_tables_come_from_the_records(varied, tmp_path, monkeypatch):
    (tmp_path / "crossover.jsonl").write_text("".join(json.dumps(r) + "\n" for r in varied))
    monkeypatch.setattr(table, "REFERENCE", tmp_path)
    text = table.TABLES["crossings-naive"]()
    assert text.startswith("| backend | forward: GPU time | forward: graph replay |")
    assert text.count("\n| ") >= 4
    assert "`python bench/crossover.py`</sub>" in text
    assert "| clock | SDPA flash | v1 flash |" in table.TABLES["crossings-conditions"]()
    assert table.TABLES["crossings-answer"]().startswith("Forward, bfloat16, causal")
    (tmp_path / "crossover.jsonl").unlink()
    with pytest.raises(table.TableError, match=r"crossover.jsonl"):
        table.TABLES["crossings-sdpa"]()


def test_marks_stand_at_the_crossings(varied):
    found = crossings.sweeps(varied)
    fig = figure.against(found, "naive")
    left, _ = fig.axes[:2]
    marks = [line.get_xdata()[0] for line in left.lines if line.get_marker() == "o"]
    (c,) = [
        c for c in crossings.crossings(crossings.base(found), "naive", "time_ms")
        if c.backend == "v1_flash"
    ]  # fmt: skip
    expected = 16 / figure.OUTSIDE if c.start == crossings.EVERYWHERE else c.start
    assert any(x == pytest.approx(expected) for x in marks)
    assert len(marks) == 3
    figure.style.plt.close(fig)


def test_the_committed_pictures_show_the_reference_records(tmp_path):
    path = table.REFERENCE / "crossover.jsonl"
    if not path.exists():
        pytest.skip("no such reference records")
    digest = crossings.digest(crossings.sweeps(records.read(path))).encode()
    pictures = [p for p in table.REFERENCE.parent.glob("crossover-*.*") if p.suffix != ".py"]
    assert pictures
    for picture in pictures:
        stale = f"{picture} is stale: python figures/crossover.py {path} --out figures"
        assert digest in picture.read_bytes(), stale


def test_pictures_of_nothing_are_refused(tmp_path, capsys):
    empty = tmp_path / "r.jsonl"
    empty.write_text("")
    with pytest.raises(SystemExit) as stop:
        figure.main([str(empty), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "nothing to draw" in capsys.readouterr().err


# The run


@pytest.fixture
def quiet(monkeypatch):
    """One thread, and one environment for a test: somebody may edit a kernel meanwhile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    environment = common.environment(torch.device("cpu"))
    monkeypatch.setattr(common, "environment", lambda device: environment)
    yield monkeypatch
    torch.set_num_threads(threads)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_cpu_gives_a_true_answer_and_the_same_command_measures_nothing(quiet, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    command = [*QUICK, "--lengths", "16,32", "--out", str(out), "--slices", "base,training,fill"]
    assert crossover.main(command) == 0
    rows = read(out)
    assert len(rows) == 3 * 2 * 3  # base, training, another B·H; lengths; backends
    assert {r["metric"] for r in rows} == {"host_ms"}
    assert {r["backend"] for r in rows} == {"naive", "sdpa", "sdpa-flash"}
    assert {r["slice"] for r in rows} == {"base", "training", "fill"}
    for r in rows:
        assert r["status"] == "ok"
        assert len(r["turns"]) == 3
        assert 0 < r["p20"] <= r["p50"] <= r["p80"]
        assert r["command"].startswith("python bench/crossover.py")
        assert (r["sdpa_kernel"] is not None) == (r["backend"] == "sdpa")
    text = capsys.readouterr().out
    assert "Faster than Naive from N = …" in text
    assert "Faster than Naive: by wall clock" in text
    assert list((tmp_path / "r").glob("crossover-naive.png"))
    assert crossover.main([*command, "--no-charts"]) == 0
    assert read(out) == rows
    assert "6 of 6 cells are in" in capsys.readouterr().out

    out.write_text("".join(json.dumps(r) + "\n" for r in rows[:-1]))  # its last cell lacks a row
    assert crossover.main([*command, "--no-charts"]) == 0
    assert len(read(out)) == len(rows) - 1 + 3


def test_a_budget_stops_between_cells_in_the_order_of_the_slices(quiet, tmp_path, capsys):
    out, clock = tmp_path / "r.jsonl", SimpleNamespace(now=0.0)
    quiet.setattr(
        crossover.Session, "settle",
        lambda self, name, cell: self.ready.update({(cell, name): rounds.Contender(name)}),
    )  # fmt: skip
    quiet.setattr(crossover, "time", SimpleNamespace(monotonic=lambda: clock.now))
    quiet.setattr(common, "ends", lambda budget, argv: math.inf if budget is None else budget)

    def measure(self, clocks, cell, names, turns):
        clock.now += 1.0
        found = [rounds.Contender(n, cost=1e-3) for n in names]
        for it in found:
            it.turns = [[1.0]] * turns
        return {"host_ms": found}

    quiet.setattr(crossover.Session, "measure_on", measure)
    command = [*QUICK, "--lengths", "16,32,64,128", "--no-charts", "--out", str(out)]
    assert crossover.main([*command, "--budget", "9"]) == 0
    assert clock.now <= 9
    done = [(r["slice"], r["N_Q"]) for r in read(out) if r["backend"] == "naive"]
    assert sorted(done[:4]) == [("base", n) for n in (16, 32, 64, 128)]
    assert sorted(done[4:8]) == [("training", n) for n in (16, 32, 64, 128)]
    assert "--budget left no time for" in capsys.readouterr().out
    before = len(done)
    assert crossover.main(command) == 0
    done = [(r["slice"], r["N_Q"], r["B"], r["H"], r["causal"]) for r in read(out)]
    assert len(done) == 3 * len(set(done))
    assert len(set(done)) == 3 * 4 + 2 > before  # base, training, B·H = 1; the other mask at two


class Compiling:
    """A Precompiler in whose processes nothing hangs."""

    def __init__(self, tasks):
        self.tasks, self.waited = tasks, None

    def wait(self, seconds):
        self.waited = seconds
        return []


@pytest.mark.parametrize("budget", [None, 100])
def test_what_compiles_for_long_is_set_up_last_and_left_out_first(quiet, budget, capsys):
    """Every call takes a second. Other processes compile for v1_flash and flex alone."""
    clock, log, made = SimpleNamespace(now=0.0), [], []
    quiet.setattr(crossover, "time", SimpleNamespace(monotonic=lambda: clock.now))
    quiet.setattr(rounds, "Precompiler", lambda tasks: made.append(Compiling(tasks)) or made[0])
    quiet.setattr(rounds, "helped", lambda name: name in ("v1_flash", "flex"))
    quiet.setattr(crossover.Session, "to_compile", lambda self: [])

    def settle(self, name, cell):
        log.append((name, cell.causal))
        clock.now += 1.0

    quiet.setattr(crossover.Session, "settle", settle)
    cell = grid.Cell("forward", 16, True, 0, 1, 2)
    names = ["naive", "flash-attn-4", "flex", "v1_flash"]
    plan = {
        "base": {("float32", cell._replace(length=n)): names for n in range(11)},
        "mask": {("float32", cell._replace(length=n, causal=False)): names for n in range(11)},
    }
    args = SimpleNamespace(end=math.inf if budget is None else budget, turns=3, seed=0)
    rest = {key: names for part in plan.values() for key in part}
    clocks = SimpleNamespace(timer=SimpleNamespace(device="cuda"))
    crossover.set_up(args, plan, rest, clocks)
    backends = ["naive", "flash-attn-4", "v1_flash", "flex"]
    order = [(b, mask) for b in backends for mask in (True, False) for _ in range(11)]
    if budget is None:
        assert log == order
        assert made[0].waited == math.inf
        assert "--budget" not in capsys.readouterr().out
    else:  # 66 s are gone before the first of flex, 62 % of the budget
        assert log == order[:66]
        assert made[0].waited == pytest.approx(62 - 44)
        assert "no time to set up 22 calls of FlexAttention" in capsys.readouterr().out


def test_nothing_is_set_up_in_the_last_quarter_of_a_budget(quiet, capsys):
    clock, log = SimpleNamespace(now=0.0), []
    quiet.setattr(crossover, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def settle(self, name, cell):
        log.append(name)
        clock.now += 1.0

    quiet.setattr(crossover.Session, "settle", settle)
    cell = grid.Cell("forward", 16, True, 0, 1, 2)
    plan = {"base": {("float32", cell._replace(length=n)): ["naive", "sdpa"] for n in range(20)}}
    args = SimpleNamespace(end=20, turns=3, seed=0)
    crossover.set_up(args, plan, plan["base"], crossover.CpuClocks())
    assert len(log) == 15
    assert "no time to set up 25 calls of SDPA, Naive" in capsys.readouterr().out


def test_a_failing_backend_is_a_row_and_the_others_go_on(quiet, tmp_path):
    def broken(q, k, v, *, causal=False, scale=None):
        if q.shape[2] == 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34 GiB")
        return naive.attention(q, k, v, causal=causal, scale=scale)

    load = rounds.load
    for module in (rounds, crossover):
        quiet.setattr(module, "load", lambda n: broken if n == "naive" else load(n))
    out = tmp_path / "r.jsonl"
    command = [*QUICK, "--lengths", "16,32", "--slices", "base", "--no-charts", "--out", str(out)]
    assert crossover.main(command) == 0
    found = {(r["backend"], r["N_Q"]): r for r in read(out)}
    assert found["naive", 32]["status"] == "oom"
    assert "34 GiB" in found["naive", 32]["reason"]
    assert {r["status"] for key, r in found.items() if key != ("naive", 32)} == {"ok"}


def test_the_plan_is_one_base_and_slices_that_vary_one_thing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    args = crossover.parse(crossover.parser(), ["--device", "cuda"])
    plan = crossover.plan_of(args)
    assert list(plan) == list(crossover.SLICES)
    keys = [key for part in plan.values() for key in part]
    assert len(keys) == len(set(keys))
    flash = {n for n, b in BACKENDS.items() if b.family == "flash"}
    every = {n for names in plan["base"].values() for n in names}
    assert every == flash | set(crossings.RIVALS)
    assert {c.length for _, c in plan["base"]} == set(crossover.LENGTHS)
    base = next(iter(plan["base"]))
    for name, part in plan.items():
        for dtype, cell in part:
            differs = {"dtype"} if dtype != base[0] else set()
            differs |= {f for f in cell._fields if getattr(cell, f) != getattr(base[1], f)}
            differs -= {"length"}
            assert differs <= {
                "base": set(), "training": {"direction"}, "fill": {"batch", "heads"},
                "mask": {"causal"}, "head-dim": {"head_dim"}, "dtype": {"dtype"},
            }[name]  # fmt: skip

    def lengths(slice_, backend):
        return sorted(c.length for (_, c), names in plan[slice_].items() if backend in names)

    twos, fours = [2**i for i in range(4, 11)], [16, 64, 256, 1024]
    assert lengths("base", "flex") == lengths("training", "flex") == fours
    assert (lengths("base", "naive-compiled"), lengths("training", "naive-compiled")) == (
        twos,
        fours,
    )
    assert lengths("training", "naive") == lengths("training", "v1_flash") == twos
    assert lengths("fill", "naive") == sorted(4 * twos)  # B·H = 64 is the base's
    assert lengths("mask", "naive") == [16, 64, 256, 512, 1024]
    assert (
        lengths("head-dim", "naive") == lengths("dtype", "naive") == sorted(2 * fours + [512] * 2)
    )
    assert len(keys) == 13 + 7 + 4 * 7 + 5 * 5
    named = crossover.parse(crossover.parser(), ["--device", "cuda", "--backends", "flex", "naive"])
    for part in crossover.plan_of(named).values():
        assert {tuple(names) for names in part.values()} == {("naive", "flex")}


def test_a_gpu_has_three_clocks(monkeypatch):
    """With stand-ins for events and graphs: what is timed how, and divided by what."""
    log = []
    graph = SimpleNamespace(replay=lambda: log.append("replay"))
    monkeypatch.setattr(rounds, "GpuTimer", lambda: SimpleNamespace(
        flush_s=1e-4, turn=lambda call, calls, idle: [call()] * calls))  # fmt: skip
    monkeypatch.setattr(common, "capture", lambda call, calls: log.append(calls) or graph)
    monkeypatch.setattr(common, "cost", lambda call: (2e-4, 1e-5))
    monkeypatch.setattr(
        common, "event_times", lambda call, calls, flush=None, idle=0: [call() or 0.4] * calls
    )
    monkeypatch.setattr(common, "host_samples", lambda call, batches, calls: [calls] * batches)
    clocks = crossover.GpuClocks()
    it = rounds.Contender("naive", cost=1e-4, host=5e-5)
    assert clocks.ready("time_ms", lambda: 7.0, it, 1e-4)() == [7.0] * 4
    samples = clocks.ready("graph_ms", lambda: None, it, 0.0)()
    assert log == [20, "replay"]
    assert samples == [0.4 / 20] * crossover.REPLAYS
    assert clocks.ready("host_ms", lambda: None, it, 0.0)() == [10]
    slow = rounds.Contender("naive", cost=1.0, host=5e-5)
    assert clocks.ready("host_ms", lambda: None, slow, 0.0)() == [3]


def test_the_gpu_is_idle_until_a_slow_host_is_done_and_only_then():
    assert common.idle_before([(1e-4, 9e-5)]) == pytest.approx(1.35e-4)
    assert common.idle_before([(1e-2, 9e-5)]) == 0.0
    assert common.idle_before([(1e-2, 9e-5), (2e-4, 1e-4)]) == pytest.approx(1.5e-4)
    assert common.idle_before([(1.0, 0.9)]) == common.MOST_IDLE
    assert common.idle_before([]) == 0.0


def test_samples_of_the_main_job_idle_like_the_rounds(monkeypatch):
    """One function for all: flush, idle for one and a half launches, event, call, event."""
    seen = {}
    monkeypatch.setattr(common, "once", lambda fn: (5e-4, 4e-4))
    monkeypatch.setattr(common, "cost", lambda fn: (1e-4, 8e-5))
    monkeypatch.setattr(common, "flush_buffer", lambda device: "flush")

    def event_times(call, calls, flush=None, idle=0.0):
        seen.update(calls=calls, flush=flush, idle=idle)
        return [1.0] * calls

    monkeypatch.setattr(common, "event_times", event_times)
    device = SimpleNamespace(type="cuda")
    assert common.samples(lambda: None, device, 0.15, 5, 50) == [1.0] * 50
    assert seen == {"calls": 50, "flush": "flush", "idle": pytest.approx(1.2e-4)}
    assert len(common.samples(lambda: None, device, 1e-6, 5, 50)) == 5
    # A call that takes long is neither warmed up again nor made more often than twice.
    monkeypatch.setattr(common, "once", lambda fn: (0.4, 1e-4))
    monkeypatch.setattr(common, "cost", None)
    assert len(common.samples(lambda: None, device, 0.15, 5, 50)) == 2
    assert seen["idle"] == 0.0


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    streams = []
    main, side = (
        SimpleNamespace(wait_stream=lambda s: None),
        SimpleNamespace(wait_stream=lambda s: None),
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: side)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda g, stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    calls = []
    assert common.capture(lambda: calls.append(1), 3) == "graph"
    assert len(calls) == 1 + 3

    def fails():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        common.capture(fails, 3)
    assert streams == [main, main]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--slices", "nope"),
        ("--backends", "nope"),
        ("--lengths", "0"),
        ("--fills", "3", "--heads", "2"),
        ("--budget", "-1"),
        ("--turns", "0"),
        ("--dtype", "int8"),
    ],
)
def test_errors_name_the_argument(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        crossover.main(["--device", "cpu", *arguments])
    assert stop.value.code == 2
    assert f"argument {arguments[0]}:" in capsys.readouterr().err


def test_help_and_plan_teach_as_a_script():
    def run(*arguments):
        command = [sys.executable, common.ROOT / "bench" / "crossover.py", *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True
        ).stdout

    text = run("--help")
    for word in ("--budget", "GPU time", "graph replay", "wall clock", "Not measured", "Exit code"):
        assert word in text
    text = run("--plan", "--device", "cpu")
    assert re.search(r"base +forward float32 causal D=64 B·H=1·8 +16,24,32", text)


# The compiled baseline


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(5, 9), (9, 5), (7, 7)])
def test_the_compiler_s_formula_is_attention(causal, n_q, n_k):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, 8, requires_grad=True) for h, n in ((4, n_q), (2, n_k), (2, n_k))
    )
    given = {"causal": causal, "scale": 0.3}
    want = naive.attention(q, k, v, **given)
    got = naive_compiled._formula(q, k, v, *given.values())
    torch.testing.assert_close(got, want)
    do = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), do) for o in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_compiler_fuses_between_the_products_and_does_not_call_sdpa():
    """Else it would be another baseline. The graph is inspected before code is made of it."""
    from torch._dynamo.utils import counters
    from torch._inductor import compile_fx, config

    seen = []

    def keep(graph, inputs, **_):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def backend(graph, inputs):
        return compile_fx.compile_fx(graph, inputs, inner_compile=keep)

    counters.clear()
    torch._dynamo.reset()
    with config.patch(force_disable_caches=True):
        run = torch.compile(naive_compiled._formula, fullgraph=True, dynamic=False, backend=backend)
        q, k, v = (torch.randn(2, 2, 16, 8) for _ in range(3))
        got = run(q, k, v, True, 0.3)
    torch.testing.assert_close(got, naive.attention(q, k, v, causal=True, scale=0.3))
    assert sum("bmm" in name for name in seen) == 2
    assert not [name for name in seen if "scaled_dot_product" in name]
    assert counters["inductor"]["fuse_attention"] == 0
    torch._dynamo.reset()
