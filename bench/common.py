"""What the sweeps share: provenance, records on disk, timing and memory.

Clocks, all in milliseconds a call:

    time_ms    GPU: device events around one eager call, the L2 cache flushed before each. Where a
               call takes longer to launch than to run, the GPU idles before it until the host has
               launched all of it: the time is the GPU's alone. CPU: torch.utils.benchmark.Timer.
    graph_ms   the same call replayed from a CUDA graph, one after the other. Not flushed.
    host_ms    wall time of an eager call, called back to back: what a small call costs a program.

Records whose `commit` is 62904e5ad105 or older were made without that idling: their time_ms below
0.1 ms contains launches.

Memory, in MiB of 2^20 bytes: the peak that one call adds to what was allocated before it (inputs
and parameters excluded), and on a GPU the absolute peak. GPU: the caching allocator's counters.
CPU: what torch's allocator was asked for, summed over the profiler's memory events; the process'
resident size would show what the C library has not yet returned.
"""

import contextlib
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import threading
import time
import weakref
from pathlib import Path

import torch
from flashstudy.backends import BACKENDS
from flashstudy.figures import records
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
METHOD = ("block.py", "bench/common.py", "bench/seqlen.py")  # what the main job measures with
FLUSH_BYTES = 256 * MIB  # several times the L2 cache of any GPU
LONG = 0.2  # seconds from which two calls a round are enough
MOST_IDLE = 3e-3  # seconds before a timed call; no backend takes longer to launch
GRAPH_CALLS = 20  # in one graph, at most: the start of a replay spreads over them
# What is timed must compute attention: with this mask, scale and layout. How well it rounds is for
# validate/check_outputs.py to judge, which allows one error budget where this allows four.
GROSS = 4
# Where this is "1" in the environment, flash-attn-4 keeps what it compiled on disk, for the next
# process: by itself it compiles for seconds a head dim, mask and dtype in every process.
FA4_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# What a sweep over lengths can compute in: TF32 is fp32 in memory, and in matrix products 10 bits.
TF32 = "tf32"
PRECISIONS = DTYPES | {TF32: torch.float32}


# Provenance


def _output(*command):
    """Standard output of a command, or None where it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def source(backend=None, method=METHOD):
    """Fingerprint of the code that a measurement of a backend, or of any, runs.

    method: the files, from the root, that measure.

    Records of other code do not count as the same measurement: a changed kernel is measured again,
    and only it.
    """
    paths = [*ROOT.glob("kernels/*.py"), *ROOT.glob("backends/*.py")]
    if backend is not None:
        module = BACKENDS[backend].target.split(":")[0].replace(".", "/")
        paths = [ROOT / f"{module}.py"]
        if module.startswith("kernels/"):
            paths += ROOT.glob("kernels/_*.py")
            joined = re.findall(r"^from \. import (.+)$", paths[0].read_text(), re.MULTILINE)
            steps = (name for line in joined for name in re.findall(r"\bv\d\w*", line))
            paths += (ROOT / f"kernels/{name}.py" for name in steps)
    digest = hashlib.sha256()
    for path in [*sorted(paths), *(ROOT / p for p in method)]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _commit():
    """Commit of the checkout, "+" where tracked files differ, None outside; or what one is told."""
    if told := os.environ.get("FLASHSTUDY_COMMIT"):  # a copy whose history is another, or none
        return told
    top = _output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel")
    if top is None or Path(top) != ROOT:
        return None
    dirty = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if head is None:
        return None
    return head + "+" * bool(dirty)


def gpu_state(device):
    """Clocks, power, temperature and driver of a GPU by nvidia-smi; {} where there is none."""
    fields = "uuid,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    text = None
    if device.type == "cuda":
        text = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    rows = [line.split(", ") for line in text.splitlines()] if text else []
    if not rows:
        return {}
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    row = next((r for r in rows if uuid and uuid in r[0]), rows[0])
    names = ("sm_mhz", "memory_mhz", "power_w", "power_limit_w", "temperature_c")
    state = {"driver": row[1]}
    for name, value in zip(names, row[2:], strict=True):
        with contextlib.suppress(ValueError):  # "[N/A]" on some boards
            state[name] = float(value)
    return state


def environment(device):
    """The fields of a record that say on what and with what it was measured."""
    cuda = device.type == "cuda"
    gpu = torch.cuda.get_device_name(device) if cuda else None
    return {
        "device": gpu if cuda else _cpu_name(),
        "gpu": gpu,
        "driver": gpu_state(device).get("driver"),
        "memory_mib": round(memory_bytes(device) / MIB),
        "threads": None if cuda else torch.get_num_threads(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "flash_attn": _version("flash_attn"),
        "flash_attn_4": _version("flash-attn-4"),
        "float32_matmul": torch.get_float32_matmul_precision(),
        "source": source(),
        "commit": _commit(),
    }


def memory_bytes(device):
    """All of a GPU's memory; of a CPU, what the machine or its control group allows a process."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max" where the group sets no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def available_bytes():
    """What a process on this CPU can still allocate before Linux kills one."""
    free = memory_bytes(torch.device("cpu"))
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = min(free, int(line.split()[1]) * 1024)
    return free


