#!/usr/bin/env python
"""Every backend and kernel that runs here against the fp64 reference, over the grid of cases.py.

    python validate/check_outputs.py                     everything this machine can run
    python validate/check_outputs.py --quick --backends v1_flash,sdpa
    python validate/check_outputs.py --self-test         are broken backends rejected?

The last table shows, per backend and dtype, the worst error as a share of its budget (errors.py)
in each family of cases: up to 1.00 is right. Exit code 0: everything that ran is right. 1: a wrong
result, or nothing ran. 2: bad arguments.

A library that raises an error for a case has refused it: listed, not a failure. A wrong number is a
failure, whoever computes it. This project's portable kernels take every case, so there a refusal
is a failure too; those for newer GPUs may refuse with a ValueError.

Without a GPU, Triton's interpreter runs the portable kernels on the cases it can afford.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import inspect
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shlex
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from typing import NamedTuple

import torch
from tqdm import tqdm


def _interpret_without_gpu():
    """Triton decides whether to interpret when it is imported, so this comes before that."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--device")
    device = early.parse_known_args()[0].device
    if device == "cpu" or (device is None and not torch.cuda.is_available()):
        os.environ["TRITON_INTERPRET"] = "1"


if __name__ in ("__main__", "__mp_main__"):  # as a script, or as one of its worker processes
    _interpret_without_gpu()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there are enough processes

from flashstudy.backends import BACKENDS, load, why_not  # noqa: E402
from flashstudy.bench import common  # noqa: E402
from flashstudy.figures.records import read  # noqa: E402
from flashstudy.validate import cases, errors, faults  # noqa: E402

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
DTYPE_NAMES = {d: n for n, d in DTYPES.items()}
CASE_SECONDS = {"cuda": 240, "cpu": 120}  # a case that takes longer hangs (compilation included)
WIDEST_TILE = 256  # queries, of any kernel
COMMON_HEAD_DIM = 64  # that three of four cases have
HEAVY_JOBS = 3  # heavy cases take up to 20 GiB each


class Candidate(NamedTuple):
    """A function to judge, and what it promises."""

    name: str
    attention: object
    backward: bool
    lse: str = (
        ""  # "fp32": returns it on request; "stored": from scores stored in the inputs' dtype
    )
    ours: bool = False  # this project's: bitwise repeatable, deaf to NaN in masked keys
    portable: bool = False  # takes every case: a refusal is a failure
    tiled: bool = False  # never touches the tiles right of the diagonal
    deterministic: bool = False  # takes that keyword: without it dq may differ between calls


def candidate(name):
    """The Candidate for a row of the table of backends."""
    row = BACKENDS[name]
    kernel = row.target.startswith("kernels.")
    ours = kernel or row.target.startswith("backends.naive")
    portable = ours and row.capability < (9, 0)
    lse = "" if not kernel else "stored" if row.family == "standard" else "fp32"
    tiled, attention = kernel and row.family == "flash", load(name)
    keyword = "deterministic" in inspect.signature(attention).parameters
    return Candidate(name, attention, row.backward, lse, ours, portable, tiled, keyword)


_candidate = functools.cache(candidate)


# ---- One call ----------------------------------------------------------------------------------


def poison(q, k):
    """Leave NaN in the memory that the next outputs and intermediates are likely to be given."""
    if q.device.type != "cuda":
        return
    sizes = [t.numel() * bytes_ for t in (q, k) for bytes_ in (q.element_size(), 4)]
    sizes += [4 * q[..., 0].numel()]
    blocks = [torch.empty(n, dtype=torch.uint8, device=q.device) for n in sizes * 4]
    for block in blocks:
        block.fill_(255)  # all ones is a NaN in every float format


class poisoned_empty:
    """torch.empty and its kin return NaN in here: what a kernel forgets to write stays NaN."""

    def __enter__(self):
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_):
        torch.use_deterministic_algorithms(False)


class InputChangedError(Exception):
    """A backend wrote into its inputs."""


