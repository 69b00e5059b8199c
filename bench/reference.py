"""Every measurement behind the pictures and tables of this study, one program after the other.

    python bench/reference.py                       # all of it
    python bench/reference.py --only seqlen mixed   # some
    python bench/reference.py --seconds 540         # start nothing that would end later
    python figures/all.py results/reference         # then: every picture and table from the records

Each program writes its own record file under --out and resumes it: the same command again goes on
where an interrupted one stopped, and measures nothing twice. A program that fails does not keep the
others from running. Without a GPU the programs that have an answer for a CPU run. The programs are
given less than a quarter of an hour in all on a GPU; --plan says how much each, from its start to
its last line. What finds no time is named, and the same command again goes on from there.

What compiles does so first, for all programs at once, in as many processes as there are cores
(bench/precompile.py), and stays on disk; flash-attn-4's own cache is switched on for that. With
--only one program nothing comes first: it compiles for itself.

What programs import (torch and its compiler, flash-attn, matplotlib) is imported once, here, before
anything uses the GPU; a program is then a fork of this process. Each has a process and a CUDA
context of its own nevertheless. Where a fork cannot use the GPU, they are started as usual.

Exit codes: 0 all done, 1 a program failed, measured something wrong, or is left for the next run,
2 bad arguments, 130 interrupted.
"""

import argparse
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from flashstudy.backends import BACKENDS
from flashstudy.bench import common, rounds
from tabulate import tabulate
from torch._inductor.runtime.runtime_utils import cache_dir

ROOT = Path(__file__).resolve().parent.parent


class Part(NamedTuple):
    """One program: its command line (without --out), its record file, what it answers, and the
    seconds that it has on an H200, of which TABLES go into what it prints after its budget."""

    command: str
    file: str  # "": makes no records
    answers: str
    seconds: int
    cpu: bool = False

    def argv(self, folder):
        program, *options = self.command.split()
        out = ["--out", str(folder / self.file)] if self.file else []
        return [str(ROOT / program), *options, *out]


TABLES = 3
IMPORTS = 18  # seconds before the first program
GRACE = 20  # seconds that an interrupted program has to write what it measured
PROBE = 30  # seconds for a fork to find the GPU; an H200's takes one
COMPILE = "compile"
MIXED = "naive sdpa sdpa-flash sdpa-cudnn flash-attn flash-attn-4 v1_flash v6_persistent"
BOTH = "sdpa-cudnn flex flash-attn flash-attn-4 v3_tma v7_hopper_backward"
FAR = "512 1024 2048 4096 8192 16384 32768 65536 131072"
GRID = "512,1024,2048,4096,8192,16384"
LONG = "sdpa-cudnn flex flash-attn flash-attn-4 v3_tma v7_hopper_backward"
PARTS = {
    COMPILE: Part(
        "bench/precompile.py --budget 97", "", "what can be compiled ahead of all others", 100
    ),
    "ladder": Part("bench/ladder.py --budget 42", "ladder.jsonl", "what each step gains", 45),
    "train": Part(
        "bench/train.py --no-charts --seeds 5", "train.jsonl", "does a model train alike", 65
    ),
    "peers": Part(
        f"bench/peers.py --rounds 5 --budget 178 --limit sdpa-flash={GRID}@256", "peers.jsonl",
        "our fastest kernels beside the libraries'", 181,
    ),
    "peers-long": Part(
        f"bench/peers.py --long --head-dims 128 --backends {LONG} --limit flex=32768"
        " --limit flash-attn=32768 --rounds 2 --budget 44",
        "peers-long.jsonl", "the same at 32k to 128k tokens", 47,
    ),
    "seqlen": Part(
        "bench/seqlen.py --no-charts --budget 114", "seqlen.jsonl", "where flash wins, forward",
        117, True,
    ),
    "both": Part(
        f"bench/seqlen.py --no-charts --direction both --scope block --batch 1 --lengths {FAR}"
        f" --backends {BOTH} --limit flex=1024,4096,16384 --budget 66",
        "both.jsonl", "forward and backward of a block, to 128k tokens", 69,
    ),
    "crossover": Part(
        "bench/crossover.py --no-charts --budget 46", "crossover.jsonl",
        "the crossing lengths, on three clocks", 49, True,
    ),
    "mixed": Part(
        f"bench/seqlen.py --no-charts --protocol mixed --backends {MIXED}"
        " --lengths 128 512 2048 8192 32768 --budget 50",
        "mixed.jsonl", "how much of the advantage is precision", 53,
    ),
    "roofline": Part(
        "bench/roofline.py --budget 54", "roofline.jsonl", "why: traffic, rates, ceilings", 57
    ),
    "memory": Part(
        "bench/memory.py --budget 48", "memory.jsonl", "peak memory to a million tokens", 51
    ),
    "small-calls": Part(
        "bench/ladder.py --small-calls --budget 20", "small-calls.jsonl", "what a launch costs", 23
    ),
    "decode": Part(
        "bench/decode.py --budget 17", "decode.jsonl", "few queries over many keys", 20
    ),
}  # fmt: skip


