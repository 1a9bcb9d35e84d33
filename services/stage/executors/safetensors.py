"""A folder of safetensors files whose tensors are read each alone; knows headers and bytes, no model and no torch.

Read, not mapped: mapped pages would count as the process's memory beside the tensors made from them.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from noodle.errors import ModelNotFound, UnsupportedModel

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
MAXIMUM_HEADER_BYTES = 100_000_000  # as the format has it
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


class SafetensorsFile:
    """One file whose header has been read and checked against the file's size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise ModelNotFound(
                f"{path} can not be read: {error.strerror}.", cure="Fetch the missing file of the model."
            ) from error
        self.entries, self._data_start = self._read_header()

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from `offset` of the file's data on."""
        done = 0
        while done < len(buffer):
            read = os.preadv(self._descriptor, [buffer[done:]], self._data_start + offset + done)
            if read == 0:
                raise self._damaged("it ends inside a tensor")
            done += read

    def not_computed_with(self, key: str) -> UnsupportedModel:
        """Of a tensor whose dtype no executor takes."""
        stored = self.entries[key]["dtype"]
        return UnsupportedModel(
            f"tensor {key} of {self.path} is stored as {stored}, which noodle does not compute with.",
            cure="Take the model's float32, float16 or bfloat16 version.",
        )

    def _read_header(self) -> tuple[dict[str, dict[str, Any]], int]:
        file_bytes = os.fstat(self._descriptor).st_size
        header_bytes = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if file_bytes < 8 or header_bytes > min(MAXIMUM_HEADER_BYTES, file_bytes - 8):
            raise self._damaged(f"its {file_bytes} bytes can not hold the header")
        try:
            header = json.loads(os.pread(self._descriptor, header_bytes, 8))
            entries = {str(key): dict(entry) for key, entry in header.items() if key != "__metadata__"}
            for key, entry in entries.items():
                begin, end = entry["data_offsets"]
                if not 0 <= begin <= end or 8 + header_bytes + end > file_bytes:
                    raise self._damaged(f"it has {file_bytes} bytes, and {key} would end at {8 + header_bytes + end}")
                item_bytes = ITEM_BYTES.get(entry["dtype"])
                if item_bytes is not None and math.prod(entry["shape"]) * item_bytes != end - begin:
                    raise self._damaged(f"{key} has {end - begin} bytes for shape {entry['shape']} of {entry['dtype']}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(f"its header can not be read ({error!r})") from error
        return entries, 8 + header_bytes

    def _damaged(self, reason: str) -> ModelNotFound:
        return ModelNotFound(
            f"{self.path} is not a whole safetensors file: {reason}.",
            cure="It is damaged or cut short: fetch it again.",
        )


class SafetensorsFolder:
    """All tensors of a model folder by key; a file is opened when one of its tensors is wanted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open_files: dict[Path, SafetensorsFile] = {}
        if not folder.is_dir():
            raise ModelNotFound(
                f"{folder} is not a folder.", cure="Set NOODLE_MODEL to a model's folder, a hub id or a .gguf file."
            )
        self.file_by_key = self._find()

    def find(self, key: str) -> SafetensorsFile:
        """The file that holds a tensor; raises ModelNotFound where the index names the wrong one."""
        path = self.file_by_key[key]
        file = self._open(path)
        if key not in file.entries:
            raise ModelNotFound(
                f"{self._folder / INDEX_FILE} says that {path.name} holds {key}, but it does not.",
                cure="Index and weights are not of the same model: fetch the folder again.",
            )
        return file

    def _open(self, path: Path) -> SafetensorsFile:
        if path not in self._open_files:
            self._open_files[path] = SafetensorsFile(path)
        return self._open_files[path]

    def _find(self) -> dict[str, Path]:
        index_path, single_path = self._folder / INDEX_FILE, self._folder / SINGLE_FILE
        if index_path.is_file():
            try:
                weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
                return {str(key): self._folder / Path(name).name for key, name in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
                raise ModelNotFound(
                    f"{index_path} is not an index of weights: {error!r}.", cure="Fetch it again."
                ) from error
        if single_path.is_file():
            return dict.fromkeys(self._open(single_path).entries, single_path)
        pickles = sorted(path.name for path in self._folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise UnsupportedModel(
                f"{self._folder} holds its weights as pickle only ({', '.join(pickles[:3])}), and unpickling runs "
                "whatever code is in the file.",
                cure="Take the model's safetensors version, or convert it where you trust the file.",
            )
        raise ModelNotFound(
            f"{self._folder} holds no weights.", cure=f"It needs {SINGLE_FILE}, or {INDEX_FILE} and its files."
        )
