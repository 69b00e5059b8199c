"""Loss curves of a language model trained with one attention and with others (bench/train.py).

    python figures/train.py results/train-nvidia-h200.jsonl --out figures

Above, the curves, which should look like one. Below, their difference to one SDPA kernel, and as a
band how far two SDPA kernels are from each other at that step.
"""

import argparse
import hashlib
import itertools
import sys
from pathlib import Path
from statistics import fmean

from flashstudy.figures import records, style

OURS = "flashstudy"  # the attention that the package picks; not a row of the table of backends
SMOOTH = 20  # steps: what one batch has more or less of is no difference between runs
SHARED = ("dtype", "B", "E", "H", "H_KV", "N_Q", "layers", "steps", "lr", "seed", "text")
SETUP = tuple(k for k in records.ENVIRONMENT if k != "source")  # each backend has its own sources
OURS_LOOK = style.Look(style.RED, "o", (0, (4, 1.5)), False)


def key(row):
    """Identifies a run together with what it ran on and with."""
    return tuple(row.get(k) for k in ("backend", *SHARED, *records.ENVIRONMENT))


def smooth(curve, width=SMOOTH):
    """Running mean over `width` steps, or fewer where the curve is shorter; of whole windows."""
    width = min(width, len(curve))
    total, out = sum(curve[:width]), []
    for i in range(width, len(curve) + 1):
        out.append(total / width)
        if i < len(curve):
            total += curve[i] - curve[i - width]
    return out


class Run:
    """One backend's training."""

    def __init__(self, row, rate):
        self.row, self.rate = row, rate
        self.ok = row["status"] == "ok"
        self.smooth = smooth(row["curve"]) if self.ok else []

    @property
    def end(self):
        return self.smooth[-1]


