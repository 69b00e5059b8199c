"""figures/summary.py and figures/validated.py: sentences and counts that follow from records."""

import json

import pytest
from flashstudy.figures import crossings, records, summary, table, validated

ALWAYS, NEVER = crossings.EVERYWHERE, crossings.NEVER
ENVIRONMENT = dict.fromkeys(records.ENVIRONMENT, "same") | {"device": "GPU", "torch": "2.11"}


def crossed(backend, start):
    return crossings.Crossing(backend, "naive", "time_ms", start, start, start, 16, 1024, 2.0)


def rows_of(backend, milliseconds, dtype="bfloat16", scope="block", mib=None, **more):
    """Records of a backend at 128, 256, … tokens; None: out of memory."""
    made = []
    for i, ms in enumerate(milliseconds):
        n = 128 * 2**i
        base = ENVIRONMENT | {
            "backend": backend, "scope": scope, "direction": "forward", "dtype": dtype,
            "causal": True, "B": 4, "E": 2048, "H": 16, "H_KV": 16, "N_Q": n, "N_K": n, "D": 128,
            "utc": "2026-01-01T00:00:00Z", "status": "ok", "reason": None, "samples": 9,
        } | more  # fmt: skip
        if mib is not None and ms is not None:
            one = dict.fromkeys(("value", "p50", "p20", "p80"), mib * 2**i)
            made.append(base | {"metric": "peak_delta_mib", "unit": "MiB"} | one)
        p = {"value": ms, "p50": ms, "p20": ms and ms * 0.99, "p80": ms and ms * 1.01}
        lost = {"status": "oom", "reason": "out", "samples": 0, "predicted_mib": 262144.0}
        made.append(base | {"metric": "time_ms", "unit": "ms"} | p | (lost if ms is None else {}))
    return made


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([("v1_flash", ALWAYS), ("flex", ALWAYS)], "all 2 from 16 tokens on"),
        ([("v1_flash", ALWAYS), ("flex", 70.2)],
         "1 of 2 from 16 tokens on, FlexAttention from 70"),
        ([("v1_flash", ALWAYS), ("flash-attn-4", 477), ("flex", 246), ("flash-attn", NEVER)],
         "1 of 4 from 16 tokens on, FlexAttention from 246, flash-attn 4 from 477, flash-attn 2 not"
         " up to 1,024"),
        ([("v1_flash", 90), ("flex", 70)], "FlexAttention from 70, v1 flash from 90 tokens on"),
        ([("v1_flash", ALWAYS), ("flex", 70), ("flash-attn", 80), ("v2_lean", 90), ("v3_tma", 91),
          ("flash-attn-4", NEVER)],
         "1 of 6 from 16 tokens on, 4 more from 70 to 91, flash-attn 4 not up to 1,024"),
    ],
)  # fmt: skip
def test_where_each_begins_to_win(found, words):
    assert summary.from_where([crossed(*x) for x in found]) == words


@pytest.mark.parametrize(
    ("cudnn", "ours", "words"),
    [
        (2.0, 1.8, "v1 flash is 11 % faster"),
        (2.0, 1.99, "v1 flash within 2%"),
        (2.0, 4.0, "1 of 1 slower"),
    ],
)
def test_the_answer_takes_its_numbers_from_the_records(cudnn, ours, words):
    rows = [
        *rows_of("naive", (1.0, 4.0, 16.0, None), mib=10.0),
        *rows_of("sdpa", (0.5, 0.8, 1.0, cudnn), sdpa_kernel="cudnn"),
        *rows_of("sdpa-cudnn", (0.5, 0.8, 1.0, cudnn), mib=2.0),
        *rows_of("v1_flash", (0.5, 0.8, 0.8, ours), mib=2.0),
    ]
    said = summary.answer(records.sweeps(rows), None, [], None)
    assert said.startswith("On an GPU, in bfloat16, causal, batch 4 with 16 heads of 128:")
    assert "Inside a Transformer block they are 16.0 to 20 times as fast at 512 tokens" in said
    assert "at 1,024 standard attention no longer fits: it needs 256 GiB" in said
    assert "where theirs needs 16 MiB" in said
    assert "SDPA *is* such a kernel (SDPA cuDNN)" in said
    assert f"at 1,024 tokens, in the block, {words}." in said
    assert "clock" not in said  # no crossings: nothing is said of them
    assert "fp32" not in said


