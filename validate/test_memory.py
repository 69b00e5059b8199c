"""bench/memory.py and its figure, with processes and a GPU that are made up."""

import itertools
import json
import sys

import pytest
import torch
from flashstudy.bench import common, memory, seqlen
from flashstudy.figures import memory as figure
from flashstudy.figures import records, style, table

GIB = 2**30
CELL = seqlen.Cell("naive", "attention", "forward", "bfloat16", True, 1, 256, 2, 2, 4096)
SHARED = {"device": "Test GPU", "gpu": "Test GPU", "memory_mib": 8192, "effort": "one call",
          "torch": "2.11", "run": "1"}  # fmt: skip


class FakeGpu:
    """A GPU of some free bytes in which calls take what is expected of them, and a little more."""

    def __init__(self, free=4 * GIB, extra=1.0, kept=0):
        self.free, self.extra, self.kept, self.held = free, extra, kept, 0
        self.seen = []  # cells measured, and whether each was called once before

    def measured(self, cell, device, before=False):
        self.seen.append((cell, before))
        result = seqlen.Result()
        need = memory.expected_bytes(cell) * self.extra
        held = memory.explain.resident(cell) if memory.stores_scores(cell.backend) else 0
        if need + held > self.free:
            result.fail("oom", "OutOfMemoryError: CUDA out of memory")
            return result, None
        result.bytes = {"peak_delta_mib": need, "peak_abs_mib": need + held}
        self.held += self.kept
        return result, 0.25


class Inline(memory.Worker):
    """A backend's process that is none."""

    def __init__(self, task):
        self.task, self.said = task, []

    def begin(self):
        pass

    def go(self, seconds):
        lines = iter([json.dumps(self.task), str(seconds)])
        memory.serve(lines, lambda x: self.said.append(json.dumps(x)))
        ready, *rest = map(json.loads, self.said)
        assert ready == {"ready": True}
        yield from rest

    def close(self):
        return 0


@pytest.fixture
def gpu(monkeypatch):
    """Puts a FakeGpu in."""

    def put(**kinds):
        fake = FakeGpu(**kinds)
        monkeypatch.setattr(memory, "measured", fake.measured)
        monkeypatch.setattr(memory, "free_now", lambda device: (fake.free, fake.held))
        monkeypatch.setattr(seqlen, "reason_not", lambda *_: None)
        return fake

    return put


def arguments(tmp_path, *more):
    names = ["--backends", "naive", "v1_flash", "--lengths", "1024,4096,65536", "--device", "cpu"]
    return memory.parse([*names, "--out", str(tmp_path / "m.jsonl"), *more])[1]


def run(args, start=Inline):
    store = common.Records(args.out)
    try:
        memory.run(args, store, SHARED, start)
        return store.rows
    finally:
        store.close()


# What is expected


def test_expected_bytes_by_hand():
    scores, tensor, row = 2 * 4096**2 * 2, 2 * 4096 * 128 * 2, 2 * 4096 * 4
    assert memory.expected_bytes(CELL) == 2 * scores + tensor  # S, P, o
    flash = CELL._replace(backend="v1_flash")
    assert memory.expected_bytes(flash) == tensor + row  # o, lse
    # P, dP, dS and P ∘ dP, which torch's softmax makes, o, and the one that a gradient needs
    more = memory.expected_bytes(CELL._replace(direction="backward"))
    assert more == pytest.approx(4 * scores, rel=0.05)
    both = flash._replace(direction="backward")
    assert memory.expected_bytes(both) == tensor + 2 * row + 3 * tensor  # o, lse, delta, dq dk dv


@pytest.mark.parametrize("direction", memory.DIRECTIONS)
@pytest.mark.parametrize("free", [3 * GIB, 140 * GIB])
def test_the_tries_bracket_the_end_within_the_promise(direction, free):
    cell = CELL._replace(direction=direction)

    def need(n):
        at = cell._replace(N=n)
        return memory.expected_bytes(at) + memory.explain.resident(at)

    end, tried = memory.end_of(cell, free), memory.tries(cell, free)
    assert need(end) <= free < need(end + memory.STEP)
    assert need(tried["under"]) <= free * (1 - memory.MARGIN)
    assert need(tried["over"]) > free * (1 + memory.MARGIN)
    if free > 100 * GIB:  # where a step of 128 tokens is small
        assert need(tried["over"]) / need(tried["under"]) - 1 < figure.WITHIN


# The process of a backend


