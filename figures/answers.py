"""What the records say, in words and small tables. Reads a records.Sweep, draws nothing.

"Faster" respects the noise: the slow fifth of one (p80) must still beat the quick fifth of the
other (p20), and its slowest round the other's quickest. A crossover is the length from which a
backend is faster at every measured length on.
"""

from typing import NamedTuple

from flashstudy.figures import records

RIVALS = ("naive", "sdpa")


class Crossover(NamedTuple):
    """kind: "everywhere" in the range, "from" `start` on, "never", "gone" (faster at `wins`, but
    not at the longest common length), or "none" (no common length). ratio: the rival's time over
    the backend's at `longest`, with the range [low, high] that the percentiles allow."""

    backend: str
    rival: str
    kind: str
    start: int | None = None
    first: int | None = None
    longest: int | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    wins: tuple = ()
    losses: tuple = ()

    def words(self):
        return {
            "everywhere": f"everywhere (≥ {self.first})",
            "from": f"{self.start}",
            "never": "never in this range",
            "gone": f"only at {', '.join(map(str, self.wins))}",
            "none": "no common length",
        }[self.kind]


def faster(a, b, margin=1.0):
    """Whether row a is faster than row b beyond their noise, by more than a factor `margin`.

    Rounds alternate between the backends, so a disturbance that lasts spoils one round of many.
    """

    def medians(row, otherwise):  # of the rounds; the ladder and the peers call them turns
        return row.get("rounds") or row.get("turns") or [row[otherwise]]

    if not a["p80"] * margin < b["p20"]:
        return False
    return max(medians(a, "p80")) * margin < min(medians(b, "p20"))


def crossover(sweep, backend, rival, metric="time_ms"):
    mine, theirs = dict(sweep.series(backend, metric)), dict(sweep.series(rival, metric))
    common = [n for n in sweep.lengths if n in mine and n in theirs]
    if not common:
        return Crossover(backend, rival, "none")
    wins = tuple(n for n in common if faster(mine[n], theirs[n]))
    losses = tuple(n for n in common if faster(theirs[n], mine[n]))
    start = None
    for n in reversed(common):
        if n not in wins:
            break
        start = n
    if start == common[0]:
        kind = "everywhere"
    elif start is not None:
        kind = "from"
    else:
        kind = "gone" if wins else "never"
    a, b = mine[common[-1]], theirs[common[-1]]
    return Crossover(
        backend, rival, kind, start, common[0], common[-1], b["p50"] / a["p50"],
        b["p20"] / a["p80"], b["p80"] / a["p20"], wins, losses,
    )  # fmt: skip


def challengers(sweep):
    """The flash backends, which are held against the rivals."""
    return [b for b in sweep.backends("ok") if records.family(b) == "flash"]


def crossovers(sweep):
    return [
        crossover(sweep, backend, rival)
        for rival in RIVALS
        if rival in sweep.backends("ok")
        for backend in challengers(sweep)
    ]


def crossover_table(sweep):
    """(header, rows): per flash backend, from where and by how much it beats each rival."""
    found = {(c.backend, c.rival): c for c in crossovers(sweep)}
    rivals = [r for r in RIVALS if any(r == rival for _, rival in found)]
    header = ["backend"]
    for r in rivals:
        header += [f"beats {records.label(r)} from N =", "times as fast", "at N ="]
    rows = []
    for backend in dict.fromkeys(b for b, _ in found):
        row = [records.label(backend)]
        for c in (found[backend, r] for r in rivals):
            if c.rival == "sdpa" and backend == own_kernel(sweep):
                row += ["is the kernel it runs", "–", "–"]
                continue
            ratio = "–" if c.ratio is None else f"{c.ratio:.2f}×"
            row += [c.words(), ratio, "–" if c.longest is None else c.longest]
        rows.append(row)
    return header, rows


def picked(sweep):
    """{length: kernel} that torch's own SDPA ran, where recorded."""
    return {
        n: row["sdpa_kernel"]
        for n, row in sweep.series("sdpa", "time_ms")
        if row.get("sdpa_kernel") is not None
    }


def own_kernel(sweep):
    """The backend that is the one kernel that SDPA ran at every length, or None.

    One kernel by two names: to compare them is to compare noise.
    """
    kernels = set(picked(sweep).values())
    return f"sdpa-{kernels.pop()}" if len(kernels) == 1 else None


class Slope(NamedTuple):
    """Memory of one backend as bytes per token (B·N of them): fitted line, and what is expected."""

    backend: str
    fitted: float
    analytic: float | None
    worst: (
        float  # largest relative distance of a measured cell from the line, upper half of lengths
    )
    linear: bool


