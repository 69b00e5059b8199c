"""Fill the tables of the documents from the reference records and the table of backends.

    python figures/table.py                     # rewrite what stands between the markers
    python figures/table.py --check             # exit code 1 where a file is stale
    python figures/table.py --print seqlen-block

A table stands between <!-- table:NAME --> and <!-- /table -->; what is there is replaced. Names:
NAMES
"""

import argparse
import functools
import re
import subprocess
import sys
from pathlib import Path

from flashstudy.figures import (
    answers,
    both,
    claims,
    crossings,
    grid,
    memory,
    records,
    roofline,
    style,
    summary,
    train,
    validated,
)

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "figures" / "reference"
DOCUMENTS = ("README.md", "kernels/README.md", "figures/RESULTS.md")
MARKED = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.DOTALL)
COMMANDS = {
    "seqlen": "python bench/seqlen.py",
    "both": "python bench/reference.py --only both",
    "mixed": "python bench/seqlen.py --protocol mixed --backends naive sdpa sdpa-flash sdpa-cudnn"
    " flash-attn flash-attn-4 v1_flash v6_persistent",
    "ladder": "python bench/ladder.py",
    "peers": "python bench/peers.py",
    "small": "python bench/ladder.py --small-calls",
    "decode": "python bench/decode.py",
    "crossover": "python bench/crossover.py",
    "roofline": "python bench/roofline.py",
    "memory": "python bench/memory.py",
    "train": "python bench/train.py",
    "peers-long": "python bench/peers.py --long",
    "validate": "python validate/check_outputs.py",
    "all": "python bench/reference.py",
}


ABSENT = "Not in these records; `{}` measures it.\n"


class TableError(Exception):
    """A table that cannot be made; says why."""


