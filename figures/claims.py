"""The claims of the public study that this one began with, each held against the records.

    python figures/claims.py                    # from figures/reference
    python figures/claims.py results            # from a folder of your own records

Reads seqlen.jsonl, and mixed.jsonl, memory.jsonl and crossover.jsonl where they are there, and
prints a Markdown table: a claim in our words, a verdict, the numbers and the picture behind it. No
verdict is written down here: each follows from the records by the rule that stands beside it.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

from flashstudy.figures import answers, crossings, memory, records

CONFIRMED, REFINED, REFUTED, OPEN = "confirmed", "refined", "refuted", "not measured"
QUADRATIC, LINEAR = 1.9, 1.1  # exponents from which, and up to which, growth is called so
MUCH = 2.0  # times as fast that is "substantially" better
MEDIUM = 2048  # tokens by which "medium" lengths have begun
STEADY = 0.3  # exponent of a speed-up over the length below which it is a constant factor
FILES = ("seqlen", "mixed", "memory", "crossover")
REFERENCE = Path(__file__).resolve().parent / "reference"


class Finding(NamedTuple):
    claim: str
    rule: str
    verdict: str
    evidence: str
    picture: str | None = None


class Evidence:
    """The sweeps that claims are held against; any of them may be missing."""

    def __init__(self, seqlen=(), mixed=(), far=(), near=()):
        self.alone = one(records.sweeps(seqlen), scope="attention", direction="forward")
        self.block = one(records.sweeps(seqlen), scope="block", direction="forward")
        halves = answers.pairs(records.sweeps(mixed))
        self.pair = next(
            (p for p in halves if (p.wide.scope, p.wide.direction) == ("attention", "forward")),
            None,
        )
        self.far = memory.Study(far)
        self.near = crossings.base(crossings.sweeps(near))

    def precisions(self):
        """Sweeps of attention alone that have SDPA, one a precision."""
        measured = [s for s in self.pair or () if s is not None and s.backends("ok")]
        found = {s.dtype: s for s in measured}
        if self.alone is not None:
            found[self.alone.dtype] = self.alone
        return {d: s for d, s in found.items() if "sdpa" in s.backends("ok")}


def one(sweeps, **wanted):
    return next((s for s in sweeps if all(s.about[k] == v for k, v in wanted.items())), None)


def exponent(points):
    """Slope of log y over log x by least squares, over the longer half of the lengths."""
    points = [(math.log(x), math.log(y)) for x, y in points[len(points) // 2 :] if y > 0]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def growth(sweep, backend, metric="peak_delta_mib"):
    """The exponent with which a metric of a backend grows, None where it was not measured."""
    return exponent([(n, r["p50"]) for n, r in sweep.series(backend, metric)])


def short(dtype):
    return {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "tf32": "TF32"}[dtype]


def spread(values, form="{:.2f}"):
    """2.00, or 1.98 to 2.01."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


# The claims, each with its rule


def quadratic(e):
    claim = "Naive attention's memory grows with the square of the length."
    rule = f"confirmed: the exponent of its peak is at least {QUADRATIC}; refuted: at most {LINEAR}"
    found = growth(e.alone, "naive") if e.alone else None
    if found is None:
        return Finding(claim, rule, OPEN, "")
    verdict = CONFIRMED if found >= QUADRATIC else REFUTED if found <= LINEAR else REFINED
    n, row = e.alone.series("naive", "peak_delta_mib")[-1]
    text = f"exponent {found:.2f}; {answers.size(row['p50'])} at {n:,} tokens"
    return Finding(claim, rule, verdict, text, "attention-memory")


