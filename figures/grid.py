"""Cells of the FlashAttention papers' grid, their FLOPs, and what records say of them in tables.

Arithmetic only: no GPU, no timing. A cell is one shape, causal or not, forward or backward. The
papers keep the work per cell comparable: 16,384 tokens (B = 16384 / N) of hidden size 2048
(H = 2048 / D).
"""

import hashlib
import math
from typing import NamedTuple

from flashstudy.figures import records

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LONG_LENGTHS = (32768, 65536, 131072)
HEAD_DIMS = (64, 128, 256)
TOKENS, HIDDEN = 16384, 2048
MATMUL = "matmul"  # the 8192³ matrix product, on record beside the backends
BOTH = "forward+backward"  # in one call, as a training step has it
DIRECTIONS = ("forward", "backward")
STUDIES = (
    "ladder",
    "peers",
    "decode",
    "crossover",
)  # the records that this module reads, by their field `study`


class Cell(NamedTuple):
    direction: str  # "forward", or "backward": from dO to finished dQ, dK, dV
    head_dim: int
    causal: bool
    length: int  # N_K, and N_Q too unless `queries` says otherwise
    batch: int
    heads: int
    kv_heads: int | None = None  # None: as many as heads
    queries: int | None = None  # None: as many as keys

    @property
    def flops(self):
        """4·B·H·N_Q·N_K·D (two matrix products), half of it causal; backward, with five, 2.5×."""
        pairs = (self.queries or self.length) * self.length
        forward = 4 * self.batch * self.heads * pairs * self.head_dim
        times = {"forward": 1.0, "backward": 2.5, BOTH: 3.5}[self.direction]
        return forward * (0.5 if self.causal else 1.0) * times

    def __str__(self):
        mask = "causal" if self.causal else "full"
        few = "" if self.queries is None else f" N_Q={self.queries} B={self.batch}"
        return f"{self.direction} D={self.head_dim} {mask} N={self.length}{few}"


