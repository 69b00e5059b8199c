"""Records, answers, tables and charts, on synthetic records whose answers are known."""

import itertools
import json

import pytest
from flashstudy.backends import BACKENDS
from flashstudy.figures import answers, both, mixed, records, seqlen, style, table, trim

LENGTHS = (128, 256, 512, 1024)
BASE = {
    "study": "seqlen", "scope": "block", "direction": "forward", "dtype": "float16", "causal": True,
    "B": 2, "E": 128, "H": 2, "H_KV": 2, "D": 64, "device": "Test GPU", "gpu": "Test GPU",
    "memory_mib": 1024, "threads": None, "cuda": "13.0", "cudnn": 1, "torch": "2.11",
    "triton": "3.6", "flash_attn": None, "flash_attn_4": None, "source": "x", "effort": "full",
    "utc": "2026-01-02T",
    "protocol": "matched", "seed": 0, "reason": None, "status": "ok", "sdpa_kernel": None,
}  # fmt: skip


def cell(backend, n, ms, spread=0.01, mib=None, **more):
    """The rows of a measured cell."""
    base = BASE | {"backend": backend, "N_Q": n, "N_K": n} | more
    spreads = {"p50": ms, "p20": ms * (1 - spread), "p80": ms * (1 + spread), "samples": 30}
    rows = [base | {"metric": "time_ms", "unit": "ms", "value": ms} | spreads]
    rate = {"p50": 2e3 * n / ms, "p20": 1.9e3 * n / ms, "p80": 2.1e3 * n / ms, "samples": 30}
    name = "tokens_per_s" if base["scope"] == "block" else "tflops"
    rows.insert(0, base | {"metric": name, "unit": "", "value": 2e3 * n / ms} | rate)
    if mib is not None:
        one = dict.fromkeys(("value", "p50", "p20", "p80"), mib) | {"samples": 1}
        rows.insert(0, base | {"metric": "peak_delta_mib", "unit": "MiB"} | one)
    return rows


def lost(backend, n, status, reason, **more):
    """The row of a cell without numbers."""
    none = dict.fromkeys(("value", "p50", "p20", "p80")) | {"samples": 0}
    about = {"backend": backend, "N_Q": n, "N_K": n, "metric": "time_ms", "unit": "ms"}
    return [BASE | about | none | {"status": status, "reason": reason} | more]


def sweep(*groups):
    (found,) = records.sweeps(list(itertools.chain(*groups)))
    return found


def times(backend, values, **more):
    return itertools.chain(*(cell(backend, n, v, **more) for n, v in zip(LENGTHS, values)))  # noqa: B905


@pytest.fixture
def rich():
    """Every status, every metric."""
    rows = []
    for i, n in enumerate(LENGTHS):
        if n < 1024:
            rows += cell("naive", n, 1.0 * 4**i, mib=8.0 * 4**i)
        else:
            rows += lost("naive", n, "oom", "OutOfMemoryError: out", predicted_mib=2048.0)
        rows += cell("sdpa", n, 0.6 * 2**i, mib=2.0 * 2**i, sdpa_kernel="cudnn")
        rows += cell("sdpa-cudnn", n, 0.6 * 2**i, mib=2.0 * 2**i)
        rows += cell("flash-attn", n, 0.7 * 2**i, mib=2.0 * 2**i, floor_mib=2.0 * 2**i)
        if n < 512:
            rows += cell("sdpa-math", n, 2.0 * 4**i, mib=20.0 * 4**i)
        else:
            rows += lost("sdpa-math", n, "oom", "OutOfMemoryError: out")
        rows += lost("flex", n, "unsupported", "needs something")
    rows += cell("v1_flash", 128, 0.5, mib=2.0)
    rows += lost("v1_flash", 256, "failed", "RuntimeError: no")
    rows += lost("sdpa-flash", 128, "wrong", "o: max error")
    return rows


# Crossovers


