"""Loss curves of a language model trained with one attention and with others (bench/train.py).

    python figures/train.py results/train-nvidia-h200.jsonl --out figures

Above, the curves, which should look like one. Below, their difference to one SDPA kernel, and as a
band how far two SDPA kernels are from each other at that step.
"""

import hashlib
import itertools
import sys
from statistics import fmean

from flashstudy.figures import cli, records, style

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


class Group:
    """The runs from one seed: the same first weights, the same words."""

    def __init__(self, found):
        """found: {backend: {metric: row}}."""
        order = [OURS, *records.table()]
        self.runs = {
            name: Run(found[name]["loss"], found[name].get("tokens_per_s"))
            for name in sorted(found, key=lambda n: order.index(n) if n in order else len(order))
        }
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

    def to_others(self, name):
        """Distances of a backend to the SDPA kernels, itself left out."""
        return [self.distance(name, other) for other in self.yardsticks if other != name]

    def apart(self):
        """Distances of two SDPA kernels, of every pair."""
        return [self.distance(a, b) for a, b in itertools.combinations(self.yardsticks, 2)]

    def own(self, name):
        """A backend's mean distance to the SDPA kernels; of two of them the smaller one.

        Of three curves alike, the mean of two distances exceeds the third as often as not.
        """
        found = self.to_others(name)
        return min(found) if len(found) == 2 else fmean(found)

    def band(self):
        """At every step, the largest difference between two SDPA kernels."""
        curves = [self.runs[name].smooth for name in self.yardsticks]
        return [max(at) - min(at) for at in zip(*curves, strict=True)]


