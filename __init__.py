"""flashstudy: when does FlashAttention beat standard attention on a GPU, and why?

`attention` is the fastest kernel of the ladder for a device and shape, `Block` the Transformer
block of the study. Both are imported on first use: Triton decides at a kernel's import whether to
compile or to interpret it, and the benchmarks of torch's own kernels need no Triton.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["Block", "attention"]


def __getattr__(name):
    if name in __all__:
        module = {"Block": ".block", "attention": ".kernels"}[name]
        return getattr(importlib.import_module(module, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