@pytest.mark.parametrize(
    ("flash", "kind", "start", "words"),
    [
        ((0.5, 0.9, 1.6, 2.0), "everywhere", 128, "everywhere in this range (from 128 tokens)"),
        ((1.5, 2.5, 3.0, 4.0), "from", 512, "from 512 tokens on"),
        ((0.5, 2.5, 3.0, 4.0), "from", 512, "from 512 tokens on"),  # once lost, the count restarts
        ((1.5, 2.5, 4.5, 9.0), "never", None, "never in this range"),
        ((0.5, 0.9, 4.5, 9.0), "gone", None, "only at 128, 256 tokens and not at the longest"),
    ],
)
def test_a_crossover_is_the_length_from_which_it_is_faster_at_every_length(
    flash, kind, start, words
):
    one = sweep(times("naive", (1.0, 2.0, 4.0, 8.0)), times("flash-attn", flash))
    found = answers.crossover(one, "flash-attn", "naive")
    assert (found.kind, found.start, found.longest) == (kind, start, 1024)
    assert found.ratio == pytest.approx(8.0 / flash[-1])
    assert words in " ".join(answers.words(one))


def test_noise_is_no_victory():
    naive = times("naive", (1.0, 2.0, 4.0, 8.0), spread=0.1)
    close = times("flash-attn", (0.9, 1.8, 3.6, 4.0), spread=0.1)  # 10 % apart, 10 % of noise
    found = answers.crossover(sweep(naive, close), "flash-attn", "naive")
    assert (found.kind, found.start, found.losses) == ("from", 1024, ())
    even = sweep(
        times("naive", (1.0, 2.0, 4.0, 8.0), spread=0.1),
        times("flash-attn", (0.95, 1.9, 3.9, 7.9), spread=0.1),
    )
    assert answers.crossover(even, "flash-attn", "naive").kind == "never"


def test_a_disturbance_that_lasts_a_round_is_no_victory():
    # The middle of its samples is slow because one round of two was: the other one says otherwise.
    rows = cell("naive", 128, 4.0, rounds=[4.1, 1.9]), cell("flash-attn", 128, 2.0, rounds=[2, 2])
    assert answers.crossover(sweep(*rows), "flash-attn", "naive").kind == "never"
    rows = cell("naive", 128, 4.0, rounds=[4.1, 3.9]), cell("flash-attn", 128, 2.0, rounds=[2, 2])
    assert answers.crossover(sweep(*rows), "flash-attn", "naive").kind == "everywhere"


def test_only_common_lengths_count():
    rows = [*times("naive", (1.0, 2.0, 4.0)), *lost("naive", 1024, "oom", "out")]
    one = sweep(rows, times("flash-attn", (2.0, 3.0, 3.5, 4.0)))
    found = answers.crossover(one, "flash-attn", "naive")
    assert (found.kind, found.start, found.longest) == ("from", 512, 512)
    absent = answers.crossover(one, "flash-attn", "sdpa")
    assert (absent.kind, absent.ratio) == ("none", None)


def test_the_answer_names_what_ran_out_of_memory_and_what_it_needed(rich):
    said = " ".join(answers.words(sweep(rich)))
    assert "Naive ran out of memory at 1024 tokens: at 1024 it would have needed 2 GiB" in said
    # 80 MiB at 256 tokens, 4 times as much at 512.
    assert (
        "SDPA math ran out of memory at 512, 1024 tokens: at 512 it would have needed 320 MiB"
        in said
    )
    assert "(scaled from its longest measured length)" in said
    assert "of 1 GiB in all" in said
    assert "v1 flash failed: RuntimeError: no." in said
    assert "SDPA flash was wrong and not timed: o: max error." in said


def test_torch_s_own_pick_is_not_compared_with_itself(rich):
    said = " ".join(answers.words(sweep(rich)))
    (against,) = [s for s in answers.words(sweep(rich)) if "Faster than SDPA" in s]
    assert "(torch ran its cudnn kernel)" in against
    assert "SDPA cuDNN" not in against
    assert ["SDPA cuDNN", "is the kernel it runs"] in [
        [row[0], row[4]] for row in answers.crossover_table(sweep(rich))[1]
    ]
    assert "SDPA takes 0.86 times as long as flash-attn 2" in said


def test_memory_lines_are_fitted_in_bytes_per_token(rich):
    (fit,) = [s for s in answers.slopes(sweep(rich)) if s.backend == "flash-attn"]
    assert fit.fitted == pytest.approx(2 * 2**20 / (2 * 128))  # 2 MiB for 2 × 128 tokens
    assert fit.analytic == pytest.approx(fit.fitted)
    assert fit.linear
    bent = sweep(times("naive", (1, 1, 1, 1)), *(
        cell("flash-attn", n, 1.0, mib=float(n * n)) for n in LENGTHS
    ))  # fmt: skip
    assert not answers.slopes(bent)[0].linear
    assert "does not fit one straight line" in " ".join(answers.words(bent))