class Comparison:
    """The newest runs of one model and text, and how far they are from one another."""

    def __init__(self, rows):
        """Raises ValueError where there is no run among the rows."""
        groups = {}
        for row in rows:
            if row.get("study") == "train":
                what = tuple(row.get(k) for k in SHARED + SETUP)
                groups.setdefault(what, {}).setdefault(row["backend"], {})[row["metric"]] = row
        groups = [
            {name: found for name, found in group.items() if "loss" in found}
            for group in groups.values()
        ]
        groups = [group for group in groups if group]
        if not groups:
            raise ValueError("no complete run of bench/train.py")
        newest = max(groups, key=lambda g: max(m["loss"].get("utc") or "" for m in g.values()))
        self.rows = [row for metrics in newest.values() for row in metrics.values()]
        order = [OURS, *records.table()]
        self.runs = {
            name: Run(newest[name]["loss"], newest[name].get("tokens_per_s"))
            for name in sorted(newest, key=lambda n: order.index(n) if n in order else len(order))
        }
        self.row = max((r.row for r in self.runs.values()), key=lambda r: r.get("utc") or "")
        ok = [name for name, run in self.runs.items() if run.ok]
        order = ["sdpa-cudnn", "sdpa-flash"]  # differences are to the first that ran
        self.yardsticks = sorted(
            (n for n in ok if n.startswith("sdpa-")),
            key=lambda n: order.index(n) if n in order else len(order),
        )
        self.judged = [n for n in ok if n not in self.yardsticks]

    def distance(self, a, b):
        """Mean over the steps of the difference of two curves, in nats."""
        pairs = zip(self.runs[a].smooth, self.runs[b].smooth, strict=True)
        return fmean(abs(x - y) for x, y in pairs)

    def distances(self, name):
        """(smallest, largest) distance to the other SDPA kernels; None where there is none."""
        found = [self.distance(name, other) for other in self.yardsticks if other != name]
        return (min(found), max(found)) if found else (None, None)

    def spread(self):
        """(smallest, largest) distance between two SDPA kernels; None of fewer than two."""
        pairs = itertools.combinations(self.yardsticks, 2)
        found = [self.distance(a, b) for a, b in pairs]
        return (min(found), max(found)) if found else (None, None)

    def within(self, name):
        """Whether a backend is as near to the SDPA kernels as these to one another, or None.

        Its mean distance to them against their largest. A pair has but one distance, which two
        others would exceed on average: there the smallest counts.
        """
        if len(self.yardsticks) < 2:
            return None
        found = [self.distance(name, other) for other in self.yardsticks]
        own = min(found) if len(found) == 2 else fmean(found)
        return own <= self.spread()[1]

    def band(self):
        """At every step, the largest difference between two SDPA kernels."""
        curves = [self.runs[name].smooth for name in self.yardsticks]
        return [max(at) - min(at) for at in zip(*curves, strict=True)]

    def words(self):
        """Sentences: is any backend's curve another than the SDPA kernels'?"""
        least, most = self.spread()
        if most is None:
            yield "Fewer than two SDPA kernels ran: there is no spread to compare with."
            return
        between = f"{least:.2g} to {most:.2g}" if len(self.yardsticks) > 2 else f"{most:.2g}"
        yield (
            f"Two SDPA kernels are {between} nats from each other, on average over"
            f" {self.row['steps']} steps."
        )
        for name in self.judged:
            found = [self.distance(name, other) for other in self.yardsticks]
            inside = "within" if self.within(name) else "outside"
            ends = [self.runs[other].row["value"] for other in self.yardsticks]
            yield (
                f"{records.label(name)} is {min(found):.2g} to {max(found):.2g} from them, on"
                f" average {fmean(found):.2g}: {inside} their spread. Held-out loss"
                f" {self.runs[name].row['value']:.4f}, theirs {min(ends):.4f} to {max(ends):.4f};"
                f" the text's entropy is {self.row['entropy']:.4f}."
            )

    def title(self):
        r = self.row
        return (
            f"{r['layers']} blocks of {r['H']} heads of {r['D']}, {r['dtype']}, batch {r['B']},"
            f" {r['N_Q']} words, {r['steps']} steps, seed {r['seed']}"
        )

    def provenance(self):
        r = self.row
        versions = [("torch", r["torch"]), ("CUDA", r["cuda"]), ("Triton", r["triton"])]
        text = ", ".join(f"{n} {v}" for n, v in versions if v)
        return f"{r['device']}; {text}; {(r.get('utc') or '')[:10]}"

    def digest(self):
        """Fingerprint of every number that is shown, the same before and after trimming."""
        parts = []
        for name, run in sorted(self.runs.items()):
            numbers = [*run.row["curve"], run.row["value"]] if run.ok else []
            numbers += [run.rate["p50"]] if run.rate else []
            text = " ".join(f"{x:.6g}" for x in numbers)
            parts.append(f"{name} {run.row['status']} {text}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def look(name):
    return OURS_LOOK if name == OURS else style.look(name)


def chart(found):
    """The figure, or None where no run came to its end."""
    names = [*found.yardsticks, *found.judged]  # the judged on top
    if not names:
        return None
    fig, top, _ = style.axes()
    left, width = 0.13, 0.84
    top.set_position([left, 0.53, width, 0.37])
    low = fig.add_axes([left, 0.13, width, 0.3], sharex=top)
    first = found.row["steps"] - len(found.runs[names[0]].smooth)
    steps = [first + i + 1 for i in range(len(found.runs[names[0]].smooth))]
    every = max(1, len(steps) // 8)

    def draw(ax, name, values, i):
        line = look(name).line() | {"markevery": (every * i // len(names), every)}
        if name in found.judged:
            line |= {"linewidth": 2.6, "zorder": 3}
        label = records.label(name)
        if ax is top and found.runs[name].rate is not None:
            rate = float(f"{found.runs[name].rate['p50']:.3g}")
            label += f", {style.plain(rate)} tokens/s"
        ax.plot(steps, values, label=label, **line)

    for i, name in enumerate(names):
        draw(top, name, found.runs[name].smooth, i)
    entropy = found.row["entropy"]
    top.axhline(entropy, color=style.GREY, linewidth=1.2, linestyle=":")
    top.annotate(
        "entropy of the text", (steps[0], entropy), xytext=(4, 4), textcoords="offset points",
        fontsize=10, color=style.GREY,
    )  # fmt: skip
    top.set_ylabel("loss, nats a word")
    curves = [found.runs[name].smooth for name in names]
    settled = [v for curve in curves for v in curve[len(curve) // 20 :]]
    top.set_ylim(entropy - 0.1, max(settled) * 1.03)
    top.tick_params(labelbottom=False)

    notes = [f"Curves are running means over {SMOOTH} steps. {' '.join(found.words())}"]
    if found.yardsticks:
        base = found.yardsticks[0]
        if len(found.yardsticks) > 1:
            band = found.band()
            low.fill_between(
                steps, [-b for b in band], band, color="#BBBBBB", linewidth=0, alpha=0.6,
            )  # fmt: skip
        zero = found.runs[base].smooth
        for i, name in enumerate(names):
            values = found.runs[name].smooth
            draw(low, name, [a - b for a, b in zip(values, zero, strict=True)], i)
        low.set_ylabel("difference")
        what = f"minus {records.label(base)}; grey: two SDPA kernels differ by up to this"
        low.set_title(what, fontsize=10.5, fontweight="normal", pad=4)
    low.set_xlabel("step")
    handles, _ = top.get_legend_handles_labels()
    ours_first = [*handles[len(found.yardsticks) :], *handles[: len(found.yardsticks)]]
    style.finish(
        fig, top, "Training a language model: does the attention kernel show?",
        f"{found.title()}. {found.provenance()}", notes, columns=2, handles=ours_first,
    )  # fmt: skip
    return fig


def draw(found, directory):
    """Write the picture; returns the paths, none where no run came to its end."""
    fig = chart(found)
    return [] if fig is None else style.save(fig, directory, "training-loss", found.digest())


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", nargs="+", type=Path, help="record files of bench/train.py")
    parser.add_argument("--out", type=Path, default=Path("figures"), metavar="DIR")
    args = parser.parse_args(argv)
    try:
        found = Comparison(records.read(*args.records))
    except (OSError, ValueError) as e:
        parser.error(f"argument records: {e}")
    paths = draw(found, args.out)
    if not paths:
        parser.error("argument records: no run came to its end")
    print("\n".join([*found.words(), *map(str, paths)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
