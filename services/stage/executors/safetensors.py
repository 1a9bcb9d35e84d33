"""Reads single tensors from a folder of safetensors files.

Tensors are read, not mapped: mapped pages would count as the process's memory beside the tensors made from them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from noodle.errors import ModelNotFound, UnsupportedModel
from noodle.model.files import INDEX_NAME, SINGLE_NAME, read_header, read_index, weight_files
from noodle.model.tensor_entry import TensorEntry

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class SafetensorsFolder:
    """All tensors of a model folder by key; a file's header is read when one of its tensors is asked for."""

    is_gguf = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._headers: dict[Path, dict[str, TensorEntry]] = {}
        if not folder.is_dir():
            raise ModelNotFound(
                f"{folder} is not a folder.", cure="Set NOODLE_MODEL to a model's folder, a hub id or a .gguf file."
            )
        with _damage_as_not_found():
            index = read_index(folder)
            files = weight_files(folder) if index is None else ()
        self.file_by_key = (
            {key: folder / name for key, name in index.items()}
            if index is not None
            else {key: path for path in files for key in self._header(path)}
        )
        if not self.file_by_key:
            raise self._no_weights()

    def shape_of(self, key: str) -> tuple[int, ...] | None:
        entry = self.find(key)
        return None if entry is None else entry.shape

    def prepare(self, keys: Collection[str]) -> None:
        """Do nothing: a tensor's type is its own."""

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self.file_by_key)

    def find(self, key: str) -> TensorEntry | None:
        """Where a tensor lies; None if the folder has no such tensor."""
        return self.entry(key) if key in self.file_by_key else None

    def stored_names(self, key: str) -> tuple[str, ...]:
        return (key,)

    def read(self, key: str, buffer: memoryview, offset: int) -> None:
        read_into(self.entry(key), buffer, offset)

    def description(self, _keys: Collection[str], /, *, held_in: str = "") -> str:  # noqa: ARG002
        return ""

    def entry(self, key: str) -> TensorEntry:
        """Where a tensor lies; raises ModelNotFound if the index names the wrong file."""
        path = self.file_by_key[key]
        entry = self._header(path).get(key)
        if entry is None:
            raise ModelNotFound(
                f"{self._folder / INDEX_NAME} says that {path.name} holds {key}, but it does not.",
                cure="Index and weights are not of the same model: fetch the folder again.",
            )
        return entry

    def _header(self, path: Path) -> dict[str, TensorEntry]:
        if path not in self._headers:
            with _damage_as_not_found():
                self._headers[path] = read_header(path)
        return self._headers[path]

    def _no_weights(self) -> ModelNotFound | UnsupportedModel:
        pickles = sorted(path.name for path in self._folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            return UnsupportedModel(
                f"{self._folder} holds its weights as pickle only ({', '.join(pickles[:3])}), and unpickling runs any "
                "code that the file contains.",
                cure="Take the model's safetensors version, or convert the file if you trust it.",
            )
        return ModelNotFound(
            f"{self._folder} holds no weights.", cure=f"It needs {SINGLE_NAME}, or {INDEX_NAME} and its files."
        )


def read_into(entry: TensorEntry, buffer: memoryview, offset: int) -> None:
    """Fill a buffer with the bytes of a tensor from `offset` on."""
    done = 0
    with entry.file.open("rb", buffering=0) as file:
        while done < len(buffer):
            read = os.preadv(file.fileno(), [buffer[done:]], entry.first_byte + offset + done)
            if read == 0:
                raise ModelNotFound(f"{entry.file} ends inside a tensor.", cure="Fetch it again.")
            done += read


def unsupported_dtype(key: str, entry: TensorEntry) -> UnsupportedModel:
    """The error for a tensor whose dtype no executor computes with."""
    return UnsupportedModel(
        f"tensor {key} of {entry.file} is stored as {entry.dtype}, which noodle does not compute with.",
        cure="Take the model's float32, float16 or bfloat16 version.",
    )


@contextlib.contextmanager
def _damage_as_not_found() -> Iterator[None]:
    """Raise ModelNotFound for a damaged file: UnsupportedModel would make a candidate's quality merely unknown."""
    try:
        yield
    except UnsupportedModel as error:
        raise ModelNotFound(error.message, cure=error.cure) from error
