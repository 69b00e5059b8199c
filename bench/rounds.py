"""Several backends taking turns in one cell, so that drift and power limits hit all of them alike.

    set-up    every backend compiled, checked against the reference at the smallest length of each
              sweep, and called at the largest: from that follows what its cells cost, roughly
    cells     in random order; in each, the backends take turns, a few rounds of many calls each,
              and the median over all rounds counts. Every round has an order of its own, and the
              first calls of a turn do not count: under a power limit the clocks follow what ran
              just before, and in a fixed order that is always the same one

What the fixed order A B C A B C … did, on an H200 of 700 W (torch 2.11.0, Triton 3.6.0, 2026-11-22;
forward, full mask, bf16, 16,384 tokens): the same v3 reached 538 TFLOP/s where it followed on v2
and 485 where it followed on flash-attn 4 (D = 128); the same v6 652 after v5 and 756 after v3 (D =
256). At 512 tokens, which draw less power, all pairs agreed within 2 %.

Device events around each call give the time; the L2 cache is flushed before it. Where some backend
of a cell takes longer to launch than to run, the GPU idles before every timed call of the cell,
equally long for all, so that the host is ahead and the events see the GPU alone.
"""

import collections
import concurrent.futures
import copyreg
import gc
import itertools
import math
import multiprocessing
import operator
import os
import random
import tempfile
import time
from dataclasses import dataclass, field

import torch
import torch._functorch.config
import torch._inductor.config
from flashstudy.backends import BACKENDS, load, why_not
from flashstudy.bench import common
from flashstudy.figures import grid
from flashstudy.validate import errors
from torch.nn.attention import SDPBackend

MATMUL, MATMUL_SIZE = grid.MATMUL, 8192  # the machine's ceiling takes turns like a backend
MATMUL_FLOPS = 2 * MATMUL_SIZE**3
VERIFY_LENGTH = 4096  # sweeps that begin longer than this are verified at it
SETUP_SHARE = 0.6  # of a budget
MOST_CALLS = 200  # of one backend in one turn
DRAWS = 100  # orders of a round to choose from
LEAD_S = 0.05  # seconds at the start of a turn that do not count, at most half of it
# What compiles for seconds a configuration (flash-attn-4) or a shape and is not ours: set up last,
# in this order, and left out where a budget is short.
SLOW_SETUP = ("naive-compiled", "flash-attn-4", "flex")
# torch's kernels by name are chosen outside the timed call where the host's time counts: a user who
# wants one of them chooses it once, and the choice costs several µs of Python.
CHOSEN = {
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}
# And our steps: compiled in one process, found by the next one.
DISK_CACHED = ("flex", "naive-compiled")
# Where this is "1" in the environment, all of it is on disk (bench/precompile.py): no process is
# started to compile.
COMPILED = "FLASHSTUDY_COMPILED"
# Where this is "1", this process has not used CUDA yet, and forks of it may (bench/reference.py).
FORKS = "FLASHSTUDY_FORKS"
WORKERS = 14  # processes that compile at once, at most
PATIENCE = 120  # seconds without any of them being done: what is left hangs

# Backward calls repeat on one forward (retain_graph), which compiled functions refuse as long as
# their backward may overwrite what the forward saved.
torch._functorch.config.donated_buffer = False


def memory_format(name):
    return getattr(torch, name)


# torch's compiler finds on disk what another process compiled by a hash of pickled graphs and of
# settings. The precision of fp32 products begins as "none" and is "ieee", which is the same, as
# soon as somebody has changed it and back: from the start, it is. And a memory format pickles under
# the name of whatever module imported torch first: under one name, it does.
torch.set_float32_matmul_precision(torch.get_float32_matmul_precision())
copyreg.pickle(torch.memory_format, lambda x: (memory_format, (str(x).removeprefix("torch."),)))


class DeviceLost(RuntimeError):
    """The GPU no longer answers (an illegal access, say): nothing can be measured after it."""


@dataclass
class Contender:
    """One backend in one cell."""

    name: str
    status: str = "ok"  # or oom, unsupported, failed, wrong, with a reason
    reason: str | None = None
    over: float | None = None  # worst error of its results over what the budget allows
    cost: float = 0.0  # seconds a single call takes, roughly: the host's, then the GPU's
    host: float = 0.0  # seconds of the host to launch it
    fresh: bool = False  # not called in this shape yet
    call: object = None
    turns: list = field(default_factory=list)  # a list of ms per turn

    def fail(self, status, reason):
        self.status, self.reason, self.call, self.turns = status, reason, None, []


