"""Attention kernels, a ladder from text-book to fast. `kernels/README.md` says what to read first."""

from .v1_flash import attention

__all__ = ["attention"]
