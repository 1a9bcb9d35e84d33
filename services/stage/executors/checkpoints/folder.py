"""A folder of quantized safetensors as the tensors that a model computes with."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from noodle.errors import ModelNotFound, UnsupportedModel
from noodle.model.ggml_types import GGML_TYPES
from noodle.model.quantization import CURE, PACKED_BITS, Quantization, WeightScheme, matrix_name
from noodle.model.tensor_entry import TensorEntry
from services.stage.executors.base import Fetch, nothing_to_fetch
from services.stage.executors.checkpoints.codebooks import TYPES, BitsAndBytes4Matrix, Mxfp4Matrix
from services.stage.executors.checkpoints.floats import CODES, SmallFloatMatrix
from services.stage.executors.checkpoints.integers import (
    AwqMatrix,
    BitsAndBytesInt8Matrix,
    GptqMatrix,
    Int8Matrix,
    PackedMatrix,
)
from services.stage.executors.checkpoints.matrix import QuantizedMatrix
from services.stage.executors.checkpoints.numbers import Bytes
from services.stage.executors.safetensors import SafetensorsFolder, read_into

# tensors of quantized modules that only say how activations or KV rows were rounded
UNUSED_SUFFIXES = (
    ".weight_format", ".input_scale", ".output_scale", ".activation_scale", ".input_scale_ub", ".input_zero_point",
    ".k_scale", ".v_scale", ".q_scale", ".qscale_act",
)  # fmt: skip

PIECE_ITEMS = 1 << 17  # decoded at once: what lies between codes and values stays in the processor's caches
ACTIVATION_SCALES = ".act.scales"  # what AWQ divides the activations of some families by


class _Stored:
    """The folder's tensors as they are stored."""

    def __init__(self, files: SafetensorsFolder) -> None:
        self._files = files

    def find(self, key: str) -> TensorEntry | None:
        return self._files.entry(key) if key in self._files.file_by_key else None

    def read(self, key: str, first_byte: int, byte_count: int) -> Bytes:
        data = np.empty(byte_count, np.uint8)
        read_into(self._files.entry(key), data.data, first_byte)
        return data


