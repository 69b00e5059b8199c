"""The training comparison: its text, its model, its records, its verdict and its picture."""

import hashlib
import json
import math
import random
import re

import pytest
import torch
from flashstudy.backends import BACKENDS, naive
from flashstudy.bench import stories, train
from flashstudy.figures import records, trim
from flashstudy.figures import train as pictures
from flashstudy.validate import faults

TINY = "--device cpu --steps 6 --batch 2 --length 16 --layers 1 --embed 16 --heads 2 --no-progress"
NAMES = "naive,sdpa-flash,sdpa-math"


# ---- The text ------------------------------------------------------------------------------------


def test_a_story_is_the_same_everywhere():
    """Records of two machines are of one text; also where Python's generator should change."""
    text, entropy = stories.write(3, 100, seed=0)
    assert hashlib.sha256(text).hexdigest().startswith("34cf3596a4741fb1")
    assert stories.write(3, 100, seed=0) == (text, entropy)
    assert stories.write(3, 100, seed=1)[0] != text
    assert len(text) == 300
    assert max(text) < len(stories.WORDS) == len(set(stories.WORDS))


def sentences(text):
    return re.findall(r"[^.?]+(?:\?[^.]+)?\.", text.removeprefix("<story> "))


def test_nats_are_those_of_the_rules():
    """Read back sentence by sentence: who holds what decides, and what each choice costs."""
    rng = random.Random(5)
    for length in (50, 333, 1025):
        tokens, nats = stories.story(rng, length)
        text = stories.read(tokens)
        whole = sentences(text)
        holder, cost = {}, 0.0
        takes, gives = stories.TAKES, stories.GIVES
        for sentence in whole:
            words = sentence.split()
            kind = math.log(takes) if holder else 0.0
            if words[1] == "takes":
                who, item = words[0], " ".join(words[2:5])
                cost -= kind - math.log(len(stories.ITEMS)) - math.log(len(stories.NAMES))
                holder[item] = who
            elif words[1] == "gives":
                giver, item, who = words[0], " ".join(words[2:5]), words[6]
                assert holder[item] == giver
                cost += math.log(len(holder)) + math.log(len(stories.NAMES)) - math.log(gives)
                holder[item] = who
            else:
                item, who = " ".join(words[2:5]), words[7]
                assert words[0] == "where"
                assert holder[item] == who
                cost += math.log(len(holder)) - math.log(1 - takes - gives)
        rest = len(tokens) - 1 - sum(len(s.split()) for s in whole)
        assert 0 <= rest < 9
        assert cost <= nats + 1e-9  # a cut sentence counts in part
        assert nats <= cost + 10
        if not rest:
            assert nats == pytest.approx(cost)


def test_entropy_is_the_mean_over_predicted_words():
    _, entropy = stories.write(200, 200, seed=3)
    rng = random.Random(3)
    assert entropy == pytest.approx(
        sum(stories.story(rng, 200)[1] for _ in range(200)) / (200 * 199)
    )
    assert 0.6 < entropy < 1.0


# ---- The model -----------------------------------------------------------------------------------


def arguments(tmp_path, *more):
    args, store = train.parse([*TINY.split(), "--out", str(tmp_path / "t.jsonl"), *more])
    store.close()
    return args


def test_the_model_does_not_look_ahead():
    model = train.LanguageModel(20, 8, 16, 2, 2, naive.attention)
    a = torch.randint(20, (3, 8))
    b = a.clone()
    b[:, 5:] = (b[:, 5:] + 1) % 20
    assert torch.equal(model(a)[:, :5], model(b)[:, :5])
    assert not torch.equal(model(a)[:, 5:], model(b)[:, 5:])
    assert model(a[:, :3]).shape == (3, 3, 20)


def test_every_backend_starts_alike_and_reads_alike(tmp_path):
    args = arguments(tmp_path)
    text = train.Text(args, 3)
    runs = [train.Run(n, train.load(n), args, 3, text) for n in ("naive", "sdpa-flash")]
    weights = [[*r.model.parameters()] for r in runs]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    losses = [r.loss(0).item() for r in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    words, following = text.batch(1)
    assert torch.equal(words[:, 1:], following[:, :-1])


def test_the_learning_rate_rises_and_falls():
    rates = [train.schedule(i, 400) for i in range(400)]
    top = rates.index(max(rates))
    assert rates[0] < 0.05
    assert train.WARM_UP - 2 <= top <= train.WARM_UP
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0.1 <= rates[-1] < 0.11


# ---- As a command --------------------------------------------------------------------------------


def run(tmp_path, *more, tiny=TINY):
    return train.main([*tiny.split(), "--out", str(tmp_path / "t.jsonl"), *more])


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]


