"""The validator as a command: what it prints, its exit codes, and that broken backends fail it."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from flashstudy.backends import BACKENDS
from flashstudy.figures import validated
from flashstudy.validate import cases, check_outputs, faults
from flashstudy.validate.check_outputs import Candidate

SCRIPT = pathlib.Path(check_outputs.__file__).resolve()
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def command(*args, code=0):
    """Run the script as a user would; its output."""
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


# ---- As a command --------------------------------------------------------------------------------


def test_native_and_interpreted_backends_pass(tmp_path, monkeypatch):
    """The whole path: TRITON_INTERPRET set by the script, workers, table, JSON."""
    file = tmp_path / "out.jsonl"
    out = command(
        "--backends", "naive,v1_flash", "--device", "cpu", "--dtype", "fp16,bf16", "--jobs", "2",
        "--quick", "--json", str(file),
    )  # fmt: skip
    first, *records = [json.loads(line) for line in file.read_text().splitlines()]
    assert first["about"]["torch"] == torch.__version__
    assert first["about"]["device"] == "CPU"
    said = first["about"]["command"]  # what to type for the same, without where it was written
    assert said.startswith("python validate/check_outputs.py --backends naive,v1_flash")
    assert said.endswith("--jobs 2 --quick")
    assert sum(r["ok"] for r in validated.counted([first, *records])) == sum(
        r["status"] == "ok" for r in records
    )
    assert {(r["backend"], r["dtype"]) for r in records} == {
        ("naive", "fp16"), ("naive", "bf16"), ("v1_flash", "fp16"),
    }  # fmt: skip
    assert {r["status"] for r in records} <= {"ok", "refused"}
    assert {r["family"] for r in records} == set(cases.FAMILIES) - {"size"}
    assert all("lse" in r["stats"] for r in records if r["backend"] == "v1_flash" and r["stats"])
    assert "v1_flash bf16: Triton's interpreter computes bfloat16 wrongly" in out
    assert " 0 wrong" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("naive ", "v1_flash "))]
    assert [row[:2] for row in rows[:3]] == [
        ["naive", "fp16"],
        ["naive", "bf16"],
        ["v1_flash", "fp16"],
    ]
    worst = max(r["over"] for r in records if r["over"] is not None)
    assert 0.1 < worst <= 1


def test_the_same_command_judges_what_is_not_judged_yet(tmp_path, monkeypatch, capsys):
    """After a run that was cut, with a line half written, and for a case of other code."""
    file = tmp_path / "out.jsonl"
    arguments = [
        "--backends",
        "naive",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--jobs",
        "0",
        "--quick",
    ]
    few = [
        c for c in cases.grid("naive", "cpu", FP32, backward=True, interpreted=False, quick=True)
        if c.family == "shapes"
    ][:5]  # fmt: skip
    monkeypatch.setattr(cases, "grid", lambda *_, **__: few)
    assert check_outputs.main([*arguments, "--json", str(file)]) == 0
    about, *lines = file.read_text().splitlines(keepends=True)
    capsys.readouterr()
    stale = json.dumps(json.loads(lines[1]) | {"source": "other", "status": "fail"}) + "\n"
    file.write_text("".join([about, lines[0], stale, lines[2], lines[3][:40]]))

    asked = []
    judge = check_outputs.judge
    monkeypatch.setattr(
        check_outputs,
        "judge",
        lambda c, case, *rest: asked.append(case.name) or judge(c, case, *rest),
    )
    assert check_outputs.main([*arguments, "--json", str(file)]) == 0
    assert "5 cases, 2 of them judged already" in capsys.readouterr().out
    assert asked == [few[1].name, few[3].name, few[4].name]
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert sorted(r["case"] for r in rows) == sorted(c.name for c in few)
    assert {r["status"] for r in rows} == {"ok"}

    assert (
        check_outputs.main([*arguments[:-1], "--json", str(file)]) == 2
    )  # not --quick: another run
    assert "is of another run" in capsys.readouterr().err
    assert len(file.read_text().splitlines()) == 6


def test_self_test_passes():
    out = command("--self-test", "--dtype", "bf16", "--device", "cpu")
    assert "every broken backend was rejected" in out
    assert "good bf16 nothing broken" in out
    assert "BAD" not in out
    assert out.count("good bf16") == 1 + sum(faults.shows_in(f, BF16) for f in faults.FAULTS)


def test_list_runs_nothing():
    out = command("--list", "--backends", "naive", "--quick", "--dtype", "fp32")
    assert "naive fp32 shapes: B1 H1 N3x3 D64 causal" in out
    assert "Error over budget" not in out


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--backends", "flash3"], "expected some of naive,"),
        (["--backends", ""], "expected some of naive,"),
        (["--dtype", "fp8"], "expected some of fp16,bf16,fp32, got 'fp8'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--jobs", "-1"], "expected a number of processes"),
        (["--jobs", "two"], "expected a number of processes"),
        (["--json", "/no/such/folder/out.jsonl"], "No such file or directory"),
        (["--length", "5"], "unrecognized arguments"),
    ],
)
def test_bad_arguments_exit_2(args, text, capsys):
    with pytest.raises(SystemExit) as exit_:
        check_outputs.main(args)
    assert exit_.value.code == 2
    assert text in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_exits_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        check_outputs.main(["--device", "cuda"])
    assert exit_.value.code == 2
    assert "torch sees no CUDA GPU" in capsys.readouterr().err


# ---- Exit codes ----------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    """Run main over one backend of the table, made of this function; (exit code, output)."""

    def run(attention, *args, name="naive"):
        real = check_outputs.candidate(name)
        monkeypatch.setattr(
            check_outputs, "_candidate", lambda _: real._replace(attention=attention)
        )
        code = check_outputs.main(
            [
                "--backends",
                name,
                "--quick",
                "--dtype",
                "fp32",
                "--device",
                "cpu",
                "--jobs",
                "0",
                *args,
            ]
        )
        return code, capsys.readouterr().out

    return run


def test_a_right_backend_exits_0(run):
    code, out = run(faults.attention())
    assert code == 0
    assert " 0 wrong" in out
    assert "FAIL" not in out


@pytest.mark.parametrize("name", ["naive", "sdpa"])
def test_a_wrong_number_exits_1_whoever_computes_it(run, name):
    code, out = run(faults.attention("last row dropped"), name=name)
    assert code == 1
    assert "FAIL" in out
    assert "Failures:" in out
    assert "fail: o: max error" in out


def test_a_library_may_refuse_and_this_project_may_not(run):
    def picky(q, k, v, **options):
        if q.shape[-1] == 40:
            raise RuntimeError("head dim 40 is not supported")
        return faults.attention()(q, k, v, **options)

    code, out = run(picky, name="sdpa")
    assert code == 0
    assert "head dim 40 is not supported" in out
    assert "Refused" in out
    code, out = run(picky, name="naive")
    assert code == 1
    assert "fail: RuntimeError: head dim 40 is not supported" in out


def test_refusing_everything_is_a_failure(run):
    def never(q, k, v, **options):
        raise RuntimeError("not today")

    code, out = run(never, name="sdpa")
    assert code == 1
    assert "sdpa: refused every case" in out
    assert "Nothing ran." in out


def test_a_library_that_overwrites_its_inputs_fails(run):
    code, out = run(faults.attention("inputs overwritten"), name="sdpa")
    assert code == 1
    assert "wrote into its input k" in out


def test_what_cannot_run_here_is_named_and_exits_1(capsys):
    name = next(n for n, row in BACKENDS.items() if row.cpu is None)
    code = check_outputs.main(["--backends", name, "--device", "cpu", "--jobs", "0"])
    out = capsys.readouterr().out
    assert code == 1
    assert f"{name} fp16, bf16, fp32: needs a CUDA GPU" in out
    assert "Nothing ran." in out
    assert f"Asked for, but cannot run here: {name}" in out


# ---- Properties ----------------------------------------------------------------------------------


def _judge(fault, judge, **promises):
    case = next(c for c in cases.every() if c.judge == judge and c.quick and not c.grad)
    c = Candidate(fault, faults.attention(fault), True, **promises)
    return check_outputs.judge(c, case, FP32, "cpu")


BREAKS = {
    "repeat": "not repeatable",
    "independent": "heads mixed by 0",
    "permuted-keys": "a ragged last key is dropped",
    "future-nan-k": "mask added, not selected",
    "future-nan-kv": "tiles past the diagonal are read",
}


@pytest.mark.parametrize("judge", BREAKS)
def test_each_property_holds_and_is_missed_when_broken(judge):
    promises = {"ours": True, "portable": True, "tiled": True}
    assert _judge("", judge, **promises)["status"] == "ok"
    record = _judge(BREAKS[judge], judge, **promises)
    assert record["status"] == "fail"


@pytest.mark.parametrize("judge", ["repeat", "future-nan-k", "future-nan-kv"])
def test_what_was_not_promised_is_a_finding(judge):
    record = _judge(BREAKS[judge], judge)
    assert record["status"] == "ok"
    assert record["findings"]


def _wavers(name, always):
    """Correct attention whose gradient `name` differs in its last bit from call to call, always or
    unless deterministic."""

    def attention(q, k, v, *, causal=False, scale=None, return_lse=False, deterministic=False):
        t = {"dq": q, "dk": k}[name]
        if t.requires_grad and (always or not deterministic):
            seen.append(t)
            # One element 1 ulp up, another one in each call.
            step = torch.zeros_like(t).view(-1)
            step[len(seen) % t.numel()] = torch.finfo(t.dtype).eps
            t.register_hook(lambda g: g + g * step.view(g.shape))
        return faults.attention()(q, k, v, causal=causal, scale=scale, return_lse=return_lse)

    seen = []
    return Candidate("x", attention, True, "fp32", True, deterministic=True)


@pytest.mark.parametrize(
    ("name", "always", "status"),
    [("dq", False, "ok"), ("dq", True, "fail"), ("dk", False, "fail"), ("dk", True, "fail")],
)
def test_what_the_keyword_deterministic_promises(name, always, status):
    """dq repeats where it is asked for, the other gradients in any case."""
    case = next(c for c in cases.every() if c.judge == "repeat" and c.grad and c.n_q < 100)
    record = check_outputs.judge(_wavers(name, always), case, FP32, "cpu")
    assert record["status"] == status
    if status == "fail":
        where = "deterministic: dq" if name == "dq" else "again: dk"
        assert f"{where} changed" in record["reasons"][0]
    else:
        assert record["findings"] == ["same call again: dq changed"]


@pytest.mark.parametrize("broken", [False, True])
def test_gradients_are_judged_with_the_keyword_and_without(broken):
    """A fault in the kernel that only deterministic=True runs is a failure."""

    def attention(q, k, v, *, causal=False, scale=None, return_lse=False, deterministic=False):
        fault = "dq 1 % off" if deterministic and broken else ""
        return faults.attention(fault)(q, k, v, causal=causal, scale=scale, return_lse=return_lse)

    case = next(c for c in cases.every() if c.quick and c.n_q == 113 and c.grad)
    candidate = Candidate("x", attention, True, "fp32", True, deterministic=True)
    record = check_outputs.judge(candidate, case, FP32, "cpu")
    assert record["status"] == ("fail" if broken else "ok")
    if broken:
        assert record["reasons"][0].startswith("deterministic: dq")


def test_every_judge_is_used_and_known():
    assert {c.judge for c in cases.every()} == set(check_outputs.PROPERTIES)


def test_memory_is_poisoned_for_the_kernels():
    """What a kernel forgets to write is NaN, not last call's right answer."""

    def forgets(q, k, v, *, causal=False, scale=None, return_lse=False):
        o, lse = faults.attention()(q, k, v, causal=causal, scale=scale, return_lse=True)
        out = torch.empty(o.shape, dtype=o.dtype)
        out[:, :, :-1] = o[:, :, :-1]
        return out, lse

    case = next(c for c in cases.every() if c.quick and c.n_q == 113 and not c.grad)
    record = check_outputs.judge(Candidate("x", forgets, False, lse="fp32"), case, FP32, "cpu")
    assert record["status"] == "fail"
    assert "not finite" in record["reasons"][0]
    assert not torch.are_deterministic_algorithms_enabled()