def utc():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# Budgets

# time.monotonic() when this program began, of which importing torch is a good part.
BEGAN = time.monotonic() - time.process_time()


def ends(budget, argv=None):
    """time.monotonic() at which a program that has so many seconds is to end; inf for None.

    argv: of its main(). None: the process is there for it, and its imports count.
    """
    return math.inf if budget is None else (BEGAN if argv is None else time.monotonic()) + budget


# Records


@contextlib.contextmanager
def _ctrl_c_waits():
    """SIGINT inside takes effect at the end. (Masking it would leave it to another thread.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = []
    before = signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if caught and callable(before):
            before(*caught[0])


class Records:
    """A record file open for appending, held by one process at a time.

    Opening repairs it: the partial last line of a killed run is cut off, nothing else, and `cut`
    says how many bytes that was. `rows` holds what is there, `append` adds to both.

    Raises OSError where the file cannot be written, records.RecordError where it is something else.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:  # a store that did not open holds no lock
            self._file = stack.enter_context(open(self.path, "a+b"))
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(f"another process is writing {self.path}") from None
            self._file.seek(0)
            data = self._file.read()
            self.rows, length = records.parse(data, self.path)
            self.cut = len(data) - length
            if self.cut:
                self._file.truncate(length)
            stack.pop_all()  # from here on `close` closes it

    def append(self, rows):
        """Write rows in one piece and wait until the disk has them; Ctrl-C waits as well."""
        lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
        with _ctrl_c_waits():
            self._file.write(lines.encode())
            self._file.flush()
            os.fsync(self._file.fileno())
            self.rows += rows

    def close(self):
        self._file.close()


def result_file(study, device):
    """Where the records of a study on a device go unless --out says."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path("results") / f"{study}-{name}.jsonl"


def open_records(path, parser):
    """The Records at the path that --out gave; what is wrong with it ends the program."""
    try:
        file = Records(path)
    except (OSError, records.RecordError) as e:
        parser.error(f"argument --out: cannot append to {path}: {e}")
    if file.cut:
        print(f"{path}: dropped a last line cut off in writing ({file.cut} bytes)")
    return file


def summary(samples):
    """p20, p50, p80 of a list and its length, as the fields of a record."""
    if len(samples) > 1:
        cuts = statistics.quantiles(samples, n=10, method="inclusive")
        p20, p80 = cuts[1], cuts[7]
    else:
        p20 = p80 = samples[0]
    p50 = statistics.median(samples)
    return {"value": p50, "p50": p50, "p20": p20, "p80": p80, "samples": len(samples)}


# Time


def once(call):
    """(seconds until the call was done, seconds until the host had launched it)."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return time.perf_counter() - start, launched - start


def cost(call, once=once):
    """The same of a typical call: the least of a few, unless one takes long."""
    costs = [once(call)]
    if costs[0][0] < 0.02:
        costs += [once(call) for _ in range(3)]
    return tuple(min(c) for c in zip(*costs, strict=True))


def idle_before(costs):
    """Seconds for which the GPU should idle before calls of such costs, so that the host is ahead.

    0 where the GPU is busy with each for long enough after its launch.
    """
    slow_hosts = [host for done, host in costs if 1.2 * host > done - host]
    return min(MOST_IDLE, max((1.5 * host for host in slow_hosts), default=0.0))


def event_times(call, calls, flush=None, idle=0.0):
    """Milliseconds of each of `calls` calls between device events.

    Before each, the L2 cache is flushed where there is a tensor to do it with, and the GPU idles
    for `idle` seconds.
    """
    start, stop = ([torch.cuda.Event(enable_timing=True) for _ in range(calls)] for _ in range(2))
    for a, b in zip(start, stop, strict=True):
        if flush is not None:
            flush.zero_()
        if idle:
            torch.cuda._sleep(int(idle * 2e9))  # cycles; Hopper's clock stays under 2 GHz
        a.record()
        call()
        b.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(start, stop, strict=True)]


def flush_buffer(device):
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)


