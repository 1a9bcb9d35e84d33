"""ggml's functions with every pointer as a plain int: tensors are handed on by the thousand, and ctypes' own pointer
objects cost more than the calls."""

from __future__ import annotations

import ctypes
from typing import Any

_FUNCTION: Any = type(ctypes.pythonapi.Py_IncRef).__mro__[1]  # what every function of every library is
_POINTER: Any = ctypes.POINTER(ctypes.c_int).__mro__[1]


class GgmlCalls:
    """The flat module `ggml`: its functions made anew at first use, all else as it is there."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if isinstance(found, _FUNCTION):
            arguments = [_plain(each) for each in found.argtypes or ()]
            address = ctypes.cast(found, ctypes.c_void_p).value or 0
            found = ctypes.CFUNCTYPE(_plain(found.restype), *arguments)(address)
        setattr(self, name, found)
        return found


def _plain(kind: Any) -> Any:
    """c_void_p for a pointer to anything but text."""
    return ctypes.c_void_p if isinstance(kind, type) and issubclass(kind, _POINTER) else kind
