"""Does training notice which attention it runs on? One small language model, trained with each.

    python bench/train.py                                   # defaults that suit this machine
    python bench/train.py --steps 1000 --layers 8           # longer, deeper
    python bench/train.py --backends flashstudy,sdpa-flash,sdpa-cudnn,sdpa-efficient

The model: embedding, blocks of block.py, final norm, head. The text: stories from a grammar
(bench/stories.py) in which who holds what has to be looked up far back, and whose entropy, the loss
of a perfect model, is known. Every backend starts from the same weights and sees the same words.

No two kernels round alike, and training amplifies what they differ in. So the question is not
whether two loss curves are equal, but whether a backend's lies as near to those of torch's SDPA
kernels as these lie to one another. flashstudy is the attention that this package picks.
"""

import argparse
import contextlib
import hashlib
import math
import random
import sys
import time
from pathlib import Path

import flashstudy
import torch
import torch.nn.functional as F
from flashstudy import backends
from flashstudy.backends import torch_sdpa
from flashstudy.bench import cells, common, rounds, seqlen, stories
from flashstudy.block import Block
from flashstudy.figures import grid, records
from flashstudy.figures import train as pictures
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

OURS = pictures.OURS
NAMES = (OURS, *backends.BACKENDS)
METHOD = ("block.py", "bench/common.py", "bench/stories.py", "bench/train.py")
TURN = 20  # steps that a run takes before the next one's turn
WARM_UP = 40  # steps until the learning rate is reached
HELD_OUT = 4  # batches to judge the trained model by
DEFAULTS = {
    "cuda": {"steps": 240, "batch": 32, "length": 1024, "layers": 4, "embed": 512, "heads": 4,
             "dtype": "bfloat16", "lr": 1e-3, "seeds": 3},
    "cpu": {"steps": 200, "batch": 8, "length": 128, "layers": 2, "embed": 128, "heads": 4,
            "dtype": "float32", "lr": 3e-3, "seeds": 1},
}  # fmt: skip
YARDSTICKS = ("sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "sdpa-math")
SLOW = ("naive", "naive-compiled", "sdpa-math")  # on a GPU: there they train from one seed only


# The model


class LanguageModel(nn.Module):
    """Embedding of words and places, blocks, norm, head. Takes tokens (B, N), returns logits."""

    def __init__(self, words, length, embed, heads, layers, attention):
        super().__init__()
        self.words, self.places = nn.Embedding(words, embed), nn.Embedding(length, embed)
        self.blocks = nn.Sequential(
            *(Block(embed, heads, attention, causal=True) for _ in range(layers))
        )
        self.norm, self.head = nn.LayerNorm(embed), nn.Linear(embed, words, bias=False)
        for table in (self.words, self.places, self.head):
            nn.init.normal_(table.weight, std=0.02)
        for block in self.blocks:  # what the blocks add up to keeps its size, whatever the depth
            nn.init.normal_(block.qkv.weight, std=embed**-0.5)
            nn.init.normal_(block.out.weight, std=(2 * layers * embed) ** -0.5)

    def forward(self, tokens):
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]  # [B, N, E]
        return self.head(self.norm(self.blocks(x)))  # [B, N, words]


class Text:
    """The words of all steps, on the device before the first: nobody waits for them."""

    def __init__(self, args, seed):
        batches = args.steps + HELD_OUT
        text, self.entropy = stories.write(args.batch * batches, args.length + 1, seed)
        self.digest = hashlib.sha256(text).hexdigest()[:12]
        tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.tokens = tokens.view(batches, args.batch, args.length + 1).to(args.device)

    def batch(self, step):
        """(words, the words that follow them), [B, N] each."""
        tokens = self.tokens[step].long()
        return tokens[:, :-1], tokens[:, 1:]