def call(c, case, q, k, v, do, deterministic=False):
    """The outputs of candidate c, from poisoned memory. The inputs have to survive the call."""
    attention = c.attention
    if c.deterministic:  # said either way: to poison sets what would decide otherwise
        attention = functools.partial(attention, deterministic=deterministic)
    named = [(n, t) for n, t in (("q", q), ("k", k), ("v", v), ("do", do)) if t is not None]
    before = [] if case.heavy else [t.clone() for _, t in named]
    if not case.heavy:
        poison(q, k)
    options = {"causal": case.causal, "scale": case.scale, "lse": bool(c.lse)}
    with poisoned_empty() if c.lse else contextlib.nullcontext():
        got = errors.run(attention, q, k, v, do, **options)
    if q.device.type == "cuda":
        torch.cuda.synchronize()  # an illegal access surfaces here, in the case that made it
    changed = [n for (n, t), old in zip(named, before, strict=False) if not _same(t, old)]
    if changed:
        for (_, t), old in zip(named, before, strict=True):
            t.copy_(old)
        raise InputChangedError(f"wrote into its input {', '.join(changed)}")
    return got


def _same(a, b):
    """Bitwise equal; NaN equals NaN."""
    bits = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.view(bits), b.view(bits))


def _expect(c, case, dtype, inputs):
    lse = {"": False, "fp32": True, "stored": dtype}[c.lse]
    return errors.expect(*inputs, causal=case.causal, scale=case.scale, lse=lse)


@functools.lru_cache(maxsize=400)
def _prepare(case, dtype, device, lse):
    inputs = cases.inputs(case, dtype, device)
    return inputs, _expect(Candidate("", None, True, lse), case, dtype, inputs)


def _prepared(c, case, dtype, device):
    """Inputs and Expectation of a case; backends that show the same things share them."""
    return _prepare(case, dtype, device, c.lse)


# ---- Judges: each returns (Verdict, findings) ----------------------------------------------------


def _compare(c, promised, what, pairs):
    """Reasons (where promised) or findings for the outputs that are not bitwise equal."""
    different = [n for n, a, b in pairs if not _same(a, b)]
    text = [f"{what}: {', '.join(different)} changed"] if different else []
    return (text, []) if promised else ([], text)


def _with(verdict, reasons):
    if not reasons:
        return verdict
    return errors.Verdict(False, math.inf, verdict.stats, verdict.reasons + reasons)


def budget(c, case, dtype, device):
    """Every output within its budget."""
    if not case.heavy:
        inputs, expectation = _prepared(c, case, dtype, device)
        verdict = errors.verdict(call(c, case, *inputs), expectation)
        if c.deterministic and case.grad and verdict.ok:
            verdict = errors.verdict(call(c, case, *inputs, deterministic=True), expectation)
            if not verdict.ok:
                verdict = verdict._replace(reasons=[f"deterministic: {r}" for r in verdict.reasons])
        return verdict, []
    inputs = cases.inputs(case, dtype, device)
    got = call(c, case, *inputs)
    if case.h > 2:  # the first and the last head stand for all
        got = {n: t[:, :: case.h - 1] for n, t in got.items()}
        inputs = [None if t is None else t[:, :: t.shape[1] - 1] for t in inputs]
    return errors.verdict(got, _expect(c, case, dtype, inputs)), []


def repeat(c, case, dtype, device):
    """The same call again gives the same bits: always in the ladder's portable steps.

    A step with the keyword `deterministic` promises it of dq where that is True, else of the rest.
    """
    inputs, expectation = _prepared(c, case, dtype, device)
    reasons, findings = [], []
    for deterministic in (False, True) if c.deterministic and case.grad else (False,):
        promised = {"o", "lse"} if c.ours else set()
        promised |= {"dk", "dv"} if c.portable or c.deterministic else set()
        promised |= {"dq"} if c.portable or deterministic else set()
        what = "same call again" + ", deterministic" * deterministic
        first = call(c, case, *inputs, deterministic=deterministic)
        for _ in range(9 if device == "cuda" else 2):
            again = call(c, case, *inputs, deterministic=deterministic)
            for part in (promised, first.keys() - promised):
                pairs = [(n, first[n], again[n]) for n in first if n in part]
                more = _compare(c, part is promised, what, pairs)
                reasons, findings = reasons or more[0], findings or more[1]
    return _with(errors.verdict(first, expectation), reasons), findings


