"""The error budget: how wrong may attention be before it is wrong?

Three computations of the same formulas, each on the inputs as rounded to their dtype:

    reference   in fp64, which stands for the truth
    yardstick   in the dtype of the inputs, every intermediate rounded to it, as eager torch does
    candidate   whatever is being judged

The error is |candidate - reference|, in the unit of the output; the budget is made from the
yardstick's own error, so that it scales with the sequence length, the values and the dtype by
itself (an absolute tolerance does not: outputs shrink as 1/sqrt(N), and 1e-2 accepts an error of
15 % at N = 4096). For each of o, dq, dk, dv

    max error   <= F × yardstick's max + 2 ulp(max |reference|) + noise,   F = 2, for gradients 3
    mean error  <= 1.5 × yardstick's mean + guard + noise
    |gain|      <= F × yardstick's + chance,   gain = <error, reference> / <reference, reference>

and for the log-sum-exp, which a flash kernel holds in fp32 whatever its inputs,

    max error   <= 2 × (error of an fp32 yardstick) + 8 ulp_fp32(max(1, max |logit|))

(a kernel that stores its scores is held against a yardstick in their dtype instead).

The gain is the part of the error that is the reference over again: 0.01 where a gradient comes out
1 % too large. Rounding leaves next to none, so it shows what hides below half-precision rounding.

Some details keep small cases honest without loosening large ones:

* The yardstick's error on a handful of numbers is luck (it is often exactly 0). A small case
  measures it over several draws, v and do scaled elementwise by random factors near 1, and takes
  the worst; the yardstick's mean counts at least the mean error of rounding the reference once.
* guard = max budget × sqrt(ln(1/δ) / 2n), with δ = 1e-6 and n numbers: Hoeffding's bound on how far
  the mean of n errors, each within the budget, strays from its expectation by chance. It is 0.33 of
  the max budget for 64 numbers and 0.003 for a million.
* chance is what independent rounding errors of that mean size give the gain: 6 standard deviations
  over as many rows (queries or keys, the fewer) as there are.
* noise is what sound fp32 arithmetic may leave where the true value cancels or the problem itself
  is ill-conditioned, and where the yardstick may be exact by luck or by construction:
  dS = P∘(dP - delta) is exactly 0 in a row with one visible key, but dP and delta are sums over the
  head dim taken in different orders; delta = rowsum(dO∘O) inherits the rounding of O as stored;
  a logit s known to half an ulp makes P uncertain by |s| ulp, a part in a thousand at 1e4, and so
  does the LSE from which a backward recomputes P. Each is a root-sum-square over the keys (or
  queries), and below the yardstick in ordinary cases.
  Everything gets the smallest normal fp32 number, because hardware may flush subnormals.
"""

import contextlib
import math
from typing import NamedTuple

import torch

MAX_FACTOR = {"o": 2.0, "dq": 3.0, "dk": 3.0, "dv": 3.0, "lse": 2.0}
MEAN_FACTOR = 1.5
ULPS = 2
LSE_ULPS = 8
NOISE_ULPS = {torch.float16: 4, torch.bfloat16: 4, torch.float32: 2}  # tensor cores truncate sums
NORMALISE = {"o": 1.5 * torch.finfo(torch.float32).eps}  # relative; see noise above
CHANCE = 1e-6  # δ of the guard
DRAW_ROWS, MAX_DRAWS = 128, 16  # draws are repeated until this many rows were seen
EPS32, TINY32 = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
# Scores held at a time: 2^26 fp64 numbers (512 MiB) on a GPU, 2^22 on a CPU.
CHUNK = {"cuda": 1 << 26, "cpu": 1 << 22}


class BadCase(ValueError):
    """The inputs judge nobody: on them the reference or the yardstick is not finite."""


class Stat(NamedTuple):
    """Errors of one output, in its own unit; `over` is the worst error/budget ratio."""

    max_error: float
    max_budget: float
    mean_error: float
    mean_budget: float
    bias: float  # signed mean of candidate - reference
    gain: float
    gain_budget: float
    over: float


