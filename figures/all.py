"""Every picture and table of the repository from the reference records, by one command.

    python figures/all.py                       # from figures/reference/
    python figures/all.py results/reference     # first take over the records of a run

Given the folder of a run (python bench/reference.py writes one), its record files are shortened
into figures/reference/, replacing those of the same names, before anything is drawn.
"""

import argparse
import importlib
import sys
from pathlib import Path

from flashstudy.figures import records, table, trim

# record file -> the programs of this folder that draw it
PROGRAMS = {
    "seqlen": ("seqlen",),
    "both": ("both",),
    "mixed": ("mixed",),
    "crossover": ("crossover",),
    "roofline": ("roofline",),
    "memory": ("memory",),
    "ladder": ("ladder",),
    "peers": ("peers",),
    "train": ("train",),
    "small-calls": (),  # tables alone
    "decode": (),
    "peers-long": (),
}


def take_over(folder):
    """Shorten the record files of a run into figures/reference/."""
    found = [path for name in PROGRAMS if (path := folder / f"{name}.jsonl").exists()]
    if not found:
        raise records.RecordError(f"{folder}: no record file of bench/reference.py")
    for path in found:
        trim.main([str(path), str(table.REFERENCE / path.name)])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, help="folder of record files to take over")
    args = parser.parse_args(argv)
    try:
        if args.run is not None:
            take_over(args.run)
    except (OSError, records.RecordError) as e:
        parser.error(f"argument run: {e}")
    out = str(table.REFERENCE.parent)
    for name, programs in PROGRAMS.items():
        path = table.REFERENCE / f"{name}.jsonl"
        if not path.exists():
            print(f"no {path}: its pictures stay as they are")
            continue
        for program in programs:
            module = importlib.import_module(f"flashstudy.figures.{program}")
            module.main([str(path), "--out", out])
    return table.main([])


if __name__ == "__main__":
    sys.exit(main())
