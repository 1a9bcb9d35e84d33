"""Files of a safetensors folder that are not what their names say: refused by name, whatever a JSON reader raises."""

import json
import struct

import pytest

from noodle.errors import UnsupportedModel
from noodle.model.files import read_config, read_header, read_tensor_entries

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def write_safetensors(path, *entries):
    """Tensors of four float32 items at the given offsets, and 64 bytes of data."""
    header = {
        f"tensor{number}": {"dtype": "F32", "shape": [4], "data_offsets": [first, first + 16]}
        for number, first in enumerate(entries)
    }
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + bytes(64))
    return path


@pytest.mark.parametrize(("name", "read"), [
    ("config.json", read_config),
    ("model.safetensors.index.json", read_tensor_entries),
    ("model.safetensors", read_tensor_entries),
])  # fmt: skip
def test_a_git_lfs_pointer_in_place_of_a_file_is_said_with_its_cure(tmp_path, name, read):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UnsupportedModel, match=rf"{name} is a Git LFS pointer") as caught:
        read(tmp_path)
    assert "git lfs pull" in caught.value.cure


@pytest.mark.parametrize(("name", "content", "read"), [
    ("config.json", DEEP, read_config),
    ("model.safetensors.index.json", DEEP, read_tensor_entries),
    ("model.safetensors", struct.pack("<Q", len(DEEP)) + DEEP, read_tensor_entries),
])  # fmt: skip
def test_json_that_nests_deeper_than_a_reader_goes_is_refused_by_name(tmp_path, name, content, read):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsupportedModel, match=name):
        read(tmp_path)


def test_tensors_that_share_bytes_are_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedModel, match="tensors tensor0 and tensor1 overlap"):
        read_header(write_safetensors(tmp_path / "model.safetensors", 0, 12, 32))
    assert len(read_header(write_safetensors(tmp_path / "model.safetensors", 32, 0, 16))) == 3
