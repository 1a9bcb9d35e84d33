"""The tensors of a model by name, whatever its files are.

Tensors are read, not mapped: mapped pages would count as the process's memory beside the tensors made from them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from noodle.model.files import read_config
from noodle.model.gguf import read_gguf
from noodle.model.quantization import read_quantization
from noodle.model.tensor_entry import TensorEntry
from services.stage.executors.base import Fetch, nothing_to_fetch
from services.stage.executors.checkpoints.folder import QuantizedFolder
from services.stage.executors.safetensors import SafetensorsFolder, read_into


class TensorFiles(Protocol):
    """What a slice is loaded from. A tensor's `dtype` is the one that `read` gives it in."""

    is_gguf: bool

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, row length last; None if the model has no such tensor."""

    def prepare(self, names: Collection[str]) -> None:
        """Bring what the types of these tensors depend on."""

    def find(self, name: str) -> TensorEntry | None:
        """Where a tensor lies; None if the model has no such tensor."""

    def stored_names(self, name: str) -> tuple[str, ...]:
        """Names in the model's files that a tensor is read from."""

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with a tensor's bytes from `offset` on."""

    def description(self, names: Collection[str], /, *, held_in: str = "") -> str:
        """What was read in another form than the files', for people; empty if nothing was.

        `held_in` names the type in which all of them are held, if that is not the one in which they are read.
        """


class GgufTensors:
    """The tensors of a GGUF file or of all parts of a split one."""

    is_gguf = True

    def __init__(self, path: Path) -> None:
        self._entries: Mapping[str, TensorEntry] = read_gguf(path).entries

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        entry = self._entries.get(name)
        return None if entry is None else entry.shape

    def prepare(self, names: Collection[str]) -> None:
        """Do nothing: a tensor's type is its own."""

    def find(self, name: str) -> TensorEntry | None:
        return self._entries.get(name)

    def stored_names(self, name: str) -> tuple[str, ...]:
        return (name,)

    def read(self, name: str, buffer: memoryview, offset: int) -> None:
        read_into(self._entries[name], buffer, offset)

    def description(self, _names: Collection[str], /, *, held_in: str = "") -> str:  # noqa: ARG002
        return ""


def open_tensor_files(model: Path, *, is_exact: bool = False, fetch: Fetch = nothing_to_fetch) -> TensorFiles:
    """Open a folder with safetensors or a GGUF file; raises ModelNotFound or UnsupportedModel.

    `is_exact` reads a quantized checkpoint without rounding. `fetch` brings what the types of its tensors depend on.
    """
    if model.is_file():
        return GgufTensors(model)
    return open_folder(model, is_exact=is_exact, fetch=fetch)


def open_folder(
    folder: Path, *, is_exact: bool = False, as_float32: bool = False, fetch: Fetch = nothing_to_fetch
) -> SafetensorsFolder | QuantizedFolder:
    """Open a folder with safetensors, quantized or not; raises ModelNotFound or UnsupportedModel."""
    quantization = read_quantization(read_config(folder)) if folder.is_dir() else None
    if quantization is None:
        return SafetensorsFolder(folder)
    return QuantizedFolder(folder, quantization, is_exact=is_exact, as_float32=as_float32, fetch=fetch)