def markdown(header, rows):
    """A GitHub table, the first column left and the others right."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(str(c) for c in line)} |\n" for line in lines)


def sweeps(file, **wanted):
    """The sweeps of a reference file whose fields are as asked."""
    path = REFERENCE / f"{file}.jsonl"
    try:
        found = records.sweeps(records.read(path))
    except (OSError, records.RecordError) as e:
        raise TableError(f"{path}: {e}") from None
    found = [s for s in found if all(s.about[k] == v for k, v in wanted.items())]
    if not found:
        raise TableError(f"{path}: no sweep with {wanted}")
    return found


def ran(row, program):
    """The command that made a row, as it stands there; else how its program is called."""
    return (row.get("command") or COMMANDS[program]).replace(" --no-charts", "")


def ran_all(sweep, program):
    """The commands that made the rows of a sweep, the newest last, in code marks."""
    rows = sorted((m["time_ms"] for m in sweep.cells.values()), key=lambda r: r.get("utc") or "")
    return " and ".join(f"`{c}`" for c in dict.fromkeys(ran(row, program) for row in rows))


def caption(one, file):
    return f"\n<sub>{one.title()}. {one.provenance()}. {ran_all(one, file)}</sub>\n"


def by_length(scope, metric, form):
    """Backends down, lengths across; what has no number says why."""
    one = sweeps("seqlen", scope=scope, direction="forward")[0]
    rows = []
    for backend in one.backends("ok", "oom", "failed", "wrong"):
        cells = []
        for n in one.lengths:
            row, status = one.at(backend, n, metric), one.status(backend, n)
            cells.append(form(row["p50"]) if row else {"ok": "–", None: "–"}.get(status, status))
        rows.append([records.label(backend), *cells])
    header = ["", *(style.tokens(n) for n in one.lengths)]
    return markdown(header, rows) + caption(one, "seqlen")


def significant(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def crossovers(scope):
    one = sweeps("seqlen", scope=scope, direction="forward")[0]
    header, rows = answers.crossover_table(one)
    return markdown(header, rows) + caption(one, "seqlen")


def forward_and_backward():
    """ms of both together in the block, and our fastest against the fastest other."""
    one = next(both.pairs(sweeps("both", scope="block")), None)
    if one is None:
        raise TableError(f"{REFERENCE / 'both.jsonl'}: not in both directions")
    rows = []
    for backend in one.backends("ok", "oom", "failed", "wrong"):
        found = [(one.at(backend, n, "time_ms"), one.status(backend, n)) for n in one.lengths]
        cells = [significant(row["p50"]) if row else status or "–" for row, status in found]
        rows.append([records.label(backend), *cells])
    best = both.fastest(one, [n for n in records.table() if re.match(r"v\d+_", n)])
    cells = [f"{best[n][2]:.2f}×" if n in best else "–" for n in one.lengths]
    rows.append(["*our fastest over the best other*", *cells])
    header = ["", *(style.tokens(n) for n in one.lengths)]
    return markdown(header, rows) + caption(one, "both")


def memory_fit():
    one = sweeps("seqlen", scope="block", direction="forward")[0]
    rows = [
        [
            records.label(s.backend),
            f"{s.fitted:,.0f}",
            "–" if s.analytic is None else f"{s.analytic:,.0f}",
            f"{s.worst:.1%}",
        ]
        for s in answers.slopes(one)
    ]
    header = ["", "bytes/token, fitted", "analytic", "worst misfit"]
    return markdown(header, rows) + caption(one, "seqlen")


def short_calls():
    """Attention alone at the shortest length, by the GPU's clock and by the host's, in µs."""
    one = sweeps("seqlen", scope="attention", direction="forward")[0]
    n = one.lengths[0]
    rows = []
    for backend in one.backends("ok"):
        found = [one.at(backend, n, metric) for metric in ("graph_ms", "host_ms")]
        us = ["–" if r is None or r["p50"] is None else f"{r['p50'] * 1e3:.1f}" for r in found]
        rows.append([records.label(backend), *us])
    return markdown(["", "GPU (graph replay)", "host (eager call)"], rows) + caption(one, "seqlen")


def seqlen_words():
    return "\n".join(" ".join(answers.words(one)) + "\n" for one in sweeps("seqlen"))


def mixed():
    text = ""
    for pair in answers.pairs(sweeps("mixed")):
        header, rows = answers.mixed_table(pair)
        where = "Inside the block" if pair.wide.scope == "block" else "Attention alone"
        text += f"{where}:\n\n{markdown(header, rows)}{caption(pair.half, 'mixed')}\n"
    if not text:
        raise TableError(f"{REFERENCE / 'mixed.jsonl'}: no backend in both precisions")
    return text.rstrip("\n") + "\n"


def answer():
    """The README's first paragraph; of the record files beside seqlen's what is there counts."""
    seqlen = sweeps("seqlen")
    near = crossings.base(crossings.sweeps(kept("crossover")))
    why = roofline.Study(kept("roofline"))
    text = summary.answer(seqlen, near, records.sweeps(kept("mixed")), why)
    return f"{text}\n\n<sub>{seqlen[0].provenance()}. `{COMMANDS['all']}`</sub>\n"


def kept(file):
    """The rows of a reference file, none where there is no such file."""
    path = REFERENCE / f"{file}.jsonl"
    try:
        return records.read(path) if path.exists() else []
    except (OSError, records.RecordError) as e:
        raise TableError(f"{path}: {e}") from None


def why_short():
    study = study_of(roofline, "roofline")
    text = "".join(f"- **{t}.** {said}\n" for t, said in summary.why_lines(study).items())
    if not text:
        raise TableError(f"{REFERENCE / 'roofline.jsonl'}: nothing to say")
    about = f"{roofline.measured_on(study)}. `{ran(study.base.row, 'roofline')}`"
    return f"{text}\n<sub>{about}</sub>\n"


def peers_summary():
    found, names = gridded("peers")
    text = markdown(*summary.peers_summary(found, names))
    about = "Speed of ours over theirs: geometric mean (least to most), ahead in so many cells."
    return text + grid_caption(found, "peers").replace("<sub>", f"<sub>{about} ")


def small_words():
    rows = grid.newest(kept("small-calls"))
    names = {r["backend"] for r in rows if r["status"] == "ok"}
    text = summary.small_words(rows, [n for n in records.table() if n in names])
    if text is None:
        raise TableError(f"{REFERENCE / 'small-calls.jsonl'}: no small calls")
    row = max(rows, key=lambda r: r["utc"])
    return f"{text}\n\n<sub>{grid.provenance(row)}. `{ran(row, 'small')}`</sub>\n"


def trained():
    study = study_of(train, "train")
    said = [*study.words(), summary.train_words(study)]
    text = " ".join(x for x in said if x is not None)
    command = f"{ran(study.row, 'train')} --seeds {len(study.groups)}"
    return f"{text}\n\n<sub>{study.provenance()}. `{command}`</sub>\n"


def precision_words():
    text = ""
    for pair in answers.pairs(sweeps("mixed")):
        if said := answers.mixed_words(pair):
            where = "Inside the block" if pair.wide.scope == "block" else "Attention alone"
            text += f"{where}: {' '.join(said)} "
    if not text:
        raise TableError(f"{REFERENCE / 'mixed.jsonl'}: no backend in both precisions")
    return f"{text.rstrip()}\n{caption(pair.half, 'mixed')}"


def crossed_shortly():
    """From which length forward, by clock: what most readers want of the crossings."""
    return crossed(lambda found: [summary_of(crossings.base(found))])


def summary_of(base):
    parts = []
    for metric in crossings.clocks([base]):
        if found := summary.of_family(base, "naive", metric):
            parts.append(f"by {crossings.CLOCKS[metric]} {summary.from_where(found)}")
    return f"Faster than naive attention, of the flash kernels: {'; '.join(parts)}."


def validated_cases():
    """What the validator counted, where a run of it is on record."""
    rows = kept("validate")
    if not rows:
        return ABSENT.format(COMMANDS["validate"])
    header, counts, said = validated.tables(rows)
    text = f"{validated.total(rows)}\n\n{markdown(header, counts)}\n"
    text += "".join(f"- {sentence}\n" for sentence in said)
    command = rows[0].get("command", COMMANDS["validate"])
    return f"{text}\n<sub>{validated.provenance(rows)}. `{command}`</sub>\n"


def predicted():
    """How bench/explain.py's predictions did on the reference records."""
    paths = [p for name in ("seqlen", "mixed") if (p := REFERENCE / f"{name}.jsonl").exists()]
    text = checked(*paths, *(p.stat().st_mtime_ns for p in paths))
    one = sweeps("seqlen", scope="block", direction="forward")[0]
    command = (
        f"python bench/explain.py --check {' '.join(f'figures/reference/{p.name}' for p in paths)}"
    )
    return f"{text}\n<sub>{one.provenance()}. `{command}`</sub>\n"