def test_it_trains_records_answers_and_resumes(tmp_path, capsys):
    assert run(tmp_path, "--backends", NAMES) == 0
    out = capsys.readouterr().out
    assert re.search(r"Naive is .* nats from the SDPA kernels, (within|outside)", out)
    found = lines(tmp_path)
    assert {(r["backend"], r["metric"]) for r in found} == {
        (n, m) for n in NAMES.split(",") for m in ("loss", "tokens_per_s")
    }
    for r in found:
        assert r["status"] == "ok"
        assert r["value"] > 0
        assert r["samples"] >= 1
        missing = [k for k in pictures.SHARED + records.ENVIRONMENT if k not in r]
        assert not missing
    losses = [r for r in found if r["metric"] == "loss"]
    assert all(len(r["curve"]) == 6 and math.isfinite(sum(r["curve"])) for r in losses)
    assert all(2 < r["value"] < 5 for r in losses)  # log of 42 words, and a little learnt
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["t", "t.jsonl"]
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [
        "training-loss.png", "training-loss.svg",
    ]  # fmt: skip

    assert run(tmp_path, "--backends", NAMES, "--no-charts") == 0
    assert "3 of 3 runs are in" in capsys.readouterr().out
    assert lines(tmp_path) == found
    assert run(tmp_path, "--backends", NAMES, "sdpa", "--no-charts") == 0
    assert {r["backend"] for r in lines(tmp_path)[len(found) :]} == {"sdpa"}
    assert lines(tmp_path)[-1]["kernels"] in ("flash", "math")
    # Another text, seed or size is another run.
    for more in (("--seed", "1"), ("--steps", "7"), ("--lr", "0.01")):
        before = len(lines(tmp_path))
        assert run(tmp_path, "--backends", "naive", "--no-charts", *more) == 0
        assert len(lines(tmp_path)) == before + 2


def test_every_seed_is_a_model_of_its_own(tmp_path, capsys):
    assert run(tmp_path, "--backends", NAMES, "--seed", "4", "--seeds", "2", "--no-charts") == 0
    losses = [r for r in lines(tmp_path) if r["metric"] == "loss"]
    assert sorted((r["seed"], r["backend"]) for r in losses) == [
        (seed, name) for seed in (4, 5) for name in sorted(NAMES.split(","))
    ]
    curves = {seed: [r["curve"] for r in losses if r["seed"] == seed] for seed in (4, 5)}
    assert curves[4][0] == pytest.approx(curves[4][1], rel=1e-4)
    assert curves[4][0] != pytest.approx(curves[5][0], rel=1e-4)
    assert len({r["text"] for r in losses}) == 2
    assert "mean over 2 seeds" in capsys.readouterr().out
    assert run(tmp_path, "--backends", NAMES, "--seed", "5", "--no-charts") == 0
    assert "3 of 3 runs are in" in capsys.readouterr().out


def test_a_wrong_backend_is_found_before_it_trains(tmp_path, monkeypatch, capsys):
    load = train.load
    broken = faults.attention("mask off by one, shows a future key")
    monkeypatch.setattr(train, "load", lambda n: broken if n == "naive" else load(n))
    assert run(tmp_path, "--backends", NAMES, "--no-charts") == 1
    assert "Naive, seed 0: wrong: at its check: " in capsys.readouterr().out
    status = {r["backend"]: r["status"] for r in lines(tmp_path) if r["metric"] == "loss"}
    assert status == {"naive": "wrong", "sdpa-flash": "ok", "sdpa-math": "ok"}


