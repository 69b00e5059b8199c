"""Attention broken on purpose, one fault at a time: what a check has to reject to be worth running.

`attention("")` is correct: fp32 throughout, rounded once at the end, differentiable, tile rows of
128 queries that stop at the diagonal. `check_outputs.py --self-test` runs all of FAULTS.
"""

import math

import torch

TILE = 128  # queries whose visible keys are read together

FAULTS = (
    "scale 1 % off", "mask off by one, shows a future key", "mask off by one, hides the last key",
    "causal aligned top-left", "one NaN", "last row dropped", "KV heads in the wrong order",
    "a padded key counts exp(0)", "a ragged last key is dropped", "empty rows average V",
    "nothing written without keys", "maximum not subtracted", "scale folded into q in half",
    "P rounded to bf16", "TF32 products", "o off by 4 ulp", "dq 1 % off", "dk 1 % off",
    "dv 1 % off", "dk of one query head only", "dS without delta", "LSE in base 2",
    "LSE of empty rows 0", "o in fp32", "o with a strided last dim", "o of another shape",
    "inputs overwritten", "transposed last dim misread", "stride-0 do misread", "not repeatable",
    "heads mixed by 0", "mask added, not selected", "tiles past the diagonal are read",
)  # fmt: skip
LSE_ONLY = ("LSE in base 2", "LSE of empty rows 0", "scale folded into q in half")
_HALF = (torch.float16, torch.bfloat16)
_DTYPES = {
    "scale folded into q in half": _HALF,
    "o in fp32": _HALF,
    "P rounded to bf16": (torch.float16, torch.float32),
    "TF32 products": (torch.float32,),
}


def shows_in(fault, dtype):
    """Whether the fault changes anything for inputs of this dtype."""
    return dtype in _DTYPES.get(fault, (*_HALF, torch.float32))


def _dense(t):
    """t read as if it were contiguous, whatever its strides say."""
    return torch.as_strided(t, t.shape, torch.empty(t.shape, device="meta").stride())


class _Backward(torch.autograd.Function):
    """Identity whose gradient passes through a function."""

    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


def _first_head_only(group):
    def change(grad):  # of the repeated k, [B, H, N_K, D]
        kept = torch.zeros_like(grad)
        kept[:, ::group] = grad[:, ::group]
        return kept

    return change


def _misread(grad):
    return torch.zeros_like(grad) if 0 in grad.stride() else grad


def attention(fault=""):
    """An attention function of the contract, with return_lse, broken as `fault` says."""
    if fault and fault not in FAULTS:
        raise ValueError(f"fault: expected one of {FAULTS}, got {fault!r}")
    calls = 0

    def broken(q, k, v, *, causal=False, scale=None, return_lse=False):
        nonlocal calls
        calls += 1
        dtype, group = q.dtype, q.shape[1] // k.shape[1]
        n_q, n_k, offset = q.shape[2], k.shape[2], k.shape[2] - q.shape[2]
        scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
        if fault == "transposed last dim misread":
            q, k, v = (_dense(t) if t.stride(-1) != 1 else t for t in (q, k, v))
        for name, t in (("q", q), ("k", k), ("v", v)):
            if t.stride(-1) != 1 and t.shape[-1] > 1:
                raise ValueError(f"{name}: expected a contiguous last dim")
        if fault == "inputs overwritten" and n_k:
            k.detach()[..., :1, :1] += 1
        if fault == "scale folded into q in half":
            q, scale = q * scale, 1.0
        elif fault == "scale 1 % off":
            scale = scale * 1.01
        offset = {
            "mask off by one, shows a future key": offset + 1,
            "mask off by one, hides the last key": offset - 1,
            "causal aligned top-left": 0,
        }.get(fault, offset)

        # [B, H_KV, N_K, D] -> [B, H, N_K, D], in fp32
        q, k, v = q.float(), k.float(), v.float()
        if fault == "KV heads in the wrong order":
            k, v = (t.repeat(1, group, 1, 1) for t in (k, v))
        else:
            k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        if fault == "dk of one query head only":
            k = _Backward.apply(k, _first_head_only(group))
        if fault.endswith(" 1 % off"):
            q, k, v = (
                _Backward.apply(t, lambda g: g * 1.01) if fault.startswith(f"d{n}") else t
                for n, t in (("q", q), ("k", k), ("v", v))
            )
        if fault == "TF32 products":  # 10 bits of mantissa
            q, k, v = (t + (_truncate(t) - t).detach() for t in (q, k, v))
        if fault == "a padded key counts exp(0)" and n_k % 16:
            k, v = (torch.nn.functional.pad(t, (0, 0, 0, 1)) for t in (k, v))
        elif fault == "a ragged last key is dropped" and n_k % 16:
            k, v = k[:, :, :-1], v[:, :, :-1]

        tiles = [
            _tile(fault, q[:, :, m : m + TILE], k, v, m, offset, causal, scale)
            for m in range(0, max(n_q, 1), TILE)
        ]
        o, lse = (torch.cat(parts, dim=2) for parts in zip(*tiles, strict=True))
        o = _finish(fault, o, calls, torch.finfo(dtype).eps)
        o = o if fault == "o in fp32" else o.to(dtype)
        if fault == "nothing written without keys" and not n_k:
            o = o + math.nan
        if fault == "LSE in base 2":
            lse = lse / math.log(2)
        elif fault == "LSE of empty rows 0":
            lse = lse.masked_fill(lse.isneginf(), 0)
        if fault == "o with a strided last dim":
            o = o.mT.contiguous().mT
        elif fault == "o of another shape":
            o = o.transpose(1, 2)
        if fault == "stride-0 do misread":
            o = _Backward.apply(o, _misread)
        return (o, lse) if return_lse else o

    return broken