@functools.cache
def checked(*paths_and_times):
    """What that program says of record files; of another GPU than it knows, that it cannot."""
    paths = [str(p) for p in paths_and_times if isinstance(p, Path)]
    program = [sys.executable, str(ROOT / "bench" / "explain.py"), "--markdown", "--check", *paths]
    ran = subprocess.run(program, capture_output=True, text=True)
    if ran.returncode == 2:
        return f"Not predicted: {ran.stderr.strip().splitlines()[-1]}\n"
    return ran.stdout


def peers_long():
    """The peers' table of the longest lengths, where they are on record."""
    if not kept("peers-long"):
        return ABSENT.format(COMMANDS["peers-long"])
    found, names = gridded("peers-long")
    header, rows = grid.peers_table(found, names)
    said = "".join(f"- {sentence}\n" for sentence in grid.peers_verdicts(found, names))
    return f"{markdown(header, rows)}\n{said}{grid_caption(found, 'peers-long')}"


def gridded(study, **wanted):
    """({cell: rows}, backends that ran) of a reference file, the cells' fields as asked."""
    path = REFERENCE / f"{study}.jsonl"
    try:
        rows = grid.newest(records.read(path))
    except (OSError, records.RecordError) as e:
        raise TableError(f"{path}: {e}") from None
    found = grid.by_cell(rows, [*records.table(), grid.MATMUL])
    found = {c: f for c, f in found.items() if all(getattr(c, k) == v for k, v in wanted.items())}
    ran = {n for of_cell in found.values() for n, r in of_cell.items() if r["status"] == "ok"}
    if not ran:
        raise TableError(f"{path}: no cell with {wanted}")
    return found, [n for n in records.table() if n in ran]


def grid_caption(found, command):
    row = max((r for of_cell in found.values() for r in of_cell.values()), key=lambda r: r["utc"])
    return f"\n<sub>{row['dtype']}. {grid.provenance(row)}. `{ran(row, command)}`</sub>\n"


