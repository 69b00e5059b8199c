"""What validate/check_outputs.py found, a line a backend and a failure, from its --json file.

    python validate/check_outputs.py --json results/validate.json
    python figures/validated.py results/validate.json      # into figures/reference/validate.jsonl

A case is right, wrong, refused with an error, or a crash that ended a process; "worst" is the
largest error over what the budget allows, of the right and the wrong ones.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from flashstudy.figures import grid, records

STUDY = "validate"
OUT = Path(__file__).resolve().parent / "reference" / "validate.jsonl"
DTYPES = ("fp16", "bf16", "fp32")
STATUSES = ("ok", "fail", "crash", "refused")


def counted(lines):
    """The records that are kept, from the lines of check_outputs' --json."""
    abouts = [line["about"] for line in lines if "about" in line]
    judged = [line for line in lines if "about" not in line]
    if len(abouts) != 1 or not judged:
        raise records.RecordError(
            "expected the --json file of one run of validate/check_outputs.py"
        )
    judged.sort(key=place)  # they stand in the order in which processes finished them
    about, rows = {"study": STUDY} | abouts[0], []
    for name in dict.fromkeys(r["backend"] for r in judged):
        for dtype in dict.fromkeys(r["dtype"] for r in judged if r["backend"] == name):
            mine = [r for r in judged if (r["backend"], r["dtype"]) == (name, dtype)]
            overs = [r["over"] for r in mine if r["over"] is not None]
            rows.append(about | {
                "backend": name, "dtype": dtype, "over": max(overs, default=None),
                **{s: sum(r["status"] == s for r in mine) for s in STATUSES},
            })  # fmt: skip
    found = {}
    for r in judged:
        if r["status"] in ("fail", "crash"):
            reason = r["reasons"][0] if r["reasons"] else r["status"]
            found.setdefault((r["backend"], r["status"], message(reason)), []).append(r)
    for (name, status, reason), mine in found.items():
        dtypes = list(dict.fromkeys(r["dtype"] for r in mine))
        rows.append(about | {
            "backend": name, "status": status, "reason": reason, "dtypes": dtypes,
            "cases": len(mine), "case": mine[0]["case"],
        })  # fmt: skip
    return rows


def place(line):
    """Where a judged case stands among all: by backend, dtype and name."""
    backends, dtypes = list(records.table()), list(DTYPES)
    name, dtype = line["backend"], line["dtype"]
    return (
        backends.index(name) if name in backends else len(backends), name,
        dtypes.index(dtype) if dtype in dtypes else len(dtypes), dtype, line["case"],
    )  # fmt: skip


def message(reason):
    """A failure without its numbers, so that cases that fail alike stand together."""
    return reason if "Error" in reason else re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "…", reason)


def tables(rows):
    """(header, rows) of the counts, and sentences on the failures."""
    order = list(records.table())
    rows = sorted(rows, key=lambda r: order.index(r["backend"]) if r["backend"] in order else 99)
    header = ["backend", "dtype", "right", "wrong", "crashed", "refused", "worst error ÷ budget"]
    counts = [
        [records.label(r["backend"]), r["dtype"], *(r[s] for s in STATUSES), over(r["over"])]
        for r in rows if "dtype" in r
    ]  # fmt: skip
    said = [
        f"{records.label(r['backend'])}, {', '.join(r['dtypes'])}: {r['cases']}"
        f" case{'s' * (r['cases'] > 1)} {'crashed' if r['status'] == 'crash' else 'wrong'}:"
        f" {r['reason']} (such as {r['case']})"
        for r in rows if "reason" in r
    ]  # fmt: skip
    return header, counts, said


def over(value):
    return "–" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0e}"


def total(rows):
    """A sentence on all of it."""
    n = {s: sum(r[s] for r in rows if "dtype" in r) for s in STATUSES}
    return (
        f"{sum(n.values()):,} cases: {n['ok']:,} right, {n['fail'] + n['crash']:,} wrong or"
        f" crashed, {n['refused']:,} refused with an error."
    )


def provenance(rows):
    return grid.provenance(rows[0])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="that --json of validate/check_outputs.py named")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        lines, _ = records.parse(args.file.read_bytes(), args.file)
        rows = counted(lines)
    except (OSError, records.RecordError) as e:
        parser.error(f"argument file: {e}")
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(total(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