def test_mixed_speed_up_is_precision_times_algorithm():
    rows = [
        *times("naive", (8.0, 16.0, 32.0, 64.0), dtype="float32"),
        *times("naive", (2.0, 4.0, 8.0, 16.0)),
        *times("flash-attn", (1.0, 2.0, 2.0, 2.0)),
    ]
    (pair,) = answers.pairs(records.sweeps(rows))
    last = answers.splits(pair, "flash-attn", "naive")[-1]
    assert (last.n, last.mixed, last.precision, last.algorithm) == (1024, 32.0, 4.0, 8.0)
    assert last.share == pytest.approx(0.4)
    assert (pair.tf32, last.tf32) == (None, None)
    (said,) = answers.mixed_words(pair)
    assert "32.00 times as long" in said
    assert "4.00× is the precision, 8.00× the algorithm (40% and 60%" in said

    rows += times("naive", (7.0, 12.0, 20.0, 20.0), dtype="tf32")
    (pair,) = answers.pairs(records.sweeps(rows))
    last = answers.splits(pair, "flash-attn", "naive")[-1]
    assert (last.mixed, last.precision, last.tf32) == (32.0, 4.0, 3.2)
    tail = "; fp32 tensors multiplied as TF32 already give 3.20×."
    assert answers.mixed_words(pair) == [said[:-1] + tail]
    header, (row,) = answers.mixed_table(pair)
    assert (header[-1], row[-1]) == ("of the precision, TF32 alone", "3.20×")


# Records


def test_a_partial_last_line_is_left_out_and_any_other_is_an_error():
    good = b'{"a": 1}\n{"b": 2}\n'
    assert records.parse(good, "f") == ([{"a": 1}, {"b": 2}], len(good))
    for tail in (b'{"c": 3', b'{"c": 3}', b"12"):
        assert records.parse(good + tail, "f") == ([{"a": 1}, {"b": 2}], len(good))
    for bad in (b"nonsense\n", b"[1]\n", b'{"c": \n'):
        with pytest.raises(records.RecordError, match="f:3: not a record"):
            records.parse(good + bad + good, "f")


def test_trimming_keeps_every_number(rich, tmp_path):
    long, short = tmp_path / "long.jsonl", tmp_path / "short.jsonl"
    long.write_text("".join(json.dumps(r) + "\n" for r in [*rich, {"metric": "machine", "x": 1}]))
    trim.main([str(long), str(short)])
    assert short.stat().st_size < long.stat().st_size / 2
    before, after = (records.sweeps(records.read(p))[0] for p in (long, short))
    assert before.about == after.about
    assert before.cells.keys() == after.cells.keys()
    for key, metrics in before.cells.items():
        for name, row in metrics.items():
            kept = after.cells[key][name]
            assert {k for k, v in row.items() if v is not None} <= kept.keys()
            for field, value in kept.items():
                number = isinstance(value, float)
                assert row[field] == (pytest.approx(value, rel=1e-5) if number else value)
    assert answers.words(before) == answers.words(after)
    assert before.digest() == after.digest()


def test_of_two_measurements_of_a_cell_the_newer_one_is_shown():
    newer = cell("naive", 128, 2.0, utc="2026-01-03T")
    one = sweep(newer, cell("naive", 128, 1.0, utc="2026-01-02T", source="y"))
    assert one.at("naive", 128, "time_ms")["p50"] == 2.0


# Charts


def test_every_chart_is_drawn_with_every_kind_of_mark(rich, tmp_path):
    rows = [*rich, *(r | {"scope": "attention"} for r in rich if r["metric"] != "tokens_per_s")]
    rates = [r for r in rich if r["metric"] == "tokens_per_s"]
    rows += [r | {"scope": "attention", "metric": "tflops"} for r in rates]
    source = tmp_path / "r.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert seqlen.main([str(source), "--out", str(tmp_path / "out")]) == 0
    names = {"block-runtime", "block-memory", "block-throughput", "block-speedup"}
    names |= {"attention-runtime", "attention-memory", "attention-tflops", "attention-speedup"}
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert made == {f"{n}.{kind}" for n in names for kind in ("png", "svg")}
    assert all(p.stat().st_size > 5000 for p in (tmp_path / "out").iterdir())