def of_grid(study, direction):
    """TFLOP/s of a direction over the grid, its cells one below the other."""
    found, names = gridded(study, direction=direction)
    if (study, direction) == ("ladder", "forward"):  # the joined steps' forward is that of one
        names = grid.forward_steps(names)
    made = {"peers": grid.peers_table, "ladder": grid.ladder_table}[study]
    says = {"peers": grid.peers_verdicts, "ladder": grid.ladder_gains}[study]
    header, rows = made(found, names)
    text = markdown(header[1:], [row[1:] for row in rows])  # the direction is the same everywhere
    said = "".join(f"- {sentence}\n" for sentence in says(found, names))
    return f"{text}\n{said}{grid_caption(found, study)}"


def small_calls():
    path = REFERENCE / "small-calls.jsonl"
    try:
        rows = grid.newest(records.read(path))
    except (OSError, records.RecordError) as e:
        raise TableError(f"{path}: {e}") from None
    names = {r["backend"] for r in rows if r["metric"] == "graph_ms" and r["status"] == "ok"}
    if not names:
        raise TableError(f"{path}: no small calls")
    header, lines, found = grid.small_table(rows, [n for n in records.table() if n in names])
    return markdown(header, lines) + grid_caption(found, "small")


def decode():
    found, names = gridded("decode")
    header, rows = grid.decode_table(found, names)
    said = "".join(f"- {sentence}\n" for sentence in grid.peers_verdicts(found, names))
    text = f"{markdown(header, rows)}\n{said}"
    return text + grid_caption(found, "decode")


def crossed(made):
    """What `made` makes, (header, rows) or sentences, of the records of the crossover."""
    path = REFERENCE / "crossover.jsonl"
    try:
        found = crossings.sweeps(records.read(path))
    except (OSError, records.RecordError) as e:
        raise TableError(f"{path}: {e}") from None
    if crossings.base(found) is None:
        raise TableError(f"{path}: no records of the base")
    got = made(found)
    text = markdown(*got) if isinstance(got, tuple) else " ".join(got) + "\n"
    about = crossings.base(found).condition
    end = (
        f"{about}. {crossings.provenance(found)}. `{ran(crossings.base(found).row(), 'crossover')}`"
    )
    return f"{text}\n<sub>{end}</sub>\n"


def study_of(module, file):
    """The Study of a reference file; module: roofline, memory or train."""
    path = REFERENCE / f"{file}.jsonl"
    try:
        rows = records.read(path)
        return module.Comparison(rows) if module is train else module.Study(rows)
    except (OSError, records.RecordError) as e:
        raise TableError(f"{path}: {e}") from None


def of_roofline(part):
    """`why`, in paragraphs, or a table of the roofline's study."""
    study = study_of(roofline, "roofline")
    if part == "why":
        text = "".join(f"**{t}.** {said}\n\n" for t, said in roofline.paragraphs(study).items())
        about = ""
    else:
        title, header, rows = getattr(study, f"{part}_table")() if study.base else ("", [], [])
        text, about = markdown(header, rows) if rows else "", f"{title}. "
    if not text:
        raise TableError(f"{REFERENCE / 'roofline.jsonl'}: nothing to say of {part}")
    on = study.provenance() if part == "head_dims" else roofline.measured_on(study)
    about += f"{on}. `{ran(study.base.row, 'roofline')}`"
    return f"{text.rstrip()}\n\n<sub>{about}</sub>\n"


def of_memory(part):
    """`words`, or the table of measured against expected bytes."""
    study = study_of(memory, "memory")
    if not study.lines():
        raise TableError(f"{REFERENCE / 'memory.jsonl'}: no memory was measured")
    if part == "short":
        text = summary.memory_words(study)
    else:
        text = "\n\n".join(study.words()) if part == "words" else markdown(*study.table()).rstrip()
    one = study.sweeps[0]
    return f"{text}\n\n<sub>{one.provenance()}. {ran_all(one, 'memory')}</sub>\n"


def claimed():
    try:
        return claims.markdown(REFERENCE)
    except (OSError, records.RecordError) as e:
        raise TableError(str(e)) from None