def test_one_failure_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    load, calls = train.load, {"naive": 0, "sdpa-math": 0}

    def until_the_fifth(name, then):  # the check is the first, step 0 the second
        def attention(q, k, v, **options):
            calls[name] += 1
            o = naive.attention(q, k, v, **options)
            return o if calls[name] < 5 else then(o)

        return attention

    def fail(o):
        raise RuntimeError("not today")

    made = {
        "naive": until_the_fifth("naive", fail),
        "sdpa-math": until_the_fifth("sdpa-math", lambda o: o * math.inf),
    }
    monkeypatch.setattr(train, "load", lambda n: made.get(n) or load(n))
    assert run(tmp_path, "--backends", NAMES, "--no-charts") == 1
    rows = {r["backend"]: r for r in lines(tmp_path) if r["metric"] == "loss"}
    assert (rows["naive"]["status"], rows["naive"]["reason"]) == (
        "failed", "RuntimeError: not today",
    )  # fmt: skip
    assert rows["sdpa-math"]["status"] == "wrong"
    assert rows["sdpa-math"]["reason"] == "the loss is not finite at step 3"
    assert rows["sdpa-flash"]["status"] == "ok"
    assert "there is no spread" in capsys.readouterr().out


def test_a_gradient_that_is_missing_shows_as_another_curve(tmp_path, monkeypatch, capsys):
    """What the check beforehand would find, too; here the curves alone have to tell."""

    def deaf(q, k, v, **options):
        return naive.attention(q, k.detach(), v, **options)

    load = train.load
    monkeypatch.setattr(train, "load", lambda n: deaf if n == "naive" else load(n))
    monkeypatch.setattr(train, "verify", lambda *a: ("ok", None))
    longer = TINY.replace("--steps 6", "--steps 40").replace("--length 16", "--length 48")
    assert run(tmp_path, "--backends", NAMES, "--no-charts", tiny=longer) == 0
    assert re.search(r"Naive is .*, outside their spread", capsys.readouterr().out)


def test_what_cannot_run_is_named(tmp_path, capsys):
    assert run(tmp_path, "--backends", "flashstudy") == 1
    out = capsys.readouterr().out
    assert "not run: flashstudy: Triton kernels need a CUDA GPU" in out
    assert "nothing to train" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--backends", "fastest"), "no 'fastest'"),
        (("--steps", "0"), "argument --steps"),
        (("--heads", "3"), "3 does not divide --embed 16"),
        (("--lr", "-1"), "expected a positive number, got -1"),
        (("--dtype", "float16"), "argument --dtype"),
    ],
)
def test_bad_arguments(tmp_path, more, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *more)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# ---- The verdict and the picture -----------------------------------------------------------------


def row(backend, offset, steps=100, **more):
    """A run whose loss is a curve and a wobble of its own, `offset` apart."""
    curve = [
        1 + 3 * math.exp(-i / 20) + offset + 0.001 * math.sin(i / 9 + len(backend))
        for i in range(steps)
    ]
    shared = dict.fromkeys((*pictures.SHARED, *records.ENVIRONMENT), "x")
    numbers = {"layers": 4, "H": 4, "D": 128, "B": 16, "N_Q": 1024, "steps": steps, "seed": 0}
    made = {
        "study": "train", "backend": backend, "metric": "loss", "status": "ok", "reason": None,
        "kernels": None, "curve": curve, "value": curve[-1], "entropy": 0.8, "samples": 1,
        "utc": "2026-11-22T10:00:00Z",
    }  # fmt: skip
    return shared | numbers | made | more


def rate(backend, **more):
    numbers = {"p50": 2e6, "p20": 1.9e6, "p80": 2.1e6, "value": 2e6}
    return row(backend, 0) | {"metric": "tokens_per_s"} | numbers | more


SDPA = [row("sdpa-cudnn", 0.0), row("sdpa-flash", 0.004), row("sdpa-efficient", -0.003)]


def test_running_means():
    assert pictures.smooth([1.0, 2.0, 3.0, 4.0], 2) == [1.5, 2.5, 3.5]
    assert pictures.smooth([1.0, 2.0], 20) == [1.5]
    long = [math.sin(i) for i in range(1000)]
    assert pictures.smooth(long)[-1] == pytest.approx(sum(long[-20:]) / 20)


