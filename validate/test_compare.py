"""bench/compare.py on synthetic records whose verdicts are known."""

import itertools
import json

import pytest
from flashstudy.bench import compare

ABOUT = {
    "study": "seqlen", "scope": "attention", "direction": "forward", "dtype": "bfloat16",
    "causal": True, "B": 4, "E": 256, "H": 4, "H_KV": 4, "D": 64, "device": "Test GPU",
    "torch": "2.11", "source": "x", "effort": "full", "commit": "abc", "reason": None,
    "utc": "2026-01-02T00:00:00Z", "status": "ok",
}  # fmt: skip


def row(n, p50, backend="v1_flash", spread=0.01, metric="time_ms", **more):
    """A record; of p50 None one without numbers, whose status `more` gives."""
    numbers = dict.fromkeys(("p20", "p50", "p80"))
    if p50 is not None:
        numbers = {"p20": p50 * (1 - spread), "p50": p50, "p80": p50 * (1 + spread)}
    unit = {"time_ms": "ms", "tflops": "TFLOP/s", "peak_delta_mib": "MiB"}[metric]
    about = {"backend": backend, "N_Q": n, "N_K": n, "metric": metric, "unit": unit}
    return ABOUT | about | numbers | more


def verdicts(before, after, metric="time_ms"):
    return [p.verdict for p in compare.compare(before, after, metric)[0]]


@pytest.fixture
def run(tmp_path, capsys):
    """run(A's rows, B's rows, *options) -> (exit code, standard output, standard error)."""

    def main(before, after, *options):
        paths = []
        for name, rows in (("a", before), ("b", after)):
            paths.append(tmp_path / f"{name}.jsonl")
            paths[-1].write_text("".join(json.dumps(r) + "\n" for r in rows))
        try:
            code = compare.main([*map(str, paths), *options])
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return main


def words(output):
    """The lines of a table, a single space between the columns."""
    return [" ".join(line.split()) for line in output.splitlines()]


# Verdicts


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        ((2.0, 0.01), (1.0, 0.01), "better"),
        ((1.0, 0.01), (2.0, 0.01), "worse"),
        ((1.0, 0.05), (1.08, 0.05), "same"),  # 8 % apart, 5 % of noise on either side
        ((1.0, 0.05), (1.12, 0.05), "worse"),
        ((1.0, 0.0), (1.000004, 0.0), "same"),  # a trimmed file keeps six digits
        ((1.0, 0.0), (1.0001, 0.0), "worse"),
    ],
)
def test_noise_is_no_difference(a, b, verdict):
    (pair,), _ = compare.compare(
        [row(128, a[0], spread=a[1])], [row(128, b[0], spread=b[1])], "time_ms"
    )
    assert pair.verdict == verdict
    assert pair.ratio == pytest.approx(b[0] / a[0])
    assert pair.low == pytest.approx(b[0] * (1 - b[1]) / (a[0] * (1 + a[1])))
    assert pair.high == pytest.approx(b[0] * (1 + b[1]) / (a[0] * (1 - a[1])))


@pytest.mark.parametrize("name", ["rounds", "turns"])  # of the main job; of ladder and peers
def test_a_round_that_says_otherwise_is_noise(name):
    slow = [row(128, 2.0, **{name: [2.0, 0.9]})]
    assert verdicts([row(128, 1.0, **{name: [1.0, 1.0]})], slow) == ["same"]
    slow[0][name] = [2.0, 1.9]
    assert verdicts([row(128, 1.0, **{name: [1.0, 1.0]})], slow) == ["worse"]


def test_more_is_better_of_rates_and_worse_of_memory():
    for metric, verdict, cost in (("tflops", "better", 0.5), ("peak_delta_mib", "worse", 2.0)):
        rows = [[row(128, x, metric=metric)] for x in (100.0, 200.0)]
        (pair,), _ = compare.compare(*rows, metric)
        assert (pair.verdict, pair.ratio, pair.cost) == (verdict, 2.0, cost)


def test_memory_that_is_zero_has_no_ratio():
    rows = [[row(128, x, metric="peak_delta_mib")] for x in (0.0, 8.0)]
    (pair,), _ = compare.compare(*rows, "peak_delta_mib")
    assert (pair.verdict, pair.ratio) == ("worse", None)
    assert compare.beyond([pair], 5) == [pair]


@pytest.mark.parametrize(
    ("statuses", "verdict", "is_lost"),
    [
        (("ok", "oom"), "changed", True),
        (("ok", "failed"), "changed", True),
        (("oom", "ok"), "changed", False),
        (("oom", "failed"), "changed", False),
        (("oom", "oom"), "same", False),
    ],
)
def test_a_status_that_changed_is_told(statuses, verdict, is_lost):
    a, b = ([row(128, 1.0 if s == "ok" else None, status=s)] for s in statuses)
    (pair,), _ = compare.compare(a, b, "time_ms")
    assert (pair.verdict, compare.lost(pair)) == (verdict, is_lost)


