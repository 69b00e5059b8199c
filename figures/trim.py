"""Shorten record files for figures/reference/: the same rows, what they share said once.

    python figures/trim.py results/seqlen-nvidia-h200.jsonl figures/reference/seqlen.jsonl

Keeps the rows of complete cells (one of each; of the ladder and the peers those of one run a cell;
of the trainings the newest) and of the machine's state, and writes fields that several rows in turn
share as {"defaults": …}.
Numbers keep six digits. Reading the result gives the same tables and charts.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

from flashstudy.figures import grid, records, train

OWN = {"metric", "unit", "value", "p50", "p20", "p80", "samples", "status", "reason", "when"}
OWN |= {
    "rounds",
    "predicted_mib",
    "floor_mib",
    "sdpa_kernel",
    "backend",
    "N_Q",
    "N_K",
    "utc",
    "source",
    "flops",
    "turns",
    "error_over_budget",
    "kernels",
    "curve",
    "counted_flops",
    "counted_exps",
    "counted_bytes",
    "scores_bytes",
    "ncu_passes",
    "ceiling",
    "best",
    "role",
    "predicted_end",
    "free_mib",
}


def digits(value):
    if isinstance(value, list):
        return [digits(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def trim(rows):
    """The lines of the shortened file."""
    gridded = [r for r in rows if r.get("study") in grid.STUDIES]
    trained = [r for r in rows if r.get("study") == "train"]
    rows = [r for r in rows if r.get("study") not in (*grid.STUDIES, "train")]
    kept = [r for cell in records.gather(rows).values() for r in cell.values()]
    kept += [r for r in rows if "backend" not in r]
    kept += grid.kept(gridded)
    kept += train.Comparison(trained).rows if trained else []
    kept.sort(key=lambda r: ("backend" not in r, str([r.get(k) for k in sorted(set(r) - OWN)])))

    def shared(row):
        return {k: v for k, v in row.items() if k not in OWN}

    for about, group in itertools.groupby(kept, shared):
        yield json.dumps({"defaults": about})
        for row in group:
            yield json.dumps({k: digits(v) for k, v in row.items() if k in OWN and v is not None})


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="+", type=Path, help="record files, merged")
    parser.add_argument("out", type=Path, help="the shortened file")
    args = parser.parse_args(argv)
    try:
        lines = list(trim(records.read(*args.records)))
    except (OSError, records.RecordError) as e:
        parser.error(f"argument records: {e}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(f"{line}\n" for line in lines))
    print(f"{args.out}: {len(lines)} lines, {args.out.stat().st_size / 2**10:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