class QuantizedFolder:
    """All tensors of a quantized model folder, with each quantized matrix under the key that it has unquantized.

    A matrix is of the smallest type of ggml that holds its values exactly. If there is none of 16 bits or less, it is
    rounded to float16, or (`is_exact`) it is float32. With `as_float32` all matrices are that. MXFP4 experts are
    [experts, rows, columns], transposed to how transformers holds them (`is_transposed`). `fetch` brings tensors that
    the folder lacks, before they are read to find a matrix's shape and type.
    """

    is_gguf = False

    def __init__(
        self,
        folder: Path,
        quantization: Quantization,
        *,
        is_exact: bool = False,
        as_float32: bool = False,
        fetch: Fetch = nothing_to_fetch,
    ) -> None:
        self._files = SafetensorsFolder(folder)
        scaled = next((key for key in self._files.file_by_key if key.endswith(ACTIVATION_SCALES)), None)
        if scaled is not None:
            raise UnsupportedModel(
                f"{folder} divides activations by {scaled}, which noodle does not compute.", cure=CURE
            )
        self._stored = _Stored(self._files)
        self._quantization = quantization
        self._is_exact = is_exact or as_float32
        self._as_float32 = as_float32
        self._fetch = fetch
        self._matrices: dict[str, QuantizedMatrix | None] = {}
        self._lock = threading.Lock()
        self._rows_left: dict[str, int] = {}

    # the interface of a model's tensors

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None if the model has no such tensor. Reads no scales."""
        matrix = self._matrix(name)
        if matrix is not None:
            return matrix.shape
        entry = self._stored.find(name)
        return None if entry is None else entry.shape

    def names(self) -> list[str]:
        """Names of all tensors that a model may hold: those of matrices instead of their parts."""
        names = [name if self._matrix(name := matrix_name(key)) else key for key in self._files.file_by_key]
        matrices = {name: matrix for name in names if (matrix := self._matrix(name)) is not None}
        parts = {part for matrix in matrices.values() for part in matrix.parts} - matrices.keys()
        return [name for name in names if name not in parts and not name.endswith(UNUSED_SUFFIXES)]

    def is_transposed(self, name: str) -> bool:
        """Whether transformers holds a tensor's matrices as [columns, rows]."""
        matrix = self._matrix(name)
        return isinstance(matrix, Mxfp4Matrix) and len(matrix.shape) > 2

    def prepare(self, names: Collection[str]) -> None:
        """Fetch what the types of these tensors depend on."""
        matrices = [matrix for name in names if (matrix := self._matrix(name)) is not None]
        if matrices:
            self._fetch([part for matrix in matrices for part in matrix.small_parts])

    def find(self, name: str) -> TensorEntry | None:
        """Where a tensor lies, with the type and shape that `read` gives it in; None if there is no such tensor."""
        matrix = self._matrix(name)
        if matrix is None:
            return self._stored.find(name)
        kind = GGML_TYPES[self._type_of(matrix)]
        first = self._files.entry(matrix.parts[0])
        byte_count = kind.byte_count(math.prod(matrix.shape))
        return replace(first, dtype=kind.name, shape=matrix.shape, byte_count=byte_count)

    def stored_names(self, name: str) -> tuple[str, ...]:
        """Keys in the files that a tensor is read from."""
        matrix = self._matrix(name)
        return (name,) if matrix is None else matrix.parts

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with rows of a tensor, in its type, from byte `offset` on; threads may read together."""
        matrix = self._matrix(name)
        if matrix is None:
            read_into(self._files.entry(name), buffer, offset)
            return
        kind = GGML_TYPES[self._type_of(matrix)]
        row_bytes = kind.byte_count(matrix.shape[-1])
        first, skipped = divmod(offset, row_bytes)
        count = -(-(skipped + len(buffer)) // row_bytes)
        target = np.frombuffer(buffer, np.uint8)
        step = max(1, PIECE_ITEMS // matrix.shape[-1])
        for begin in range(first, first + count, step):
            rows = min(step, first + count - begin)
            data = matrix.encoded(begin, rows, kind.name)
            at = (begin - first) * row_bytes - skipped
            target[max(0, at) : at + len(data)] = data[max(0, -at) : len(target) - at]
        self._note_read(matrix, count)

    def description(self, names: Collection[str], /, *, held_in: str = "") -> str:
        """How tensors were read, for people; empty if none of them is quantized: AWQ 4 bit as q5_0.

        `held_in` names the type in which all of them are held, if that is not the one in which they are read.
        """
        uses: Counter[tuple[str, str, bool]] = Counter()
        for name in names:
            if matrix := self._matrix(name):
                is_exact = held_in == "f32" or (not held_in and (self._is_exact or matrix.storage.is_exact))
                uses[matrix.label, held_in or self._type_of(matrix), is_exact] += 1
        if not uses:
            return ""
        forms = [
            f"{label} as {kind if kind.startswith('MXFP') else kind.lower()}{'' if is_exact else ' (rounded)'}"
            for (label, kind, is_exact), _ in uses.most_common()
        ]
        return "; ".join([f"read from {', '.join(forms)}", *self._quantization.notes])

    def _type_of(self, matrix: QuantizedMatrix) -> str:
        if self._as_float32:
            return "F32"
        storage = matrix.storage
        return storage.type_name if storage.is_exact or not self._is_exact else "F32"

    def _note_read(self, matrix: QuantizedMatrix, rows: int) -> None:
        """Count the rows that were read; after the last of them the matrix needs its codes no longer."""
        with self._lock:
            left = self._rows_left.get(matrix.key, matrix.row_count) - rows
            self._rows_left[matrix.key] = left if left > 0 else matrix.row_count
        if left <= 0:
            matrix.release()

    # which tensors a matrix is made of

    def _matrix(self, name: str) -> QuantizedMatrix | None:
        with self._lock:
            if name not in self._matrices:
                self._matrices[name] = self._make(name)
            return self._matrices[name]

    def _make(self, name: str) -> QuantizedMatrix | None:
        """The quantized matrix of a name, from the tensors that there are; None for a tensor stored as it is."""
        entry, method = self._stored.find(name), self._quantization.method
        module = name.removesuffix(".weight")
        if entry is None:
            if module != name and self._has(f"{module}.qweight"):
                kind = AwqMatrix if method == "awq" else GptqMatrix
                return kind(self._stored, name, self._quantization.settings)
            if self._has(f"{name}_packed"):
                return self._packed(name, module)
            if self._has(f"{name}_blocks"):
                return Mxfp4Matrix(self._stored, name, f"{name}_blocks", f"{name}_scales")
            return None
        if entry.dtype in CODES:
            return self._small_floats(name, module)
        if entry.dtype == "I8" and self._has(f"{module}.SCB"):
            return BitsAndBytesInt8Matrix(self._stored, name)
        if entry.dtype == "I8" and method == "compressed-tensors":
            return Int8Matrix(self._stored, name, self._scheme(module).group_size)
        is_packed = entry.dtype == "U8" or self._has(f"{name}.absmax")
        if method == "bitsandbytes" and name.endswith(".weight") and is_packed:
            states = [f"{name}.quant_state.bitsandbytes__{kind}" for kind in TYPES]
            self._fetch([state for state in states if self._has(state)])
            return BitsAndBytes4Matrix(self._stored, name)
        return None

    def _small_floats(self, name: str, module: str) -> QuantizedMatrix:
        scale_keys = (f"{name}_scale_inv", f"{name}_scale", f"{module}.qscale_weight")
        found = next((key for key in scale_keys if self._has(key)), None)
        block: Sequence[int] | None = self._quantization.block
        if self._quantization.method == "compressed-tensors":
            scheme = self._scheme(module)
            block = scheme.block or ((1, scheme.group_size) if scheme.group_size else None)
        scale_key = found or scale_keys[1 if self._quantization.method != "fp8" else 0]
        return SmallFloatMatrix(self._stored, name, scale_key, block)

    def _packed(self, name: str, module: str) -> QuantizedMatrix:
        if self._files.entry(f"{name}_packed").dtype in ("U8", "I8"):
            return Mxfp4Matrix(self._stored, name, f"{name}_packed", f"{name}_scale")
        scheme = self._scheme(module)
        if scheme.bits not in PACKED_BITS:
            raise UnsupportedModel(f"{name} is packed in {scheme.bits} bits, which noodle does not read.", cure=CURE)
        return PackedMatrix(self._stored, name, scheme.bits, scheme.group_size)

    def _has(self, key: str) -> bool:
        return key in self._files.file_by_key

    def _scheme(self, module: str) -> WeightScheme:
        if scheme := self._quantization.scheme_of(module):
            return scheme
        raise ModelNotFound(
            f"{module} is quantized, but no group in config.json's quantization_config names it.",
            cure="Fetch the model again, and check that its config.json belongs to its weights.",
        )