def test_naive_is_tried_on_either_side_of_its_end(gpu, tmp_path):
    fake, args = gpu(), arguments(tmp_path, "--direction", "forward")
    rows = run(args)
    tried = memory.tries(CELL, fake.free)
    naive = [r for r in rows if r["backend"] == "naive" and r["metric"] == "time_ms"]
    assert [(r["N_Q"], r["status"], r["role"]) for r in naive] == [
        (1024, "ok", None), (4096, "ok", None),  # 65,536 is beyond the end
        (tried["under"], "ok", "under"), (tried["over"], "oom", "over"),
    ]  # fmt: skip
    assert {r["predicted_end"] for r in naive[2:]} == {memory.end_of(CELL, fake.free)}
    assert naive[-1]["value"] is None
    assert "out of memory" in naive[-1]["reason"]
    for row in naive:
        cell = CELL._replace(N=row["N_Q"])
        assert row["predicted_mib"] == memory.expected_bytes(cell) / 2**20
    peaks = [r for r in rows if r["metric"] == "peak_delta_mib"]
    assert all(r["value"] == r["predicted_mib"] for r in peaks)
    first = {}
    for cell, before in fake.seen[1:]:
        first.setdefault(cell.backend, before)
    assert first == {"naive": True, "v1_flash": False}


def test_a_cell_waits_for_the_memory_of_the_last(gpu, tmp_path):
    gpu(kept=GIB)
    rows = run(arguments(tmp_path, "--direction", "forward"))
    flash = [r for r in rows if r["backend"] == "v1_flash" and r["metric"] == "time_ms"]
    assert [r["status"] for r in flash] == ["ok", "failed", "failed"]
    assert "1024 MiB of the cell before are not free again" in flash[1]["reason"]


def test_the_same_command_measures_only_what_is_missing(gpu, tmp_path):
    fake, args = gpu(), arguments(tmp_path)
    rows = [*run(args)]
    seen = len(fake.seen)
    assert run(args) == rows
    assert len(fake.seen) == seen
    lost = [r for r in rows if not (r["backend"] == "v1_flash" and r["N_Q"] == 4096)]
    args.out.write_text("".join(json.dumps(r) + "\n" for r in lost))
    again = run(args)
    assert {(r["backend"], r["N_Q"]) for r in again[len(lost) :]} == {("v1_flash", 4096)}
    assert len(run(arguments(tmp_path, "--again"))) == len(again) + len(rows)


STUB = """
import os, sys
from flashstudy.bench import memory, seqlen
def measured(cell, device, before=False):
    print("what a library prints with", os.environ["PYTORCH_ALLOC_CONF"])
    result = seqlen.Result()
    result.bytes = {{"peak_delta_mib": memory.expected_bytes(cell), "peak_abs_mib": 2**40}}
    if cell.N == {hangs}:
        import time; time.sleep(60)
    return result, 0.5
memory.measured, memory.free_now = measured, lambda device: (4 * 2**30, 0)
sys.exit(memory.main(["--serve"]))
"""


@pytest.mark.parametrize("hangs", [0, 4096])
def test_a_real_process_answers_over_its_pipes(tmp_path, monkeypatch, hangs, capfd):
    path = tmp_path / "stub.py"
    path.write_text(STUB.format(hangs=hangs))
    monkeypatch.setattr(memory.Worker, "command", (sys.executable, str(path)))
    monkeypatch.setattr(seqlen, "reason_not", lambda *_: None)
    more = ["--direction", "forward", "--backends", "v1_flash"]
    if hangs:
        monkeypatch.setattr(memory, "GRACE", 0)
        more += ["--budget", "12"]
    rows = [r for r in run(arguments(tmp_path, *more), memory.Worker) if r["metric"] == "time_ms"]
    assert [r["N_Q"] for r in rows] == [1024, 4096, 65536]
    assert [r["status"] for r in rows[1:]] == ["failed" if hangs else "ok"] * 2
    out, err = capfd.readouterr()
    assert "what a library prints with expandable_segments:True" in err
    assert ("exit code -9" in out) == bool(hangs)


def test_what_does_not_fit_the_budget_is_left_to_the_next_run(gpu, tmp_path, monkeypatch, capsys):
    gpu()
    monkeypatch.setattr(memory, "SLOW", 1e9)  # FLOP/s: 65,536 tokens would take 17 minutes
    args = arguments(tmp_path, "--direction", "forward")
    before = run(args)
    flash = [r["N_Q"] for r in before if r["backend"] == "v1_flash" and r["metric"] == "time_ms"]
    assert flash == [1024, 4096]
    assert "left no time for v1 flash at 65,536 (forward)" in capsys.readouterr().out
    monkeypatch.setattr(memory, "SLOW", 1e15)
    after = run(args)[len(before) :]
    assert {r["N_Q"] for r in after if r["backend"] == "v1_flash"} == {65536}


def test_a_process_that_dies_leaves_failed_cells_and_the_others_go_on(gpu, tmp_path):
    gpu()

    class Dying(Inline):
        def go(self, seconds):
            heard = super().go(seconds)
            yield from itertools.islice(heard, 1) if self.task["ends"] else heard

        def close(self):
            return -11

    rows = run(arguments(tmp_path, "--direction", "forward"), Dying)
    naive = [r for r in rows if r["backend"] == "naive" and r["metric"] == "time_ms"]
    assert [r["status"] for r in naive] == ["ok", "failed", "failed"]
    assert "exit code -11" in naive[1]["reason"]
    flash = [r for r in rows if r["backend"] == "v1_flash" and r["metric"] == "time_ms"]
    assert [r["status"] for r in flash] == ["ok"] * 3