def independent(c, case, dtype, device):
    """NaN in one KV head of one batch, and the queries that read it, stays there."""
    inputs, expectation = _prepared(c, case, dtype, device)
    clean = call(c, case, *inputs, deterministic=True)
    group = case.h // case.h_kv
    hurt = [None if t is None else t.clone() for t in inputs]
    for t, width in zip(hurt, (group, 1, 1, group), strict=True):
        if t is not None:
            t[0, :width] = math.nan
    got = call(c, case, *hurt, deterministic=True)
    pairs = []
    for n in clean:
        width = 1 if n in ("dk", "dv") else group
        a, b = clean[n].clone(), got[n].clone()
        a[0, :width] = b[0, :width] = 0
        pairs.append((n, a, b))
    reasons, _ = _compare(c, True, "NaN in another head", pairs)
    return _with(errors.verdict(clean, expectation), reasons), []


def permuted_keys(c, case, dtype, device):
    """The order of the keys does not matter without a mask: same reference, same budget."""
    (q, k, v, do), expectation = _prepared(c, case, dtype, device)
    order = torch.randperm(case.n_k, generator=torch.Generator().manual_seed(1)).to(device)
    return errors.verdict(call(c, case, q, k[:, :, order], v[:, :, order], do), expectation), []


def _future_nan(c, case, dtype, device, promised, values, margin):
    (q, k, v, do), expectation = _prepared(c, case, dtype, device)
    clean = call(c, case, q, k, v, do)
    cut = case.n_k - case.n_q // 8  # the last eighth of the queries may see it
    k, v = k.clone(), v.clone()
    k[:, :, cut:] = math.nan
    if values:
        v[:, :, cut:] = math.nan
    got = call(c, case, q, k, v, do)
    rows = cut - (case.n_k - case.n_q) - margin  # row i sees the keys up to i + N_K - N_Q
    if rows <= 0:
        raise errors.BadCase(f"{case.name}: no row is far enough from the NaN")
    pairs = [(n, clean[n][:, :, :rows], got[n][:, :, :rows]) for n in clean]
    reasons, findings = _compare(c, promised, f"NaN in future {values or 'keys'}", pairs)
    return _with(errors.verdict(clean, expectation), reasons), findings


def future_nan_k(c, case, dtype, device):
    """Causal: NaN in future keys leaves the bits of earlier rows alone."""
    return _future_nan(c, case, dtype, device, c.ours, "", 0)


def future_nan_kv(c, case, dtype, device):
    """Causal: NaN in future keys and values leaves the rows of earlier tiles alone.

    Within a tile it cannot: the masked probability is 0, and 0 · NaN in the matrix product is NaN.
    """
    return _future_nan(c, case, dtype, device, c.tiled, "keys and values", WIDEST_TILE)


PROPERTIES = {
    "budget": budget,
    "repeat": repeat,
    "independent": independent,
    "permuted-keys": permuted_keys,
    "future-nan-k": future_nan_k,
    "future-nan-kv": future_nan_kv,
}


def _one_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _is_crash(error):
    """An asynchronous CUDA error: the process cannot use the GPU any more."""
    return "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"


