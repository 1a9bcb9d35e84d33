"""What one core can do at best (kernels/limits.c): bytes that a loop reads, numbers that a loop multiplies and adds."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
import numpy.typing as npt

READ_BYTES = 512  # read at once
STEPS = 1_000_000  # of the multiplying loop: one to four milliseconds
# by the type of the weights, whose numbers are multiplied; others are multiplied in 8 bits
MULTIPLIED = {"F32": "f32", "F16": "f32", "BF16": "bf16"}


class Limits:
    """The loops of noodle's library for some instructions."""

    def __init__(self, library: ctypes.CDLL, instructions: str) -> None:
        self._library, self._instructions = library, instructions

    def bytes_per_second(self, memory: npt.NDArray[np.uint8]) -> float:
        """Read memory once, in its order."""
        byte_count = memory.nbytes // READ_BYTES * READ_BYTES
        read = self.function("read")
        begin = time.process_time()
        read(memory.ctypes.data, byte_count)
        return byte_count / (time.process_time() - begin)

    def products_per_second(self, kind: str) -> float:
        """Multiply and add numbers as weights of a type need it."""
        multiplied = "f32" if kind == "BF16" and self._instructions == "avx2" else MULTIPLIED.get(kind, "int8")
        multiply = self.function(f"multiply_{multiplied}")
        begin = time.process_time()
        count = multiply(STEPS)
        return float(count / (time.process_time() - begin))

    def function(self, name: str) -> Any:
        """Return a loop: `read` of an address and a byte count, or `multiply_*` of a number of steps."""
        found = getattr(self._library, f"noodle_limit_{name}_{self._instructions}")
        found.restype = ctypes.c_uint64
        found.argtypes = [ctypes.c_void_p, ctypes.c_int64] if name == "read" else [ctypes.c_int64]
        return found
