"""Every measurement behind the pictures and tables of this study, one program after the other.

    python bench/reference.py                       # all of it
    python bench/reference.py --only seqlen mixed   # some
    python bench/reference.py --seconds 540         # start nothing new after nine minutes
    python figures/all.py results/reference         # then: every picture and table from the records

Each program writes its own record file under --out and resumes it: the same command again goes on
where an interrupted one stopped, and measures nothing twice. A program that fails does not keep the
others from running. Without a GPU the programs that have an answer for a CPU run. On an H200 the
parts add up to about a quarter of an hour.

Exit codes: 0 all done, 1 a program failed, measured something wrong, or is left for the next run,
2 bad arguments, 130 interrupted.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent


class Part(NamedTuple):
    """One program: its command line (without --out), its record file, and what it answers."""

    command: str
    file: str
    answers: str
    cpu: bool = False

    def argv(self, folder):
        program, *options = self.command.split()
        return [sys.executable, str(ROOT / program), *options, "--out", str(folder / self.file)]

    def shown(self):
        """As a reader types it."""
        return "python " + self.command.replace(" --no-charts", "")


MIXED = "naive sdpa sdpa-flash sdpa-cudnn flash-attn flash-attn-4 v1_flash v6_persistent"
BOTH = "sdpa-cudnn sdpa-flash flex flash-attn flash-attn-4 v1_flash v3_tma v7_hopper_backward"
LONG = "512 1024 2048 4096 8192 16384 32768 65536 131072"
PARTS = {
    "seqlen": Part(
        "bench/seqlen.py --no-charts", "seqlen.jsonl", "where flash wins, forward", True
    ),
    "both": Part(
        f"bench/seqlen.py --no-charts --direction both --scope block --batch 1 --lengths {LONG}"
        f" --backends {BOTH}",
        "both.jsonl",
        "forward and backward of a block, to 128k tokens",
    ),
    "mixed": Part(
        f"bench/seqlen.py --no-charts --protocol mixed --backends {MIXED}",
        "mixed.jsonl",
        "how much of the advantage is precision",
    ),
    "crossover": Part(
        "bench/crossover.py --no-charts --budget 90",
        "crossover.jsonl",
        "the crossing lengths, on three clocks",
        True,
    ),
    "roofline": Part("bench/roofline.py", "roofline.jsonl", "why: traffic, rates, ceilings"),
    "memory": Part("bench/memory.py", "memory.jsonl", "peak memory to a million tokens"),
    "peers": Part(
        "bench/peers.py --budget 170 --limit flex=512,4096,16384",
        "peers.jsonl",
        "our fastest kernels beside the libraries'",
    ),
    "peers-long": Part(
        "bench/peers.py --long --head-dims 128 --limit flex=131072 --budget 45",
        "peers.jsonl",
        "the same at 32k to 128k tokens",
    ),
    "ladder": Part("bench/ladder.py --budget 90", "ladder.jsonl", "what each step gains"),
    "small-calls": Part(
        "bench/ladder.py --small-calls --budget 40", "small-calls.jsonl", "what a launch costs"
    ),
    "decode": Part("bench/decode.py --budget 35", "decode.jsonl", "few queries over many keys"),
    "train": Part("bench/train.py --no-charts", "train.jsonl", "does a model train alike"),
}


def parser():
    p = argparse.ArgumentParser(
        prog="reference.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="programs:\n"
        + "\n".join(f"  {name:12} {part.answers}" for name, part in PARTS.items()),
    )
    p.add_argument("--only", nargs="+", choices=PARTS, metavar="NAME", help="these programs alone")
    p.add_argument("--seconds", type=float, help="start no further program after this time")
    p.add_argument(
        "--out", type=Path, default=ROOT / "results" / "reference", metavar="DIR",
        help="folder of the record files (default: results/reference)",
    )  # fmt: skip
    p.add_argument("--plan", action="store_true", help="print the commands and stop")
    return p


def lines_in(path):
    return sum(1 for _ in path.open()) if path.exists() else 0


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if args.seconds is not None and not args.seconds > 0:
        p.error(f"argument --seconds: expected a number above 0, got {args.seconds}")
    names = [n for n in PARTS if n in (args.only or PARTS)]
    if args.plan:
        print("\n".join(" ".join(PARTS[n].argv(args.out)[1:]) for n in names))
        return 0
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        p.error(f"argument --out: {e}")

    gpu = torch.cuda.is_available()
    began, done = time.monotonic(), []
    for i, name in enumerate(names, start=1):
        part, start = PARTS[name], time.monotonic()
        left = None if args.seconds is None else began + args.seconds - start
        if not gpu and not part.cpu:
            done.append((name, "needs a GPU", None, None))
        elif left is not None and left <= 0:
            done.append((name, "left for the next run", None, None))
        else:
            print(f"\n==== {i} of {len(names)}: {name}: {part.answers}\n", flush=True)
            before = lines_in(args.out / part.file)
            try:
                code = subprocess.run(part.argv(args.out), cwd=ROOT).returncode
            except KeyboardInterrupt:  # the program had it too and has kept what it measured
                return 130
            if code == 130:
                return 130
            what = "done" if code == 0 else f"exit code {code}"
            new = lines_in(args.out / part.file) - before
            done.append((name, what, new, time.monotonic() - start))

    rows = [
        (name, what, "" if new is None else new, "" if s is None else f"{s:.0f}")
        for name, what, new, s in done
    ]
    total = time.monotonic() - began
    rows.append(("in all", "", sum(n or 0 for _, _, n, _ in done), f"{total:.0f}"))
    print("\n" + tabulate(rows, ["program", "", "new records", "s"], disable_numparse=True))
    print(f"\nEvery picture and table from them: python figures/all.py {args.out}")
    return 0 if all(what in ("done", "needs a GPU") for _, what, _, _ in done) else 1


if __name__ == "__main__":
    sys.exit(main())