def judge(c, case, dtype, device):
    """One record: the verdict on one case, or how it was refused.

    status: ok, fail, refused (by a library, or rightly), crash. over: error/budget.
    """
    began = time.perf_counter()
    record = {
        "backend": c.name,
        "dtype": DTYPE_NAMES[dtype],
        "device": device,
        "family": case.family,
        "case": case.name,
        "grad": case.grad,
        "status": "ok",
        "over": None,
        "reasons": [],
        "findings": [],
        "stats": {},
    }
    try:
        verdict, findings = PROPERTIES[case.judge](c, case, dtype, device)
    except errors.BadCase as e:  # a fault of the grid, nobody's refusal
        record |= {"status": "fail", "reasons": [f"the case is at fault: {e}"]}
    except Exception as e:
        wanted = isinstance(e, ValueError) and (case.may_refuse or (c.ours and not c.portable))
        refused = wanted or not (c.ours or isinstance(e, InputChangedError))
        status = "crash" if _is_crash(e) else "refused" if refused else "fail"
        record |= {"status": status, "reasons": [_one_line(e)]}
    else:
        record |= {
            "status": "ok" if verdict.ok else "fail",
            "over": verdict.over,
            "reasons": verdict.reasons,
            "findings": findings,
            "stats": {n: s._asdict() for n, s in verdict.stats.items()},
        }
    return record | {"seconds": round(time.perf_counter() - began, 3)}


# ---- Workers: a crash or a hang costs one case, and several backends compile at once -------------


def _be_quiet():
    """Torch tells which of its kernels it cannot take, the interpreter's numpy of log(0)."""
    for category in (UserWarning, RuntimeWarning):
        warnings.simplefilter("ignore", category)


def _worker(connection, device):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent ends them
    torch.set_num_threads(1)  # the parallelism is in the processes
    _be_quiet()
    while (task := connection.recv()) is not None:
        name, case, dtype = task
        connection.send(judge(_candidate(name), case, dtype, device))


class Worker:
    """A process that judges one case after the other."""

    def __init__(self, device):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_worker, args=(theirs, device), daemon=True)
        self.process.start()
        theirs.close()
        self.limit = CASE_SECONDS[device] + 120  # the first case waits for the imports
        self.device, self.task, self.queue = device, None, []

    def give(self, task):
        self.task, self.since = task, time.monotonic()
        self.connection.send(task)

    def take(self):
        """The record of the task in hand, or None while it is still running."""
        name, case, dtype = self.task
        reason = None
        if self.connection.poll():
            try:
                record = self.connection.recv()
            except (EOFError, OSError):
                self.process.join()
                reason = f"the process died (exit code {self.process.exitcode})"
        elif time.monotonic() - self.since > self.limit:
            reason = f"no result after {self.limit} s"
        else:
            return None
        self.limit = CASE_SECONDS[self.device]
        if reason is not None:
            record = {
                "backend": name,
                "dtype": DTYPE_NAMES[dtype],
                "device": self.device,
                "family": case.family,
                "case": case.name,
                "grad": case.grad,
                "status": "crash",
                "over": None,
                "reasons": [reason],
                "findings": [],
                "stats": {},
                "seconds": round(time.monotonic() - self.since, 3),
            }
        self.task = None
        return record

    def stop(self):
        self.process.kill()
        self.process.join()
        self.connection.close()


def _effort(part):
    """Roughly the seconds a list of tasks takes: compilations first of all."""
    name = part[0][0]
    if name in cases.CORE_ONLY:
        return 15 * len(part)
    builds = len({(n, c.d, c.causal) for n, c, _ in part})
    return (1 if BACKENDS[name].target.startswith("kernels.") else 0.1) * builds + len(part) / 20


def run_in_workers(work, device, jobs, show):
    """Judge every (name, case, dtype) of `work`, a list of lists; the records in any order.

    Each inner list stays in one process, the longest come first. Heavy cases run last, few at a
    time, because they have to fit in memory together.
    """
    light = [[t for t in part if not t[1].heavy] for part in work]
    light = sorted((part for part in light if part), key=_effort)
    heavy = [[t] for part in work for t in part if t[1].heavy]
    workers = [Worker(device) for _ in range(min(jobs, len(light) + len(heavy)))]

    def next_part():
        running = sum(w.task is not None and w.task[1].heavy for w in workers)
        if light:
            return light.pop()[::-1]
        return heavy.pop() if heavy and running < HEAVY_JOBS else []

    records = []
    try:
        while workers:
            for i, w in enumerate(workers):
                if w.task is not None and (record := w.take()) is not None:
                    records.append(record)
                    show(record)
                    if record["status"] == "crash":  # what it leaves behind is not trusted
                        w.stop()
                        workers[i] = Worker(device)
                        workers[i].queue = w.queue
                        w = workers[i]
                if w.task is None:
                    w.queue = w.queue or next_part()
                    if w.queue:
                        w.give(w.queue.pop())
            for w in (w for w in workers if w.task is None):
                w.stop()
            workers = [w for w in workers if w.task is not None]
            multiprocessing.connection.wait([w.connection for w in workers], timeout=1)
    finally:
        for w in workers:
            w.stop()
    return records