def _truncate(t):
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def _tile(fault, q, k, v, start_m, offset, causal, scale):
    """o and LSE of one tile of queries: [B, H, M, D] and [B, H, M]."""
    n_k = k.shape[2]
    i = start_m + torch.arange(q.shape[2], device=q.device)
    hi = max(0, min(n_k, start_m + TILE + offset)) if causal else n_k
    if fault == "tiles past the diagonal are read":
        hi = n_k
    k, v = k[:, :, :hi], v[:, :, :hi]

    s = scale * (q @ k.mT)  # [B, H, M, hi]
    if causal:
        hidden = torch.arange(hi, device=q.device) > i[:, None] + offset
        if fault == "mask added, not selected":
            s = s + torch.zeros(hidden.shape, device=q.device).masked_fill_(hidden, -math.inf)
        else:
            s = s.masked_fill(hidden, -math.inf)
    s_seen = s.detach()
    lse = torch.logsumexp(s_seen, -1) if hi else s.new_full(s.shape[:3], -math.inf)
    empty = lse.isneginf()[..., None]
    m = s_seen.amax(-1, keepdim=True).masked_fill(empty, 0) if hi else 0
    p = (s if fault == "maximum not subtracted" else s - m).exp()
    p = p / p.sum(-1, keepdim=True).masked_fill(empty, 1)
    if fault == "dS without delta":
        s = s.masked_fill(s_seen == -math.inf, 0)
        p = p.detach() * (1 + s - s.detach())
    elif fault == "P rounded to bf16":
        p = p + (p.bfloat16().float() - p).detach()
    if fault == "empty rows average V" and n_k:
        p = p + empty / n_k
    return p @ v, lse


def _finish(fault, o, calls, eps):
    """Faults of the last step, in fp32; eps of the output's dtype."""
    if not o.numel():
        return o
    last = torch.zeros(o.shape, dtype=torch.bool, device=o.device)
    last[-1, -1, -1, -1] = True
    if fault == "one NaN":
        return o.masked_fill(last, math.nan)
    if fault == "last row dropped":
        return torch.cat([o[:, :, :-1], torch.zeros_like(o[:, :, -1:])], dim=2)
    if fault == "heads mixed by 0":
        return o + 0 * o.sum()
    if fault == "o off by 4 ulp":
        return o + 4 * eps * o.detach().abs().amax()
    if fault == "not repeatable":  # one number, by 2 ulp, every other time
        return o * (1 + 2 * eps * (calls % 2) * last)
    return o
