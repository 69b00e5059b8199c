"""Forward and backward together, the time of a training step's attention block, from records alone.

    python figures/both.py results/reference/both.jsonl --out figures

The two are timed apart; here their medians are added, as are their 20th and their 80th percentiles,
which makes the band rather too wide than too narrow. Writes block-both-speedup as PNG and SVG: how
many times as fast as SDPA's cuDNN kernel (or --rival) each backend is, of three lengths or more.
"""

import sys

from flashstudy.figures import cli, records, seqlen, style

RIVAL = "sdpa-cudnn"


def joined(forward, backward):
    """The Sweep whose times are those of two sweeps added, cell by cell; other metrics are left."""
    cells = []
    for (backend, n), metrics in backward.cells.items():
        a, b = forward.cells.get((backend, n), {}).get("time_ms"), metrics["time_ms"]
        if a is None:
            continue
        row = b | {"direction": "forward and backward"}
        if a["status"] == b["status"] == "ok":
            row |= {k: a[k] + b[k] for k in ("value", "p50", "p20", "p80")}
            row["samples"] = min(a["samples"], b["samples"])
            row["utc"] = max(a["utc"], b["utc"])
        elif b["status"] == "ok":
            row |= {k: a.get(k) for k in ("status", "reason", "value", "p50", "p20", "p80")}
        row.pop("rounds", None)
        cells.append({"time_ms": row})
    return records.Sweep(cells)


def pairs(found):
    """A joined Sweep for every scope and shape that was measured in both directions."""
    same = [k for k in records.Sweep.SHARED if k != "direction"]
    for one in found:
        for two in found:
            if (one.direction, two.direction) == ("forward", "backward") and all(
                one.about[k] == two.about[k] for k in same
            ):
                yield joined(one, two)


def fastest(sweep, ours):
    """{length: (backend of `ours`, best other, ratio of their times)}, the ratio above 1 where ours
    is the faster."""
    found = {}
    for n in sweep.lengths:
        times = {b: r["p50"] for b in sweep.backends() if (r := sweep.at(b, n, "time_ms"))}
        mine = min((b for b in times if b in ours), key=times.get, default=None)
        other = min((b for b in times if b not in ours), key=times.get, default=None)
        if mine and other:
            found[n] = mine, other, times[other] / times[mine]
    return found


def draw(found, directory, rival=RIVAL):
    paths = []
    for one in pairs(found):
        if one.backends("ok").count(rival) == 0 or len(one.lengths) < 3:
            continue  # nothing to compare with, or too few points for a line
        fig = seqlen.chart(
            one,
            f"times as fast as {records.label(rival)}, forward and backward",
            "speed-up",
            seqlen.speedups(one, rival),
            False,
        )
        fig.get_axes()[0].axhline(1, color=style.GREY, linewidth=1)
        paths += style.save(fig, directory, f"{one.scope}-both-speedup", one.digest())
    return paths


def main(argv=None):
    def options(parser):
        parser.add_argument("--rival", default=RIVAL, choices=records.table(), metavar="NAME")

    def drawn(found, args):
        if not any(args.rival in one.backends("ok") for one in pairs(found)):
            return []
        return draw(found, args.out, args.rival) or ["too few lengths for a line"]

    return cli.main(
        argv, __doc__, "bench/seqlen.py --direction both", drawn, records.sweeps, options,
        "no rival in both directions",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
