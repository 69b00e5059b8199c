"""The README's sentences and small tables that take their numbers from several record files.

Text only: every number comes from records. What a file lacks is left out, never made up; which
words stand around a number follows from the number.
"""

from flashstudy.figures import answers, crossings, grid, records, roofline

LONG_HAUL = 0.02  # a difference of speed below this is called level


def names(backends):
    """Labels, joined as a sentence has them."""
    labels = [records.label(b) for b in backends]
    return labels[0] if len(labels) == 1 else ", ".join(labels[:-1]) + " and " + labels[-1]


def span(values, form):
    """'4.0 to 11', or one of them where both read the same."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def times(x):
    """How many times as fast."""
    return f"{x:.1f}" if x < 19.95 else f"{x:.0f}"


def one(found, **wanted):
    return next((s for s in found if all(s.about[k] == v for k, v in wanted.items())), None)


# From which length


def from_where(found):
    """'every … kernel from 16 tokens on', with those that begin later or never named.

    found: crossings against one rival on one clock.
    """
    first, last = found[0].first, found[0].last
    always = [c for c in found if c.start == crossings.EVERYWHERE]
    never = [c for c in found if c.start == crossings.NEVER]
    later = sorted((c for c in found if c not in always and c not in never), key=lambda c: c.start)
    named = [f"{records.label(c.backend)} from {c.bound(c.start)}" for c in later]
    if never:
        named.append(f"{names([c.backend for c in never])} not up to {last:,}")
    if not named:
        return f"all {len(found)} from {first} tokens on"
    if not always:
        return f"{', '.join(named)} tokens on"
    if len(named) > 3:  # too many to name each
        starts = [c.bound(c.start) for c in later]
        rest = f"{len(later)} more from {starts[0]} to {starts[-1]}" if later else ""
        named = [text for text in (rest, *named[len(later) :]) if text]
    return f"{len(always)} of {len(found)} from {first} tokens on, {', '.join(named)}"


def of_family(found, rival, metric):
    """The crossings of the flash kernels alone."""
    return [
        c for c in crossings.crossings(found, rival, metric)
        if records.family(c.backend) == "flash" and not c.same
    ]  # fmt: skip


# The answer


def answer(seqlen, near, mixed, why):
    """The answer in one paragraph. seqlen, mixed: sweeps; near: crossings' base sweep or None; why:
    a roofline.Study."""
    block = one(seqlen, scope="block", direction="forward")
    about = block.about
    said = [
        f"On an {about['device']}, in {about['dtype']}, {'causal' if about['causal'] else 'full'},"
        f" batch {about['B']} with {about['H']} heads of {about['D']}:"
    ]
    said += [f"**{text}**" for text in [" ".join(_naive(block, near))] if text]
    said += [*_host(near), *_why(why), *_sdpa(block), *_precision(mixed)]
    return " ".join(said)


def _naive(block, near):
    """Against standard attention: from where, by how much, and what does not fit."""
    # By graph replay: events around a short call also see its kernels wait for their launches.
    found = of_family(near, "naive", "graph_ms") if near is not None else []
    if found:
        yield (
            "by the GPU's own clock FlashAttention's kernels are faster than standard attention at"
            f" almost any length, {from_where(found)}."
            if any(c.start == crossings.EVERYWHERE for c in found)
            else f"by the GPU's own clock FlashAttention's kernels are faster than standard"
            f" attention from some length on: {from_where(found)}."
        )
    ratios = [c for b in answers.challengers(block)
              if (c := answers.crossover(block, b, "naive")).kind != "none"]  # fmt: skip
    if ratios:
        longest = max(c.longest for c in ratios)
        some = [c.ratio for c in ratios if c.longest == longest]
        yield (
            f"Inside a Transformer block they are {span(some, times)} times as fast at"
            f" {longest:,} tokens"
        )
        gone = [n for n in block.lengths if block.status("naive", n) == "oom" and n > longest]
        need = block.predicted_mib("naive", gone[0])[0] if gone else None
        held = [r["value"] for b in answers.challengers(block)
                if gone and (r := block.at(b, gone[0], "peak_delta_mib"))]  # fmt: skip
        if need is not None and held:
            yield (
                f"and at {gone[0]:,} standard attention no longer fits: it needs"
                f" {answers.size(need)} where theirs needs {answers.size(min(held))}."
            )
        else:
            yield "."


def _host(near):
    """What a caller from Python waits for."""
    found = of_family(near, "naive", "host_ms") if near is not None else []
    if found:
        text = f"Called one by one from Python: {from_where(found)}"
        if any(c.start != crossings.EVERYWHERE for c in found):
            text += "; what loses there is the launcher, not the algorithm"
        yield text + "."


def _why(why):
    """Where naive becomes bound by memory."""
    calls = why.calls("naive") if why is not None and why.base is not None else []
    start = None
    for c in reversed(calls):
        if not roofline.heavy(why, c):
            break
        start = c
    if start is not None:
        mask = "causal" if why.base.about["causal"] else "full"
        yield (
            "*Why:* standard attention writes N² scores and reads them back, and from"
            f" {start.n:,} tokens on ({mask} mask) moving them costs more than"
            f" {roofline.HEAVY:g} times what computing with them does."
        )


def _sdpa(block):
    """Against torch's own, which is one of them."""
    kernel = answers.own_kernel(block)
    found = [
        c for b in answers.challengers(block)
        if b != kernel and (c := answers.crossover(block, b, "sdpa")).kind != "none"
    ]  # fmt: skip
    if not found:
        return
    longest = max(c.longest for c in found)
    found = sorted((c for c in found if c.longest == longest), key=lambda c: -c.ratio)
    text = "Against PyTorch's SDPA the answer is another one"
    if kernel in records.table() and records.family(kernel) == "flash":
        text += f", because on this GPU SDPA *is* such a kernel ({records.label(kernel)})"
    ahead = [c for c in found if c.ratio > 1 + LONG_HAUL]
    level = [c for c in found if abs(c.ratio - 1) <= LONG_HAUL]
    parts = []
    if ahead:
        percent = span([c.ratio - 1 for c in ahead], lambda x: f"{x * 100:.0f}")
        verb = "is" if len(ahead) == 1 else "are"
        parts.append(f"{names([c.backend for c in ahead])} {verb} {percent} % faster")
    if level:
        parts.append(f"{names([c.backend for c in level])} within {LONG_HAUL:.0%}")
    slower = len(found) - len(ahead) - len(level)
    if slower:
        parts.append(f"{slower} of {len(found)} slower")
    yield f"{text}: at {longest:,} tokens, in the block, {', '.join(parts)}."


