"""bench/reference.py runs the programs it names; figures/all.py draws and fills what there is."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from flashstudy.bench import reference
from flashstudy.figures import all as everything
from flashstudy.figures import table

PROGRAM = """
import os, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
with out.open("a") as f:
    line = '{"cache": "%s"}\\n' % os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"]
    f.write(line * int(sys.argv[1]))
sys.exit(int(sys.argv[2]))
"""


@pytest.fixture
def parts(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    made = {
        "good": reference.Part("program.py 3 0", "good.jsonl", "is it good", 1, cpu=True),
        "bad": reference.Part("program.py 2 1", "bad.jsonl", "is it bad", 2, cpu=True),
        "last": reference.Part("program.py 1 0", "good.jsonl", "does it go on", 1, cpu=True),
        "gpu": reference.Part("program.py 9 0", "gpu.jsonl", "does it need a GPU", 5),
    }
    monkeypatch.setattr(reference, "PARTS", made)
    monkeypatch.setattr(reference.torch.cuda, "is_available", lambda: False)
    return tmp_path


def test_every_program_runs_and_a_failing_one_keeps_none_from_it(parts, capsys):
    out = parts / "records"
    assert reference.main(["--out", str(out)]) == 1
    assert (out / "good.jsonl").read_text() == '{"cache": "1"}\n' * 4
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
    assert reference.main(["--seconds", "4.9", "--only", "good", "gpu", "--out", str(out)]) == 1
    assert [path.name for path in out.iterdir()] == ["good.jsonl"]
    assert "1 of 2, 0 s gone, about 6 to go: good" in capsys.readouterr().out


def test_all_of_it_takes_less_than_a_quarter_of_an_hour():
    assert reference.planned(reference.PARTS) < 900
    for part in reference.PARTS.values():
        options = part.command.split()
        if "--budget" in options:
            assert options[options.index("--budget") + 1] == str(part.seconds)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--seconds", "0"], "--seconds"), (["--only", "nope"], "--only")],
)
def test_bad_arguments(parts, arguments, named, capsys):
    with pytest.raises(SystemExit) as stop:
        reference.main(arguments)
    assert stop.value.code == 2
    assert f"argument {named}" in capsys.readouterr().err


@pytest.mark.parametrize("name", reference.PARTS)
def test_the_programs_take_these_arguments(name, tmp_path, capsys):
    """Each command line is accepted: the programs stop at an --out that is a folder, or before."""
    program, *options = reference.PARTS[name].argv(tmp_path)[1:]
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
    assert done.stdout.splitlines()[-1].split() == [
        str(reference.planned(reference.PARTS)),
        "in",
        "all",
    ]