# ---- Workers -------------------------------------------------------------------------------------


class DyingWorker(check_outputs.Worker):
    """Its process dies on one case."""

    def give(self, task):
        super().give(task)
        if task[1].n_q == 2:
            self.process.kill()


class HangingWorker(check_outputs.Worker):
    """Its process never hears of one case, and so never answers."""

    def give(self, task):
        super().give(task) if task[1].n_q != 2 else self.wait_for(task)

    def wait_for(self, task):
        self.task, self.since, self.limit = task, time.monotonic(), 0.2


@pytest.mark.parametrize(
    ("worker", "reason"),
    [(DyingWorker, "the process died"), (HangingWorker, "no result after 0.2 s")],
)
def test_a_crash_or_a_hang_costs_one_case(monkeypatch, worker, reason):
    monkeypatch.setattr(check_outputs, "Worker", worker)
    some = [c for c in cases.every() if c.family == "shapes" and c.n_q <= 3 and not c.grad]
    seen = []
    work = [[("naive", c, FP32) for c in some]]
    records = check_outputs.run_in_workers(work, "cpu", 1, seen.append)
    assert [r["case"] for r in records] == [c.name for c in some]
    assert seen == records
    crashed = [r for r in records if r["status"] == "crash"]
    assert {r["case"] for r in crashed} == {c.name for c in some if c.n_q == 2}
    assert all(reason in r["reasons"][0] for r in crashed)
    assert all(r["status"] == "ok" for r in records if r not in crashed)
    assert check_outputs.report(records, [], 0.0) == 1