def _precision(mixed):
    """How much of a comparison of fp32 with fp16 is the precision."""
    for pair in answers.pairs(mixed):
        backend = answers.champion(pair.half)
        parts = {}
        for rival in answers.RIVALS:
            if pair.wide.scope == "block" and backend and (
                found := answers.splits(pair, backend, rival)
            ):  # fmt: skip
                parts[rival] = found[-1]
        if parts:
            texts = [
                f"{times(s.mixed)} times as fast as {records.label(rival)}, a factor of"
                f" {times(s.precision)} of which is the precision"
                for rival, s in parts.items()
            ]
            yield (
                f"And where a study compares fp32 with fp16, {records.label(backend)} looks"
                f" {', and '.join(texts)}."
            )
            return


# Why, in a line each


def why_lines(study):
    """{title: the first sentences of each explanation}, for whoever does not read them all."""
    return {title: first_sentences(text, 2) for title, text in roofline.paragraphs(study).items()}


def first_sentences(text, count):
    """The first `count` sentences; a sentence ends with a full stop before a capital."""
    found, start = [], 0
    for i in range(len(text) - 2):
        if text[i] == "." and text[i + 1] == " " and text[i + 2].isupper():
            found.append(text[start : i + 1])
            start = i + 2
            if len(found) == count:
                return " ".join(found)
    return text


# Ours beside the libraries


