"""Gives memory that was freed back to the system; the C library keeps much of what loading and measuring took."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """At once, where the C library is one that can (glibc); harmless elsewhere."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
