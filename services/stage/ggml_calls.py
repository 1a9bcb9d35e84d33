"""ggml's functions with every pointer as a plain int: tensors are handed on by the thousand, and ctypes' own pointer
objects cost more than the calls."""

from __future__ import annotations

import ctypes
from typing import Any

_SIMPLE = (ctypes.c_void_p, ctypes.c_char_p)


class GgmlCalls:
    """The flat module `ggml`: its functions made anew at first use, all else as it is there."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if isinstance(found, ctypes._CFuncPtr):
            arguments = [_plain(each) for each in found.argtypes or ()]
            address = ctypes.cast(found, ctypes.c_void_p).value
            found = ctypes.CFUNCTYPE(_plain(found.restype), *arguments)(address)
        setattr(self, name, found)
        return found


def _plain(kind: Any) -> Any:
    """c_void_p for a pointer to anything but text."""
    is_pointer = isinstance(kind, type) and issubclass(kind, ctypes._Pointer) and kind not in _SIMPLE
    return ctypes.c_void_p if is_pointer else kind
