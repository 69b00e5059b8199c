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
import importlib
import os
import sys
import time
from pathlib import Path

import torch
from flashstudy.bench import common, reference, rounds


def collect(names):
    """Tasks for a rounds.Precompiler, each once, from the programs that have some."""
    tasks = {}
    for name in names:
        program, *options = reference.PARTS[name].command.split()
        module = importlib.import_module(f"flashstudy.bench.{Path(program).stem}")
        if hasattr(module, "compilations"):
            tasks |= dict.fromkeys(module.compilations(options))
    return list(tasks)


def main(argv=None):
    p = argparse.ArgumentParser(
        prog="precompile.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    names = [name for name, part in reference.PARTS.items() if part.file]
    p.add_argument("programs", nargs="*", choices=[[], *names], metavar="NAME",
                   help=f"some of {', '.join(names)}")  # fmt: skip
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        print("this program compiles for a GPU, and torch sees no CUDA GPU here", file=sys.stderr)
        return 2
    os.environ[common.FA4_CACHE] = "1"
    start = time.monotonic()
    compiling = rounds.Precompiler(collect(args.programs or names), rounds.call)
    try:
        print(f"{len(compiling.tasks)} compilations in other processes …", flush=True)
        hung = compiling.wait()
    except KeyboardInterrupt:
        compiling.wait(seconds=0.0)
        return 130
    for _, *what in hung:
        print(f"did not return within {rounds.PATIENCE} s: {what}")
    for (_, *what), error in compiling.failed:
        print(f"{rounds.failure(error)[1]}: {what}")
    print(f"took {time.monotonic() - start:.0f} s")
    return int(bool(hung))


if __name__ == "__main__":
    sys.exit(main())