class Counting:
    """A worker without a process: a case is done at the third look."""

    made, running, most, order = 0, 0, 0, []

    def __init__(self, device):
        Counting.made += 1
        self.connection, self.task, self.queue = None, None, []

    def give(self, task):
        self.task, self.looks = task, 0
        Counting.order.append(task)
        if task[1].heavy:
            Counting.running += 1
            Counting.most = max(Counting.most, Counting.running)

    def take(self):
        self.looks += 1
        if self.looks < 3:
            return None
        Counting.running -= self.task[1].heavy
        self.task = None
        return {"status": "ok"}

    def stop(self):
        pass


def test_heavy_cases_run_last_few_at_a_time_in_the_same_processes(monkeypatch):
    monkeypatch.setattr(check_outputs, "Worker", Counting)
    monkeypatch.setattr(check_outputs.multiprocessing.connection, "wait", lambda *a, **more: None)
    heavy = [c for c in cases.every() if c.heavy] * 4
    light = [c for c in cases.every() if c.family == "edges"][:10]
    work = [[("naive", c, FP16) for c in heavy + light[:1]]]
    work += [[("sdpa", c, FP16)] for c in light[1:]]
    records = check_outputs.run_in_workers(work, "cuda", 5, lambda record: None)
    assert len(records) == len(Counting.order) == len(heavy) + len(light)
    assert Counting.most == check_outputs.HEAVY_JOBS
    assert Counting.made == 5
    weights = [task[1].heavy for task in Counting.order]
    assert not any(weights[: len(light)])
    assert all(weights[len(light) :])


