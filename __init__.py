"""flashstudy: when does FlashAttention beat standard attention on a GPU, and why?"""

from .block import Block
from .kernels import attention

__version__ = "0.1.0"
__all__ = ["Block", "attention"]