class GpuTimer:
    """Times calls with device events, the L2 cache flushed before each."""

    device = "cuda"

    def __init__(self):
        self.flush = common.flush_buffer(self.device)
        self.flush_s = min(self.once(self.flush.zero_)[0] for _ in range(5))

    def once(self, call):
        """(seconds until the call was done, seconds until the host had launched it)."""
        return common.once(call)

    def turn(self, call, calls, idle):
        """Milliseconds of each of `calls` calls, the GPU idle for `idle` seconds before each."""
        return common.event_times(call, calls, self.flush, idle)


def inputs(cell, dtype, device, seed):
    """q and dO (B, H, N_Q, D), k and v (B, H_KV, N_K, D) as (q, k, v, do), standard normal."""
    generator = torch.Generator(device).manual_seed(seed)
    rows = (cell.batch, cell.heads, cell.queries or cell.length, cell.head_dim)
    keys = (cell.batch, cell.kv_heads or cell.heads, cell.length, cell.head_dim)
    return tuple(
        torch.randn(shape, generator=generator, device=device, dtype=dtype)
        for shape in (rows, keys, keys, rows)
    )


def closure(attention, cell, q, k, v, do):
    """The call that is timed: the forward, both, or the backward of a forward that is done here."""
    if cell.direction == "forward":
        return lambda: attention(q, k, v, causal=cell.causal)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    if cell.direction == grid.BOTH:
        return lambda: torch.autograd.grad(attention(*leaves, causal=cell.causal), leaves, do)
    o = attention(*leaves, causal=cell.causal)
    return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)


def matmul_closure(dtype, device, seed):
    """The matrix product that the ladder's figures are a share of."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (MATMUL_SIZE, MATMUL_SIZE)
    a, b = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def grad_mode(cell):
    """Autograd as a user has it: off in a forward cell."""
    return torch.set_grad_enabled(cell.direction != "forward")


def failure(error):
    """(status, reason) of an exception that a backend raised: a row, and the others go on."""
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError):
        return "oom", first
    if isinstance(error, ValueError):  # how attention functions refuse a shape
        return "unsupported", first
    return "failed", f"{type(error).__name__}: {first}"


def recover(device, after):
    """Free what calls left. Raises DeviceLost, saying after what, where the GPU is gone."""
    gc.collect()
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as e:
            raise DeviceLost(f"after {after}: {str(e).splitlines()[0]}") from e


def compile_alone():
    """In a process among many that compile: torch's compiler shall start no more of them."""
    torch._inductor.config.compile_threads = 1


def first_call(name, cell, dtype, seed):
    """Call a backend once, in a process of its own, for the sake of what that leaves on disk."""
    compile_alone()
    with grad_mode(cell):
        closure(load(name), cell, *inputs(cell, dtype, "cuda", seed))()
    torch.cuda.synchronize()


def call(function, *arguments):
    """Work for a Precompiler whose tasks are of several kinds."""
    function(*arguments)


def begin(mark, work, task):
    open(mark, "x").close()
    work(*task)


class Precompiler:
    """Calls backends in as many processes as there are cores: the set-up finds the code on disk.

    What fails there fails again in the set-up, and is told there. What never returns (a deadlock in
    a kernel) must not be called again.
    """

    def __init__(self, tasks, work=first_call, start="spawn"):
        """tasks: arguments of `work`. start: how processes do; CUDA survives no fork."""
        tasks = [] if os.environ.get(COMPILED) == "1" else tasks
        workers = max(1, min(WORKERS, len(os.sched_getaffinity(0)) - 2, len(tasks)))
        self.pool = concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context(start)
        )
        self.begun = tempfile.TemporaryDirectory()  # a file for each task that a process has begun
        self.tasks = {
            self.pool.submit(begin, f"{self.begun.name}/{i}", work, task): (i, task)
            for i, task in enumerate(tasks)
        }

    @property
    def done(self):
        return all(future.done() for future in self.tasks)

    @property
    def failed(self):
        """[(task, exception)] so far."""
        ended = [future for future in self.tasks if future.done() and not future.cancelled()]
        return [(self.tasks[f][1], f.exception()) for f in ended if f.exception() is not None]

    def wait(self, patience=PATIENCE, seconds=math.inf):
        """Until all is done, or nothing more gets done, or so many seconds have passed.

        Returns the tasks that hang; those that there were no seconds for are merely given up.
        """
        left, end = set(self.tasks), time.monotonic() + seconds
        hangs = False
        while left and not hangs and (rest := end - time.monotonic()) > 0:
            done, left = concurrent.futures.wait(
                left, min(patience, rest), concurrent.futures.FIRST_COMPLETED
            )
            hangs = not done and patience < rest
        begun = {int(name) for name in os.listdir(self.begun.name)}
        hung = [task for i, task in map(self.tasks.get, left) if hangs and i in begun]
        processes = list((self.pool._processes or {}).values()) if left else []
        self.pool.shutdown(wait=not left, cancel_futures=True)
        for process in processes:
            process.kill()
        self.begun.cleanup()
        return hung