class Run:
    """The training of one model with one backend, a turn at a time."""

    def __init__(self, name, attention, args, seed, text):
        self.name, self.args, self.seed, self.text = name, args, seed, text
        self.status, self.reason = "ok", None
        self.step, self.rates = 0, []
        torch.manual_seed(seed)  # on the CPU: the same weights whatever the device
        sizes = (len(stories.WORDS), args.length, args.embed, args.heads, args.layers)
        self.model = LanguageModel(*sizes, attention).to(args.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1,
            fused=args.device.type == "cuda",
        )  # fmt: skip
        self.losses = torch.zeros(args.steps, device=args.device)  # read at the end of a turn

    def loss(self, step):
        words, following = self.text.batch(step)
        dtype, kind = common.DTYPES[self.args.dtype], self.args.device.type
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            logits = self.model(words)
        return F.cross_entropy(logits.float().flatten(0, 1), following.flatten())

    def turn(self):
        """Take TURN steps, or what is left of them."""
        began, first = time.perf_counter(), self.step
        for _ in range(min(TURN, self.args.steps - self.step)):
            rate = schedule(self.step, self.args.steps) * self.args.lr
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = self.loss(self.step)
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.losses[self.step] = loss.detach()
            self.step += 1
        bad = (~self.losses[first : self.step].isfinite()).nonzero()  # waits for the device
        if len(bad):
            self.fail("wrong", f"the loss is not finite at step {first + int(bad[0])}")
        seconds = time.perf_counter() - began
        self.rates.append((self.step - first) * self.args.batch * self.args.length / seconds)

    def fail(self, status, reason):
        self.status, self.reason = status, reason
        self.model = self.optimizer = None

    def held_out(self):
        """Mean loss on stories that no step has seen."""
        steps = range(self.args.steps, self.args.steps + HELD_OUT)
        with torch.no_grad():
            return sum(self.loss(step).item() for step in steps) / HELD_OUT


def schedule(step, steps):
    """Share of the learning rate: up in WARM_UP steps, then half a cosine down to a tenth."""
    return min(1, (step + 1) / WARM_UP) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


# Backends


def load(name):
    if name != OURS:
        return backends.load(name)
    return flashstudy.attention


def reason_not(name, device, dtype):
    """Why a backend cannot train here, or None."""
    # What this package picks runs wherever the portable steps do.
    name = "v3_tma" if name == OURS else name
    return seqlen.reason_not(name, device, dtype, True)