def capabilities():
    """The table of backends as a reader wants it."""
    short = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
    rows = []
    for name, b in records.table().items():
        scores = {"standard": "in memory", "flash": "on chip", "auto": "torch picks"}[b.family]
        gpu = "any" if b.capability == (0, 0) else "sm_{}{}".format(*b.capability)
        gpu += "" if gpu == "any" else " only" if b.needs else "+"
        dtypes = " ".join(short[str(d).removeprefix("torch.")] for d in b.dtypes)
        backward = "yes" if b.backward else "no"
        cpu = {"native": "yes", "interpreter": "interpreted"}.get(b.cpu, "no")
        package = f"`{name}`" if b.package else "–"  # these are called what their package is called
        rows.append([f"`{name}`", scores, gpu, dtypes, backward, cpu, package])
    header = ["backend", "scores", "GPU", "dtypes on a GPU", "backward", "CPU", "package"]
    return markdown(header, rows)


GRID_TABLES = {
    "ladder-forward": lambda: of_grid("ladder", "forward"),
    "ladder-backward": lambda: of_grid("ladder", "backward"),
    "peers-forward": lambda: of_grid("peers", "forward"),
    "peers-backward": lambda: of_grid("peers", "backward"),
    "small-calls": small_calls,
    "decode": decode,
    "crossings-answer": lambda: crossed(crossings.words),
    "crossings-naive": lambda: crossed(lambda f: crossings.table(f, "naive")),
    "crossings-naive-compiled": lambda: crossed(lambda f: crossings.table(f, "naive-compiled")),
    "crossings-sdpa": lambda: crossed(lambda f: crossings.table(f, "sdpa")),
    "crossings-conditions": lambda: crossed(crossings.conditions_table),
    "why": lambda: of_roofline("why"),
    "ceilings": lambda: of_roofline("ceilings"),
    "limits": lambda: of_roofline("limits"),
    "head-dims": lambda: of_roofline("head_dims"),
    "memory-words": lambda: of_memory("words"),
    "memory-far": lambda: of_memory("table"),
    "memory-short": lambda: of_memory("short"),
    "claims": claimed,
    "why-short": why_short,
    "peers-summary": peers_summary,
    "small-words": small_words,
    "peers-long": peers_long,
    "validated": validated_cases,
    "train-words": trained,
    "crossings-short": crossed_shortly,
}
TABLES = {
    "answer": answer,
    "seqlen-words": seqlen_words,
    "precision-words": precision_words,
    "backends": capabilities,
    "seqlen-block": lambda: by_length("block", "time_ms", significant),
    "seqlen-throughput": lambda: by_length("block", "tokens_per_s", lambda v: significant(v / 1e6)),
    "seqlen-memory": lambda: by_length("block", "peak_delta_mib", significant),
    "seqlen-attention": lambda: by_length("attention", "tflops", significant),
    "crossover-block": lambda: crossovers("block"),
    "crossover-attention": lambda: crossovers("attention"),
    "both-block": forward_and_backward,
    "memory-fit": memory_fit,
    "short-calls": short_calls,
    "mixed": mixed,
    "predicted": predicted,
} | GRID_TABLES


def filled(text):
    """The text with every marked table made anew."""

    def make(match):
        if match[2] not in TABLES:
            raise TableError(f"no table {match[2]!r}; there are {', '.join(TABLES)}")
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return MARKED.sub(make, text)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.replace("NAMES", "    " + ", ".join(TABLES)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path, help=f"default: {', '.join(DOCUMENTS)}")
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where stale")
    parser.add_argument("--print", choices=TABLES, metavar="NAME", help="print one table")
    args = parser.parse_args(argv)
    try:
        if args.print:
            print(TABLES[args.print](), end="")
            return 0
        usual = [ROOT / path for path in DOCUMENTS]
        stale = []
        for path in args.files or [p for p in usual if p.exists()]:
            text = path.read_text()
            new = filled(text)
            if new == text:
                continue
            stale.append(path)
            if not args.check:
                path.write_text(new)
                print(f"{path}: rewritten")
    except (OSError, TableError) as e:
        parser.error(str(e))
    if args.check:
        for path in stale:
            print(f"{path}: stale; run python figures/table.py", file=sys.stderr)
        return 1 if stale else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
