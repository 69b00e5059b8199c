"""The grid: shapes, head dims, heads, masks, strides, values and traps that attention gets wrong.

A Case is data; `inputs` makes its tensors. `grid` picks the cases for a backend, a device and a
dtype. Adding a case is adding a line here: `check_outputs.py` runs it on everything.
"""

import itertools
import math
import zlib
from typing import NamedTuple

import torch

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
ALL = (FP16, BF16, FP32)

# (N_Q, N_K): one and two rows, decoding, ragged ends, both sides of every tile edge.
SHAPES = (
    (1, 1), (1, 2), (2, 1), (3, 3), (1, 239), (239, 1), (3, 799), (64, 32), (64, 128), (127, 512),
    (113, 203), (128, 217), (108, 256), (255, 256), (257, 257), (384, 256), (640, 128), (512, 256),
    (1023, 1024), (1024, 1023), (1025, 1025), (2048, 2048),
    (15, 17), (17, 15), (31, 33), (33, 31), (63, 65), (65, 63), (79, 81), (95, 97), (127, 129),
    (129, 127), (159, 161), (175, 177), (191, 193), (193, 191), (256, 255),
)  # fmt: skip
HEAD_DIMS = (1, 8, 16, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
HEADS = ((1, 1), (3, 3), (6, 2), (6, 1), (8, 4))  # (H, H_KV)

# The families, in the order of the table's columns.
FAMILIES = ("shapes", "head dims", "heads", "values", "strides", "edges", "size", "properties")

# Backends that compile anew for (almost) every case, seconds each: they get the core cases only.
CORE_ONLY = {
    "naive-compiled": "compiles every shape anew (seconds each)",
    "flex": "compiles every shape anew (seconds each)",
    "flash-attn-4": "compiles every head dim, mask, dtype and head grouping anew (seconds each)",
}
# Multiply-adds per product that one core does in about half a second, in fp64.
CPU_WORK = 1 << 28
# A tile of 64 x 64 scores costs the interpreter tens of milliseconds: cases have up to this many.
INTERPRETED_TILES = 8


class Case(NamedTuple):
    """One call. family: column of the table. grad: differentiate too. judge: "budget", or a
    property in check_outputs.PROPERTIES. may_refuse: a ValueError is a right answer."""

    family: str
    n_q: int
    n_k: int
    d: int = 64
    b: int = 1
    h: int = 1
    h_kv: int = 1
    causal: bool = False
    scale: float | None = None
    values: str = "normal"
    layout: str = "contiguous"
    do: str = "normal"
    grad: bool = False
    judge: str = "budget"
    may_refuse: bool = False
    dtypes: tuple = ALL
    quick: bool = False
    core: bool = False
    heavy: bool = False  # GiBs: on a GPU only, few at a time

    @property
    def name(self):
        """Everything that tells this case from the others, as in B1 H6/2 N113x203 D64 causal."""
        heads = f"H{self.h}" if self.h == self.h_kv else f"H{self.h}/{self.h_kv}"
        parts = [f"B{self.b} {heads} N{self.n_q}x{self.n_k} D{self.d}"]
        parts += ["causal"] if self.causal else []
        parts += [] if self.scale is None else [f"scale={self.scale:g}"]
        parts += [x for x in (self.values, self.layout) if x not in ("normal", "contiguous")]
        parts += [] if self.do == "normal" else [f"do:{self.do}"]
        parts += [] if self.judge == "budget" else [self.judge]
        return " ".join([*parts, "grad"] if self.grad else parts)


def _both(**fields):
    """The case forward, and forward with gradients."""
    return [Case(**fields), Case(**fields, grad=True)]


def _shapes():
    quick = {(1, 1), (3, 3), (113, 203), (128, 217), (64, 128), (384, 256), (17, 15), (129, 127)}
    core = {(113, 203), (1025, 1025), (384, 256)}
    for (n_q, n_k), causal in itertools.product(SHAPES, (False, True)):
        picked = {"quick": (n_q, n_k) in quick, "core": (n_q, n_k) in core and causal}
        yield from _both(family="shapes", n_q=n_q, n_k=n_k, causal=causal, **picked)


def _head_dims():
    for d in HEAD_DIMS:
        # Every head dim is a compilation: all of them in one dtype, the common ones in the others.
        dtypes = ALL if d in (32, 59, 64, 128, 256) else (FP16,)
        shape = {"family": "head dims", "n_q": 97, "n_k": 130, "d": d, "dtypes": dtypes}
        core = d in (64, 128, 256)
        yield Case(**shape, quick=d in (16, 59, 128), core=core)
        yield Case(**shape, causal=True, grad=True, quick=d in (40, 128), core=core and d != 64)
        if d in (64, 128, 256):  # long enough for every stage of a pipeline to wrap
            long = shape | {"n_q": 600, "n_k": 700}
            yield from _both(**long, causal=True)


def _heads():
    for (h, h_kv), (n_q, n_k), causal in itertools.product(
        HEADS, ((50, 60), (67, 131)), (False, True)
    ):
        shape = {"family": "heads", "n_q": n_q, "n_k": n_k, "h": h, "h_kv": h_kv, "causal": causal}
        picked = (h, h_kv) == (6, 2) and causal and n_q == 50
        yield from _both(**shape, b=2, quick=picked, core=picked)
    # Decoding: one query, or a few, of many heads over long grouped keys.
    for n_q in (1, 4):
        yield Case("heads", n_q, 1500, d=128, h=8, h_kv=2, causal=True)


def _values():
    for values, causal in itertools.product(
        ("x5", "huge-logits", "huge-key", "equal-logits", "tiny", "v-ones", "v-one-hot"),
        (False, True),
    ):
        shape = {"family": "values", "n_q": 113, "n_k": 139, "values": values, "causal": causal}
        yield from _both(**shape, quick=not causal, core=values == "huge-logits" and not causal)
    for scale in (0.5, 1.0):
        yield from _both(family="values", n_q=65, n_k=100, scale=scale, causal=True)
    # 0 · -inf is NaN, and a negative scale turns the row's maximum into its minimum.
    for scale in (0.0, -0.5):
        yield from _both(
            family="values", n_q=65, n_k=100, scale=scale, causal=True, may_refuse=True
        )


def _strides():
    for layout, d, n in itertools.product(
        ("bnhd", "qkv", "expanded", "padded", "offset"), (64, 40), (61, 301)
    ):
        h, h_kv = (4, 2) if layout == "expanded" else (2, 1)  # all KV heads are one, stride 0
        shape = {"family": "strides", "n_q": n, "n_k": n, "h": h, "h_kv": h_kv, "b": 2, "d": d}
        picked = {"quick": (n, d) == (61, 40), "dtypes": ALL if d == 64 else (FP16, FP32)}
        core = d == 64 and n == 301 and layout in ("bnhd", "qkv")
        yield Case(**shape, **picked, layout=layout)
        yield Case(**shape, **picked, layout=layout, causal=True, grad=True, core=core)
    for layout in ("transposed-q", "transposed-k", "transposed-v"):
        yield Case("strides", 70, 90, layout=layout, may_refuse=True, quick=layout[-1] == "k")
    # o.sum().backward() hands over one number expanded to every place: all strides 0.
    for do in ("expanded", "bnhd", "transposed"):
        yield Case("strides", 70, 90, do=do, grad=True, quick=do == "expanded", core=do != "bnhd")


def _edges():
    """No queries, no keys, and rows that see no key because N_Q > N_K."""
    for (n_q, n_k), causal in itertools.product(
        ((0, 5), (5, 0), (0, 0), (130, 0), (200, 3), (129, 1), (300, 172)), (False, True)
    ):
        if causal or not n_q * n_k:
            yield from _both(family="edges", n_q=n_q, n_k=n_k, causal=causal, quick=n_q in (5, 200))


def _size():
    # More heads than a grid's second and third dimension may have programs (65,535).
    for causal in (False, True):
        yield Case("size", 3, 5, d=16, b=7000, h=10, h_kv=5, causal=causal, dtypes=(FP16, FP32))
    yield Case("size", 3, 5, d=16, b=70000, h=1, h_kv=1, grad=True, dtypes=(FP16,))
    # Offsets past 2^31 elements, by strides and by the number of elements.
    heavy = {"family": "size", "heavy": True, "dtypes": (FP16,)}
    yield Case(**heavy, n_q=130, n_k=130, b=2, layout="far", causal=True, grad=True)
    yield Case(**heavy, n_q=1 << 18, n_k=16, d=128, h=65, h_kv=65)


def _properties():
    for judge, causal, grad in itertools.product(
        ("repeat", "independent"), (False, True), (False, True)
    ):
        shape = {"family": "properties", "judge": judge, "causal": causal, "grad": grad}
        yield Case(**shape, n_q=40, n_k=70, b=2, h=4, h_kv=2, quick=True)
        if judge == "repeat":  # many tiles in flight
            yield Case(**shape, n_q=1000, n_k=1100, b=2, h=8, h_kv=4)
    yield Case("properties", 100, 170, judge="permuted-keys", quick=True)
    yield Case("properties", 150, 170, causal=True, judge="future-nan-k", quick=True)
    yield Case("properties", 450, 450, causal=True, judge="future-nan-kv", quick=True)


def every():
    """All cases, cheap families first."""
    makers = (_shapes, _head_dims, _heads, _values, _strides, _edges, _size, _properties)
    return [case for make in makers for case in make()]


def _tiles(case):
    tiles = case.b * case.h * -(-case.n_q // 64) * -(-case.n_k // 64)
    return tiles // 2 if case.causal else tiles


def _work(case):
    """Multiply-adds of one product; tiny heads cost their overhead."""
    products = 3 if case.grad else 1
    return products * case.b * case.h * max(case.n_q * case.n_k * case.d, 1 << 11)


def _affordable(case):
    """Whether Triton's interpreter gets through this case in a second or so."""
    limit = INTERPRETED_TILES * (3 / 4 if case.grad else 1)
    if case.judge == "future-nan-kv":  # needs many tiles to say anything
        limit = math.inf
    return _tiles(case) <= limit and case.d <= 128


def grid(name, device, dtype, *, backward, interpreted, quick=False):
    """The cases of backend `name` in this dtype on this kind of device ("cuda" or "cpu")."""
    return [
        case
        for case in every()
        if dtype in case.dtypes
        and (backward or not case.grad)
        and (case.quick or not quick)
        and (name not in CORE_ONLY or (case.core and (case.quick or dtype == FP16)))
        and (device == "cuda" or (not case.heavy and _work(case) <= CPU_WORK))
        and (not interpreted or (_affordable(case) and (case.quick or dtype == FP16)))
    ]


def _lay(t, layout, which):
    """The numbers of t (B, H, N, D) in another memory layout; which: "q", "k", "v" or "do"."""
    b, h, n, d = t.shape
    if layout == "bnhd" or layout == "qkv":  # "qkv" is built whole, in `inputs`
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expanded":
        return t if which == "q" else t[:1, :1].expand(b, h, n, d)
    if layout == "padded":  # rows at no multiple of 16 bytes, the gaps poisoned
        wide = t.new_full((b, h, n, d + 3), float("nan"))
        wide[..., :d] = t
        return wide[..., :d]
    if layout == "offset":  # the first element at no multiple of 16 bytes
        flat = t.new_full((t.numel() + 1,), float("nan"))
        flat[1:] = t.reshape(-1)
        return flat[1:].view(b, h, n, d)
    if layout == "transposed" or layout == f"transposed-{which}":
        return t.mT.contiguous().mT
    if layout == "far" and which != "do":  # batches 2^31 + 64 elements apart
        apart = (1 << 31) + 64
        flat = t.new_empty(apart * (b - 1) + h * n * d)
        far = flat.as_strided(t.shape, (apart, n * d, d, 1))
        return far.copy_(t)
    return t


def _values_of(case, q, k, v, do):
    values = case.values
    if values == "x5":
        return q * 5, k * 5, v * 5, do
    if values == "huge-logits":
        if q.dtype == FP32:  # std 1e4
            return q * 100, k * 100, v, do
        # Logits of 128 n, |n| <= 78: exact in half precision, so that the yardstick is exact, too,
        # and the budget tight. Many ties for the maximum.
        n = (k[..., 0].float() * 40).round().clamp(-78, 78)
        q, k = torch.zeros_like(q), torch.zeros_like(k)
        q[..., 0], k[..., 0] = 128, n.to(k.dtype) * case.d**0.5
        q[..., 1::2, 0] = -128
        return q, k, v, do / 16
    if values == "huge-key":
        k[..., case.n_k // 2, :] *= 100
    elif values == "equal-logits":
        k[...] = k[..., :1, :]
    elif values == "tiny":  # subnormal in their dtype
        tiny = torch.finfo(q.dtype).smallest_normal / 8
        return q * tiny, k * tiny, v * tiny, do
    elif values == "v-ones":
        v[...] = 1
    elif values == "v-one-hot":  # o holds columns of P
        v[...] = torch.eye(case.d, dtype=v.dtype, device=v.device).repeat(
            -(-case.n_k // case.d), 1
        )[: case.n_k]
    elif values != "normal":
        raise ValueError(f"values: unknown {values!r}")
    return q, k, v, do


def inputs(case, dtype, device):
    """q, k, v and do (None without grad) of a case: standard normal unless it says otherwise."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))

    def normal(h, n):
        return torch.randn(case.b, h, n, case.d, generator=generator, device=device, dtype=dtype)

    q, k, v = normal(case.h, case.n_q), normal(case.h_kv, case.n_k), normal(case.h_kv, case.n_k)
    do = normal(case.h, case.n_q) if case.grad else q.new_zeros(())
    q, k, v, do = _values_of(case, q, k, v, do)
    if case.layout == "qkv":
        fused = torch.cat([q, k, v], dim=1).transpose(1, 2).contiguous()  # [B, N, H + 2 H_KV, D]
        q, k, v = fused.transpose(1, 2).split((case.h, case.h_kv, case.h_kv), dim=1)
    else:
        q, k, v = (_lay(t, case.layout, which) for t, which in ((q, "q"), (k, "k"), (v, "v")))
    if not case.grad:
        return q, k, v, None
    if case.do == "expanded":
        do = do.new_ones(()).expand(do.shape)
    elif case.do != "normal":
        do = _lay(do, case.do, "do")
    return q, k, v, do