def test_of_another_metric_the_time_row_tells_why_there_is_none():
    a = [row(128, 8.0, metric="peak_delta_mib"), row(128, 1.0)]
    assert verdicts(a, [row(128, None, status="oom")], "peak_delta_mib") == ["changed"]


def test_cells_of_one_file_alone_and_cells_that_never_ran():
    a = [row(128, 1.0), row(256, 1.0), row(128, None, "flex", status="unsupported")]
    b = [row(256, 1.0), row(512, 1.0), row(128, None, "flex", status="unsupported")]
    found, _ = compare.compare(a, b, "time_ms")
    assert [(p.row["N_Q"], p.verdict) for p in found] == [
        (128, "only in A"), (256, "same"), (512, "only in B"),
    ]  # fmt: skip


@pytest.mark.parametrize("field", compare.IDENTITY)
def test_another_cell_is_never_the_same_one(field):
    other = row(128, 1.0)
    other[field] = 7 if isinstance(other[field], int) else "other"
    found, _ = compare.compare([row(128, 1.0)], [row(128, 1.0), other], "time_ms")
    assert sorted(p.verdict for p in found) == ["only in B", "same"]


@pytest.mark.parametrize("field", ["device", "torch", "source", "effort", "commit"])
def test_another_environment_is_the_same_cell(field):
    assert verdicts([row(128, 1.0)], [row(128, 2.0, **{field: "other"})]) == ["worse"]


def test_the_last_measurement_of_a_cell_counts_with_its_own_metrics():
    old = [row(128, 5.0, utc="2026-01-01"), row(128, 9.0, metric="tflops", utc="2026-01-01")]
    for rows in itertools.permutations([*old, row(128, 1.0, source="y")]):
        (found,) = compare.cells(rows).values()
        assert {metric: r["p50"] for metric, r in found.items()} == {"time_ms": 1.0}


# Control


def test_what_two_runs_differ_by_without_a_cause_is_noise_too():
    """Naive is the control: slower by a tenth everywhere, give or take four per cent."""
    ratios = (1.06, 1.08, 1.1, 1.12, 1.14)
    a = [row(n, 1.0, "naive", 0.001) for n in range(5)] + [row(9, 1.0, spread=0.001)]
    b = [row(n, r, "naive", 0.001) for n, r in enumerate(ratios)]
    for ratio, verdict in ((1.02, "same"), (1.06, "worse"), (0.95, "better")):
        pairs, control = compare.compare(
            a, [*b, row(9, ratio, spread=0.001, source="y")], "time_ms"
        )
        assert control == pytest.approx(ratios)
        assert compare.between_runs(control) == pytest.approx(1.1 / 1.06, rel=0.01)
        assert pairs[-1].verdict == verdict
    text = compare.control_words(pairs, control)
    assert "5 of 6 cells" in text
    assert "×1.100 in the geometric mean, four fifths of them within 3.7%" in text


@pytest.mark.parametrize("field", ["source", "torch", "device", "driver", "power_limit_w"])
def test_there_is_no_control_where_something_changed(field):
    machine = {"metric": "machine", "power_limit_w": 700.0}
    a = [row(n, 1.0) for n in range(5)]
    b = [row(n, 1.0, **{field: "other"} if field != "power_limit_w" else {}) for n in range(5)]
    other = machine | ({field: 600.0} if field == "power_limit_w" else {})
    assert compare.compare([*a, machine], [*b, other], "time_ms")[1] is None
    assert compare.compare([*a, machine], [*a, machine], "time_ms")[1] == [1.0] * 5


def test_the_matrix_product_is_a_control_whatever_the_sources():
    a = [row(n, 1.0, name) for n in range(5) for name in ("matmul", "v1_flash")]
    b = [r | {"source": "y"} for r in a]
    assert compare.compare(a, b, "time_ms")[1] == [1.0] * 5


# What is told


def test_the_table_holds_what_differs_and_the_summary_everything(run):
    a = [row(n, 1.0) for n in (128, 256, 512)] + [row(n, 1.0, "naive") for n in (128, 256)]
    b = [row(128, 1.21), row(256, 1.0), row(512, None, status="oom", reason="full")]
    code, out, _ = run(a, [*b, row(128, 0.5, "naive")])
    assert code == 0
    cells, by_backend = out.split("Cells that differ")[1].split("All cells")
    lines = [line for line in words(cells) if line.startswith(("v1", "Naive"))]
    assert lines == [
        "v1 flash 512 1 oom – – status changed",
        "v1 flash 128 1 1.21 ×1.210 1.186 to 1.234 slower",
        "Naive 128 1 0.5 ×0.500 0.490 to 0.510 faster",
        "Naive 256 only in A",
        "v1 flash, oom in B at N = 512: full",
    ]
    assert "Naive ×0.500 1 0 0 0 1 0 same" in words(by_backend)
    # The geometric mean of 1.21 and 1.
    assert "v1 flash ×1.100 0 1 1 1 0 0 same" in words(by_backend)


