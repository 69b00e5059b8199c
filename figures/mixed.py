"""How much of a speed-up was precision? Charts of a run of bench/seqlen.py --protocol mixed.

    python figures/mixed.py results/seqlen-mixed-nvidia-h200.jsonl --out figures

Timing Naive in float32 against flash in half precision mixes two things. With Naive timed in half
precision too, speed-up = precision × algorithm, exactly:

    naive fp32 / flash fp16  =  naive fp32 / naive fp16  ×  naive fp16 / flash fp16      (times)

On a logarithmic axis the factors add up, so the bars are stacked there. The precision's factor is
in two parts where Naive was also timed with fp32 tensors multiplied as TF32 (10 bits).
"""

import sys

from flashstudy.figures import answers, cli, records, style

SHORT = {"float16": "fp16", "bfloat16": "bf16"}


def chart(pair, backend, rival):
    found, half = answers.splits(pair, backend, rival), pair.half
    if not found:
        return None
    fig, ax, _ = style.axes()
    x, name = range(len(found)), records.label(rival)
    # Each bar runs from 1 to its factor: precision first, the algorithm on top of it.
    stepped = all(s.tf32 is not None for s in found)
    first = [s.tf32 if stepped else 1 for s in found]
    middle = [s.precision for s in found]
    if stepped:
        ax.bar(
            x, [f - 1 for f in first], 0.62, bottom=1, color=style.YELLOW, edgecolor="black",
            hatch="..", label=f"precision: {name} fp32 → TF32",
        )  # fmt: skip
    ax.bar(
        x, [m - f for m, f in zip(middle, first, strict=True)], 0.62, bottom=first,
        color=style.ORANGE, edgecolor="black",
        label=f"precision: {name} {'TF32' if stepped else 'fp32'} → {SHORT[half.dtype]}",
    )  # fmt: skip
    ax.bar(
        x, [s.mixed - m for s, m in zip(found, middle, strict=True)], 0.62, bottom=middle,
        color=style.SKY, edgecolor="black", hatch="//",
        label=f"algorithm: {name} → {records.label(backend)}, {SHORT[half.dtype]}",
    )  # fmt: skip
    for i, s in enumerate(found):
        ax.annotate(
            f"{s.mixed:.1f}×", (i, max(s.mixed, s.precision, 1)), xytext=(0, 4),
            textcoords="offset points", ha="center", fontsize=11, fontweight="bold",
        )  # fmt: skip
        steps = [(1, first[i]), (first[i], s.precision)]
        for low, high in steps:
            if high > 1.25 * low:
                ax.annotate(
                    f"{high / low:.1f}×", (i, (low * high) ** 0.5), ha="center", va="center",
                    fontsize=10, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
                )  # fmt: skip
        if not 0.85 < s.algorithm < 1.25:
            ax.annotate(
                f"{s.algorithm:.2g}×", (i, s.precision * s.algorithm**0.5), ha="center",
                va="center", fontsize=10,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2},
            )  # fmt: skip
    ax.axhline(1, color="black", linewidth=1)
    style.value_axis(ax, f"times as fast as {records.label(rival)} in fp32")
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.9), high * 1.25)
    ax.set_yticks([t for t in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= t <= high])
    ax.minorticks_off()
    ax.set_xticks(list(x), [style.tokens(s.n) for s in found])
    ax.grid(axis="x", visible=False)
    ax.set_xlabel("sequence length (tokens)")
    where = "Block" if pair.wide.scope == "block" else "Attention"
    style.finish(
        fig, ax, f"How much of it was precision? {where}, {pair.wide.direction}",
        f"{half.title()}; {name} also float32{' and TF32' if stepped else ''}. {half.provenance()}",
        ["Bars start at 1 and multiply: total = precision × algorithm, on a logarithmic axis."
         " A factor below 1 takes away: its part hangs from the top of the other."],
        columns=1,
    )  # fmt: skip
    return fig


def draw(found, directory):
    """Write a chart per scope, direction and rival that the sweeps hold both precisions of."""
    paths = []
    for pair in answers.pairs(found):
        backend = answers.champion(pair.half)
        for rival in answers.RIVALS:
            fig = chart(pair, backend, rival) if backend else None
            if fig is not None:
                name = f"{pair.wide.scope}-mixed-{rival}"
                name += "" if pair.wide.direction == "forward" else f"-{pair.wide.direction}"
                digests = [s.digest() for s in pair if s is not None]
                paths += style.save(fig, directory, name, *digests)
    return paths


def main(argv=None):
    return cli.main(
        argv, __doc__, "bench/seqlen.py --protocol mixed",
        lambda found, args: draw(found, args.out), records.sweeps,
        nothing="no backend was timed in float32 and in half precision",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