# ---- Report --------------------------------------------------------------------------------------


def _cell(records):
    """One cell of the table: worst error/budget of what ran, and how much of it failed."""
    ran = [r for r in records if r["status"] != "refused"]
    if not records:
        return ""
    if not ran:
        return "refused"
    bad = sum(r["status"] in ("fail", "crash") for r in ran)
    worst = max((r["over"] for r in ran if r["over"] is not None), default=math.inf)
    text = "inf" if worst == math.inf else f"{worst:.2f}" if worst < 100 else f"{worst:.0e}"
    return f"{text} FAIL {bad}/{len(ran)}" if bad else text


def _worst(records):
    ran = [r for r in records if r["status"] != "refused"]
    failed = [r for r in ran if r["status"] in ("fail", "crash")]
    key = lambda r: math.inf if r["over"] is None else r["over"]  # noqa: E731
    return max(failed or ran, key=key, default=None)


def table(records):
    """The text of the table: a row per backend and dtype, a column per family of cases.

    Gradient cases stand in a column of their own; LSE shows its own error/budget and bias the
    output's signed mean error over the budget of the mean.
    """
    from tabulate import tabulate

    groups = defaultdict(list)
    for r in records:
        groups[r["backend"], r["dtype"]].append(r)
    order = {n: i for i, n in enumerate(BACKENDS)}
    rows = []
    for (name, dtype), mine in sorted(
        groups.items(), key=lambda g: (order.get(g[0][0], 99), g[0][0], list(DTYPES).index(g[0][1]))
    ):
        forward = [r for r in mine if not r["grad"]]
        stats = [r["stats"] for r in mine]
        lse = max((s["lse"]["over"] for s in stats if "lse" in s), default=None)
        bias = [s["o"]["bias"] / s["o"]["mean_budget"] for s in stats if "o" in s]
        bias = max((b for b in bias if math.isfinite(b)), key=abs, default=None)
        worst = _worst(mine)
        rows.append(
            [name, dtype, sum(r["status"] != "refused" for r in mine)]
            + [_cell([r for r in forward if r["family"] == f]) for f in cases.FAMILIES]
            + [_cell([r for r in mine if r["grad"]])]
            + ["" if lse is None else f"{lse:.2f}", "" if bias is None else f"{bias:+.2f}"]
            + ["" if worst is None else worst["case"]]
        )
    header = ["backend", "dtype", "cases", *cases.FAMILIES, "gradients", "LSE", "bias"]
    return tabulate(rows, [*header, "worst case"], tablefmt="simple", disable_numparse=True)


def _grouped(records, field):
    """(backend, dtypes, text, cases) for each different message of a backend."""
    groups = defaultdict(list)
    for r in records:
        for text in r[field]:
            groups[r["backend"], text].append(r)
    for (name, text), mine in groups.items():
        dtypes = ", ".join(d for d in DTYPES if any(r["dtype"] == d for r in mine))
        names = list(dict.fromkeys(r["case"] for r in mine))
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        yield f"{name} {dtypes}: {text}\n    {'; '.join(names[:2])}{more}"