def parser():
    p = argparse.ArgumentParser(
        prog="reference.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="programs:\n"
        + "\n".join(f"  {name:12} {part.answers}" for name, part in PARTS.items()),
    )
    p.add_argument("--only", nargs="+", choices=PARTS, metavar="NAME", help="these programs alone")
    p.add_argument(
        "--seconds", type=float, help="start no program that would not end within this time"
    )
    p.add_argument(
        "--out", type=Path, default=ROOT / "results" / "reference", metavar="DIR",
        help="folder of the record files (default: results/reference)",
    )  # fmt: skip
    p.add_argument("--plan", action="store_true", help="print the commands and stop")
    return p


def planned(names):
    """Seconds that these programs have on an H200."""
    return sum(PARTS[n].seconds for n in names)


# Processes


def shared():
    """What the programs import, as lists of modules: the first are known to leave the GPU alone."""
    compiler = ["triton", "torch._dynamo", "torch._inductor.compile_fx", "matplotlib.pyplot"]
    programs = [f"flashstudy.bench.{Path(p.command.split()[0]).stem}" for p in PARTS.values()]
    packages = [[row.package] for row in BACKENDS.values() if row.package is not None]
    ours = [f"flashstudy.{row.target.split(':')[0]}" for row in BACKENDS.values()]
    return [[*compiler, *programs], *packages, ours]


def preload(names):
    for name in names:
        with contextlib.suppress(ImportError, OSError):  # a program that needs it says so
            importlib.import_module(name)


def ready_to_fork():
    """Import what the programs do, as far as forks find the GPU afterwards. False where none does.

    CUDA survives no fork, and some packages start it when they are imported: the programs that need
    those import them themselves.
    """
    first, *more = shared()
    preload(first)
    if torch.cuda.is_initialized() or not can_fork([]):
        return False
    for names in more:
        if can_fork(names):
            preload(names)
        else:
            print(f"each program imports {names[0]} itself")
    gc.freeze()  # collections in the forks skip all this, and leave its pages shared
    return True


def can_fork(names):
    """Whether a fork of a process like this one that has imported these finds the GPU."""
    return fork(rehearse, names, seconds=PROBE) == 0


def rehearse(names):
    preload(names)
    sys.exit(fork(touch_gpu))


def touch_gpu():
    try:
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()
    except (RuntimeError, AssertionError):  # what torch raises without a GPU
        sys.exit(1)


def begin(argv, environment):
    """In a fork: what a Python started with these arguments would do."""
    common.BEGAN = time.monotonic()
    os.environ.update(environment)
    sys.orig_argv = [sys.executable, *argv]  # for a program that starts itself anew
    sys.argv = argv
    os.chdir(ROOT)
    runpy.run_path(argv[0], run_name="__main__")


def fork(work, *arguments, seconds=None):
    """Exit code of a fork that calls work; one that takes longer than `seconds` is killed."""
    process = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    process.start()
    try:
        process.join(seconds)
    except KeyboardInterrupt:  # it had it too, and keeps what it has measured
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # `timeout` sends two
        process.join(GRACE)
        signal.signal(signal.SIGINT, before)
        raise
    finally:
        if process.is_alive():
            process.kill()
            process.join()
    return process.exitcode