class Verifier:
    """Checks backends against the reference: first and last head of first and last batch entry."""

    def __init__(self, dtype, device, seed):
        self.dtype, self.device, self.seed = dtype, device, seed
        self.expected = {}

    def ends(self, t):
        """[B, H, N, D] -> [1 or 2, 1 or 2, N, D]."""
        b, h = (sorted({0, n - 1}) for n in t.shape[:2])
        return t[b][:, h]

    def inputs(self, cell):
        *qkv, do = inputs(cell, self.dtype, self.device, self.seed)
        return *qkv, do if cell.direction != "forward" else None

    def expect(self, cell):
        """Compute what `verdict` compares with, once a cell."""
        if cell not in self.expected:
            ends = [None if t is None else self.ends(t) for t in self.inputs(cell)]
            self.expected[cell] = errors.expect(*ends, causal=cell.causal)

    def verdict(self, attention, cell):
        """The errors.Verdict on `attention` in this cell; `expect` it first."""
        *qkv, do = self.inputs(cell)
        # The results go where NaN was, so that a row that nobody writes shows.
        nan = [torch.full_like(qkv[0], float("nan")) for _ in range(6)]
        del nan
        got = errors.run(attention, *qkv, do, causal=cell.causal)
        got = {name: self.ends(t) for name, t in got.items()}
        return errors.verdict(got, self.expected[cell])


def helped(name):
    """Whether another process can compile for this one."""
    if name == "flash-attn-4":
        return os.environ.get(common.FA4_CACHE) == "1"
    return name in DISK_CACHED or name in grid.steps()


def slow(name):
    """Place in SLOW_SETUP, from 1; 0 of others, and where another process has compiled it once."""
    done = name not in SLOW_SETUP or (helped(name) and name not in DISK_CACHED)
    return 0 if done else SLOW_SETUP.index(name) + 1


def same_sweep(cell, cells):
    """Those of the cells that differ from this one in length, batch and heads alone."""
    return [c for c in cells if (c[:3], c[6:]) == (cell[:3], cell[6:])]


def smallest(cell, cells):
    """The cell in which to verify for this one: its sweep's shortest, VERIFY_LENGTH at most."""
    first = min(same_sweep(cell, cells), key=lambda c: c.length)
    return first._replace(length=VERIFY_LENGTH, batch=1) if first.length > VERIFY_LENGTH else first