def slopes(sweep):
    """Straight lines through the delta peaks of the flash backends, by least squares."""
    found = []
    for backend in sweep.backends("ok"):
        points = [
            (r["B"] * n, r["value"] * 2**20) for n, r in sweep.series(backend, "peak_delta_mib")
        ]
        if records.family(backend) == "standard" or len(points) < 3:
            continue
        mean_x = sum(x for x, _ in points) / len(points)
        mean_y = sum(y for _, y in points) / len(points)
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points)
        slope /= sum((x - mean_x) ** 2 for x, _ in points)
        line = [(y, mean_y + slope * (x - mean_x)) for x, y in points[len(points) // 2 :]]
        worst = max(abs(y - fit) / max(abs(fit), 1.0) for y, fit in line)
        row = sweep.series(backend, "peak_delta_mib")[-1][1]
        floor = row.get("floor_mib")
        analytic = None if floor is None else floor * 2**20 / points[-1][0]
        found.append(Slope(backend, slope, analytic, worst, worst <= 0.05))
    return found


def size(mib):
    """3.2 MiB, 64 GiB: two to three digits."""
    unit, value = ("MiB", mib) if mib < 1024 else ("GiB", mib / 1024)
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def _names(backends):
    labels = [records.label(b) for b in backends]
    return labels[0] if len(labels) == 1 else ", ".join(labels[:-1]) + " and " + labels[-1]


def _against(sweep, rival):
    """Sentences on every flash backend against one rival."""
    found = [crossover(sweep, b, rival) for b in challengers(sweep)]
    found = [c for c in found if c.kind != "none"]
    name = records.label(rival)
    kernels = list(dict.fromkeys(picked(sweep).values())) if rival == "sdpa" else []
    if kernels:
        name += f" (torch ran its {' and '.join(kernels)} kernel)"
    if rival == "sdpa" and any(c.backend == own_kernel(sweep) for c in found):
        found = [c for c in found if c.backend != own_kernel(sweep)]
        if not found:
            same = records.label(own_kernel(sweep))
            yield f"{name} and {same} run one kernel, and no other flash backend ran."
    if not found:
        return
    groups = {}
    for c in found:
        phrase = {
            "everywhere": f"everywhere in this range (from {c.first} tokens)",
            "from": f"from {c.start} tokens on",
            "never": "never in this range",
            "gone": f"only at {', '.join(map(str, c.wins))} tokens and not at the longest length",
        }[c.kind]
        groups.setdefault((c.kind, c.start or 0, phrase), []).append(c)
    order = ("everywhere", "from", "gone", "never")
    parts = [
        f"{_names([c.backend for c in groups[k]])} {k[2]}"
        for k in sorted(groups, key=lambda k: (order.index(k[0]), k[1]))
    ]
    yield f"Faster than {name} beyond the noise: {'; '.join(parts)}."

    longest = max(c.longest for c in found)
    found = sorted((c for c in found if c.longest == longest), key=lambda c: -c.ratio)
    text = f"At {longest}, the longest length that both finished, {records.label(rival)} takes"
    best, least = found[0], found[-1]
    text += f" {best.ratio:.2f} times as long as {records.label(best.backend)}"
    text += f" ({best.low:.2f} to {best.high:.2f} within p20 and p80)"
    if least is not best:
        text += f" and {least.ratio:.2f} times as long as {records.label(least.backend)}"
    yield text + "."


def _memory(sweep):
    total = sweep.row.get("memory_mib")
    for backend in sweep.backends("oom"):
        gone = [n for n in sweep.lengths if sweep.status(backend, n) == "oom"]
        mib, scaled = sweep.predicted_mib(backend, gone[0])
        text = f"{records.label(backend)} ran out of memory at {', '.join(map(str, gone))} tokens"
        if mib is not None and scaled and total and mib < total / 8:
            # Not the backend's own need: what else the process held, or its set-up, filled the GPU.
            text += f", though its line leads to {size(mib)} at {gone[0]}: look at the row's reason"
        elif mib is not None:
            text += f": at {gone[0]} it would have needed {size(mib)}"
            text += " (scaled from its longest measured length)" if scaled else ""
            text += f" beyond its inputs, of {size(total)} in all" if total else ""
        yield text + "."
    lines = [s for s in slopes(sweep) if s.linear]
    bent = [s for s in slopes(sweep) if not s.linear]
    if lines:
        low, high = min(s.fitted for s in lines), max(s.fitted for s in lines)
        who = f"the {len(lines)} backends without stored scores"
        if len(lines) <= 3:
            who = _names([s.backend for s in lines])
        text = f"Memory of {who} grows linearly:"
        text += f" {low:,.0f}" + (f" to {high:,.0f}" if round(low) != round(high) else "")
        text += " bytes a token fitted"
        if lines[0].analytic is not None:
            text += ", where the tensors that any implementation must hold make"
            least = min(s.analytic for s in lines if s.analytic is not None)
            text += f" {least:,.0f}"
            more = {f"{s.analytic:,.0f}": s.backend for s in lines if s.analytic is not None}
            del more[f"{least:,.0f}"]
            for number, backend in more.items():
                text += f", {number} with the sums of dQ that {records.label(backend)} keeps"
        yield text + "."
    for s in bent:
        n, row = sweep.series(s.backend, "peak_delta_mib")[-1]
        text = f"Memory of {records.label(s.backend)} is {size(row['value'])} at {n} tokens and"
        yield f"{text} does not fit one straight line (off by up to {s.worst:.0%})."


def words(sweep):
    """The answer for one sweep, a list of sentences; the first says what was measured."""
    where = "Inside the block" if sweep.scope == "block" else "Attention alone"
    said = [f"{where} ({sweep.title()}; {sweep.about['device']})."]
    for rival in RIVALS:
        said += _against(sweep, rival)
    if len(said) == 1:
        said.append("No flash backend was measured beside Naive or SDPA at this precision.")
    said += _memory(sweep)
    for status, text in (("wrong", "was wrong and not timed"), ("failed", "failed")):
        for backend in sweep.backends(status):
            row = next(
                m["time_ms"] for (b, _), m in sweep.cells.items()
                if b == backend and m["time_ms"]["status"] == status
            )  # fmt: skip
            said.append(f"{records.label(backend)} {text}: {row['reason']}.")
    return said


class Split(NamedTuple):
    """Speed-up over naive at one length when the precision differs too, and its two factors."""

    n: int
    mixed: float  # t(rival, fp32) / t(flash, half)
    precision: float  # t(rival, fp32) / t(rival, half)
    algorithm: float  # t(rival, half) / t(flash, half)
    share: float  # of precision, on the logarithmic scale on which the factors add up
    tf32: float | None  # t(rival, fp32) / t(rival, TF32): the part of precision that no dtype needs


class Pair(NamedTuple):
    """Sweeps of the same thing in fp32 and in half precision, and in fp32 multiplied as TF32."""

    wide: "records.Sweep"
    half: "records.Sweep"
    tf32: "records.Sweep | None" = None


def splits(pair, backend, rival):
    """mixed = precision × algorithm, at every length where all three times were measured."""
    import math

    slow, same, quick = (
        dict(s.series(b, "time_ms"))
        for s, b in ((pair.wide, rival), (pair.half, rival), (pair.half, backend))
    )
    between = dict(pair.tf32.series(rival, "time_ms")) if pair.tf32 else {}
    found = []
    for n in sorted(slow.keys() & same.keys() & quick.keys()):
        precision = slow[n]["p50"] / same[n]["p50"]
        algorithm = same[n]["p50"] / quick[n]["p50"]
        mixed = precision * algorithm
        share = math.log(precision) / math.log(mixed) if mixed > 1 else math.nan
        tf32 = slow[n]["p50"] / between[n]["p50"] if n in between else None
        found.append(Split(n, mixed, precision, algorithm, share, tf32))
    return found


def champion(sweep):
    """The flash backend that is quickest at the most lengths, earlier in the table on ties."""
    wins = dict.fromkeys(challengers(sweep), 0)
    for n in sweep.lengths:
        times = {b: r["p50"] for b in wins if (r := sweep.at(b, n, "time_ms"))}
        if times:
            wins[min(times, key=times.get)] += 1
    return max(wins, key=wins.get) if wins else None


def pairs(all_sweeps):
    """A Pair of each thing that was swept in fp32 and in half precision, fp16 before bf16."""
    same = ("scope", "direction", "causal", "B", "E", "H", "H_KV", "D", "device", "torch")
    found = []
    for wide in (s for s in all_sweeps if s.dtype == "float32"):
        others = [
            s
            for s in all_sweeps
            if s.dtype != "float32" and all(s.about[k] == wide.about[k] for k in same)
        ]
        halves = [s for s in others if s.dtype != "tf32"]
        if halves:
            half = min(halves, key=lambda s: s.dtype != "float16")
            found.append(Pair(wide, half, next((s for s in others if s.dtype == "tf32"), None)))
    return found


def mixed_table(pair):
    """(header, rows): the factors per rival and flash backend at their longest length."""
    name = {"float16": "fp16", "bfloat16": "bf16"}[pair.half.dtype]
    header = ["fp32 baseline", f"{name} flash", "at N =", "speed-up", "= precision", "× algorithm"]
    header += ["of the precision, TF32 alone"] * (pair.tf32 is not None)
    rows = []
    for rival in RIVALS:
        for backend in challengers(pair.half):
            for s in splits(pair, backend, rival)[-1:]:
                factors = [f"{x:.2f}×" for x in (s.mixed, s.precision, s.algorithm)]
                if pair.tf32 is not None:
                    factors.append("–" if s.tf32 is None else f"{s.tf32:.2f}×")
                rows.append([records.label(rival), records.label(backend), s.n, *factors])
    return header, rows


def mixed_words(pair):
    """How much of the quickest backend's advantage was precision: a sentence per rival."""
    said, backend = [], champion(pair.half)
    for rival in RIVALS:
        if found := splits(pair, backend, rival) if backend else None:
            s = found[-1]
            text = (
                f"{records.label(rival)} in fp32 takes {s.mixed:.2f} times as long as"
                f" {records.label(backend)} in {pair.half.dtype} at {s.n} tokens:"
                f" {s.precision:.2f}× is the precision, {s.algorithm:.2f}× the algorithm"
            )
            if s.precision >= 1 and s.algorithm >= 1 and s.mixed > 1:
                text += f" ({s.share:.0%} and {1 - s.share:.0%} of the gain, in logarithms)"
            if s.tf32 is not None:
                text += f"; fp32 tensors multiplied as TF32 already give {s.tf32:.2f}×"
            said.append(text + ".")
    return said