def peers_summary(found, backends):
    """(header, rows): speed of ours over each library's: geometric mean, range, cells ahead."""
    ours, peers = grid.sides(backends)
    header = ["", "", *map(records.label, peers), "the best of them"]
    rows = []
    for direction in grid.DIRECTIONS:
        for name in ours:
            cells = []
            for rivals in (*([p] for p in peers), peers):
                ratios = [
                    r for cell, of_cell in found.items()
                    if cell.direction == direction
                    and (r := grid.ratio(of_cell, name, rivals)) is not None
                ]  # fmt: skip
                cells.append(ratio_words(ratios))
            if any(c != "–" for c in cells):
                rows.append([records.label(name), direction, *cells])
    return header, rows


def ratio_words(ratios):
    """'1.08 (1.00 to 1.15), 36 of 36': mean, range, in how many cells ahead."""
    if not ratios:
        return "–"
    low, high = min(ratios), max(ratios)
    ahead = sum(r >= 1 for r in ratios)
    mean = grid.geometric_mean(ratios)
    return f"**{mean:.2f}** ({low:.2f} to {high:.2f}), {ahead} of {len(ratios)}"


def train_words(study):
    """How fast ours trains beside the fastest other, tokens a second, mean over the seeds."""
    rates = {}
    for group in study.groups.values():
        for name, run in group.runs.items():
            if run.ok and run.rate is not None:
                rates.setdefault(name, []).append(run.rate["p50"])
    means = {name: sum(x) / len(x) for name, x in rates.items()}
    others = [n for n in means if n in records.table()]
    ours = [n for n in means if n not in records.table()]
    if not ours or not others:
        return None
    best = max(others, key=means.get)
    return (
        f"It trains {means[ours[0]] / 1e6:.2f} million tokens a second; the fastest other,"
        f" {records.label(best)}, {means[best] / 1e6:.2f}."
    )


def small_words(rows, backends, dtype="bfloat16"):
    """What the shortest small call costs the GPU and the host, over the backends."""
    spans = {}
    for metric in ("graph_ms", "host_ms"):
        cells = grid.by_cell(rows, backends, dtype, metric)
        cells = {cell: found for cell, found in cells.items() if cell.direction == "forward"}
        if not cells:
            return None
        cell = min(cells, key=lambda c: c.length)
        found = {n: r["p50"] * 1e3 for n, r in cells[cell].items() if r["status"] == "ok"}
        spans[metric] = cell, found
    cell, gpu = spans["graph_ms"]
    host = spans["host_ms"][1]
    low, high = min(host, key=host.get), max(host, key=host.get)
    return (
        f"At {cell.length} tokens (batch {cell.batch}, {cell.heads} heads of {cell.head_dim}) a"
        f" call is {span(gpu.values(), lambda x: f'{x:.1f}')} µs of work for the GPU, and"
        f" {host[low]:.0f} ({records.label(low)}) to {host[high]:.0f} µs ({records.label(high)})"
        " for the host that launches it."
    )


# Memory


def memory_words(study):
    """How much flash adds at the longest length, and where naive ends, in two sentences."""
    of_direction = {}
    for line in study.lines():
        if records.family(line.backend) == "flash":
            of_direction.setdefault(line.direction, []).append(line)
    said = []
    for direction, lines in of_direction.items():
        longest = max(x.longest for x in lines)
        some = [x.mib for x in lines if x.longest == longest]
        what = "forward" if direction == "forward" else "forward and backward"
        said.append(f"{span(some, answers.size)} over {longest:,} tokens {what}")
    if not said:
        return None
    about = study.sweeps[0].about
    text = (
        f"At batch {about['B']} with {about['H']} heads of {about['D']} a call adds"
        f" {', and '.join(said)}."
    )
    for end in study.ends():
        what = "forward" if end.direction == "forward" else "with the backward"
        if end.as_predicted:
            text += (
                f" {records.label(end.backend)} runs to {end.under:,} tokens {what} and not to"
                f" {end.over:,}, as predicted ({end.predicted:,}, {end.bracket:.1%} of the bytes"
                " between the two)."
            )
        else:
            text += (
                f" {records.label(end.backend)} was predicted to end at {end.predicted:,} tokens"
                f" {what}; {end.under:,} was {end.under_status}, {end.over:,} {end.over_status}."
            )
    return text