def test_batch_and_length_are_columns_where_they_vary(run):
    rows = [row(128, 1.0, B=8), row(256, 1.0, B=4)]
    out = run(rows, rows, "--all")[1]
    assert "Cells, time_ms in ms: seqlen, attention, forward, bfloat16, causal, H 4, D 64" in out
    assert "backend batch N A B B/A noise verdict" in words(out)
    assert "v1 flash 8 128 1 1 ×1.000 0.980 to 1.020 same" in words(out)


def test_all_lists_what_is_the_same_too(run):
    rows = [row(128, 1.0)]
    assert "No cell differs" in run(rows, rows)[1]
    out = run(rows, rows, "--all")[1]
    assert "v1 flash 128 1 1 ×1.000 0.980 to 1.020 same" in words(out)


def test_a_difference_of_environment_comes_first(run):
    a = [row(128, 1.0), row(128, 1.0, "naive")]
    b = [row(128, 2.0, source="y"), row(128, 1.1, "naive")]
    machine = ABOUT | {"metric": "machine", "when": "before"}
    out = run(
        [*a, machine | {"power_limit_w": 700.0}],
        [*(r | {"commit": "def"} for r in b), machine | {"power_limit_w": 600.0, "commit": "def"}],
    )[1]
    before = out[: out.index("Cells that differ")]
    lines = words(before)
    assert "commit abc def" in lines
    assert "its power limit, W 700.0 600.0" in lines
    assert not [line for line in lines if line.startswith(("device", "torch", "effort"))]
    assert "Sources changed of v1 flash; not of the other 1." in before
    assert "No control" in before
    assert "are the same." in run(a, a)[1]
    assert "Sources changed of every backend" in run(a[:1], b[:1])[1]


def test_ladder_and_peers_hold_the_power_limit_in_their_rows():
    rows = [[row(128, 1.0, gpu_after={"power_limit_w": w})] for w in (700.0, 600.0)]
    assert compare.differences(*rows) == [["its power limit, W", "700.0", "600.0"]]


# Exit codes


@pytest.mark.parametrize(
    ("after", "percent", "code"),
    [
        (row(128, 1.2), "10", 1),
        (row(128, 1.2), "25", 0),
        (row(128, 1.2, spread=0.5), "10", 0),  # within the noise
        (row(128, 0.5), "0", 0),  # faster
        (row(128, None, status="failed", reason="no"), "10", 1),
    ],
)
def test_fail_above(run, after, percent, code):
    before = [row(128, 1.0), row(256, 1.0)]  # what B lacks is no failure
    assert run(before, [after])[0] == 0
    assert run(before, [after], "--fail-above", percent)[0] == code


def test_fail_above_reads_rates_upside_down(run):
    rows = [[row(128, x, metric="tflops"), row(128, 1.0)] for x in (100.0, 80.0)]
    options = ("--metric", "tflops", "--fail-above")
    assert [run(*rows, *options, p)[0] for p in ("24", "26")] == [1, 0]  # 100 / 80 is 1.25
    assert run(*reversed(rows), *options, "0")[0] == 0


@pytest.mark.parametrize(
    ("after", "options", "says"),
    [
        ([row(128, 1.0, study="ladder")], (), "is of the study seqlen"),
        ([row(256, 1.0)], (), "no cell of time_ms in common"),
        ([{"metric": "machine"}], (), "no record of a backend"),
        ([{"backend": "naive"}], (), "a record without study, scope"),
        ([row(128, None)], (), "a record without p20, p50, p80"),
        (["text"], (), "b.jsonl:1: not a record"),
        ([row(128, 1.0)], ("--metric", "speed"), "no 'speed' on record; there are time_ms"),
        ([row(128, 1.0)], ("--fail-above", "-1"), "a number from 0 up, got '-1'"),
        ([row(128, 1.0)], ("--fail-above", "nan"), "a number from 0 up, got 'nan'"),
    ],
)
def test_bad_input_is_2_and_a_sentence(run, after, options, says):
    code, out, err = run([row(128, 1.0)], after, *options)
    assert (code, out) == (2, "")
    assert says in err


def test_a_missing_file_is_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        compare.main([str(tmp_path / "none.jsonl")] * 2)
    assert e.value.code == 2
    assert "No such file" in capsys.readouterr().err
