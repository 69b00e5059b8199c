"""figures/claims.py: verdicts follow from records, and turn when the records do."""

import itertools
import json

import pytest
from flashstudy.figures import claims

LENGTHS = (128, 512, 2048, 8192)
BASE = {
    "study": "seqlen", "scope": "attention", "direction": "forward", "dtype": "bfloat16",
    "causal": True, "B": 2, "E": 128, "H": 2, "H_KV": 2, "D": 64, "device": "Test GPU",
    "gpu": "Test GPU", "memory_mib": 1024, "torch": "2.11", "cuda": "13.0", "triton": "3.6",
    "effort": "full", "utc": "2026-01-02T", "reason": None, "sdpa_kernel": None,
}  # fmt: skip


def row(backend, n, metric, value, **more):
    spread = {"value": value, "p50": value, "p20": value and value * 0.99}
    spread |= {"p80": value and value * 1.01, "samples": 9, "status": "ok"}
    return BASE | {"backend": backend, "N_Q": n, "N_K": n, "metric": metric} | spread | more


def series(backend, ms, mib, graph=None, host=None, **more):
    """Rows of a backend: ms and mib as functions of the length; clocks of the shortest one."""
    for n in LENGTHS:
        yield row(backend, n, "peak_delta_mib", mib(n), **more)
        if n == LENGTHS[0] and graph is not None:
            yield row(backend, n, "graph_ms", graph, **more)
            yield row(backend, n, "host_ms", host, **more)
        yield row(backend, n, "time_ms", ms(n), **more)


def square(n):
    return (n / 128) ** 2


def line(n):
    return n / 128


def world(**change):
    """A sweep in which every claim holds; `change`: other series of a backend."""
    made = {
        "naive": series("naive", lambda n: square(n) * (n / 128) ** 0.5, square, 1.0, 1.0),
        "sdpa": series("sdpa", lambda n: 0.4 * square(n), lambda n: (n / 128) ** 1.5),
        "v1_flash": series("v1_flash", lambda n: 0.2 * square(n), line, 1.1, 1.1),
        "v3_tma": series("v3_tma", lambda n: 0.25 * square(n), line, 1.2, 1.2),
    } | change
    return [*itertools.chain(*made.values())]


def verdict(make, rows=(), **kinds):
    return make(claims.Evidence(rows, **kinds)).verdict


@pytest.mark.parametrize("make", claims.CLAIMS)
def test_without_records_nothing_is_claimed(make):
    found = make(claims.Evidence())
    assert (found.verdict, found.evidence) == ("not measured", "")


@pytest.mark.parametrize(
    ("make", "change", "expected"),
    [
        (claims.quadratic, {}, "confirmed"),
        (claims.quadratic, {"naive": series("naive", square, line)}, "refuted"),
        (claims.quadratic, {"naive": series("naive", square, lambda n: n**1.5)}, "refined"),
        (claims.impractical, {}, "refuted"),
        (claims.impractical, {"late": [row("naive", 32768, "time_ms", None, status="oom")]},
         "confirmed"),
        (claims.better, {}, "confirmed"),
        (claims.better, {"sdpa": series("sdpa", lambda n: 0.6 * n**2.5 / 128**2.5, line)},
         "refuted"),
        (claims.pressure, {}, "confirmed"),
        (claims.pressure, {"sdpa": series("sdpa", square, line)}, "refuted"),
        (claims.pressure, {"sdpa": series("sdpa", square, line),
                           "math": series("sdpa-math", square, square)}, "refined"),
        (claims.linear, {}, "confirmed"),
        (claims.linear, {"v1_flash": series("v1_flash", square, square)}, "refined"),
        (claims.linear, {"v1_flash": series("v1_flash", square, square),
                         "v3_tma": series("v3_tma", square, square)}, "refuted"),
        (claims.overhead, {}, "confirmed"),
        (claims.overhead, {"naive": series("naive", square, square, 9.0, 1.15)}, "refined"),
        (claims.overhead, {"naive": series("naive", square, square, 9.0, 9.0)}, "refuted"),
        (claims.gains, {}, "confirmed"),
        (claims.gains, {"sdpa": series("sdpa", lambda n: 0.1 * square(n), line)}, "refined"),
        (claims.gains, {"naive": series("naive", lambda n: 0.1 * square(n), square)}, "refuted"),
        (claims.order, {}, "confirmed"),
        (claims.order, {"naive": series("naive", square, square)}, "refined"),
        (claims.order, {"naive": series("naive", square, line)}, "refuted"),
    ],
)  # fmt: skip
def test_a_verdict_follows_its_rule(make, change, expected):
    # Generators are used up by one test: the parameters above are read once.
    rows = world(**{k: [*v] for k, v in change.items()})
    assert verdict(make, rows) == expected