def test_the_same_records_give_the_same_files(rich, tmp_path):
    one = sweep(rich)
    charts = "runtime", measured_time(one)
    for place in ("a", "b"):
        style.save(seqlen.chart(one, charts[0], "ms", charts[1], True), tmp_path / place, "x")
    for kind in ("png", "svg"):
        assert (tmp_path / f"a/x.{kind}").read_bytes() == (tmp_path / f"b/x.{kind}").read_bytes()


def measured_time(one):
    return seqlen.measured(one, "time_ms")


def test_out_of_memory_is_marked_at_the_size_it_would_have_needed(rich):
    one = sweep(rich)
    fig = seqlen.chart(one, "memory", "", seqlen.measured(one, "peak_delta_mib"), True, True)
    ax, strip = fig.get_axes()
    points = {(x, y) for line in ax.lines for x, y in zip(*line.get_data(), strict=True)}
    assert (1024, 2048.0) in points
    assert (512, 320.0) in points
    said = " ".join(t.get_text() for t in strip.texts)
    for text in ("Naive: out of memory", "v1 flash: failed", "SDPA flash: wrong result"):
        assert text in said
    notes = " ".join(t.get_text() for t in fig.texts)
    assert "Not run here: FlexAttention" in notes.replace("\n", " ")
    assert "Test GPU" in notes
    style.plt.close(fig)


def test_the_protocol_chart_is_drawn(tmp_path):
    rows = [
        *times("naive", (8.0, 16.0, 32.0, 64.0), dtype="float32"),
        *times("naive", (2.0, 4.0, 8.0, 16.0)),
        *times("flash-attn", (3.0, 2.0, 2.0, 2.0)),
    ]
    source = tmp_path / "r.jsonl"
    source.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert mixed.main([str(source), "--out", str(tmp_path / "out")]) == 0
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert made == {"block-mixed-naive.png", "block-mixed-naive.svg"}


def test_backends_are_told_apart_without_colour():
    looks = {name: style.look(name) for name in BACKENDS}
    shapes = [(look.marker, look.dash, look.open) for look in looks.values()]
    assert len(set(shapes)) == len(shapes)


def test_a_picture_says_which_records_it_shows(rich, tmp_path):
    made = seqlen.draw([sweep(rich)], tmp_path)
    assert made
    assert all(sweep(rich).digest().encode() in path.read_bytes() for path in made)
    other = [r | {"p50": 9.9} if r["metric"] == "time_ms" else r for r in rich]
    assert sweep(other).digest() != sweep(rich).digest()


@pytest.mark.parametrize("name", ["seqlen", "mixed", "both"])
def test_the_committed_pictures_show_the_reference_records(name):
    path = table.REFERENCE / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("no such reference records")
    found = records.sweeps(records.read(path))
    folder = table.REFERENCE.parent
    if name == "mixed":
        digests = [s.digest() for pair in answers.pairs(found) for s in pair if s is not None]
        pictures = [p for p in folder.glob("*-mixed-*.*") if p.suffix in (".png", ".svg")]
    elif name == "both":
        digests = [one.digest() for one in both.pairs(found) if len(one.lengths) > 2]
        if not digests:
            pytest.skip("too few lengths for a line")
        pictures = [p for p in folder.glob("*-both-*.*") if p.suffix in (".png", ".svg")]
    else:
        digests = [one.digest() for one in found]
        charts = ("runtime", "memory", "throughput", "tflops", "speedup")
        pictures = [p for p in folder.glob("*.*") if p.suffix in (".png", ".svg")
                    and p.stem.split("-")[0] in ("block", "attention")
                    and p.stem.split("-")[1] in charts]  # fmt: skip
    assert pictures
    for picture in pictures:
        data = picture.read_bytes()
        stale = f"{picture} is stale: python figures/{name}.py {path} --out {folder}"
        assert any(d.encode() in data for d in digests), stale


