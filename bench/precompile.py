"""Compile what the reference run needs and what stays on disk, in many processes at once.

    python bench/precompile.py                  # for all programs of bench/reference.py
    python bench/precompile.py peers seqlen     # for some

A kernel that several of the programs run is compiled once, none of them has to start processes that
compile, and nothing is timed meanwhile. bench/reference.py begins with it. What the caches on disk
hold already takes a moment; what fails here fails again, and is told, in the program that runs it.

Exit codes: 0 done, 1 something hangs (a program that meets it will say so), 2 bad arguments or no
GPU, 130 interrupted.
"""

import argparse
import concurrent.futures
import importlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch
from flashstudy.bench import common, reference, rounds

HEAVY = {"flash-attn-4": 4.0, "flex": 4.0, "naive-compiled": 2.0, "v7_hopper_backward": 3.0}


def collect(names):
    """Tasks for a rounds.Precompiler, each once, from the programs that have some."""
    tasks = {}
    for name in names:
        program, *options = reference.PARTS[name].command.split()
        module = importlib.import_module(f"flashstudy.bench.{Path(program).stem}")
        if hasattr(module, "compilations"):
            tasks |= dict.fromkeys(module.compilations(options))
    return sorted(tasks, key=weight, reverse=True)


def weight(task):
    """How long a task compiles, roughly: the longest begin first, lest all wait for one."""
    _, name, *rest = task
    cells = [(name, rest[0])] if isinstance(name, str) else [(c.backend, c) for c in name]
    return sum(
        HEAVY.get(backend, 1.0) * (1.0 if cell.direction == "forward" else 2.0)
        for backend, cell in cells
    )


def apart(work, *arguments):
    """The result of work in another process: what this one forks later must not have used CUDA."""
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def main(argv=None):
    p = argparse.ArgumentParser(
        prog="precompile.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = [name for name, part in reference.PARTS.items() if part.file]
    p.add_argument("programs", nargs="*", choices=[[], *names], metavar="NAME",
                   help=f"some of {', '.join(names)}")  # fmt: skip
    p.add_argument("--budget", type=common.positive, metavar="SECONDS",
                   help="end within this time, imports included; what is left compiles in the"
                   " program that runs it")  # fmt: skip
    args = p.parse_args(argv)
    end = common.ends(args.budget, argv)
    if not torch.cuda.is_available():
        print("this program compiles for a GPU, and torch sees no CUDA GPU here", file=sys.stderr)
        return 2
    os.environ[common.FA4_CACHE] = "1"
    start = time.monotonic()
    names = args.programs or names
    if os.environ.get(rounds.FORKS) == "1":
        compiling = rounds.Precompiler(apart(collect, names), rounds.call, start="fork")
    else:
        compiling = rounds.Precompiler(collect(names), rounds.call)
    try:
        print(f"{len(compiling.tasks)} compilations in other processes …", flush=True)
        hung = compiling.wait(seconds=end - time.monotonic())
    except KeyboardInterrupt:
        compiling.wait(seconds=0.0)
        return 130
    for _, *what in hung:
        print(f"did not return within {rounds.PATIENCE} s: {what}")
    for (_, *what), error in compiling.failed:
        print(f"{rounds.failure(error)[1]}: {what}")
    if left := sum(future.cancelled() or not future.done() for future in compiling.tasks):
        print(f"--budget left no time for {left} of them")
    print(f"took {time.monotonic() - start:.0f} s")
    return int(bool(hung))


if __name__ == "__main__":
    sys.exit(main())