def failures(records):
    """One paragraph per failed case, the worst first, each with what is needed to repeat it."""
    bad = [r for r in records if r["status"] in ("fail", "crash")]
    bad.sort(key=lambda r: -math.inf if r["over"] is None else -r["over"])
    return [
        f"{r['backend']} {r['dtype']} {r['family']}: {r['case']}\n    {r['status']}: "
        + "; ".join(r["reasons"])
        for r in bad
    ]


def report(records, skipped, seconds, limit=40):
    """Print table and lists; return the exit code."""
    print(f"\nError over budget (up to 1.00 is right), worst of each family:\n\n{table(records)}")
    refused = list(_grouped([r for r in records if r["status"] == "refused"], "reasons"))
    findings = list(_grouped(records, "findings"))
    bad = failures(records)
    for title, lines in (
        ("Not run here", skipped),
        ("Refused with an error (not counted as wrong)", refused),
        ("Findings (not promised, so not counted as wrong)", findings),
        ("Failures", bad),
    ):
        if lines:
            print(f"\n{title}:")
            print("\n".join(f"  {line}" for line in lines[:limit]))
            if len(lines) > limit:
                print(f"  … and {len(lines) - limit} more (--json has them all)")
    ran = [r for r in records if r["status"] != "refused"]
    empty = [n for n in {r["backend"] for r in records} - {r["backend"] for r in ran}]
    for name in empty:
        print(f"\n{name}: refused every case")
    counts = Counter(r["status"] for r in records)
    print(
        f"\n{counts['ok']} right, {counts['fail'] + counts['crash']} wrong, {counts['refused']}"
        f" refused, {len(skipped)} not run here; {seconds:.0f} s"
    )
    if not ran:
        print("Nothing ran.")
    return 1 if bad or empty or not ran else 0


# ---- Is the check any good? ----------------------------------------------------------------------


def self_test(device, dtypes):
    """Feed broken backends to the check. Exit code 0: each is rejected, the correct one passes."""
    wrong = 0
    for name, fault in ((d, f) for d in dtypes for f in ("", *faults.FAULTS)):
        dtype = DTYPES[name]
        if not faults.shows_in(fault, dtype):
            continue
        # Most have to be found without the LSE, which libraries do not show.
        lse = "fp32" if not fault or fault in faults.LSE_ONLY else ""
        c = Candidate(fault, faults.attention(fault), True, lse, True, True, True)
        grid = cases.grid("", device, dtype, backward=True, interpreted=False, quick=True)[::-1]
        for n, case in enumerate(grid, start=1):  # noqa: B007
            record = judge(c, case, dtype, device)
            rejected = record["status"] not in ("ok", "refused")
            if rejected:
                break
        what = f"{n} of {len(grid)} cases, {'rejected' if rejected else 'all accepted'}"
        if rejected:
            what += f" by {record['case']}: {record['reasons'][0]}"
        good = rejected == bool(fault)
        wrong += not good
        print(
            f"{'good' if good else 'BAD '} {name} {fault or 'nothing broken'}: {what}", flush=True
        )
    print(f"Self-test: {wrong} wrong" if wrong else "Self-test: every broken backend was rejected")
    return 1 if wrong else 0


# ---- Command line --------------------------------------------------------------------------------


def _choice(known):
    def parse(text):
        names = list(dict.fromkeys(text.replace(",", " ").split()))
        for n in names or [text]:
            if n not in known:
                raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {n!r}")
        return names

    return parse


def _jobs(text):
    try:
        if (jobs := int(text)) >= 0:
            return jobs
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number of processes, 0 or more, got {text!r}")