def impractical(e):
    claim = "It becomes impractical at moderate lengths."
    rule = "confirmed: it runs out of this GPU's memory inside the measured lengths; refined: only"
    rule += " beyond them"
    if e.alone is None or "naive" not in e.alone.backends():
        return Finding(claim, rule, OPEN, "")
    gone = [n for n in e.alone.lengths if e.alone.status("naive", n) == "oom"]
    far = [end for end in e.far.ends() if end.direction == "forward" and end.as_predicted]
    said = []
    if gone:
        mib, _ = e.alone.predicted_mib("naive", gone[0])
        about = e.alone.about
        text = f"out of memory at {gone[0]:,} tokens (batch {about['B']}, {about['H']} heads)"
        said.append(text + (f", which need {answers.size(mib)}" if mib else ""))
    for end in far:
        about = one(e.far.sweeps, direction="forward").about
        said.append(f"at {end.over:,} with batch {about['B']} and {about['H']} heads")
    verdict = CONFIRMED if gone else REFINED if far else REFUTED
    return Finding(claim, rule, verdict, "; ".join(said) or "it never did", "attention-memory")


def better(e):
    claim = "PyTorch's SDPA is substantially better than naive attention."
    rule = f"confirmed: more than {MUCH:g} times as fast, beyond the noise, at the longest length"
    rule += " that both finish, in every precision measured; refined: in some"
    said, wins = [], []
    for dtype, s in e.precisions().items():
        c = answers.crossover(s, "sdpa", "naive")
        if c.kind == "none":
            continue
        a, b = (s.at(x, c.longest, "time_ms") for x in ("sdpa", "naive"))
        wins.append(answers.faster(a, b, MUCH))
        kernel = f" ({a['sdpa_kernel']} kernel)" if a.get("sdpa_kernel") else ""
        said.append(
            f"{c.ratio:.1f} times as fast in {short(dtype)}{kernel} at {c.longest:,} tokens"
        )
    verdict = CONFIRMED if all(wins) else REFINED if any(wins) else REFUTED
    verdict = verdict if wins else OPEN
    return Finding(claim, rule, verdict, "; ".join(said), "attention-speedup")


def pressure(e):
    claim = "SDPA's memory still comes under growing pressure with the length."
    rule = f"confirmed: the exponent of the peak of what SDPA picks is above {LINEAR} in some"
    rule += (
        " precision; refined: only of one of its kernels that it does not pick; refuted: of none"
    )
    found = {d: x for d, s in e.precisions().items() if (x := growth(s, "sdpa")) is not None}
    if not found:
        return Finding(claim, rule, OPEN, "")
    math_ = growth(e.alone, "sdpa-math") if e.alone else None
    said = [f"exponent {x:.2f} in {short(d)}" for d, x in found.items()]
    if math_ is not None:
        said.append(f"{math_:.2f} of its math kernel, which it does not pick here")
    own = any(x > LINEAR for x in found.values())
    other = math_ is not None and math_ > LINEAR
    verdict = CONFIRMED if own else REFINED if other else REFUTED
    return Finding(claim, rule, verdict, ", ".join(said), "attention-memory")


def linear(e):
    claim = "FlashAttention's memory scales nearly linearly."
    rule = (
        f"confirmed: the exponents of all flash backends are between {2 - LINEAR:g} and {LINEAR};"
    )
    rule += " refined: of some"
    series = []
    if e.alone is not None:
        series += [(e.alone, b) for b in answers.challengers(e.alone)]
    for s in e.far.sweeps:
        series += [(s, b) for b in answers.challengers(s)]
    found = [x for s, b in series if (x := growth(s, b)) is not None]
    if not found:
        return Finding(claim, rule, OPEN, "")
    fit = [2 - LINEAR <= x <= LINEAR for x in found]
    verdict = CONFIRMED if all(fit) else REFINED if any(fit) else REFUTED
    text = f"exponent {spread(found)} in {len(found)} series"
    longest = max((x for x in e.far.lines() if not memory.stored(x.backend)),
                  key=lambda x: x.longest, default=None)  # fmt: skip
    if longest is not None:
        text += f", up to {longest.longest:,} tokens"
    picture = "memory-forward" if longest is not None else "attention-memory"
    return Finding(claim, rule, verdict, text, picture)


