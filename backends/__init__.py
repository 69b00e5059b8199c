"""The table of attention implementations, in the order in which everything shows them.

Every function has one contract: attention(q, k, v, *, causal=False, scale=None) -> o, with
q (B, H, N_Q, D), k and v (B, H_KV, N_K, D), any strides with a contiguous last dim, o shaped like
q. `causal` is aligned bottom-right: query i sees the keys up to i + N_K - N_Q. A row that sees no
key gives 0.
"""

import importlib
import os
from typing import NamedTuple

import torch

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


class Backend(NamedTuple):
    label: str  # for tables and legends
    family: str  # "standard": scores in memory, "flash": scores stay on chip, "auto": torch picks
    target: str  # "module:function" inside this package, imported on first use
    package: str | None = None  # third-party module it needs beyond torch and triton
    capability: tuple[int, int] = (0, 0)  # lowest compute capability
    dtypes: tuple = (FP16, BF16, FP32)  # on a GPU
    backward: bool = True
    cpu: str | None = None  # "native", "interpreter" (Triton's), or None: cannot run there
    needs: str | None = None  # "module:function" of ours: the reason why not on a device, or None


HALF = (FP16, BF16)
FA2, FA4 = "flash_attn.flash_attn_interface", "flash_attn.cute.interface"
HOPPER = "kernels._gluon:why_not"
BACKENDS = {
    "naive": Backend("Naive", "standard", "backends.naive:attention", cpu="native"),
    "naive-compiled": Backend("Naive compiled", "standard", "backends.naive_compiled:attention", None, (7, 0)),
    "sdpa": Backend("SDPA", "auto", "backends.torch_sdpa:sdpa", cpu="native"),
    "sdpa-math": Backend("SDPA math", "standard", "backends.torch_sdpa:sdpa_math", cpu="native"),
    "sdpa-efficient": Backend("SDPA efficient", "flash", "backends.torch_sdpa:sdpa_efficient"),
    "sdpa-flash": Backend("SDPA flash", "flash", "backends.torch_sdpa:sdpa_flash", None, (8, 0), HALF, cpu="native"),
    "sdpa-cudnn": Backend("SDPA cuDNN", "flash", "backends.torch_sdpa:sdpa_cudnn", None, (8, 0), HALF),
    "flex": Backend("FlexAttention", "flash", "backends.flex:attention", None, (8, 0)),
    "flash-attn": Backend("flash-attn 2", "flash", "backends.flash_attn:flash_attn_2", FA2, (8, 0), HALF),
    "flash-attn-4": Backend("flash-attn 4", "flash", "backends.flash_attn:flash_attn_4", FA4, (8, 0), HALF),
    "v0_naive": Backend("v0 naive", "standard", "kernels.v0_naive:attention", None, (8, 0), cpu="interpreter"),
    "v1_flash": Backend("v1 flash", "flash", "kernels.v1_flash:attention", None, (8, 0), cpu="interpreter"),
    "v2_lean": Backend("v2 lean", "flash", "kernels.v2_lean:attention", None, (8, 0), cpu="interpreter"),
    "v3_tma": Backend("v3 TMA", "flash", "kernels.v3_tma:attention", None, (8, 0), cpu="interpreter"),
    "v4_warp_specialized": Backend("v4 warp-specialised", "flash", "kernels.v4_warp_specialized:attention", None, (9, 0), HALF, False, needs=HOPPER),
    "v5_pingpong": Backend("v5 ping-pong", "flash", "kernels.v5_pingpong:attention", None, (9, 0), HALF, False, needs=HOPPER),
    "v6_persistent": Backend("v6 persistent", "flash", "kernels.v6_persistent:attention", None, (9, 0), HALF, False, needs=HOPPER),
    "v7_hopper_backward": Backend("v6 + v7", "flash", "kernels.hopper:attention", None, (9, 0), HALF, needs=HOPPER),
}  # fmt: skip


def why_not(name, device="cuda", dtype=None, backward=False):
    """The reason why backend `name` cannot run here as asked, or None where it can."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    row, device = BACKENDS[name], torch.device(device)
    if backward and not row.backward:
        return "has no backward"
    if device.type == "cpu":
        if row.cpu is None:
            return "needs a CUDA GPU"
        if row.cpu == "interpreter":
            if os.environ.get("TRITON_INTERPRET") != "1":
                return "needs a CUDA GPU (or TRITON_INTERPRET=1, which interprets it for testing)"
            if dtype == BF16:
                return "Triton's interpreter computes bfloat16 wrongly"
    elif not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    elif (have := torch.cuda.get_device_capability(device)) < row.capability:
        return "needs compute capability {}.{}, this GPU has {}.{}".format(*row.capability, *have)
    elif dtype is not None and dtype not in row.dtypes:
        return f"does not take {str(dtype).removeprefix('torch.')}"
    elif row.needs is not None and (reason := _function(row.needs)(device)) is not None:
        return reason
    if row.package is not None:
        try:
            importlib.import_module(row.package)
        except (ImportError, OSError) as e:  # absent, or built for another torch or CUDA
            return f"package {row.package.split('.')[0]} does not import: {e}"
    return None


def load(name):
    """The attention function of backend `name`. Never falls back to another one."""
    return _function(BACKENDS[name].target)


def _function(target):
    module, function = target.split(":")
    return getattr(importlib.import_module(f"flashstudy.{module}"), function)