def samples(fn, device, seconds, least, most):
    """Milliseconds of single calls of fn: about `seconds` of them, from `least` to `most`."""
    if device.type == "cpu":
        return _cpu_samples(fn, seconds, least, most)
    done, launched = once(fn)
    if done < LONG:  # else that was warm-up enough
        done, launched = cost(fn)
    for _ in range(min(20, int(5e-3 / done))):  # 5 ms of warm-up, the clocks rise
        fn()
    idle = idle_before([(done, launched)])
    least = least if done < LONG else min(least, 2)
    count = max(least, min(most, int(seconds / (done + idle))))
    return event_times(fn, count, flush_buffer(device), idle)


def _cpu_samples(fn, seconds, least, most):
    from torch.utils.benchmark import Timer

    timer = Timer("fn()", globals={"fn": fn}, num_threads=torch.get_num_threads())
    # Single calls, or the mean of a few where the clock would show.
    times = list(timer.blocked_autorange(min_run_time=seconds).times)
    while len(times) < least:  # slow ones: another blocked_autorange would first call in vain
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    step = max(1, len(times) // most)
    return [t * 1e3 for t in times[::step]]


def capture(fn, calls):
    """A CUDA graph of so many calls of fn, which has been called before."""
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            fn()  # what is set up once a stream (cuBLAS' workspace) is no part of the graph
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                fn()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves its own behind
    current.wait_stream(stream)
    return graph


def graph_calls(done):
    """How many calls of so many seconds one graph should hold."""
    return max(1, min(GRAPH_CALLS, int(2e-3 / done)))


def graph_samples(fn, count=20):
    """Milliseconds a call, replayed from a CUDA graph of several; one sample a replay."""
    calls = graph_calls(cost(fn)[0])
    graph = capture(fn, calls)
    idle = idle_before([cost(graph.replay)])
    return [t / calls for t in event_times(graph.replay, count, idle=idle)]


def host_samples(fn, batches=20, calls=10, wait=torch.cuda.synchronize):
    """Wall milliseconds of an eager call among calls made back to back, one sample a batch."""
    times = []
    for _ in range(batches):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            fn()
        wait()
        times.append((time.perf_counter() - start) * 1e3 / calls)
    return times


# Memory


def peak(fn, device):
    """(delta, absolute) peak bytes of one call; absolute is None on a CPU. Call fn once before."""
    gc.collect()
    if device.type == "cpu":
        return _cpu_peak(fn), None
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = fn()
    torch.cuda.synchronize()
    absolute = torch.cuda.max_memory_allocated(device)
    del out
    return absolute - before, absolute


@contextlib.contextmanager
def _silent_stderr():
    """Some builds of torch's profiler announce themselves on file descriptor 2."""
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def _cpu_peak(fn):
    from torch.profiler import ProfilerActivity, profile

    with (
        _silent_stderr(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        out = fn()
    del out
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        highest = max(highest, live)
    return highest


class LiveBytes(TorchDispatchMode):
    """Counts the storages that the operations under it create and drop; `peak` bytes at most.

    On meta tensors it tells what a computation would allocate, without allocating.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._sizes = {}

    def _dropped(self, key):
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        old = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for storage in (_storage(t) for t in tree_leaves(out) if _is_tensor(t)):
            key = storage._cdata
            if key not in old and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._dropped, key)
        return out


def _is_tensor(t):
    return isinstance(t, torch.Tensor)


def _storage(t):
    return t.untyped_storage()


# Command lines


def positive(text):
    """argparse type: a whole number from 1 up."""
    import argparse

    try:
        n = int(text)
    except ValueError:
        n = 0
    if n < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 up, got {text!r}")
    return n


def positives(text):
    """argparse type: such numbers, separated by commas."""
    return [positive(part) for part in text.split(",") if part]


def device_argument(text):
    """argparse type: cpu, cuda or cuda:INDEX, if this machine has it."""
    import argparse

    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:INDEX, got {text!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError(f"{text!r} asked for, but torch sees no CUDA GPU")
        if (device.index or 0) >= torch.cuda.device_count():
            raise argparse.ArgumentTypeError(
                f"{text!r} asked for, but there are {torch.cuda.device_count()} GPUs"
            )
        device = torch.device("cuda", device.index or 0)
    return device


def default_device():
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def products(precision):
    """torch's matrix products of fp32 tensors as `precision` (of PRECISIONS) has them."""
    if precision != TF32:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@functools.cache
def short(dtype):
    """float16 -> fp16 and so on, for people."""
    names = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", TF32: "TF32"}
    return names.get(dtype, dtype)