class Verdict(NamedTuple):
    """ok: within every budget. over: worst error/budget (inf where something is not finite or not
    as promised). stats: a Stat per output. reasons: a sentence per violation."""

    ok: bool
    over: float
    stats: dict
    reasons: list


class Budget(NamedTuple):
    max: float
    mean: float
    gain: float


class Expectation(NamedTuple):
    """What any candidate for these inputs is held against; made once by `expect`."""

    reference: dict  # output name -> fp64 tensor
    budget: dict  # output name -> Budget
    dtype: torch.dtype  # of the inputs, and so of o and the gradients


@contextlib.contextmanager
def _ieee():
    """Matrix products in full fp32 (no TF32), whatever the caller's setting."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _bmm(a, b, alpha=1.0):
    # Adding 0 and not beta=0: for alpha=0 the latter returns uninitialised memory on some CPUs.
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, alpha=alpha)


class _Noise:
    """Collects the noise of the outputs, row by row, next to the fp64 computation."""

    def __init__(self):
        self.rows = {}  # name -> list of (noise at the largest element, at a typical one)
        self.columns = {}

    def add(self, dtype, p, size, q, k, v, o, do, scale):
        """One chunk: p [Z, M, N_K]; size [Z, M], the largest |logit| of each row."""
        unit = NOISE_ULPS.get(dtype, 0) * EPS32
        unsure = unit * size[..., None] * p  # [Z, M, N_K], of P by its logits or its LSE
        self._row("o", (unsure * (1 - p)).norm(dim=-1), v)  # normalised by its own sum
        if do is None:
            return
        d = q.shape[-1]
        self._column("dv", unsure.square().sum(1), do)
        do_size, v_size = do.norm(dim=-1)[..., None], v.norm(dim=-1)[:, None, :]
        ds = (unit * p + unsure / math.sqrt(d)) * do_size * v_size * abs(scale)
        delta = 1.5 * torch.finfo(dtype).eps * (do * o).norm(dim=-1) * abs(scale)  # [Z, M]
        self._row("dq", ds.norm(dim=-1), k)
        self._row("dq", delta, _bmm(p, k))
        stored = (p * delta[..., None]).square()
        self._column("dk", (ds.square() + stored).sum(1), q)

    def _row(self, name, each, other):
        """`each` row's noise per unit of the tensor it multiplies."""
        spread = other.abs().max().item(), other.square().mean().sqrt().item()
        pair = each.max().item() * spread[0], each.mean().item() * spread[1]
        self.rows.setdefault(name, []).append(pair)

    def _column(self, name, squares, other):
        """The same for keys, whose squares add up over the chunks of rows."""
        old, largest, typical = self.columns.get(name, (0.0, 0.0, 0.0))
        spread = other.abs().max().item(), other.square().mean().sqrt().item()
        self.columns[name] = old + squares, max(largest, spread[0]), max(typical, spread[1])

    def end_of_rows(self):
        """The heads of this chunk are complete."""
        for name, (squares, largest, typical) in self.columns.items():
            each = squares.sqrt()
            pair = each.max().item() * largest, each.mean().item() * typical
            self.rows.setdefault(name, []).append(pair)
        self.columns = {}

    def worst_and_mean(self):
        names = self.rows.items()
        return {n: (max(a for a, _ in pairs), max(b for _, b in pairs)) for n, pairs in names}