@pytest.mark.parametrize(("offset", "within"), [(0.001, True), (-0.002, True), (0.02, False)])
def test_within_the_spread(offset, within):
    found = pictures.Comparison([*SDPA, row("flashstudy", offset)])
    assert found.first.yardsticks == ["sdpa-cudnn", "sdpa-flash", "sdpa-efficient"]
    assert found.first.judged == ["flashstudy"]
    assert found.within("flashstudy") == within
    assert found.spread("flashstudy") == pytest.approx(0.007, rel=0.3)
    said = " ".join(found.words())
    assert ("within their spread" if within else "outside their spread") in said


def test_seeds_are_averaged():
    """What is far from one seed may be chance; a slow kernel that has but one seed counts there."""
    far = [r | {"seed": 1} for r in (*SDPA[:2], row("sdpa-efficient", 0.1))]
    rows = [*SDPA, row("sdpa-math", 0.001), row("flashstudy", 0.012), *far]
    assert not pictures.Comparison([*rows]).within("flashstudy")
    found = pictures.Comparison([*rows, row("flashstudy", 0.012) | {"seed": 1, "text": "y"}])
    assert [*found.groups] == [0, 1]
    assert len(found.first.yardsticks) == 4
    assert found.spread("flashstudy") == pytest.approx((0.007 + 0.1) / 2, rel=0.1)
    assert found.within("flashstudy")
    assert "mean over 100 steps, mean over 2 seeds" in " ".join(found.words())
    assert "seeds 0, 1" in found.title()


def test_a_pair_has_but_one_distance():
    """Three curves alike: the mean of two distances exceeds the third as often as not."""
    pair = [row("sdpa-cudnn", 0.0), row("sdpa-flash", 0.004)]
    for offset, within in ((-0.0035, True), (0.0075, True), (-0.01, False)):
        assert pictures.Comparison([*pair, row("naive", offset)]).within("naive") == within
    found = pictures.Comparison([pair[0], row("naive", 0)])
    assert found.within("naive") is None
    assert "no spread" in " ".join(found.words())


def test_the_newest_group_counts_and_failures_are_no_curves():
    old = [r | {"lr": 0.5, "utc": "2026-11-21T10:00:00Z"} for r in SDPA]
    broken = row("naive", 0, status="wrong", curve=[], value=None)
    found = pictures.Comparison([*old, *SDPA, broken])
    assert found.row["lr"] == "x"
    assert found.first.judged == []
    assert not found.first.runs["naive"].ok
    with pytest.raises(ValueError, match="no complete run"):
        pictures.Comparison([{"study": "seqlen"}])


def test_the_picture_says_which_records_it_shows(tmp_path, capsys):
    rows = [*SDPA, row("flashstudy", 0.001), rate("flashstudy"), rate("sdpa-cudnn")]
    whole, short = tmp_path / "whole.jsonl", tmp_path / "short.jsonl"
    whole.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert pictures.main([str(whole), "--out", str(tmp_path)]) == 0
    digest = pictures.Comparison(rows).digest()
    for kind in ("png", "svg"):
        assert digest.encode() in (tmp_path / f"training-loss.{kind}").read_bytes()
    assert "within their spread" in capsys.readouterr().out
    assert trim.main([str(whole), str(short)]) == 0
    assert short.stat().st_size < whole.stat().st_size
    assert pictures.Comparison(records.read(short)).digest() == digest
    changed = [r | {"value": 1.5} for r in rows]
    assert pictures.Comparison(changed).digest() != digest


def test_the_committed_picture_shows_the_reference_records():
    from flashstudy.figures import table

    path = table.REFERENCE / "train.jsonl"
    if not path.exists():
        pytest.skip("no such reference records")
    digest = pictures.Comparison(records.read(path)).digest()
    for kind in ("png", "svg"):
        picture = table.REFERENCE.parent / f"training-loss.{kind}"
        assert digest.encode() in picture.read_bytes(), f"{picture} is stale"


def test_records_without_a_run_are_an_error(tmp_path, capsys):
    path = tmp_path / "none.jsonl"
    path.write_text("")
    with pytest.raises(SystemExit):
        pictures.main([str(path)])
    assert "no complete run" in capsys.readouterr().err


def test_ours_is_no_row_of_the_table():
    """It is the package's own pick among them, and the choice of names in --help says so."""
    assert pictures.OURS not in BACKENDS
    assert train.NAMES[0] == pictures.OURS