def test_forward_and_backward_are_added(tmp_path):
    forward = [*times("sdpa-cudnn", (1.0, 2.0, 3.0, 4.0)), *times("v1_flash", (2.0, 2.0, 2.0, 2.0))]
    more = {"direction": "backward"}
    backward = [
        *times("sdpa-cudnn", (3.0, 4.0, 6.0, 8.0), **more),
        *times("v1_flash", (4.0, 4.0, 4.0), **more),
        *lost("v1_flash", 1024, "oom", "OutOfMemoryError: out", **more),
    ]
    (one,) = both.pairs(records.sweeps([*forward, *backward]))
    assert [r["p50"] for _, r in one.series("sdpa-cudnn", "time_ms")] == [4.0, 6.0, 9.0, 12.0]
    assert one.at("v1_flash", 256, "time_ms")["p80"] == pytest.approx(6.0 * 1.01)
    assert one.status("v1_flash", 1024) == "oom"
    assert both.fastest(one, ["v1_flash"]) == {
        128: ("v1_flash", "sdpa-cudnn", 4.0 / 6.0),
        256: ("v1_flash", "sdpa-cudnn", 1.0),
        512: ("v1_flash", "sdpa-cudnn", 1.5),
    }
    assert [p.name for p in both.draw(records.sweeps([*forward, *backward]), tmp_path)] == [
        "block-both-speedup.png",
        "block-both-speedup.svg",
    ]


def test_nothing_to_draw_is_an_error(tmp_path, capsys):
    empty = tmp_path / "r.jsonl"
    empty.write_text("")
    for program in (seqlen, mixed, both):
        with pytest.raises(SystemExit) as stop:
            program.main([str(empty), "--out", str(tmp_path / "out")])
        assert stop.value.code == 2
    assert not (tmp_path / "out").exists()
    assert "argument records" in capsys.readouterr().err


# Tables


@pytest.fixture
def reference(rich, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "REFERENCE", tmp_path)
    rows = [*rich, *(r | {"scope": "attention"} for r in rich)]
    rows += [r | {"metric": "tflops"} for r in rows if r["metric"] == "tokens_per_s"]
    wide = [*times("naive", (8.0, 16.0, 32.0, 64.0), dtype="float32")]
    twice = [*rich, *(r | {"direction": "backward"} for r in rich)]
    for name, some in (("seqlen", rows), ("mixed", [*rich, *wide]), ("both", twice)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    return tmp_path


def test_tables_are_filled_and_a_stale_one_is_noticed(reference, capsys):
    readme = reference / "README.md"
    names = [name for name in table.TABLES if name not in table.GRID_TABLES]
    marked = [f"<!-- table:{name} -->\nold\n<!-- /table -->\n" for name in names]
    readme.write_text("before\n" + "between\n".join(marked) + "after\n")
    assert table.main([str(readme), "--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert table.main([str(readme)]) == 0
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("<!-- /table -->\nafter\n")
    assert "| flash-attn 2 | 0.7 | 1.4 | 2.8 | 5.6 |" in text
    assert "| Naive | 1 | 4 | 16 | oom |" in text
    assert "Test GPU; torch 2.11" in text
    for name in BACKENDS:
        assert f"`{name}`" in text
    assert table.main([str(readme), "--check"]) == 0
    readme.write_text(text.replace("5.6", "5.5"))
    assert table.main([str(readme), "--check"]) == 1


def test_an_unknown_table_and_missing_records_are_errors(reference, capsys):
    readme = reference / "README.md"
    readme.write_text("<!-- table:nonsense -->\n<!-- /table -->\n")
    with pytest.raises(SystemExit) as stop:
        table.main([str(readme)])
    assert stop.value.code == 2
    assert "no table 'nonsense'" in capsys.readouterr().err
    (reference / "seqlen.jsonl").unlink()
    with pytest.raises(SystemExit) as stop:
        table.main(["--print", "answer"])
    assert stop.value.code == 2


def test_the_readmes_are_not_stale():
    assert table.main(["--check"]) == 0


def test_a_backend_is_not_blamed_for_memory_that_it_does_not_need():
    """Its line leads to a hundredth of the GPU's memory: something else filled it."""
    rows = [*cell("flash-attn", 128, 1.0, mib=10.0), *cell("flash-attn", 256, 2.0, mib=20.0)]
    one = sweep(rows, lost("flash-attn", 512, "oom", "OutOfMemoryError: out"))
    said = " ".join(answers.words(one))
    assert "though its line leads to" in said
    assert "would have needed" not in said


@pytest.mark.parametrize("title", ["A title of one line", "A title that is much too long " * 5])
def test_a_title_of_several_lines_stays_inside_its_picture(title):
    fig, ax, _ = style.axes()
    ax.plot([1, 2], [1, 2], label="a line")
    style.finish(fig, ax, title, "measured")
    fig.canvas.draw()
    assert ax.get_tightbbox().y1 < fig.bbox.y1  # titles count
    style.plt.close(fig)