def test_lists_share_what_there_is_to_share(monkeypatch):
    """A kernel's compilations, a library's references; every case is in one list."""

    def supported(name, device, dtype):
        return None if dtype in BACKENDS[name].dtypes else "not this dtype"

    monkeypatch.setattr(check_outputs, "why_not", supported)
    names = ["naive", "sdpa", "flex", "v1_flash", "v6_persistent"]
    dtypes = ["fp16", "fp32"]
    args = SimpleNamespace(backends=names, device="cuda", dtype=dtypes, quick=False)
    work, skipped, _ = check_outputs.plan(args)
    assert skipped == ["v6_persistent fp32: not this dtype"]
    tasks = [task for part in work for task in part]
    wanted = {
        (name, case, dtype)
        for name in names
        for dtype in (FP16, FP32)
        if dtype in BACKENDS[name].dtypes
        for case in cases.grid(
            name, "cuda", dtype, backward=BACKENDS[name].backward, interpreted=False
        )
    }
    assert len(tasks) == len(wanted)
    assert set(tasks) == wanted
    for part in work:
        who = {name for name, _, _ in part}
        ((grad, fp16),) = {(case.grad, dtype == FP16) for _, case, dtype in part}
        if who & {"v1_flash", "v6_persistent"}:
            assert len({case.d for _, case, _ in part}) == 1
            common = part[0][1].d == check_outputs.COMMON_HEAD_DIM
            assert (
                who == {"v1_flash", "v6_persistent"}
                if common and fp16 and not grad
                else len(who) == 1
            )
        elif who == {"flex"}:
            assert len(part) == 1
        else:
            assert who == {"naive", "sdpa"}
            assert len(part) == 2 * len({case for _, case, _ in part})