class Session:
    """One run of a set of cells.

    plan: {cell: names of backends}, MATMUL among them where its figure is wanted.
    timer: a GpuTimer, or something with its `device`, `once` and `turn`.
    seconds: for the whole run, None for as long as it takes. slot: seconds of a backend's turn.
    rounds: turns each backend has in a cell.
    report: called with a line for people.
    """

    def __init__(self, plan, timer, dtype, *, seconds, slot, rounds, seed, report=print):
        self.plan, self.timer, self.dtype, self.seed = plan, timer, dtype, seed
        self.slot, self.rounds, self.report = slot, rounds, report
        self.start = time.monotonic()
        self.seconds = seconds
        self.verifier = Verifier(dtype, timer.device, seed)
        self.draw = random.Random(seed)
        self.attention, self.verdicts, self.reasons = {}, {}, {}
        self.largest = {}  # sweep and name -> the Contender that was called at its largest cell
        self.ready = {}  # (cell, name) -> Contender, set up

    def left(self):
        """Seconds until the run has to end."""
        if self.seconds is None:
            return float("inf")
        return self.start + self.seconds - time.monotonic()

    def cells_of(self, name):
        """Those in which a backend takes part."""
        return [cell for cell, names in self.plan.items() if name in names]

    def set_up_left(self):
        """Seconds until the set-up's share of them is up."""
        return self.left() - (0.0 if self.seconds is None else self.seconds * (1 - SETUP_SHARE))

    def inputs(self, cell):
        return inputs(cell, self.dtype, self.timer.device, self.seed)

    def closure(self, name, cell, given):
        if name == MATMUL:
            return matmul_closure(self.dtype, self.timer.device, self.seed)
        return closure(self.attention[name], cell, *given)

    def verdict(self, name, cell):
        """(status, reason, over) of a backend's results in the sweep of this cell; once a sweep."""
        at = smallest(cell, self.cells_of(name))
        if (name, at) not in self.verdicts:
            self.verifier.expect(at)
            try:
                judged = self.verifier.verdict(self.attention[name], at)
                reasons = f"at N={at.length}: {'; '.join(judged.reasons)}"
                found = ("ok", None, judged.over)
                if not judged.over <= common.GROSS:
                    found = ("wrong", reasons, judged.over)
                elif not judged.ok:
                    self.report(f"{name}, {at} is over the error budget {reasons}")
            except Exception as e:
                found = (*failure(e), None)
            if found[0] != "ok":
                recover(self.timer.device, f"{name}, {at}: {found[1]}")
            self.verdicts[name, at] = found
        return self.verdicts[name, at]

    def why_not(self, name, cell):
        """Asked once: a package that does not import takes its time to say so, every time."""
        key = name, cell.direction != "forward"
        if key not in self.reasons:
            self.reasons[key] = why_not(name, self.timer.device, self.dtype, key[1])
        return self.reasons[key]

    def set_up(self, name, cell):
        """Compile, verify, estimate: a Contender without its call, or with what went wrong.

        What compiles every shape anew is called in this cell; of others one call a sweep tells what
        the cells cost, and `prepare` is the first to call them.
        """
        it = Contender(name)
        if name != MATMUL:
            if (reason := self.why_not(name, cell)) is not None:
                it.fail("unsupported", reason)
                return it
            if name not in self.attention:
                self.attention[name] = load(name)
            status, reason, it.over = self.verdict(name, cell)
            if status != "ok":
                it.fail(status, reason)
                return it
        known = None if name in DISK_CACHED else self.known(name, cell)
        if known is None:
            self.attempt(it, lambda: self.first_calls(it, cell))
        else:
            work = 1.0 if name == MATMUL else cell.flops / known[0].flops
            it.cost, it.host = max(known[1].host, work * known[1].cost), known[1].host
            it.fresh = True
        return it

    def sweep(self, name, cell):
        """(key in `largest`, largest cell) of the sweep that this cell belongs to."""
        at = max(same_sweep(cell, self.cells_of(name)), key=lambda c: c.flops)
        return (name if name == MATMUL else (name, at)), at

    def known(self, name, cell):
        """(largest cell of this sweep, the Contender after a call there); None where it failed."""
        key, at = self.sweep(name, cell)
        if key not in self.largest:
            self.largest[key] = it = Contender(name)
            self.attempt(it, lambda: self.first_calls(it, at))
        return (at, self.largest[key]) if self.largest[key].status == "ok" else None

    def first_calls(self, it, cell):
        """Compile for this shape; then what a call costs the GPU and the host."""
        with grad_mode(cell):
            call = self.closure(it.name, cell, self.inputs(cell))
            self.timer.once(call)
            it.cost, it.host = common.cost(call, self.timer.once)

    def to_compile(self):
        """Tasks that leave their results on disk: DISK_CACHED every shape, others twice a sweep."""
        tasks = {}
        for cell, names in self.plan.items():
            for name in filter(helped, names):
                tasks[name, smallest(cell, self.cells_of(name))] = None
                if name in DISK_CACHED:
                    tasks[name, cell] = None
                elif BACKENDS[name].family != "standard":  # some launch another kernel at its end
                    tasks[name, self.sweep(name, cell)[1]] = None
        return [(*task, self.dtype, self.seed) for task in tasks if self.why_not(*task) is None]

    def precompile(self):
        return Precompiler(self.to_compile())

    def refuse(self, hung):
        """What hung in another process is not called here."""
        for name, at, dtype, _ in hung:
            if dtype == self.dtype:
                reason = f"at N={at.length}: did not return within {PATIENCE} s"
                self.verdicts[name, at] = ("failed", reason, None)

    def settle(self, name, cell):
        """Set up a backend in a cell, and say what went wrong."""
        it = self.ready[cell, name] = self.set_up(name, cell)
        if it.status not in ("ok", "unsupported"):
            self.report(f"{name}, {cell}: {it.status}, {it.reason}")

    def set_up_all(self, progress):
        """Set up everything; of SLOW_SETUP nothing more once the set-up's share of time is up.

        While other processes compile our steps, this one sets up what they cannot help with.
        Returns [(name, cell)] of what was left out.
        """
        compiling = self.precompile() if self.timer.device == "cuda" else None
        pairs = [(name, cell) for cell, names in self.plan.items() for name in names]
        pairs.sort(key=lambda pair: (helped(pair[0]), slow(pair[0])))
        left_out = []
        for name, cell in progress(pairs):
            if compiling is not None and helped(name):
                if found := len(compiling.tasks):
                    self.report(f"waiting for {found} compilations in other processes")
                self.refuse(compiling.wait(seconds=max(0.0, self.set_up_left())))
                compiling = None
            late = self.set_up_left() < 0
            called = name not in DISK_CACHED and self.sweep(name, cell)[0] in self.largest
            if late and slow(name) and not called:
                left_out.append((name, cell))
            else:
                self.settle(name, cell)
        return left_out

    def floor(self, cell):
        """Seconds that the cell takes with one call a turn, preparing included."""
        runs = [it.cost for (c, _), it in self.ready.items() if c == cell and it.status == "ok"]
        calls = (self.rounds + (1 if run >= common.LONG else 5) for run in runs)  # see prepare
        return sum(map(operator.mul, calls, runs)) + 0.01 * len(runs)

    def measure(self, cell, seconds):
        """The contenders of a cell after their turns, which take about `seconds`."""
        field = [self.ready[cell, n] for n in self.plan[cell] if (cell, n) in self.ready]
        able = [it for it in field if it.status == "ok"]
        if not able:
            return field
        slot = min(self.slot, seconds / (self.rounds * len(able)))
        given = self.inputs(cell)
        with grad_mode(cell):
            for it in able:
                self.attempt(it, lambda it=it: self.prepare(it, cell, given))
        running = [it for it in able if it.status == "ok"]
        idle = common.idle_before([(it.cost, it.host) for it in running])
        with grad_mode(cell):
            take_turns(able, self.rounds, lambda it: self.turn(it, slot, idle), self.draw)
        for it in able:
            it.call = None  # and with it what its forward saved
        return field

    def prepare(self, it, cell, given):
        """The call to time, and its costs: other processes ran during the set-up."""
        it.call = self.closure(it.name, cell, given)
        if it.fresh:
            it.fresh = False
            it.cost, it.host = self.timer.once(it.call)
            if it.cost < common.LONG:  # the first call may have been a slow one
                it.cost, it.host = common.cost(it.call, self.timer.once)
        elif it.cost < common.LONG:
            cost, host = self.timer.once(it.call)
            it.cost, it.host = min(it.cost, cost), min(it.host, host)

    def attempt(self, it, action):
        """Do something for a contender that is still in; an exception takes it out."""
        if it.status != "ok":
            return None
        try:
            return action()
        except Exception as e:
            it.fail(*failure(e))
        # The exception, and with it the tensors of its frames, is gone by now.
        recover(self.timer.device, f"{it.name}: {it.reason}")
        return None

    def turn(self, it, slot, idle):
        period = max(it.cost, it.host) + idle + self.timer.flush_s
        calls = max(1, min(MOST_CALLS, int(slot / period)))
        times = self.attempt(it, lambda: self.timer.turn(it.call, calls, idle))
        if times is not None:
            it.turns.append(times[min(calls // 2, int(LEAD_S / period)) :])

    def run(self, write, progress=lambda things, **_: things):
        """Measure everything; `write(cell, contenders)` after each cell.

        Returns what there was no time for: ([(name, cell)] not set up, [cell] not measured).
        """
        not_set_up = self.set_up_all(lambda p: progress(p, desc="set-up", unit="cell"))
        self.report(f"set-up took {time.monotonic() - self.start:.0f} s")
        order = list(self.plan)
        random.Random(self.seed).shuffle(order)
        not_measured = []
        for i, cell in enumerate(progress(order, desc="measuring", unit="cell")):
            reserve = sum(map(self.floor, order[i:]))
            own = self.floor(cell)
            if own > self.left():
                not_measured.append(cell)
                continue
            spare = max(0.0, self.left() - reserve) / (len(order) - i)
            write(cell, self.measure(cell, own + spare))
        return not_set_up, not_measured


def take_turns(field, rounds, turn, draw):
    """`turn(contender)`, `rounds` times each. `draw`, a random.Random, draws an order a round.

    Of some drawn the one counts in which the fewest follow on whom they have followed before.
    """
    followed, last = collections.Counter(), None
    for _ in range(rounds):

        def again(order, last=last):
            return sum(followed[pair] for pair in itertools.pairwise([last, *order]))

        order = min((draw.sample(range(len(field)), len(field)) for _ in range(DRAWS)), key=again)
        followed.update(itertools.pairwise([last, *order]))
        for last in order:
            turn(field[last])
