"""bench/reference.py runs the programs it names; figures/all.py draws and fills what there is."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from flashstudy import backends
from flashstudy.backends import BACKENDS
from flashstudy.bench import peers, precompile, reference, seqlen
from flashstudy.figures import all as everything
from flashstudy.figures import table
from flashstudy.validate import errors

PROGRAM = """
import os, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
with out.open("a") as f:
    names = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASHSTUDY_COMPILED"
    f.write('["%s", "%s"]\\n' % tuple(map(os.environ.get, names)) * int(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


COMPILE = """
import sys
from pathlib import Path
(Path(__file__).parent / "compiled").write_text(" ".join(sys.argv[1:]))
sys.exit(int((Path(__file__).parent / "code").read_text()))
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "compile.py").write_text(COMPILE)
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    made = {
        reference.COMPILE: reference.Part("compile.py", "", "what compiles", 1),
        "good": reference.Part("program.py 3 0", "good.jsonl", "is it good", 1, cpu=True),
        "bad": reference.Part("program.py 2 1", "bad.jsonl", "is it bad", 2, cpu=True),
        "last": reference.Part("program.py 1 0", "good.jsonl", "does it go on", 1, cpu=True),
        "gpu": reference.Part("program.py 9 0", "gpu.jsonl", "does it need a GPU", 5),
    }
    monkeypatch.setattr(reference, "PARTS", made)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(reference.torch.cuda, "is_available", lambda: False)
    return tmp_path


def test_every_program_runs_and_a_failing_one_keeps_none_from_it(parts, capsys):
    out = parts / "records"
    assert reference.main(["--out", str(out)]) == 1
    assert (out / "good.jsonl").read_text() == '["1", "None"]\n' * 4
    assert len((out / "bad.jsonl").read_text().splitlines()) == 2
    assert not (out / "gpu.jsonl").exists()
    text = capsys.readouterr().out
    assert "exit code 1" in text
    assert "needs a GPU" in text
    assert reference.main(["--only", "good", "gpu", "--out", str(out)]) == 0


def test_nothing_begins_after_its_time(parts, capsys):
    out = parts / "records"
    assert reference.main(["--seconds", "1e-9", "--out", str(out)]) == 1
    assert list(out.iterdir()) == []
    assert "left for the next run" in capsys.readouterr().out


def test_on_a_gpu_nothing_begins_that_would_not_end_in_time(parts, monkeypatch, capsys):
    monkeypatch.setattr(reference.torch.cuda, "is_available", lambda: True)
    out = parts / "records"
    (parts / "code").write_text("0")
    began = time.monotonic()
    monkeypatch.setattr(reference.time, "monotonic", lambda: began)
    assert reference.main(["--seconds", "4.9", "--only", "good", "gpu", "--out", str(out)]) == 1
    assert [path.name for path in out.iterdir()] == ["good.jsonl"]
    said = capsys.readouterr().out
    assert "1 of 3, 0 s gone, about 7 to go: compile" in said
    assert "2 of 3" in said


@pytest.mark.parametrize(("code", "told"), [("0", "1"), ("1", "None")])
def test_on_a_gpu_what_compiles_comes_first_and_once(parts, monkeypatch, code, told):
    monkeypatch.setattr(reference.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(reference.rounds.COMPILED, raising=False)
    (parts / "code").write_text(code)
    out = parts / "records"
    assert reference.main(["--only", "good", "last", "--out", str(out)]) == int(code)
    assert (parts / "compiled").read_text() == "good last"
    # Where something hung, the programs look for themselves.
    assert (out / "good.jsonl").read_text() == f'["1", "{told}"]\n' * 4
    (parts / "compiled").unlink()
    assert reference.main(["--only", "good", "--out", str(out)]) == 0
    assert not (parts / "compiled").exists()  # one program compiles for itself

    # The next run finds it on disk, unless it wants more than that.
    (out / "good.jsonl").unlink()
    assert reference.main(["--only", "good", "last", "--out", str(out)]) == int(code)
    assert (parts / "compiled").exists() == bool(int(code))
    assert (out / "good.jsonl").read_text() == f'["1", "{told}"]\n' * 4
    assert reference.main(["--only", "good", "last", "gpu", "--out", str(out)]) == int(code)
    assert (parts / "compiled").read_text() == "good last gpu"


@pytest.fixture
def forks(parts, monkeypatch):
    """As where a fork finds the GPU."""
    monkeypatch.setattr(reference.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(reference, "ready_to_fork", lambda: True)
    monkeypatch.delenv(reference.rounds.COMPILED, raising=False)
    monkeypatch.delenv(reference.common.FA4_CACHE, raising=False)
    (parts / "code").write_text("0")
    return parts


def test_programs_are_forks_where_these_find_the_gpu(forks):
    out = forks / "records"
    assert reference.main(["--out", str(out)]) == 1
    assert (forks / "compiled").read_text() == "good bad last gpu"
    assert (out / "good.jsonl").read_text() == '["1", "1"]\n' * 4
    assert len((out / "bad.jsonl").read_text().splitlines()) == 2
    assert reference.rounds.COMPILED not in os.environ  # nothing of a program stays here


def test_a_fork_begins_as_a_program_does(forks):
    (forks / "program.py").write_text(
        "import json, os, sys, time; from flashstudy.bench import common\n"
        "age = time.monotonic() - common.BEGAN\n"
        "open(sys.argv[-1], 'w').write(json.dumps([__name__, sys.argv, sys.orig_argv, os.getcwd(),"
        " age, os.environ['FLASHSTUDY_FORKS']]))\n"
    )
    out = forks / "records"
    assert reference.main(["--only", "good", "--out", str(out)]) == 0
    name, argv, command, folder, age, may = json.loads((out / "good.jsonl").read_text())
    assert (name, folder, may) == ("__main__", str(forks), "1")
    assert argv == [str(forks / "program.py"), "3", "0", "--out", str(out / "good.jsonl")]
    assert command == [sys.executable, *argv]
    assert 0 <= age < 5


def crash():
    os.kill(os.getpid(), 9)


def test_a_fork_that_dies_hangs_or_fails_is_an_exit_code():
    assert reference.fork(sys.exit, 3) == 3
    assert reference.fork(crash) == -9
    began = time.monotonic()
    assert reference.fork(time.sleep, 60, seconds=0.2) == -9
    assert time.monotonic() - began < 20


def test_what_starts_cuda_is_left_to_the_programs(monkeypatch, capsys):
    imported = []

    def touch_gpu():
        sys.exit("harmful" in imported)

    monkeypatch.setattr(reference, "preload", imported.extend)
    monkeypatch.setattr(reference, "touch_gpu", touch_gpu)
    monkeypatch.setattr(reference, "shared", lambda: [["a"], ["harmful", "b"], ["c"]])
    assert reference.ready_to_fork()
    assert imported == ["a", "c"]
    assert "each program imports harmful itself" in capsys.readouterr().out
    monkeypatch.setattr(reference, "shared", lambda: [["harmful"], ["c"]])
    assert not reference.ready_to_fork()


def test_without_a_gpu_no_fork_finds_one():
    if reference.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert not reference.can_fork([])


def test_ctrl_c_lets_a_fork_keep_what_it_has(forks):
    out = forks / "records"
    (forks / "program.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "try:\n    os.kill(os.getppid(), signal.SIGINT); time.sleep(0.5)\n"
        "finally:\n    pathlib.Path(sys.argv[-1]).write_text('kept')\n"
    )
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's is off
    try:
        assert reference.main(["--only", "good", "--out", str(out)]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert (out / "good.jsonl").read_text() == "kept"


def test_all_of_it_takes_less_than_a_quarter_of_an_hour():
    assert reference.IMPORTS + reference.planned(reference.PARTS) < 15 * 60
    for name, part in reference.PARTS.items():
        options = part.command.split()
        if name != "train":  # which trains whole models or none
            budget = int(options[options.index("--budget") + 1])
            assert budget + reference.TABLES == part.seconds


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--seconds", "0"], "--seconds"), (["--only", "nope"], "--only")],
)
def test_bad_arguments(parts, arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        reference.main(arguments)
    assert stop.value.code == 2
    assert f"argument {named}" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n, part in reference.PARTS.items() if part.file])
def test_the_programs_take_these_arguments(name, tmp_path, capsys):
    """Each command line is accepted: the programs stop at an --out that is a folder, or before."""
    program, *options = reference.PARTS[name].argv(tmp_path)
    module = importlib.import_module(f"flashstudy.bench.{Path(program).stem}")
    options[-1] = str(tmp_path)
    try:
        code = module.main(options)
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    assert code == 2
    assert "unrecognized" not in said.err
    assert "invalid" not in said.err
    assert "--out" in said.err or "GPU" in said.err + said.out


def test_records_of_a_run_are_taken_over(tmp_path, monkeypatch, capsys):
    """Shortened into the reference, then tables are filled; what has no records is named."""
    folder, run = tmp_path / "reference", tmp_path / "run"
    folder.mkdir()
    run.mkdir()
    source = table.REFERENCE / "seqlen.jsonl"
    if not source.exists():
        pytest.skip("no reference records")
    (run / "seqlen.jsonl").write_bytes(source.read_bytes())
    monkeypatch.setattr(table, "REFERENCE", folder)
    monkeypatch.setattr(table, "main", lambda argv: 0)
    assert everything.main([str(run)]) == 0
    assert [json.loads(x) for x in (folder / "seqlen.jsonl").open()]
    assert (tmp_path / "block-runtime.png").exists()
    assert f"no {folder / 'peers.jsonl'}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        everything.main([str(tmp_path)])
    assert stop.value.code == 2


def test_it_says_what_it_would_run():
    done = subprocess.run(
        [sys.executable, reference.ROOT / "bench" / "reference.py", "--plan"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    commands = [f"python {part.command}" for part in reference.PARTS.values()]
    assert [line.split(None, 1)[1] for line in done.stdout.splitlines()[1:-1]] == commands
    total = reference.IMPORTS + reference.planned(reference.PARTS)
    assert done.stdout.splitlines()[-1].split() == [
        str(total), "with", str(reference.IMPORTS), "for", "imports",
    ]  # fmt: skip


def as_on_an_h200(monkeypatch):
    """What the programs ask of a GPU before they plan."""
    for name, found in (
        ("is_available", True), ("device_count", 1), ("get_device_capability", (9, 0)),
        ("get_device_name", "NVIDIA H200"),
    ):  # fmt: skip
        monkeypatch.setattr(reference.torch.cuda, name, lambda *_, found=found: found)
    monkeypatch.setattr(reference.common, "memory_bytes", lambda device: 140 * 2**30)
    monkeypatch.setenv(reference.common.FA4_CACHE, "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def why_not(name, device="cuda", dtype=None, backward=False):
        row = BACKENDS[name]
        able = dtype in (None, *row.dtypes) and (row.backward or not backward)
        return None if able else "not so"

    monkeypatch.setattr(backends, "why_not", why_not)
    monkeypatch.setattr(reference.rounds, "why_not", why_not)


def test_every_program_that_compiles_is_compiled_for_once(monkeypatch):
    """Exactly what each would compile for itself, a task of several once."""
    as_on_an_h200(monkeypatch)
    names = [name for name, part in reference.PARTS.items() if part.file]
    of = {name: precompile.collect([name]) for name in names}
    whole = precompile.collect(names)
    assert len(whole) == len(set(whole))
    assert set(whole) == {task for tasks in of.values() for task in tasks}
    assert len(whole) < sum(map(len, of.values()))  # ladder and peers share some
    assert {name for name, tasks in of.items() if not tasks} == {"train", "memory"}

    # The programs' own lists, from where they start processes.
    started = []

    class Started(Exception):
        pass

    def start(tasks, work=reference.rounds.first_call):
        started.append({(work, *task) for task in tasks})
        raise Started

    monkeypatch.setattr(reference.rounds, "Precompiler", start)
    args, _ = seqlen.arguments(reference.PARTS["seqlen"].command.split()[1:])
    cells = [cell for group in seqlen.plan(args) for cell in group]
    with pytest.raises(Started):
        seqlen.Bench(args.device, seqlen.EFFORTS["cuda", "full"], args.seed).precompile(cells)
    args, plan = peers.planned(peers.parser(), reference.PARTS["peers"].command.split()[1:])
    session = reference.rounds.Session(
        plan, SimpleNamespace(device="cuda"), reference.common.DTYPES[args.dtype], seconds=9,
        slot=0.1, rounds=3, seed=args.seed,
    )  # fmt: skip
    with pytest.raises(Started):
        session.set_up_all(lambda pairs: pairs)
    assert started == [set(of["seqlen"]), set(of["peers"])]


def test_where_all_is_compiled_no_process_starts(monkeypatch):
    monkeypatch.setenv(reference.rounds.COMPILED, "1")
    compiling = reference.rounds.Precompiler([(1,), (2,)], start="fork")
    assert not compiling.tasks
    assert compiling.done
    assert compiling.wait() == []


def test_a_memory_format_pickles_alike_in_every_process(tmp_path):
    """torch's compiler hashes it; by itself it takes the name of the first module with a torch."""
    (tmp_path / "early.py").write_text("import torch\n")
    said = [
        subprocess.run(
            [sys.executable, "-c", f"{first}; import torch, pickle, flashstudy.bench.rounds;"
             "whole = pickle.dumps(torch.contiguous_format);"
             "print(whole, pickle.loads(whole) is torch.contiguous_format)"],
            cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True,
        ).stdout
        for first in ("import early", "import torch", "import flashstudy")
    ]  # fmt: skip
    assert len(set(said)) == 1
    assert said[0].endswith(" True\n")


def test_checking_a_result_changes_no_setting_that_torch_compiles_by():
    settings = reference.torch.backends.cuda.matmul
    before = settings.fp32_precision
    with errors._ieee():
        assert not settings.allow_tf32
    assert settings.fp32_precision == before
    with reference.common.products("tf32"):
        assert settings.fp32_precision != before
    assert settings.fp32_precision == before


def kept(path):
    Path(path).touch()


def hang(path):
    time.sleep(600)


def fail(path):
    raise ValueError("head dim 3")


@pytest.mark.parametrize(
    ("work", "said", "code"),
    [
        (kept, None, 0),
        (hang, "did not return within 120 s: ['b']", 1),
        (fail, "head dim 3: ['b']", 0),
    ],
)
def test_the_program_that_compiles_says_what_hangs_or_fails(
    tmp_path, monkeypatch, capfd, work, said, code
):
    monkeypatch.setattr(precompile.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(reference.common.FA4_CACHE, "0")  # and after the test what it was
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(precompile, "collect", lambda names: [(kept, "a"), (work, "b")])
    start = reference.rounds.Precompiler
    monkeypatch.setattr(
        reference.rounds, "Precompiler", lambda tasks, work: start(tasks, work, start="fork")
    )
    wait = start.wait
    monkeypatch.setattr(start, "wait", lambda self, seconds: wait(self, 1.5, seconds))
    assert precompile.main(["seqlen"]) == code
    assert (tmp_path / "a").exists()
    text = capfd.readouterr().out
    assert "2 compilations" in text
    assert said is None or said in text
    assert text.count("did not return") == (work is hang)


def test_it_compiles_for_a_gpu_alone(monkeypatch, capsys):
    monkeypatch.setattr(precompile.torch.cuda, "is_available", lambda: False)
    assert precompile.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        precompile.main(["nope"])
    assert stop.value.code == 2