def test_ctrl_c_ends_the_processes_and_says_nothing_of_them():
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command_ = [sys.executable, str(SCRIPT), "--device", "cpu", "--backends", "v1_flash"]
    run = subprocess.Popen(
        [*command_, "--jobs", "2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=env, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        for line in run.stdout:
            if "worker processes" in line:
                break
        time.sleep(5)  # its workers are at it
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to all of them
        said, _ = run.communicate(timeout=30)
        assert run.returncode == 130, said
        assert "Traceback" not in said
        ended = time.monotonic()
        with contextlib.suppress(ProcessLookupError):  # soon nobody is left in the group
            while time.monotonic() - ended < 10:
                os.killpg(run.pid, 0)
                time.sleep(0.1)
        assert time.monotonic() - ended < 10
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)


# ---- The grid ------------------------------------------------------------------------------------


def test_names_of_cases_are_unique():
    names = [c.name for c in cases.every()]
    assert len(set(names)) == len(names)


def test_inputs_are_the_same_every_time_and_finite():
    for case in cases.every():
        if case.heavy or case.b > 100 or case.n_q > 700:
            continue
        for dtype in case.dtypes:
            first, again = (cases.inputs(case, dtype, "cpu") for _ in range(2))
            for a, b in zip(first, again, strict=True):
                if a is not None:
                    assert a.dtype == dtype
                    assert a.isfinite().all()
                    assert torch.equal(a, b)


def test_layouts_are_what_they_say():
    def of(layout):
        case = next(c for c in cases.every() if c.layout == layout and c.d in (40, 64))
        return cases.inputs(case, FP16, "cpu")

    q, k, v, _ = of("qkv")
    assert (
        q.untyped_storage().data_ptr()
        == k.untyped_storage().data_ptr()
        == v.untyped_storage().data_ptr()
    )
    _, k, v, _ = of("expanded")
    assert k.stride(1) == v.stride(1) == 0
    q, _, _, _ = of("padded")
    assert q.stride(-2) * q.element_size() % 16
    q, _, _, _ = of("offset")
    assert q.storage_offset() == 1
    _, k, _, _ = of("transposed-k")
    assert k.stride(-1) != 1
    q, _, _, _ = of("bnhd")
    assert q.stride(1) < q.stride(2)


def test_interpreted_and_quick_grids_are_parts_of_the_whole():
    whole = cases.grid("v1_flash", "cuda", FP16, backward=True, interpreted=False)
    small = cases.grid("v1_flash", "cpu", FP16, backward=True, interpreted=True)
    quick = cases.grid("v1_flash", "cpu", FP16, backward=True, interpreted=True, quick=True)
    assert set(quick) < set(small) < set(whole)
    assert len(quick) > 40
    assert {c.family for c in quick} == set(cases.FAMILIES) - {"size"}
    assert not [
        c for c in cases.grid("v1_flash", "cuda", FP16, backward=False, interpreted=False) if c.grad
    ]
    assert any(c.heavy for c in whole)
    assert 10 < len(cases.grid("flex", "cuda", FP16, backward=True, interpreted=False)) < 30