def test_precision_is_told_from_the_algorithm():
    wide = rows_of("sdpa", (3.0, 12.0, 24.0), dtype="float32")
    half = [
        *rows_of("sdpa", (1.0, 2.0, 2.0), dtype="float16"),
        *rows_of("flash-attn", (1.0, 2.0, 1.0), dtype="float16"),
    ]
    (said,) = summary._precision(records.sweeps([*wide, *half]))
    assert "flash-attn 2 looks 24 times as fast as SDPA, a factor of 12.0 of which" in said


def test_the_peers_are_summed_up_by_library():
    rows = []
    for n, ours, cudnn, fa4 in ((512, 1.0, 2.0, 0.5), (1024, 1.0, 0.5, None)):
        for name, ms in (("v1_flash", ours), ("sdpa-cudnn", cudnn), ("flash-attn-4", fa4)):
            made = rows_of(name, (ms,), scope="attention", run="1", study="peers", flops=1e9)
            rows += [r | {"N_Q": n, "N_K": n} for r in made if r["metric"] == "time_ms"]
    from flashstudy.figures import grid

    names = ["sdpa-cudnn", "flash-attn-4", "v1_flash"]
    header, lines = summary.peers_summary(grid.by_cell(rows, names), names)
    assert header[2:] == ["SDPA cuDNN", "flash-attn 4", "the best of them"]
    assert lines == [[
        "v1 flash", "forward", "**1.00** (0.50 to 2.00), 1 of 2", "**0.50** (0.50 to 0.50), 0 of 1",
        "**0.50** (0.50 to 0.50), 0 of 2",
    ]]  # fmt: skip


def test_the_first_sentences_end_where_sentences_do():
    text = "It is 1.5 times as fast. A copy takes 3.2 ms. The rest waits."
    assert summary.first_sentences(text, 2) == "It is 1.5 times as fast. A copy takes 3.2 ms."
    assert summary.first_sentences("One alone.", 2) == "One alone."


JUDGED = {"family": "edges", "case": "N_Q=0", "reasons": [], "over": None, "grad": False}
ABOUT = {"device": "GPU", "torch": "2.11", "triton": "3.6.0", "utc": "2026-01-02T00:00:00Z"}


def judged(backend, status, over=None, *reasons, dtype="bf16"):
    about = {"backend": backend, "dtype": dtype, "status": status, "over": over}
    return JUDGED | about | {"reasons": list(reasons)}


def test_the_validator_s_counts_are_kept_and_shown(tmp_path, monkeypatch, capsys):
    lines = [
        {"about": ABOUT},
        judged("v1_flash", "ok", 0.5), judged("v1_flash", "ok", 0.9),
        judged("v1_flash", "ok", 0.2, dtype="fp32"),
        judged("sdpa-cudnn", "fail", None, "o: 3 values are not finite"),
        judged("sdpa-cudnn", "fail", None, "o: 7 values are not finite", dtype="fp16"),
        judged("flash-attn", "crash", None, "AcceleratorError: CUDA error: misaligned address"),
        judged("flash-attn", "refused", None, "RuntimeError: no"),
    ]  # fmt: skip
    path = tmp_path / "v.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert validated.main([str(path), "--out", str(tmp_path / "validate.jsonl")]) == 0
    assert "7 cases: 3 right, 3 wrong or crashed, 1 refused" in capsys.readouterr().out
    monkeypatch.setattr(table, "REFERENCE", tmp_path)
    text = table.TABLES["validated"]()
    assert "| v1 flash | bf16 | 2 | 0 | 0 | 0 | 0.90 |" in text
    assert "| flash-attn 2 | bf16 | 0 | 0 | 1 | 1 | – |" in text
    assert (
        "- SDPA cuDNN, fp16, bf16: 2 cases wrong: o: … values are not finite (such as N_Q=0)"
        in text
    )
    assert "- flash-attn 2, bf16: 1 case crashed: AcceleratorError: CUDA error: misaligned" in text
    assert "GPU; torch 2.11, Triton 3.6.0; 2026-01-02" in text
    names = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| ")]
    assert names[2:] == [
        ["| SDPA cuDNN", "fp16"], ["| SDPA cuDNN", "bf16"], ["| flash-attn 2", "bf16"],
        ["| v1 flash", "bf16"], ["| v1 flash", "fp32"],
    ]  # fmt: skip
    assert validated.counted(lines[::-1]) == validated.counted(lines)  # whoever was done first
    path.write_text(json.dumps(lines[1]) + "\n")
    with pytest.raises(SystemExit) as stop:
        validated.main([str(path)])
    assert stop.value.code == 2


def test_what_is_not_on_record_is_said_to_be_so(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "REFERENCE", tmp_path)
    assert "not in these records" in table.TABLES["validated"]().lower()
    assert "`python bench/peers.py --long`" in table.TABLES["peers-long"]()
