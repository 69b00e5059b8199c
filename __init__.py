"""flashstudy: when does FlashAttention beat standard attention on a GPU, and why?

`attention` runs the fastest kernels of the ladder for a device and shape, and `choose` says which
those are; `Block` is the Transformer block of the study. They are imported on first use: Triton
decides at a kernel's import whether to compile or to interpret it, and the benchmarks of torch's
own kernels need no Triton.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["Block", "attention", "choose"]


def __getattr__(name):
    if name in __all__:
        module = ".block" if name == "Block" else ".kernels"
        return getattr(importlib.import_module(module, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