def cells(directions, head_dims, causal, lengths, tokens=TOKENS, hidden=HIDDEN):
    """The grid in the order of tables: direction, head dim, mask, length.

    Raises ValueError where a head dim does not divide `hidden`.
    """
    for d in head_dims:
        if hidden % d:
            raise ValueError(f"head dim {d} does not divide the hidden size {hidden}")
    return [
        Cell(direction, d, mask, n, max(1, tokens // n), hidden // d)
        for direction in directions
        for d in head_dims
        for mask in causal
        for n in lengths
    ]


def cell_of(row):
    """The cell that a row of a record file belongs to."""
    kv_heads = None if row["H_KV"] == row["H"] else row["H_KV"]
    queries = None if row["N_Q"] == row["N_K"] else row["N_Q"]
    shape = row["N_K"], row["B"], row["H"], kv_heads, queries
    return Cell(row["direction"], row["D"], row["causal"], *shape)


def steps():
    """The ladder: the rows of the table of backends that are kernels of ours, in its order."""
    return [n for n, row in records.table().items() if row.target.startswith("kernels.")]


def forward_steps(names):
    """Those with a forward of their own: the joined Hopper steps run that of another."""
    return [n for n in names if records.table()[n].target.split(":")[0] == f"kernels.{n}"]


def newest(rows):
    """Rows of the machine and software that the newest row was measured with, in file order."""
    if not rows:
        return []
    last = max(rows, key=lambda r: r.get("utc") or "")
    return [settled(r) for r in rows if environment(r) == environment(last)]


def settled(row):
    """The row, a refusal by ValueError called unsupported: older records called it failed."""
    refused = row.get("status") == "failed" and (row.get("reason") or "").startswith("ValueError")
    return row | {"status": "unsupported"} if refused else row


def environment(row):
    return tuple(row.get(k) for k in records.ENVIRONMENT)


def kept(rows):
    """Of the ladder's and the peers' rows those that tables and pictures show."""
    rows = newest(rows)
    names = [*records.table(), MATMUL]
    return [
        row
        for study in dict.fromkeys(r["study"] for r in rows)
        for dtype, metric in dict.fromkeys((r["dtype"], r["metric"]) for r in rows)
        for of_cell in by_cell(
            [r for r in rows if r["study"] == study], names, dtype, metric
        ).values()
        for row in of_cell.values()
    ]


def provenance(row):
    """On what, with what and when, in a line for people."""
    versions = [("torch", "torch"), ("CUDA", "cuda"), ("cuDNN", "cudnn"), ("Triton", "triton")]
    versions += [("flash-attn", "flash_attn"), ("flash-attn-4", "flash_attn_4")]
    text = ", ".join(f"{name} {row[key]}" for name, key in versions if row.get(key))
    return f"{row['device']}; {text}; {row['utc'][:10]}"


def by_cell(rows, names, dtype="bfloat16", metric="time_ms"):
    """{cell: {backend: row}}, every cell from one run, so that its backends can be compared.

    Where several runs measured a cell, the one that measured the most of the backends `names`
    counts, and the latest of those. Rows without a run, of other backends, dtypes and metrics are
    left out.
    """
    runs = {}  # cell -> run -> backend -> row, in the order of the file
    for row in rows:
        if (row["metric"], row["dtype"]) != (metric, dtype) or row.get("run") is None:
            continue
        if row["backend"] in names:
            runs.setdefault(cell_of(row), {}).setdefault(row["run"], {})[row["backend"]] = row

    def worth(item):
        at, found = item
        return sum(r["status"] == "ok" for r in found.values()), len(found), at

    return {
        cell: max(enumerate(runs[cell].values()), key=worth)[1] for cell in sorted(runs, key=order)
    }


def digest(found):
    """Fingerprint of every number and status that is shown, the same before and after trimming."""
    parts = []
    for cell in sorted(found, key=order):
        for name, row in sorted(found[cell].items()):
            time = f"{row['p50']:.6g}" if row["status"] == "ok" else row["status"]
            parts.append(f"{cell} {name} {time}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def order(cell):
    """Sort key: forward before backward, then head dim, full before causal, length."""
    return ((*DIRECTIONS, BOTH).index(cell.direction), *(x or 0 for x in cell[1:]))


def tflops(row):
    """TFLOP/s of a row, None where it has no time. The counted work stands in the row."""
    return row["flops"] / row["p50"] / 1e9 if row["status"] == "ok" else None


def best(found, names):
    """(backend, TFLOP/s) of the fastest among `names` in a cell's rows, None where none ran."""
    speeds = [(n, tflops(found[n])) for n in names if n in found and found[n]["status"] == "ok"]
    return max(speeds, key=lambda pair: pair[1], default=None)


def ratio(found, name, others):
    """Speed of `name` over the fastest of `others` in one cell, None where either is missing."""
    own, rival = best(found, [name]), best(found, others)
    return own[1] / rival[1] if own and rival else None


def gain(found, name, names):
    """Speed of a step over the nearest of `names` before it that ran in the cell, None without."""
    before = [n for n in names[: names.index(name)] if best(found, [n]) is not None]
    return ratio(found, name, before[-1:])


def geometric_mean(ratios):
    """Of positive numbers; None of none."""
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if ratios else None


# Tables, as (header, rows of text)


def shown(row):
    """TFLOP/s of a row, or why there is none."""
    if row is None:
        return ""
    if row["status"] == "unsupported":
        return "–"
    return f"{tflops(row):.0f}" if row["status"] == "ok" else row["status"]


def where(cell):
    return [
        cell.direction,
        "causal" if cell.causal else "full",
        str(cell.head_dim),
        str(cell.length),
    ]


def sides(names):
    """(ours, peers) of some backends, the matrix product in neither."""
    ours = [n for n in names if n in steps()]
    return ours, [n for n in names if n not in ours and n != MATMUL]


def peers_table(found, names):
    """A row a cell, a column a backend; * the best peer; ours over it in the last columns."""
    ours, peers = sides(names)
    lines = []
    for cell, of_cell in found.items():
        rival = best(of_cell, peers)
        line = where(cell)
        for name in (*ours, *peers, MATMUL):
            line.append(shown(of_cell.get(name)) + " *" * (rival is not None and name == rival[0]))
        for name in ours:
            r = ratio(of_cell, name, peers)
            line.append("" if r is None else f"{r:.2f}")
        lines.append(line)
    head = ["", "mask", "D", "N", *map(records.label, (*ours, *peers)), "matmul"]
    return head + [f"{records.label(n)} ÷*" for n in ours], lines


def kv_bytes(row):
    """Bytes of K and V, which a call has to read once: half precision."""
    return 2 * 2 * row["B"] * row["H_KV"] * row["N_K"] * row["D"]


def decode_table(found, names):
    """A row a cell, a column a backend: µs; * the best peer. Then ours over it, and the rate at
    which our last one reads K and V."""
    ours, peers = sides(names)
    lines = []
    for cell, of_cell in found.items():
        rival = best(of_cell, peers)
        line = [str(cell.batch), str(cell.queries or cell.length), f"{cell.length:,}"]
        for name in (*ours, *peers):
            r = of_cell.get(name)
            text = f"{r['p50'] * 1e3:.1f}" if r and r["status"] == "ok" else shown(r)
            line.append(text + " *" * (rival is not None and name == rival[0]))
        for name in ours:
            r = ratio(of_cell, name, peers)
            line.append("" if r is None else f"{r:.2f}")
        last = of_cell.get(ours[-1]) if ours else None
        ran = last is not None and last["status"] == "ok"
        line.append(f"{kv_bytes(last) / last['p50'] / 1e9:.2f}" if ran else "")
        lines.append(line)
    head = ["B", "N_Q", "N_K", *(records.label(n) for n in (*ours, *peers))]
    return [*head, *(f"{records.label(n)} ÷*" for n in ours), "K, V TB/s"], lines


def peers_verdicts(found, names):
    """Sentences: each of ours against the best peer, over the cells that have both."""
    ours, peers = sides(names)
    sentences = []
    for direction in DIRECTIONS:
        for name in ours:
            ratios = {
                cell: r
                for cell, of_cell in found.items()
                if cell.direction == direction and (r := ratio(of_cell, name, peers)) is not None
            }
            if ratios:
                worst = min(ratios, key=ratios.get)
                behind = sum(r < 1 for r in ratios.values())
                sentences.append(
                    f"{records.label(name)}, {direction}: geometric mean"
                    f" {geometric_mean(list(ratios.values())):.3f} of the best peer over"
                    f" {len(ratios)} cells, behind in {behind}, least {ratios[worst]:.3f} ({worst})"
                )
    return sentences


def ladder_table(found, names):
    """A row a cell, a column a step: TFLOP/s, share of the matrix product, gain over the last."""
    lines = []
    for cell, of_cell in found.items():
        line = where(cell)
        for name in names:
            text = shown(of_cell.get(name))
            if (share := ratio(of_cell, name, [MATMUL])) is not None:
                text += f"  {share:4.0%}"
            gained = gain(of_cell, name, names)
            line.append(text + (f"  ×{gained:.2f}" if gained is not None else ""))
        lines.append([*line, shown(of_cell.get(MATMUL))])
    return ["", "mask", "D", "N", *map(records.label, names), "matmul"], lines


def ladder_gains(found, names):
    """Sentences: what each step gains over the one before it, per direction and head dim."""
    sentences = []
    for direction, d in dict.fromkeys((c.direction, c.head_dim) for c in found):
        of_step = {
            name: [
                g
                for cell, of_cell in found.items()
                if (cell.direction, cell.head_dim) == (direction, d)
                and (g := gain(of_cell, name, names)) is not None
            ]
            for name in names
        }
        parts = [
            f"{records.label(name)} ×{geometric_mean(g):.2f} ({min(g):.2f} to {max(g):.2f})"
            for name, g in of_step.items()
            if g
        ]
        if parts:
            sentences.append(f"{direction}, D={d}, gain over the step before: {', '.join(parts)}")
    return sentences


def small_table(rows, names, dtype="bfloat16"):
    """A row a backend; µs of small calls on each clock. Also {what: rows} of what it shows."""
    lines = {name: [records.label(name)] for name in names}
    head, seen = ["B=1, H=16, D=64, causal"], {}
    for metric, what in (("host_ms", "host"), ("graph_ms", "graph")):
        for cell, of_cell in by_cell(rows, names, dtype, metric).items():
            both = ", with backward" if cell.direction == BOTH else ""
            head.append(f"N={cell.length} {what} µs{both}")
            seen[f"{cell}, {what}"] = of_cell
            for name in names:
                r = of_cell.get(name)
                ok = r is not None and r["status"] == "ok"
                lines[name].append(
                    f"{r['p50'] * 1e3:.1f}" if ok else "" if r is None else r["status"]
                )
    return head, list(lines.values()), seen