def what_ran(name, args):
    """Which kernels a backend chose among, for those that choose."""
    shape = (args.batch, args.heads, args.length, args.embed // args.heads)
    q, k, v = (
        torch.empty(shape, device=args.device, dtype=common.DTYPES[args.dtype], requires_grad=True)
        for _ in range(3)
    )
    if name == "sdpa":
        return torch_sdpa.picked(q, k, v, causal=True)
    if name == OURS:
        steps = flashstudy.choose(q, k, v), flashstudy.choose(q, k, v, backward=True)
        return " and ".join(dict.fromkeys(steps))
    return None


def verify(name, attention, args, verifier):
    """Judge a backend's results and gradients, in the shape that it will train with.

    Returns ("ok", None), or a status and the reason why it does not train.
    """
    cell = grid.Cell(
        "backward", args.embed // args.heads, True, args.length, args.batch, args.heads
    )
    try:
        verifier.expect(cell)
        judged = verifier.verdict(attention, cell)
    except Exception as e:
        return rounds.failure(e)
    reasons = "; ".join(judged.reasons)
    if not judged.over <= common.GROSS:
        return "wrong", f"at its check: {reasons}"
    if not judged.ok:
        print(f"{records.label(name)} is over the error budget: {reasons}")
    return "ok", None


# Records


def about(args):
    """The fields that all records of a call share: machine, software, sizes."""
    return {"study": "train"} | common.environment(args.device) | {
        "effort": "full", "scope": "model", "direction": "both", "causal": True, "B": args.batch,
        "E": args.embed, "H": args.heads, "H_KV": args.heads, "N_Q": args.length,
        "N_K": args.length, "D": args.embed // args.heads, "dtype": args.dtype,
        "layers": args.layers, "steps": args.steps, "lr": args.lr,
    }  # fmt: skip


def fields(name, seed, text, shared):
    """A record's fields before anything is measured: they say what a run is."""
    source = common.source(None if name == OURS else name, METHOD)
    own = {"seed": seed, "text": text.digest, "entropy": text.entropy}
    return shared | own | {"backend": name, "source": source}


def rows(run, base, stamp):
    """The records of a run, that of its loss last: it says that the run is complete."""
    base = base | stamp | {"status": run.status, "reason": run.reason}
    none = dict.fromkeys(("value", "p50", "p20", "p80")) | {"samples": 0}
    loss = {"metric": "loss", "unit": "nats/token"}
    if run.status != "ok":
        return [base | loss | none | {"curve": []}]
    rates = common.summary(run.rates[1:] or run.rates)  # the first turn compiles
    held_out = common.summary([run.held_out()])
    curve = [round(x, 8) for x in run.losses.tolist()]
    return [
        base | {"metric": "tokens_per_s", "unit": "tokens/s"} | rates,
        base | loss | held_out | {"curve": curve},
    ]


# The program


def train(args, texts, todo, store, shared):
    """Train `todo`, pairs (seed, backend), in turns and record each."""
    verifier = rounds.Verifier(common.DTYPES[args.dtype], args.device.type, args.seed)
    field, before = [], common.gpu_state(args.device)
    print("checking each backend against the fp64 reference, and compiling …", flush=True)
    names = list(dict.fromkeys(name for _, name in todo))
    attention = {name: load(name) for name in names}
    verdicts = {}
    for name in names:
        verdicts[name] = verify(name, attention[name], args, verifier)
        if verdicts[name][0] != "ok":
            rounds.recover(args.device.type, f"{name}: {verdicts[name][1]}")
    for seed, name in todo:
        run = Run(name, attention[name], args, seed, texts[seed])
        if verdicts[name][0] != "ok":
            run.fail(*verdicts[name])
        field.append(run)
    bar = tqdm(
        total=args.steps * len(field), unit="step", disable=args.no_progress, dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    order = random.Random(args.seed)
    with bar:
        while running := [r for r in field if r.status == "ok" and r.step < args.steps]:
            for run in order.sample(running, len(running)):
                first = run.step
                attempt(run, run.turn)
                seen = "" if run.status != "ok" else f" loss {run.losses[run.step - 1]:.3f}"
                text = f"{records.label(run.name)} seed {run.seed}{seen}"
                bar.set_description(text, refresh=False)
                bar.update(run.step - first)
    after = common.gpu_state(args.device)
    stamp = {"utc": common.utc(), "gpu_before": before, "gpu_after": after}
    for run in field:
        base = fields(run.name, run.seed, run.text, shared)
        store.append(rows(run, base | {"kernels": what_ran(run.name, args)}, stamp))
        if run.status != "ok":
            label = f"{records.label(run.name)}, seed {run.seed}"
            print(f"{label}: {run.status}: {run.reason}")


def attempt(run, action):
    """Do something for a run that is still in; an exception takes it out, and no other."""
    if run.status != "ok":
        return
    try:
        action()
    except Exception as e:
        run.fail(*rounds.failure(e))
    if run.status != "ok":
        rounds.recover(run.args.device.type, f"{run.name}: {run.reason}")


def show(found, args):
    """The table, the answer in words, and the picture."""
    table = []
    for seed, group in found.groups.items():
        for name, run in group.runs.items():
            own = [records.label(name), run.row["kernels"] or "", seed, run.row["status"]]
            if run.ok:
                rate = "–" if run.rate is None else f"{run.rate['p50']:,.0f}"
                own[3:] = [f"{run.row['value']:.4f}", f"{run.end:.4f}", rate]
                apart = group.to_others(name)
                own += [f"{min(apart):.2g}", f"{max(apart):.2g}"] if apart else ["–", "–"]
            table.append(own)
    head = ["", "kernels", "seed", "held-out loss", "last steps", "tokens/s", "nearest SDPA",
            "farthest"]  # fmt: skip
    print(f"\n{found.title()}")
    align = ["left"] * 2 + ["right"] * (len(head) - 2)
    print(tabulate(table, head, "simple", disable_numparse=True, colalign=align))
    print("\n" + "\n".join(found.words()))
    if not args.no_charts:
        for path in pictures.draw(found, args.charts):
            print(path)


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""
How it measures. Each backend is first checked against an fp64 reference, gradients included, in the
very shape that it will train with. Then the models train in turns of 20 steps, in random order, so
that clocks and power limits treat them alike: AdamW, weights in fp32, products and attention in
--dtype under autocast. tokens/s are those of a turn, the host included; the first turn of each does
not count. The held-out loss is that of stories which no step has seen. On a GPU, attention that
stores its scores is so slow that it trains from the first seed alone.

How it judges. Curves are smoothed over 20 steps. The distance of two is the mean over the steps of
their difference. A backend lies within the spread where its mean distance to the SDPA kernels is at
most the largest distance between two of them; with only two of those, its smallest. Both are means
over the seeds: what one curve alone does is chance, as the SDPA kernels' own curves show.

How it resumes. Runs are recorded when they are done, and the same command trains only what is
missing: add a backend, and it alone trains. An interrupted call begins its own runs again.

Exit codes: 0 done, 1 a backend failed or was wrong, or nothing ran, 2 bad arguments,
130 interrupted.""",
    )
    add = parser.add_argument
    add("--backends", nargs="+", metavar="NAME", type=cells.words(NAMES),
        help=f"default: {OURS} and torch's kernels by name, {', '.join(YARDSTICKS)}; without a GPU"
             " naive takes the place of the first")  # fmt: skip
    for name, text in (
        ("steps", "steps of the optimizer"),
        ("batch", "stories a step"),
        ("length", "words of a story, and keys that its last word sees"),
        ("layers", "blocks"),
        ("embed", "width of the model, H·D"),
        ("heads", "heads, dividing --embed"),
    ):
        values = f"{DEFAULTS['cuda'][name]}, without a GPU {DEFAULTS['cpu'][name]}"
        add(f"--{name}", type=common.positive, metavar="N", help=f"{text} (default: {values})")
    add("--dtype", choices=("bfloat16", "float32"),
        help="of products and attention (default: bfloat16, without a GPU float32)")  # fmt: skip
    add("--lr", type=float, help="highest learning rate (default: 1e-3, without a GPU 3e-3)")
    add("--seed", type=int, default=0, help="of weights, text and order (default: 0)")
    add("--seeds", type=common.positive, metavar="N",
        help="train from so many seeds, --seed and the next (default: 3, without a GPU 1)",
        )  # fmt: skip
    add("--out", type=Path, metavar="FILE",
        help="record file, JSON lines (default: results/train-DEVICE.jsonl)")  # fmt: skip
    add("--charts", type=Path, metavar="DIR", help="where charts go (default: beside the records)")
    add("--no-charts", action="store_true", help="table and answer only")
    add("--no-progress", action="store_true", help="no progress bar")
    add("--device", type=common.device_argument, default=None,
        help="cpu, cuda or cuda:INDEX (default: cuda where there is one)")  # fmt: skip
    args = parser.parse_args(argv)

    if args.device is None:
        args.device = common.default_device()
    for name, value in DEFAULTS[args.device.type].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.embed % args.heads:
        parser.error(f"argument --heads: {args.heads} does not divide --embed {args.embed}")
    if args.lr <= 0:
        parser.error(f"argument --lr: expected a positive number, got {args.lr}")
    if args.backends is None:
        first = OURS if args.device.type == "cuda" else "naive"
        args.backends = [[first, *YARDSTICKS]]
    asked = {name for part in args.backends for name in part}
    args.backends = [name for name in NAMES if name in asked]
    if not args.backends:
        parser.error("argument --backends: expected at least one name")
    if args.out is None:
        args.out = common.result_file("train", args.device)
    store = common.open_records(args.out, parser)
    if args.charts is None:
        args.charts = args.out.with_name(args.out.stem + "-charts" * (not args.out.suffix))
    return args, store


def main(argv=None):
    args, store = parse(argv)
    with contextlib.closing(store):
        if args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        able = []
        for name in args.backends:
            reason = reason_not(name, args.device, args.dtype)
            if reason is None:
                able.append(name)
            else:
                print(f"not run: {records.label(name)}: {reason}")
        if not able:
            print("nothing to train")
            return 1
        seeds = range(args.seed, args.seed + args.seeds)
        texts, shared = {seed: Text(args, seed) for seed in seeds}, about(args)
        plan = {
            pictures.key(fields(name, seed, texts[seed], shared)): (seed, name)
            for seed in seeds
            for name in able
            if seed == args.seed or name not in SLOW or args.device.type == "cpu"
        }

        def mine():
            return [r for r in store.rows if "curve" in r and pictures.key(r) in plan]

        done = {pictures.key(r) for r in mine()}
        todo = [run for key, run in plan.items() if key not in done]
        print(f"{shared['device']}; {len(done)} of {len(plan)} runs are in {args.out}")
        if todo:
            stopped = cells.guarded(lambda: train(args, texts, todo, store, shared))
            if stopped is not None:
                return stopped
        kept = [r for r in store.rows if pictures.key(r) in plan]
        show(pictures.Comparison(kept), args)
        return int(any(r["status"] != "ok" for r in mine()))


if __name__ == "__main__":
    sys.exit(main())