class Comparison:
    """The newest runs of one model, from one seed or several, and how far they lie apart."""

    def __init__(self, rows):
        """Raises ValueError where there is no run among the rows."""
        models = {}
        for row in rows:
            if row.get("study") == "train":
                what = tuple(row.get(k) for k in SHARED + SETUP if k not in ("seed", "text"))
                seed = models.setdefault(what, {}).setdefault(row["seed"], {})
                seed.setdefault(row["backend"], {})[row["metric"]] = row
        models = [
            {
                seed: complete
                for seed, found in seeds.items()
                if (complete := {name: m for name, m in found.items() if "loss" in m})
            }
            for seeds in models.values()
        ]

        def when(seeds):
            return max(m["loss"].get("utc") or "" for f in seeds.values() for m in f.values())

        if not any(models):
            raise ValueError("no complete run of bench/train.py")
        newest = max(filter(None, models), key=when)
        self.rows = [r for f in newest.values() for m in f.values() for r in m.values()]
        self.row = max(self.rows, key=lambda r: r.get("utc") or "")
        self.groups = {seed: Group(newest[seed]) for seed in sorted(newest)}
        self.first = next(iter(self.groups.values()))

    def measured(self, name):
        """The groups that can tell how far a backend is from the SDPA kernels and they apart."""
        return [g for g in self.groups.values() if name in g.judged and len(g.yardsticks) > 1]

    def own(self, name):
        """Group.own, mean over the seeds; None where nothing can tell."""
        found = [g.own(name) for g in self.measured(name)]
        return fmean(found) if found else None

    def spread(self, name):
        """The largest distance between two SDPA kernels, mean over the same seeds."""
        found = [max(g.apart()) for g in self.measured(name)]
        return fmean(found) if found else None

    def within(self, name):
        """Whether a backend is as near to the SDPA kernels as they to one another, or None."""
        return None if self.own(name) is None else self.own(name) <= self.spread(name)

    def words(self):
        """Sentences: is any backend's curve another than the SDPA kernels'?"""
        names = list(dict.fromkeys(n for g in self.groups.values() for n in g.judged))
        told = [name for name in names if self.measured(name)]
        if not told:
            yield "Fewer than two SDPA kernels ran beside another: there is no spread to judge by."
            return
        for name in told:
            groups = self.measured(name)
            inside = "within" if self.within(name) else "outside"
            seeds = "" if len(groups) == 1 else f", mean over {len(groups)} seeds"
            text = f"{records.label(name)} is {self.own(name):.2g} nats from the SDPA kernels,"
            text += f" {inside} their spread: two of them are up to {self.spread(name):.2g} from"
            text += f" each other (mean over {self.row['steps']} steps{seeds})."
            ends = [[g.runs[n].row["value"] for n in g.yardsticks] for g in groups]
            mine = fmean(g.runs[name].row["value"] for g in groups)
            text += f" Held-out loss {mine:.4f}, theirs {fmean(map(min, ends)):.4f} to"
            text += f" {fmean(map(max, ends)):.4f}; the text's entropy is"
            yield text + f" {fmean(g.runs[name].row['entropy'] for g in groups):.4f}."

    def title(self):
        r = self.row
        return (
            f"{r['layers']} blocks of {r['H']} heads of {r['D']}, {r['dtype']}, batch {r['B']},"
            f" {r['N_Q']} words, {r['steps']} steps,"
            f" seed{'s' * (len(self.groups) > 1)} {', '.join(map(str, self.groups))}"
        )

    def provenance(self):
        r = self.row
        versions = [("torch", r["torch"]), ("CUDA", r["cuda"]), ("Triton", r["triton"])]
        text = ", ".join(f"{n} {v}" for n, v in versions if v)
        return f"{r['device']}; {text}; {(r.get('utc') or '')[:10]}"

    def digest(self):
        """Fingerprint of every number that is shown, the same before and after trimming."""
        parts = []
        for seed, group in self.groups.items():
            for name, run in sorted(group.runs.items()):
                numbers = [*run.row["curve"], run.row["value"]] if run.ok else []
                numbers += [run.rate["p50"]] if run.rate else []
                text = " ".join(f"{x:.6g}" for x in numbers)
                parts.append(f"{seed} {name} {run.row['status']} {text}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def look(name):
    return OURS_LOOK if name == OURS else style.look(name)


def chart(found):
    """The figure, or None where no run came to its end."""
    one = found.first
    names = [*one.yardsticks, *one.judged]  # the judged on top
    if not names:
        return None
    fig, top, _ = style.axes()
    left, width = 0.13, 0.84
    top.set_position([left, 0.53, width, 0.37])
    low = fig.add_axes([left, 0.13, width, 0.3], sharex=top)
    first = found.row["steps"] - len(one.runs[names[0]].smooth)
    steps = [first + i + 1 for i in range(len(one.runs[names[0]].smooth))]
    every = max(1, len(steps) // 8)

    def draw(ax, name, values, i):
        line = look(name).line() | {"markevery": (every * i // len(names), every)}
        if name in one.judged:
            line |= {"linewidth": 2.6, "zorder": 3}
        label = records.label(name)
        if ax is top and one.runs[name].rate is not None:
            rate = float(f"{one.runs[name].rate['p50']:.3g}")
            label += f", {style.plain(rate)} tokens/s"
        ax.plot(steps, values, label=label, **line)

    for i, name in enumerate(names):
        draw(top, name, one.runs[name].smooth, i)
    entropy = one.runs[names[0]].row["entropy"]
    top.axhline(entropy, color=style.GREY, linewidth=1.2, linestyle=":")
    top.annotate(
        "entropy of the text", (steps[0], entropy), xytext=(4, 4), textcoords="offset points",
        fontsize=10, color=style.GREY,
    )  # fmt: skip
    top.set_ylabel("loss, nats a word")
    curves = [one.runs[name].smooth for name in names]
    settled = [v for curve in curves for v in curve[len(curve) // 20 :]]
    top.set_ylim(entropy - 0.1, max(settled) * 1.03)
    top.tick_params(labelbottom=False)

    drawn = "" if len(found.groups) == 1 else f" of seed {next(iter(found.groups))}"
    notes = [f"Curves{drawn} are running means over {SMOOTH} steps. {' '.join(found.words())}"]
    if one.yardsticks:
        base = one.yardsticks[0]
        if len(one.yardsticks) > 1:
            band = one.band()
            low.fill_between(
                steps, [-b for b in band], band, color="#BBBBBB", linewidth=0, alpha=0.6,
            )  # fmt: skip
        zero = one.runs[base].smooth
        for i, name in enumerate(names):
            values = one.runs[name].smooth
            draw(low, name, [a - b for a, b in zip(values, zero, strict=True)], i)
        low.set_ylabel("difference")
        what = f"minus {records.label(base)}; grey: two SDPA kernels differ by up to this"
        low.set_title(what, fontsize=10.5, fontweight="normal", pad=4)
    low.set_xlabel("step")
    handles, _ = top.get_legend_handles_labels()
    ours_first = [*handles[len(one.yardsticks) :], *handles[: len(one.yardsticks)]]
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
    def described(found, args):
        paths = draw(found, args.out)
        return [*found.words(), *paths] if paths else []

    return cli.main(
        argv, __doc__, "bench/train.py", described, Comparison, nothing="no run came to its end"
    )


if __name__ == "__main__":
    sys.exit(main())