def test_without_a_gpu_it_prints_the_lines_and_says_so(capsys):
    assert memory.main(["--device", "cpu"]) == 2
    out = capsys.readouterr().out
    assert "1,048,576" in out
    assert "torch sees none here" in out
    assert memory.main(["--device", "cpu", "--plan", "--lengths", "4096"]) == 0
    out = capsys.readouterr().out
    assert "130 MiB" in out  # 2 · 2 · 4096² · 2 bytes of S and P, and o
    assert "2.03 MiB" in out
    assert "Naive would end at" in out


@pytest.mark.gpu
@pytest.mark.parametrize("direction", memory.DIRECTIONS)
@pytest.mark.parametrize("backend", ["naive", "v1_flash"])
def test_a_gpus_peak_is_the_expected_one(backend, direction):
    cell = CELL._replace(backend=backend, direction=direction, N=2048)
    result, seconds = memory.measured(cell, torch.device("cuda", 0), before=True)
    assert result.bytes["peak_delta_mib"] == pytest.approx(memory.expected_bytes(cell), rel=0.05)
    assert seconds > 0


# The figure


def synthetic(gpu, tmp_path, extra=1.0):
    gpu(extra=extra)
    return run(arguments(tmp_path))


def test_words_say_what_came_and_whether_as_predicted(gpu, tmp_path):
    study = figure.Study(synthetic(gpu, tmp_path))
    (forward, both) = study.ends()
    assert forward.as_predicted
    assert both.as_predicted
    assert forward.bracket == pytest.approx((forward.over / forward.under) ** 2 - 1)
    said = " ".join(study.words())
    assert "as predicted" in said
    assert "NOT" not in said
    assert "520 bytes a token" in said  # 2 heads · (128 · 2 + 4)
    header, lines = study.table()
    assert {len(line) for line in lines} == {len(header)}
    assert {line[5] for line in lines} == {"1.000"}


def test_a_run_without_flash_attn_goes_on_one_with_it(gpu, tmp_path):
    """Two runs make one line, and the caption tells both days and both commands."""
    rows = synthetic(gpu, tmp_path)
    first, second = {"flash_attn": "2.8"}, {"flash_attn": None}
    first |= {"utc": "2026-01-02T00:00:00Z", "command": "python bench/memory.py"}
    second |= {"utc": "2026-01-05T00:00:00Z", "command": "python bench/memory.py --budget 35"}
    split = [r | (second if r["backend"] == "naive" else first) for r in rows]
    study = figure.Study(split)
    assert {line.backend for line in study.lines()} == {r["backend"] for r in rows}
    sweep = study.sweeps[0]
    assert sweep.provenance().endswith("flash-attn 2.8; 2026-01-02 and 2026-01-05")
    told = table.ran_all(sweep, "memory")
    assert told == "`python bench/memory.py` and `python bench/memory.py --budget 35`"


def test_a_missed_end_is_said(gpu, tmp_path):
    study = figure.Study(synthetic(gpu, tmp_path, extra=1.06))  # 6 % more than was predicted
    assert not any(e.as_predicted for e in study.ends())
    said = " ".join(study.words())
    assert "NOT as predicted" in said
    assert "1.06 times its line: linear too" in said


def test_memory_that_is_no_line_is_said(gpu, tmp_path):
    rows = [
        r | {"p50": r["p50"] * r["N_Q"] / 1024}
        if r["backend"] == "v1_flash" and r["metric"] == "peak_delta_mib" else r
        for r in synthetic(gpu, tmp_path)
    ]  # fmt: skip
    assert "not in proportion to the length" in " ".join(figure.Study(rows).words())


def test_pictures_are_drawn_from_records_alone(gpu, tmp_path):
    rows = synthetic(gpu, tmp_path)
    paths = figure.draw(rows, tmp_path / "out")
    assert {p.name for p in paths} == {
        f"memory-{d}.{kind}" for d in memory.DIRECTIONS for kind in ("png", "svg")
    }
    again = figure.draw(rows, tmp_path / "again")
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(paths, again, strict=True))


def test_the_picture_shows_lines_points_and_the_end(gpu, tmp_path):
    (sweep, _) = figure.Study(synthetic(gpu, tmp_path)).sweeps
    fig = figure.chart(sweep)
    shown = {line.get_label() for line in fig.axes[0].lines}
    assert {"Naive", "v1 flash", "expected: S and P", "expected: flash"} <= shown
    (cross,) = [x for x in fig.axes[0].lines if x.get_marker() == "x"]
    assert list(cross.get_xdata()) == [memory.tries(CELL, 4 * GIB)["over"]]
    style.plt.close(fig)


def test_the_figure_refuses_what_holds_nothing(tmp_path, capsys):
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(SystemExit):
        figure.main([str(path)])
    assert "nothing to draw" in capsys.readouterr().err
    assert records.sweeps([]) == []