def run(argv, environment, forks):
    """Exit code of a program. Raises KeyboardInterrupt."""
    if forks:
        return fork(begin, argv, environment)
    return subprocess.run([sys.executable, *argv], cwd=ROOT, env=environment).returncode


def compiled(programs):
    """What tells whether caches on disk hold what these programs need."""
    about = {"torch": torch.__version__, "source": common.source()}
    return about | {"programs": sorted(programs)}


def on_disk(note, programs):
    """Whether a run before this one has compiled for these programs as they are."""
    try:
        before = json.loads(note.read_text())
    except (OSError, ValueError):
        return False
    return before | {"programs": sorted(programs)} == compiled(programs) and {*programs} <= {
        *before.get("programs", ())
    }


def lines_in(path):
    return sum(1 for _ in path.open()) if path.is_file() else 0


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if args.seconds is not None and not args.seconds > 0:
        p.error(f"argument --seconds: expected a number above 0, got {args.seconds}")
    # By the driver's library: the other way of looking would leave forks without a GPU.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    asked, gpu = args.only or PARTS, torch.cuda.is_available()
    names = [n for n in PARTS if n in asked or (n == COMPILE and gpu and len(asked) > 1)]
    if args.plan:
        rows = [(PARTS[n].seconds, "python " + PARTS[n].command) for n in names]
        total = IMPORTS + planned(names)
        print(tabulate([*rows, (total, f"with {IMPORTS} for imports")], ["s", "program"], "plain"))
        return 0
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        p.error(f"argument --out: {e}")
    args.out = args.out.resolve()

    environment = {common.FA4_CACHE: "1"} | os.environ
    began, done, forks = common.ends(0, argv), [], False
    if gpu:
        if forks := ready_to_fork():
            environment[rounds.FORKS] = "1"
        else:
            print("a fork of this process finds no GPU: each program imports for itself")
    # Of what is compiled; it goes where torch's cache goes.
    note = Path(cache_dir()) / "flashstudy-compiled.json"
    programs = [n for n in names if n != COMPILE]
    for i, name in enumerate(names, start=1):
        part, start = PARTS[name], time.monotonic()
        left = None if args.seconds is None else began + args.seconds - start
        if not gpu and not part.cpu:
            done.append((name, "needs a GPU", None, None))
        elif name == COMPILE and on_disk(note, programs):
            environment[rounds.COMPILED] = "1"
        elif left is not None and left < (part.seconds if gpu else 0):
            done.append((name, "left for the next run", None, None))
        else:
            times = f"{start - began:.0f} s gone"
            if gpu:
                times += f", about {planned(names[i - 1 :])} to go"
            print(f"\n==== {i} of {len(names)}, {times}: {name}: {part.answers}\n", flush=True)
            command = part.argv(args.out)
            if name == COMPILE:
                command += programs
            before = lines_in(args.out / part.file)
            try:
                code = run(command, environment, forks)
            except KeyboardInterrupt:  # the program had it too and has kept what it measured
                return 130
            if code == 130:
                return 130
            if name == COMPILE and code == 0:
                environment[rounds.COMPILED] = "1"
                note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(json.dumps(compiled(programs)))
            what = "done" if code == 0 else f"exit code {code}"
            new = lines_in(args.out / part.file) - before
            done.append((name, what, new, time.monotonic() - start))

    rows = [
        (
            name,
            what,
            "" if new is None else new,
            "" if s is None else f"{s:.0f}",
            PARTS[name].seconds,
        )
        for name, what, new, s in done
    ]
    total = time.monotonic() - began
    new = sum(n or 0 for _, _, n, _ in done)
    rows.append(("in all", "", new, f"{total:.0f}", IMPORTS + planned(names)))
    head = ["program", "", "new records", "s", "planned"]
    print("\n" + tabulate(rows, head, disable_numparse=True))
    print(f"\nEvery picture and table from them: python figures/all.py {args.out}")
    return 0 if all(what in ("done", "needs a GPU") for _, what, _, _ in done) else 1


if __name__ == "__main__":
    sys.exit(main())