def compute(q, k, v, do=None, *, causal=False, scale=None, dtype=torch.float64):
    """Attention by its formulas with every intermediate in `dtype`; gradients where do is given.

    q, do (B, H, N_Q, D); k, v (B, H_KV, N_K, D). Returns a dict with o (B, H, N_Q, D), lse (B, H,
    N_Q) and, with do, dq, dk, dv shaped like q, k, v; in addition `logit`, the largest
    |scale · q kᵀ|, and (in fp64) `noise`: output name -> its largest and mean noise.
    Scores are held a chunk at a time, so N_Q · N_K is bounded by time and not by memory.
    """
    b, h, n_q, d = q.shape
    h_kv, n_k = k.shape[1:3]
    scale = 1.0 / math.sqrt(d) if scale is None else scale
    given, noise = q.dtype, _Noise()
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    # The query heads that share a KV head are more rows of the same problem:
    # [B, H, N_Q, D] -> [B * H_KV, rows = (H / H_KV) * N_Q, D]
    rows = h // h_kv * n_q
    q, k, v = (t.to(dtype).reshape(b * h_kv, -1, d) for t in (q, k, v))
    do = None if do is None else do.to(dtype).reshape(b * h_kv, rows, d)
    o, dq = torch.zeros_like(q), torch.zeros_like(q)
    lse = torch.full(q.shape[:2], -math.inf, dtype=accumulate, device=q.device)
    dk, dv = (torch.zeros_like(t, dtype=accumulate) for t in (k, v))
    logit = 0.0

    limit = CHUNK.get(q.device.type, CHUNK["cpu"])
    step_m = max(1, min(rows, limit // max(1, n_k)))
    step_z = max(1, limit // max(1, step_m * n_k)) if step_m == rows else 1
    j = torch.arange(n_k, device=q.device)
    with _ieee(), torch.no_grad():
        for z in range(0, b * h_kv if n_k and rows else 0, step_z):
            head = slice(z, z + step_z)
            kc, vc = k[head], v[head]  # [Z, N_K, D]
            for m in range(0, rows, step_m):
                row = slice(m, m + step_m)
                qc = q[head, row]  # [Z, M, D]
                s = _bmm(qc, kc.mT, scale)  # [Z, M, N_K]
                if causal:
                    i = torch.arange(rows, device=q.device)[row] % n_q
                    hidden = j > i[:, None] + n_k - n_q  # [M, N_K]
                    s.masked_fill_(hidden, -math.inf)
                size = s.abs().nan_to_num(nan=math.inf, posinf=0.0).amax(-1)  # [Z, M]
                logit = max(logit, size.max().item())
                lse[head, row] = torch.logsumexp(s.to(accumulate), -1)
                p = s.softmax(-1)
                if causal:
                    p.masked_fill_(hidden, 0)  # rows without a key came out NaN
                o[head, row] = _bmm(p, vc)
                if dtype == torch.float64:
                    doc = None if do is None else do[head, row]
                    noise.add(given, p, size, qc, kc, vc, o[head, row], doc, scale)
                if do is None:
                    continue

                doc = do[head, row]
                dv[head] += _bmm(p.mT, doc)
                dp = _bmm(doc, vc.mT).to(accumulate)
                p_wide = p.to(accumulate)
                ds = p_wide * (dp - (dp * p_wide).sum(-1, keepdim=True))
                ds = ds.to(dtype)
                dq[head, row] = _bmm(ds, kc, scale)
                dk[head] += _bmm(ds.mT, qc, scale)
            noise.end_of_rows()
    out = {"o": o.view(b, h, n_q, d), "lse": lse.view(b, h, n_q), "logit": logit}
    out["noise"] = noise.worst_and_mean()
    if do is not None:
        out |= {"dq": dq.view(b, h, n_q, d)}
        out |= {n: t.to(dtype).view(b, h_kv, n_k, d) for n, t in (("dk", dk), ("dv", dv))}
    return out


def ulp(x, dtype):
    """The distance from |x| to the next larger number of `dtype`."""
    info = torch.finfo(dtype)
    if not x:
        return info.smallest_normal * info.eps
    return max(2.0 ** math.floor(math.log2(abs(x))), info.smallest_normal) * info.eps


def _gain(error, reference):
    """The multiple of the reference that is in the error; 0 for a reference of zeros."""
    square = reference.square().sum().item()
    return (error * reference).sum().item() / square if square else 0.0


def _draws(q, k, v, do):
    """The inputs, and for a small case variants of them that draw new rounding errors."""
    yield q, k, v, do
    rows = max(1, min(q[..., 0].numel(), k[..., 0].numel()))
    generator = torch.Generator(q.device).manual_seed(0)
    for _ in range(min(MAX_DRAWS, math.ceil(DRAW_ROWS / rows)) - 1):
        v_new, do_new = (
            None
            if t is None
            else t * (0.75 + torch.rand(t.shape, generator=generator, device=t.device) / 2).to(t)
            for t in (v, do)
        )
        yield q, k, v_new, do_new


def expect(q, k, v, do=None, *, causal=False, scale=None, lse=False, like=None):
    """The reference and the budgets for these inputs (see the module's docstring).

    do: gradient of o, asks for dq, dk, dv too. lse: asks for the log-sum-exp too; True, or the
    dtype in which a materialising kernel stores the scores. like: the dtype that the yardstick
    rounds to, by default that of q; fp16 where fp32 tensors are multiplied as TF32, which has its
    10 bits.
    Raises BadCase where reference or yardstick is not finite.
    """
    names = ["o"] + (["dq", "dk", "dv"] if do is not None else [])
    reference, worst = None, {n: [0.0, 0.0, 0.0] for n in names}
    for inputs in _draws(q, k, v, do):
        true = compute(*inputs, causal=causal, scale=scale)
        eager = compute(*inputs, causal=causal, scale=scale, dtype=like or q.dtype)
        reference = true if reference is None else reference
        for n in names:
            if not true[n].numel():
                continue
            signed = eager[n].double() - true[n]
            error = signed.abs()
            rounding = (true[n].to(q.dtype).double() - true[n]).abs().mean().item()
            if not error.isfinite().all():
                raise BadCase(f"{n}: the reference or the yardstick is not finite")
            worst[n][0] = max(worst[n][0], error.max().item())
            worst[n][1] = max(worst[n][1], error.mean().item(), rounding)
            worst[n][2] = max(worst[n][2], abs(_gain(signed, true[n])))

    budget = {}
    for n in names:
        true, (yard_max, yard_mean, yard_gain) = reference[n], worst[n]
        largest, count = (true.abs().max().item(), true.numel()) if true.numel() else (0.0, 1)
        last = NORMALISE.get(n, 0.0)
        typical = true.abs().mean().item() if true.numel() else 0.0
        noise, mean_noise = (
            TINY32 + t + last * size
            for t, size in zip(
                reference["noise"].get(n, (0.0, 0.0)), (largest, typical), strict=True
            )
        )
        max_budget = MAX_FACTOR[n] * yard_max + ULPS * ulp(largest, q.dtype) + noise
        guard = max_budget * math.sqrt(-math.log(CHANCE) / (2 * count))
        mean_budget = MEAN_FACTOR * yard_mean + guard + mean_noise
        mean_budget = min(max_budget, mean_budget)
        rms = true.square().mean().sqrt().item() if true.numel() else 0.0
        rows = max(1, min(q[..., 0].numel(), k[..., 0].numel()))
        chance = 6 * mean_budget / (rms * math.sqrt(rows)) if rms else math.inf
        gain_budget = MAX_FACTOR[n] * yard_gain + chance + 2 * EPS32 + last
        budget[n] = Budget(max_budget, mean_budget, gain_budget)
    if lse:
        stored = torch.float32 if lse is True else lse
        eager = compute(q, k, v, causal=causal, scale=scale, dtype=stored)["lse"].double()
        error = (eager - reference["lse"])[reference["lse"].isfinite()].abs()
        yard = (error.max().item(), error.mean().item()) if error.numel() else (0.0, 0.0)
        slack = LSE_ULPS * ulp(max(1.0, reference["logit"]), torch.float32)
        budget["lse"] = Budget(
            MAX_FACTOR["lse"] * yard[0] + slack, MEAN_FACTOR * yard[1] + slack, math.inf
        )
        names.append("lse")
    return Expectation({n: reference[n] for n in names}, budget, q.dtype)


def _form(name, got, ref, dtype, device):
    """What is wrong with the shape, dtype, device or strides of one output, or None."""
    if not isinstance(got, torch.Tensor):
        return f"{name}: expected a tensor, got {type(got).__name__}"
    if got.shape != ref.shape:
        return f"{name}: expected shape {tuple(ref.shape)}, got {tuple(got.shape)}"
    if got.dtype != dtype:
        return f"{name}: expected {dtype}, got {got.dtype}"
    if got.device.type != device.type:
        return f"{name}: expected it on {device}, got {got.device}"
    if name == "o" and got.numel() and got.shape[-1] > 1 and got.stride(-1) != 1:
        return f"o: expected a contiguous last dim, got strides {got.stride()}"
    return None


def verdict(got, expectation):
    """Judge a dict of outputs (those of `expectation`: o, and lse, dq, dk, dv where asked)."""
    stats, reasons, worst = {}, [], 0.0
    for name, ref in expectation.reference.items():
        dtype = torch.float32 if name == "lse" else expectation.dtype
        form = _form(name, got.get(name), ref, dtype, ref.device)
        if form is not None:
            reasons.append(form)
            worst = math.inf
            continue
        value, true = got[name].detach().double(), ref
        if name == "lse":  # -inf where and only where no key is seen
            empty = true == -math.inf
            if not torch.equal(value == -math.inf, empty):
                reasons.append("lse: -inf in the wrong rows")
                worst = math.inf
                continue
            value, true = value[~empty], true[~empty]
        budget = expectation.budget[name]
        signed = value - true
        bad = signed.numel() - int(signed.isfinite().sum())
        error = signed.abs()
        max_error, mean_error, bias = (
            (error.max().item(), error.mean().item(), signed.mean().item())
            if signed.numel()
            else (0.0, 0.0, 0.0)
        )
        gain = _gain(signed, true)
        over = max(max_error / budget.max, mean_error / budget.mean, abs(gain) / budget.gain)
        if not over <= math.inf or bad:
            over = math.inf
        stats[name] = Stat(
            max_error, budget.max, mean_error, budget.mean, bias, gain, budget.gain, over
        )
        if bad:
            reasons.append(f"{name}: {bad} of {signed.numel()} numbers are not finite")
        elif not max_error <= budget.max:
            reasons.append(f"{name}: max error {max_error:.3g}, budget {budget.max:.3g}")
        elif not mean_error <= budget.mean:
            reasons.append(f"{name}: mean error {mean_error:.3g}, budget {budget.mean:.3g}")
        elif not abs(gain) <= budget.gain:
            reasons.append(f"{name}: gain {gain:+.3g}, budget {budget.gain:.3g}")
        worst = max(worst, over)
    return Verdict(not reasons, worst, stats, reasons)


def run(attention, q, k, v, do=None, *, causal=False, scale=None, lse=False):
    """Call `attention` and, with do, differentiate it; the dict that `verdict` takes.

    The inputs keep their strides. lse asks the function for return_lse=True.
    """
    options = {"causal": causal, "scale": scale} | ({"return_lse": True} if lse else {})
    if do is None:
        with torch.no_grad():
            out = attention(q, k, v, **options)
    else:
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        out = attention(q, k, v, **options)
    got = dict(zip(("o", "lse"), out, strict=True)) if lse else {"o": out}
    if do is not None:
        gradients = torch.autograd.grad(got["o"], (q, k, v), do)
        got |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return got


def check(attention, q, k, v, do=None, *, causal=False, scale=None, lse=False):
    """`run`, judged: the Verdict on one call of an attention function of the contract."""
    expectation = expect(q, k, v, do, causal=causal, scale=scale, lse=lse)
    return verdict(run(attention, q, k, v, do, causal=causal, scale=scale, lse=lse), expectation)