def parse(argv=None):
    """The arguments, checked against this machine. Bad ones exit with 2 and a sentence."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backends", nargs="+", metavar="NAME", type=_choice(BACKENDS),
        help="separated by spaces or commas; default: all that run here")  # fmt: skip
    add("--device", choices=("cuda", "cpu"), help="default: cuda where torch sees a GPU")
    add("--dtype", nargs="+", metavar="DTYPE", type=_choice(DTYPES), default=[list(DTYPES)],
        help="default: fp16,bf16,fp32")  # fmt: skip
    add("--quick", action="store_true", help="about a quarter of the cases")
    add("--self-test", action="store_true", help="feed broken backends to the check instead")
    add("--list", action="store_true", help="print what would run, and why the rest would not")
    add("--jobs", type=_jobs, help="worker processes; 0: none; default: by device and cores")
    add("--json", metavar="FILE",
        help="write a JSON line per case, as soon as it is judged; the same command goes on from"
             " there, but for cases of which the code has changed since")  # fmt: skip
    args = parser.parse_args(argv)
    args.backends = args.backends and [name for part in args.backends for name in part]
    args.dtype = [name for part in args.dtype for name in part]
    gpu = torch.cuda.is_available()
    args.device = args.device or ("cuda" if gpu else "cpu")
    if args.device == "cuda" and not gpu:
        parser.error("argument --device: cuda: torch sees no CUDA GPU")
    if args.jobs is None:
        args.jobs = min(os.cpu_count() or 1, 16 if args.device == "cuda" else 2)
    if args.json:
        try:
            open(args.json, "a").close()
        except OSError as e:
            parser.error(f"argument --json: {e}")
    return args


def plan(args):
    """(work, skipped, notes): lists of (name, case, dtype) to judge in one process, and the reasons
    for what does not run or runs on fewer cases.

    On a GPU such a list shares a kernel's compilations for a head dim, which take the most time.
    What compiles nothing shares references, which depend on the case alone, and so do the kernels
    where most of the cases are.
    """
    parts, skipped, notes = defaultdict(list), [], []
    for name in args.backends or BACKENDS:
        row = BACKENDS[name]
        interpreted = args.device == "cpu" and row.cpu == "interpreter"
        reasons = defaultdict(list)
        for dtype_name in args.dtype:
            dtype = DTYPES[dtype_name]
            why = why_not(name, args.device, dtype)
            if why is not None:
                reasons[why].append(dtype_name)
                continue
            options = {"backward": row.backward, "interpreted": interpreted, "quick": args.quick}
            for c in cases.grid(name, args.device, dtype, **options):
                key = name, dtype
                if name in cases.CORE_ONLY:  # nothing to share: every case compiles
                    key = name, dtype, c
                elif args.device == "cuda" and row.target.startswith("kernels."):
                    key = name, dtype, c.grad, c.d
                    if c.d == COMMON_HEAD_DIM:
                        key = dtype, c.grad, c.causal
                elif args.device == "cuda":
                    key = dtype, c.grad, c.family
                parts[key].append((name, c, dtype))
        skipped += [f"{name} {', '.join(d)}: {why}" for why, d in reasons.items()]
        if name in cases.CORE_ONLY and any(p[0][0] == name for p in parts.values()):
            notes.append(f"{name} runs the core cases only: it {cases.CORE_ONLY[name]}")
    work = list(parts.values())
    if any(BACKENDS[p[0][0]].cpu == "interpreter" for p in work) and args.device == "cpu":
        notes.append(
            f"Triton's interpreter runs the kernels on cases of up to {cases.INTERPRETED_TILES}"
            " tiles of 64 x 64 scores and head dim 128, in fp32 on the quick ones; a GPU runs all"
        )
    return work, skipped, notes


def _about(device, options):
    """On what, with what and how, as figures/validated.py tells it: the first line of --json."""

    def version(package):
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "flash_attn": version("flash_attn"),
        "flash_attn_4": version("flash-attn-4"),
        "command": shlex.join(["python", "validate/check_outputs.py", *options]),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def judged(path, about):
    """The records that a --json file of the same run holds, and still true ones; [] for a new file.

    Raises ValueError where it is of another run, on another machine or with other options.
    """
    lines = read(path)
    if not lines:
        return []
    before = lines[0].get("about", {})
    if differ := [k for k in about if k != "utc" and before.get(k) != about[k]]:
        was, now = ({k: a.get(k) for k in differ} for a in (before, about))
        raise ValueError(f"{path} is of another run: expected {now}, got {was}; name another file")
    return [_infinite(r) for r in lines[1:] if r["source"] == _source(r["backend"])]


@functools.cache
def _source(name):
    """Fingerprint of a backend and of what is asked of it."""
    return common.source(name, ("validate/cases.py", "validate/errors.py"))


def _key(record):
    return tuple(record[k] for k in ("backend", "dtype", "family", "case"))


def without(work, records):
    """What of the work is not judged yet."""
    done = {_key(r) for r in records}
    left = (
        [(n, c, d) for n, c, d in part if (n, DTYPE_NAMES[d], c.family, c.name) not in done]
        for part in work
    )
    return [part for part in left if part]


def main(argv=None):
    args = parse(argv)
    began = time.monotonic()
    torch.set_num_threads(1)  # cases are small: threads would wait for each other
    _be_quiet()
    options = list(sys.argv[1:] if argv is None else argv)
    if args.json:  # where it goes says nothing of what ran
        at = next(i for i, x in enumerate(options) if x.startswith("--js"))  # or shortened
        del options[at : at + 2 - ("=" in options[at])]
    about = _about(args.device, options)
    what = f"{about['device']}, torch {about['torch']}, triton {about['triton']}"
    print(f"{what}; reference fp64 on {args.device}")
    if args.self_test:
        return self_test(args.device, args.dtype)
    work, skipped, notes = plan(args)
    for note in notes:
        print(f"Note: {note}")
    if args.list:
        for part in work:
            for name, case, dtype in part:
                print(f"{name} {DTYPE_NAMES[dtype]} {case.family}: {case.name}")
        print("\n".join(f"not run: {s}" for s in skipped))
        return 0

    about |= {"quick": args.quick}
    try:
        known = judged(args.json, about) if args.json else []
    except (OSError, ValueError) as e:
        print(f"{sys.argv[0]}: error: argument --json: {e}", file=sys.stderr)
        return 2
    total = sum(map(len, work))
    work = without(work, known)
    left = sum(map(len, work))
    gone = f", {total - left} of them judged already" if known else ""
    print(f"{total} cases{gone}, {args.jobs or 'no'} worker processes")
    with (
        tqdm(total=left, unit="case", mininterval=1 if sys.stderr.isatty() else 15) as bar,
        _continued(args.json, about, known) if args.json else contextlib.nullcontext() as file,
    ):

        def show(record):
            if file:
                file.write(_line(record))
                file.flush()
            bar.set_postfix_str(f"{record['backend']} {record['dtype']}", refresh=False)
            bar.update()
            if record["status"] in ("fail", "crash"):
                bar.write(f"{failures([record])[0]}")

        if args.jobs:
            records = run_in_workers(work, args.device, args.jobs, show)
        else:
            records = []
            for name, case, dtype in (task for part in work for task in part):
                records.append(judge(_candidate(name), case, dtype, args.device))
                show(records[-1])
    records = known + records
    code = report(records, skipped, time.monotonic() - began)
    if args.backends:  # asked for by name, so it has to have run
        missing = [n for n in args.backends if all(r["backend"] != n for r in records)]
        if missing:
            print(f"Asked for, but cannot run here: {', '.join(missing)}")
            return 1
    return code


def _line(record):
    """A record as a line of --json, with the fingerprint of what it is of."""
    return json.dumps(_finite(record | {"source": _source(record["backend"])})) + "\n"


def _continued(path, about, known):
    """The --json file, open for what follows the records known; these and `about` are in it."""
    new = f"{path}.new"
    with open(new, "w") as file:
        file.write(json.dumps({"about": about}) + "\n")
        file.writelines(map(_line, known))
    os.replace(new, path)
    return open(path, "a")


def _finite(x):
    """JSON has no infinity: null stands for it."""
    if isinstance(x, dict):
        return {k: _finite(v) for k, v in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _infinite(record):
    """A record of a file as it was: null among the statistics stands for infinity."""
    stats = {
        name: {k: math.inf if v is None else v for k, v in stat.items()}
        for name, stat in record["stats"].items()
    }
    return record | {"stats": stats}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