def slower_at_first(e):
    """(shortest length, {clock: (slower than naive beyond the noise, of so many, words)}, picture).

    Of the flash backends; from the crossings, which begin at shorter lengths, where they are there.
    """
    clocks = {"graph_ms": "the GPU's clock", "host_ms": "the host's"}
    if e.near is not None and "naive" in e.near.backends("host_ms"):
        found, first = {}, e.near.lengths()[0]
        for metric, clock in clocks.items():
            crossed = [
                c for c in crossings.crossings(e.near, "naive", metric)
                if records.family(c.backend) == "flash"
            ]  # fmt: skip
            slower = [c for c in crossed if c.low > crossings.EVERYWHERE]
            text = f"{len(slower)} of {len(crossed)} slower than naive by {clock}"
            if slower:
                ends = [c.start for c in slower]
                low, high = (slower[0].bound(f(ends)) for f in (min, max))
                text += f", up to {low if low == high else f'{low} to {high}'} tokens"
            found[metric] = len(slower), len(crossed), text
        return first, found, "crossover-naive"
    if e.alone is None:
        return None, {}, None
    n, found = e.alone.lengths[0], {}
    for metric, clock in clocks.items():
        naive = e.alone.at("naive", n, metric)
        rows = [r for b in answers.challengers(e.alone) if (r := e.alone.at(b, n, metric))]
        if naive is not None and rows:
            slower = sum(answers.faster(naive, r) for r in rows)
            took = spread([r["p50"] * 1e3 for r in rows], "{:.1f}")
            text = f"{slower} of {len(rows)} slower than naive by {clock} ({took} µs, naive"
            found[metric] = slower, len(rows), f"{text} {naive['p50'] * 1e3:.1f})"
    return n, found, "attention-runtime"


def overhead(e):
    claim = "It has a slight overhead at very small lengths, from the kernel's set-up."
    rule = "confirmed: at the shortest length most flash backends are slower than naive beyond the"
    rule += " noise by the GPU's clock and by the host's; refined: some are, by one of them;"
    rule += " refuted: none is"
    n, found, picture = slower_at_first(e)
    if len(found) < 2 or not all(of for _, of, _ in found.values()):
        return Finding(claim, rule, OPEN, "")
    verdict = REFUTED
    if all(slower > of / 2 for slower, of, _ in found.values()):
        verdict = CONFIRMED
    elif any(slower for slower, _, _ in found.values()):
        verdict = REFINED
    text = f"at {n:,} tokens " + "; ".join(text for _, _, text in found.values())
    return Finding(claim, rule, verdict, text, picture)


def gains(e):
    claim = "It is faster at medium and long lengths."
    rule = (
        f"confirmed: every flash backend beats naive and SDPA of the same precision from {MEDIUM:,}"
    )
    rule += " tokens on or before; refuted: not even naive by one; refined: in between"
    if e.alone is None:
        return Finding(claim, rule, OPEN, "")
    own, shares, said = answers.own_kernel(e.alone), [], []
    for rival in answers.RIVALS:
        found = [
            answers.crossover(e.alone, b, rival) for b in answers.challengers(e.alone)
            if rival != "sdpa" or b != own
        ]  # fmt: skip
        found = [c for c in found if c.kind != "none"]
        if not found:
            continue
        wins = [c for c in found if c.start is not None and c.start <= MEDIUM]
        shares.append(len(wins) / len(found))
        ratios = spread([c.ratio for c in found])
        said.append(
            f"{len(wins)} of {len(found)} beat {records.label(rival)} so, and are {ratios} times as"
            f" fast at the longest common length"
        )
    if not shares:
        return Finding(claim, rule, OPEN, "")
    verdict = CONFIRMED if all(x == 1 for x in shares) else REFINED if shares[0] else REFUTED
    return Finding(claim, rule, verdict, "; ".join(said), "attention-speedup")


