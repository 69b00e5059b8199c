"""Every measurement behind the pictures and tables of this study, one program after the other.

    python bench/reference.py                       # all of it
    python bench/reference.py --only seqlen mixed   # some
    python bench/reference.py --seconds 540         # start nothing that would end later
    python figures/all.py results/reference         # then: every picture and table from the records

Each program writes its own record file under --out and resumes it: the same command again goes on
where an interrupted one stopped, and measures nothing twice. A program that fails does not keep the
others from running. Without a GPU the programs that have an answer for a CPU run. The programs are
given less than a quarter of an hour in all on a GPU; --plan says how much each. Imports and slow
hosts come on top: on an H200 with 16 cores all but memory and decode took 1,069 s in pieces, some
of them begun twice (2026-11-27; 810 s by plan). It has not been run whole. What finds no time is
named, and the same command again goes on from there.

What compiles does so first, for all programs at once, in as many processes as there are cores
(bench/precompile.py), and stays on disk; flash-attn-4's own cache is switched on for that. With
--only one program nothing comes first: it compiles for itself.

Exit codes: 0 all done, 1 a program failed, measured something wrong, or is left for the next run,
2 bad arguments, 130 interrupted.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from flashstudy.bench import common, rounds
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent


class Part(NamedTuple):
    """One program: its command line (without --out), its record file, what it answers, and the
    seconds that it has on an H200, of which START go into imports and tables."""

    command: str
    file: str  # "": makes no records
    answers: str
    seconds: int
    cpu: bool = False

    def argv(self, folder):
        program, *options = self.command.split()
        out = ["--out", str(folder / self.file)] if self.file else []
        return [sys.executable, str(ROOT / program), *options, *out]


START = 8
COMPILE = "compile"
MIXED = "naive sdpa sdpa-flash sdpa-cudnn flash-attn flash-attn-4 v1_flash v6_persistent"
BOTH = "sdpa-cudnn flex flash-attn flash-attn-4 v3_tma v7_hopper_backward"
FAR = "512 1024 2048 4096 8192 16384 32768 65536 131072"
GRID = "512,1024,2048,4096,8192,16384"
LONG = "sdpa-cudnn flex flash-attn flash-attn-4 v3_tma v7_hopper_backward"
PARTS = {
    COMPILE: Part("bench/precompile.py", "", "what can be compiled ahead of all others", 100),
    "ladder": Part("bench/ladder.py --budget 50", "ladder.jsonl", "what each step gains", 58),
    "train": Part("bench/train.py --no-charts", "train.jsonl", "does a model train alike", 50),
    "peers": Part(
        "bench/peers.py --budget 92 --limit flex=512,4096,16384@64,128"
        f" --limit sdpa-flash={GRID}@256", "peers.jsonl",
        "our fastest kernels beside the libraries'", 100,
    ),
    "peers-long": Part(
        f"bench/peers.py --long --head-dims 128 --backends {LONG} --limit flex=32768"
        " --limit flash-attn=32768 --rounds 2 --budget 57",
        "peers-long.jsonl", "the same at 32k to 128k tokens", 65,
    ),
    "seqlen": Part(
        "bench/seqlen.py --no-charts --budget 130", "seqlen.jsonl", "where flash wins, forward",
        138, True,
    ),
    "both": Part(
        f"bench/seqlen.py --no-charts --direction both --scope block --batch 1 --lengths {FAR}"
        f" --backends {BOTH} --limit flex=1024,4096,16384 --budget 76",
        "both.jsonl", "forward and backward of a block, to 128k tokens", 84,
    ),
    "crossover": Part(
        "bench/crossover.py --no-charts --budget 58", "crossover.jsonl",
        "the crossing lengths, on three clocks", 66, True,
    ),
    "mixed": Part(
        f"bench/seqlen.py --no-charts --protocol mixed --backends {MIXED}"
        " --lengths 128 512 2048 8192 32768 --budget 58",
        "mixed.jsonl", "how much of the advantage is precision", 66,
    ),
    "roofline": Part(
        "bench/roofline.py --budget 52", "roofline.jsonl", "why: traffic, rates, ceilings", 60
    ),
    "memory": Part(
        "bench/memory.py --budget 46", "memory.jsonl", "peak memory to a million tokens", 54
    ),
    "small-calls": Part(
        "bench/ladder.py --small-calls --budget 15", "small-calls.jsonl", "what a launch costs", 23
    ),
    "decode": Part(
        "bench/decode.py --budget 17", "decode.jsonl", "few queries over many keys", 25
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


def lines_in(path):
    return sum(1 for _ in path.open()) if path.is_file() else 0


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if args.seconds is not None and not args.seconds > 0:
        p.error(f"argument --seconds: expected a number above 0, got {args.seconds}")
    asked, gpu = args.only or PARTS, torch.cuda.is_available()
    names = [n for n in PARTS if n in asked or (n == COMPILE and gpu and len(asked) > 1)]
    if args.plan:
        rows = [(PARTS[n].seconds, "python " + PARTS[n].command) for n in names]
        print(tabulate([*rows, (planned(names), "in all")], ["s", "program"], "plain"))
        return 0
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        p.error(f"argument --out: {e}")

    environment = {common.FA4_CACHE: "1"} | os.environ
    began, done = time.monotonic(), []
    for i, name in enumerate(names, start=1):
        part, start = PARTS[name], time.monotonic()
        left = None if args.seconds is None else began + args.seconds - start
        if not gpu and not part.cpu:
            done.append((name, "needs a GPU", None, None))
        elif left is not None and left < (part.seconds if gpu else 0):
            done.append((name, "left for the next run", None, None))
        else:
            times = f"{start - began:.0f} s gone"
            if gpu:
                times += f", about {planned(names[i - 1 :])} to go"
            print(f"\n==== {i} of {len(names)}, {times}: {name}: {part.answers}\n", flush=True)
            command = part.argv(args.out)
            if name == COMPILE:
                command += [n for n in names if n != COMPILE]
            before = lines_in(args.out / part.file)
            try:
                code = subprocess.run(command, cwd=ROOT, env=environment).returncode
            except KeyboardInterrupt:  # the program had it too and has kept what it measured
                return 130
            if code == 130:
                return 130
            if name == COMPILE and code == 0:
                environment[rounds.COMPILED] = "1"
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
    rows.append(("in all", "", sum(n or 0 for _, _, n, _ in done), f"{total:.0f}", planned(names)))
    head = ["program", "", "new records", "s", "planned"]
    print("\n" + tabulate(rows, head, disable_numparse=True))
    print(f"\nEvery picture and table from them: python figures/all.py {args.out}")
    return 0 if all(what in ("done", "needs a GPU") for _, what, _, _ in done) else 1


if __name__ == "__main__":
    sys.exit(main())