@pytest.mark.parametrize(
    ("naive", "sdpa", "expected"),
    [
        (2.0, 1.2, "confirmed"),  # fp32 costs little: the algorithm makes the difference
        (2.0, 20.0, "refined"),
        (50.0, 20.0, "refuted"),
    ],
)
def test_precision_and_algorithm_are_weighed(naive, sdpa, expected):
    """naive, sdpa: times in fp32 over those in fp16. In fp16 flash is 10 and 2 times as fast."""
    half = {"dtype": "float16"}
    rows = [
        *series("v1_flash", square, line, **half),
        *series("naive", lambda n: 10 * square(n), square, **half),
        *series("sdpa", lambda n: 2 * square(n), line, **half),
        *series("naive", lambda n: 10 * naive * square(n), square, dtype="float32"),
        *series("sdpa", lambda n: 2 * sdpa * square(n), line, dtype="float32"),
    ]
    found = claims.fair(claims.Evidence(mixed=rows))
    assert found.verdict == expected
    assert f"{naive:.1f} (precision) × 10.00 (algorithm)" in found.evidence


def test_noise_decides_nothing():
    noisy = [r | {"p20": r["p50"] * 0.3, "p80": r["p50"] * 3} if r["p50"] else r for r in world()]
    assert verdict(claims.better, noisy) == "refuted"
    assert verdict(claims.overhead, noisy) == "refuted"


@pytest.mark.parametrize(
    ("gpu", "host", "expected"),
    [
        ((2.0, 1.5), (2.0, 1.5), "refuted"),  # naive is the slower one, at 16 and at 256 tokens
        ((2.0, 1.5), (0.5, 2.0), "refined"),
        ((0.5, 2.0), (0.5, 2.0), "confirmed"),
    ],
)
def test_crossings_decide_on_small_lengths_where_there_are_any(gpu, host, expected):
    """gpu, host: naive's time over flash's at the two lengths, by each clock."""

    def rows(backend, ratios):
        about = BASE | {"study": "crossover", "slice": "base", "run": "1", "backend": backend}
        for metric, of_clock in ratios.items():
            for n, ratio in zip((16, 256), of_clock, strict=True):
                turns = {"turns": [ratio, ratio * 1.01, ratio * 0.99], "p50": ratio}
                shape = {"N_Q": n, "N_K": n, "metric": metric, "status": "ok"}
                yield about | shape | turns

    near = [
        *rows("naive", {"graph_ms": gpu, "host_ms": host}),
        *rows("v1_flash", {"graph_ms": (1, 1), "host_ms": (1, 1)}),
    ]
    found = claims.overhead(claims.Evidence(world(), near=near))
    assert found.verdict == expected
    assert "at 16 tokens" in found.evidence
    assert found.picture == "crossover-naive"
    if expected == "refined":
        assert "0 of 1 slower than naive by the GPU's clock" in found.evidence
        assert "1 of 1 slower than naive by the host's, up to 64 tokens" in found.evidence


def test_an_exponent_is_that_of_the_longer_half():
    points = [(n, 1e4 + n**2) for n in (2, 4, 8, 16)]  # a constant hides the growth at first
    assert claims.exponent(points) < 0.1
    points += [(n, 1e4 + n**2) for n in (10**4, 10**5, 10**6, 10**7)]
    assert claims.exponent(points) == pytest.approx(2, abs=1e-3)
    assert claims.exponent([(1, 1)]) is None


def test_the_table_says_verdict_numbers_and_rules(tmp_path):
    assert "not measured" in claims.markdown(tmp_path)
    text = "".join(json.dumps(r) + "\n" for r in world())
    (tmp_path / "seqlen.jsonl").write_text(text)
    made = claims.markdown(tmp_path)
    assert made.count("**confirmed**") == 7
    assert "exponent 2.00" in made
    assert "64.2" not in made
    assert "Test GPU; torch 2.11" in made
    assert "at least 1.9" in made


def test_the_program_prints_it_and_refuses_what_is_no_record(tmp_path, capsys):
    assert claims.main([str(tmp_path)]) == 0
    assert "the study's claim" in capsys.readouterr().out
    (tmp_path / "seqlen.jsonl").write_text("no\n")
    with pytest.raises(SystemExit):
        claims.main([str(tmp_path)])