def order(e):
    claim = "Its advantage is not a constant factor but a change of scaling."
    rule = f"of the memory: exponents at least {QUADRATIC} and at most {LINEAR}; of the time: the"
    rule += f" speed-up over naive grows with an exponent above {STEADY}. confirmed: both; refined:"
    rule += " one; refuted: neither"
    best = answers.champion(e.alone) if e.alone else None
    if best is None:
        return Finding(claim, rule, OPEN, "")
    theirs = dict(e.alone.series("naive", "time_ms"))
    ratios = [(n, theirs[n]["p50"] / r["p50"]) for n, r in e.alone.series(best, "time_ms")
              if n in theirs]  # fmt: skip
    stored, held, faster = growth(e.alone, "naive"), growth(e.alone, best), exponent(ratios)
    if None in (stored, held, faster):
        return Finding(claim, rule, OPEN, "")
    (n, first), (m, last) = ratios[len(ratios) // 2], ratios[-1]
    kept = [stored >= QUADRATIC and held <= LINEAR, faster > STEADY]
    verdict = CONFIRMED if all(kept) else REFINED if any(kept) else REFUTED
    text = (
        f"memory: exponent {stored:.2f} against {held:.2f}; time: {records.label(best)} is"
        f" {first:.1f} times as fast at {n:,} tokens and {last:.1f} at {m:,}, an exponent of"
        f" {faster:+.2f}"
    )
    return Finding(claim, rule, verdict, text, "attention-speedup")


def fair(e):
    claim = "Naive and SDPA in fp32 against flash in fp16 tell the algorithms apart."
    rule = (
        "refuted: of the speed-up over naive and over SDPA, more than half (on a logarithmic scale)"
    )
    rule += " is the precision's; refined: over one of them; confirmed: over none"
    backend = answers.champion(e.pair.half) if e.pair else None
    found = {}
    for rival in answers.RIVALS if backend else ():
        if splits := answers.splits(e.pair, backend, rival):
            found[rival] = splits[-1]
    if not found:
        return Finding(claim, rule, OPEN, "")
    said = [
        f"{s.mixed:.1f} times as fast as {records.label(rival)} at {s.n:,} tokens ="
        f" {s.precision:.1f} (precision) × {s.algorithm:.2f} (algorithm)"
        for rival, s in found.items()
    ]
    most = [s.precision > s.algorithm for s in found.values()]
    verdict = REFUTED if all(most) else REFINED if any(most) else CONFIRMED
    text = f"{records.label(backend)}: {'; '.join(said)}"
    return Finding(claim, rule, verdict, text, "attention-mixed-sdpa")


CLAIMS = (quadratic, impractical, better, pressure, linear, overhead, gains, order, fair)


def findings(evidence):
    return [claim(evidence) for claim in CLAIMS]


def evidence_in(folder):
    """The Evidence of a folder of record files. Raises records.RecordError, OSError."""
    files = {name: Path(folder) / f"{name}.jsonl" for name in FILES}
    rows = {name: records.read(path) if path.exists() else [] for name, path in files.items()}
    return Evidence(*(rows[name] for name in FILES))


def markdown(folder=REFERENCE, pictures="figures"):
    """The table, with the rules below it and what it was made from."""
    evidence = evidence_in(folder)
    found = findings(evidence)
    lines = ["| the study's claim | here | by these numbers |", "| :-- | :-- | :-- |"]
    for f in found:
        seen = f" ([picture]({pictures}/{f.picture}.png))" if f.picture and f.evidence else ""
        lines.append(f"| {f.claim} | **{f.verdict}** | {f.evidence}{seen} |")
    lines += ["", "<details><summary>The rules by which the verdicts fell</summary>", ""]
    lines += [f"{i}. {upper(f.rule)}." for i, f in enumerate(found, 1)]
    lines += [
        "",
        "An exponent is the slope of the logarithms over the longer half of the lengths.",
        "</details>",
    ]
    if evidence.alone is not None:
        lines += ["", f"<sub>{evidence.alone.title()}. {evidence.alone.provenance()}."]
        lines[-1] += " `python figures/claims.py`</sub>"
    return "\n".join(lines) + "\n"


def upper(text):
    return text[0].upper() + text[1:]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=REFERENCE)
    args = parser.parse_args(argv)
    try:
        print(markdown(args.folder), end="")
    except (OSError, records.RecordError) as e:
        parser.error(f"argument folder: {e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
