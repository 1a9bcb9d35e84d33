"""The header reader is compared with files that the gguf package writes, and given damaged ones."""

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from noodle.errors import ModelNotFound, NoodleError, UnsupportedModel
from noodle.model.ggml_types import GGML_TYPES
from noodle.model.gguf import GgufArray, read_gguf

U32, U64, STRING, ARRAY, FLOAT = 4, 10, 8, 9, 6


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: str, sizes: tuple[int, ...], number: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, offset)


def write(path: Path, *, keys: list[bytes] | None = None, tensors: list[bytes] | None = None, data: int = 0) -> Path:
    """A file by hand, for what no writer writes; `data` bytes follow the header."""
    keys = [key("general.architecture", STRING, text("llama"))] if keys is None else keys
    tensors = [tensor("token_embd.weight", (8, 2))] if tensors is None else tensors
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys + tensors)
    path.write_bytes(header.ljust(-(-len(header) // 32) * 32, b"\0") + bytes(data))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a model with ü.gguf"


def refused(path: Path, kind: type[NoodleError] = UnsupportedModel) -> NoodleError:
    began = time.monotonic()
    with pytest.raises(kind) as caught:
        read_gguf(path)
    assert time.monotonic() - began < 3
    assert str(path.parent) in caught.value.message, "an error names the file"
    assert caught.value.cure
    return caught.value


def refusal(path: Path, kind: type[NoodleError] = UnsupportedModel) -> str:
    return refused(path, kind).message


def test_types_are_those_of_the_gguf_package() -> None:
    for kind, (items, byte_count) in gguf.GGML_QUANT_SIZES.items():
        assert GGML_TYPES[kind.name].number == int(kind)
        assert (GGML_TYPES[kind.name].block_items, GGML_TYPES[kind.name].block_bytes) == (items, byte_count)


def test_a_header_reads_as_the_gguf_package_wrote_it(path: Path) -> None:
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(3)
    writer.add_bool("some.flag", True)
    writer.add_float32("some.number", 0.5)
    writer.add_array("tokenizer.ggml.tokens", [f"token {number}" for number in range(3000)])
    writer.add_array("some.short", [1, 2, 3])
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("first", values)
    writer.add_tensor(
        "second", gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = read_gguf(path)

    assert file.architecture == "qwen2"
    assert (file.metadata["qwen2.block_count"], file.metadata["some.flag"]) == (3, True)
    assert (file.metadata["some.number"], file.array("some.short")) == (0.5, [1, 2, 3])
    assert isinstance(file.metadata["tokenizer.ggml.tokens"], GgufArray)
    assert file.count_of("tokenizer.ggml.tokens") == 3000
    assert (file.array("tokenizer.ggml.tokens") or [])[2999] == "token 2999"
    first, second = file.entries["first"], file.entries["second"]
    assert (first.dtype, first.shape, second.dtype, second.shape) == ("F32", (2, 32), "Q8_0", (2, 32))
    assert second.byte_count == 68
    stored = path.read_bytes()[first.first_byte : first.first_byte + first.byte_count]
    assert np.array_equal(np.frombuffer(stored, np.float32).reshape(2, 32), values)
    assert file.header_bytes == (first.first_byte,)


def test_a_file_is_known_by_its_content_whatever_its_name(tmp_path: Path) -> None:
    blob = write(tmp_path / "sha256-0a1b2c", data=64)
    assert read_gguf(blob).architecture == "llama"


def test_a_split_model_is_all_its_parts_also_where_the_first_holds_no_tensors(tmp_path: Path) -> None:
    architecture = key("general.architecture", STRING, text("llama"))

    def part(number: int, tensors: list[bytes], data: int) -> Path:
        counts = [key("split.no", U32, struct.pack("<I", number)), key("split.count", U32, struct.pack("<I", 3))]
        name = tmp_path / f"model-{number + 1:05}-of-00003.gguf"
        return write(name, keys=[*([architecture] if number == 0 else []), *counts], tensors=tensors, data=data)

    first = part(0, [], 0)
    part(1, [tensor("a", (8,)), tensor("b", (8,), offset=32)], 64)
    part(2, [tensor("c", (8,))], 32)

    file = read_gguf(first)

    assert {name: entry.file.name[6:11] for name, entry in file.entries.items()} == {
        "a": "00002",
        "b": "00002",
        "c": "00003",
    }
    assert len(file.parts) == 3
    assert "00001-of-00003" in refused(file.parts[1]).cure

    file.parts[2].write_bytes(file.parts[2].read_bytes()[:-1])
    assert "00003-of-00003" in refusal(first)
    assert "ends 1 bytes after the file's end" in refusal(first)
    file.parts[2].rename(tmp_path / "elsewhere")
    assert "part 3 of 3" in refusal(first, ModelNotFound)
    part(1, [], 0)
    file.parts[1].rename(file.parts[2])
    part(1, [], 0).write_bytes(file.parts[2].read_bytes())
    assert "its name says 3" in refusal(first)


def test_a_missing_file_is_named(path: Path) -> None:
    assert "cannot be read" in refusal(path, ModelNotFound)


def test_a_big_endian_file_and_other_versions_are_refused_by_name(path: Path) -> None:
    whole = write(path, data=64).read_bytes()
    for version, words in ((3 << 24, "big-endian"), (1, "version 1"), (4, "version 4")):
        path.write_bytes(whole[:4] + struct.pack("<I", version) + whole[8:])
        assert words in refusal(path)


def test_a_pointer_of_git_lfs_is_named_with_its_cure(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    error = refused(path)
    assert "Git LFS pointer" in error.message
    assert "git lfs pull" in error.cure


def test_a_file_that_is_cut_anywhere_is_refused(path: Path) -> None:
    whole = write(path, data=64).read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refusal(path)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"tensors": [tensor("t", (8, 1 << 41))]}, "the sizes"),
        ({"tensors": [tensor("t", (8, 0))]}, "the sizes"),
        ({"tensors": [tensor("t", (8, 8, 8, 8, 8))]}, "5 dimensions"),
        ({"tensors": [tensor("t", (8,), number=99)]}, "type number 99"),
        ({"tensors": [tensor("t", (8,), number=4)]}, "type number 4"),
        ({"tensors": [tensor("t", (48,), number=8)]}, "not whole blocks of 32"),
        ({"tensors": [tensor("t", (8,), offset=8)]}, "not a multiple of 32"),
        ({"tensors": [tensor("t", (8,)), tensor("t", (8,), offset=32)]}, "twice"),
        ({"tensors": [tensor("t", (16,)), tensor("u", (8,), offset=32)]}, "overlap"),
        ({"tensors": [tensor("t", (8,), offset=96)]}, "after the file's end"),
        ({"tensors": []}, "no tensors"),
        ({"keys": []}, "names no architecture"),
        ({"keys": [key("k", 77, b"")]}, "unknown type 77"),
        ({"keys": [key("k", U32, bytes(4))] * 2}, "twice"),
        ({"keys": [key("general.alignment", U32, struct.pack("<I", 0))]}, "alignment"),
        ({"keys": [key("general.alignment", U32, struct.pack("<I", 24))]}, "alignment"),
        ({"keys": [key("general.alignment", STRING, text("32"))]}, "alignment"),
        ({"keys": [key("k", STRING, struct.pack("<Q", 1 << 40))]}, "a string of"),
        ({"keys": [key("k", ARRAY, struct.pack("<IQ", STRING, 1 << 40))]}, "announces"),
        ({"keys": [key("k", ARRAY, struct.pack("<IQ", FLOAT, 1 << 62))]}, "announces"),
        ({"keys": [key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * 5000)]}, "array of arrays"),
    ],
)
def test_a_damaged_header_is_refused_and_nothing_is_allocated_for_it(path: Path, broken: dict, words: str) -> None:
    write(path, data=64, **broken)
    assert words in refusal(path)


def test_counts_that_no_file_has_are_refused(path: Path) -> None:
    for counts in ((1 << 63, 1), (1, 1 << 63)):
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + bytes(100))
        assert "announces" in refusal(path)


def test_a_file_that_changed_is_read_again(path: Path) -> None:
    write(path, data=64)
    assert "token_embd.weight" in read_gguf(path).entries
    write(path, tensors=[tensor("other", (8,))], data=128)
    assert list(read_gguf(path).entries) == ["other"]
