"""Quantized matrices that other libraries wrote have the values that these read back; see make_golden.py."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.torch import save_file

from noodle.model.quantization import read_quantization
from services.stage.executors.checkpoints.folder import QuantizedFolder

GOLDEN = Path(__file__).with_name("golden.safetensors")
# the type in which each case is held
TYPES = {
    "awq": "Q5_0",
    "gptq": "Q4_0",
    "gptq_asymmetric": "F16",  # groups of 16
    "gptq_act_order": "F16",
    "gptq_v2": "Q5_0",
    "gptq_whole_rows": "Q4_0",
    "gptq_8_bit": "Q8_0",
    "gptq_2_bit": "Q4_0",
    "int4_group": "Q4_0",
    "int4_asymmetric": "Q5_0",
    "int4_channel": "Q4_0",
    "int4_channel_asymmetric": "Q5_0",
    "int8_packed": "Q8_0",
    "int8": "Q8_0",
    "float8": "F16",
    "float8_tensor": "F16",
    "mxfp4_packed": "MXFP4",
    "nf4": "F16",
    "nf4_nested": "F16",
    "fp4": "F16",
    "bitsandbytes_int8": "F16",
}
BLOCKS = ("Q4_0", "Q5_0", "Q8_0", "MXFP4")


def configs() -> dict[str, Any]:
    with safe_open(GOLDEN, "pt") as golden:
        return {name: json.loads(text) for name, text in golden.metadata().items()}


def opened(name: str, folder: Path, *, is_exact: bool = False, rename: str = "m") -> QuantizedFolder:
    """A folder with one case's tensors."""
    with safe_open(GOLDEN, "pt") as golden:
        keys = [key for key in golden.keys() if key.startswith(f"{name}/{rename}.")]  # noqa: SIM118
        save_file({key.partition("/")[2]: golden.get_tensor(key) for key in keys}, folder / "model.safetensors")
    quantization = read_quantization({"model_type": "llama", "quantization_config": configs()[name]})
    assert quantization is not None
    return QuantizedFolder(folder, quantization, is_exact=is_exact)


def expected_of(name: str) -> npt.NDArray[np.float32]:
    with safe_open(GOLDEN, "pt") as golden:
        return golden.get_tensor(f"{name}/expected").numpy()


def values_of(files: QuantizedFolder, first: int, count: int) -> tuple[str, npt.NDArray[np.float32]]:
    entry = files.find("m.weight")
    assert entry is not None
    row_bytes = entry.byte_count // entry.shape[0]
    data = np.empty(count * row_bytes, np.uint8)
    files.read("m.weight", data.data, first * row_bytes)
    if entry.dtype in BLOCKS:
        values = dequantize(data.reshape(count, row_bytes), GGMLQuantizationType[entry.dtype])
    else:
        values = data.view("<f2" if entry.dtype == "F16" else "<f4").astype(np.float32).reshape(count, -1)
    return entry.dtype, np.asarray(values, np.float32)


def test_every_golden_matrix_is_tested() -> None:
    assert configs().keys() == TYPES.keys()


@pytest.mark.parametrize("name", TYPES)
def test_a_matrix_is_held_in_the_smallest_exact_type_or_rounded_to_float16(name: str, tmp_path: Path) -> None:
    files, expected = opened(name, tmp_path), expected_of(name)
    dtype, values = values_of(files, 0, len(expected))
    assert (dtype, values.shape) == (TYPES[name], expected.shape)
    if dtype == "F16":
        np.testing.assert_allclose(values, expected, rtol=2**-11, atol=2**-25)
        assert "as f16 (rounded)" in files.description(["m.weight"])
    else:
        np.testing.assert_array_equal(values, expected)
        assert "rounded" not in files.description(["m.weight"])


@pytest.mark.parametrize("name", TYPES)
def test_an_exact_folder_has_the_values_that_the_other_library_reads(name: str, tmp_path: Path) -> None:
    files, expected = opened(name, tmp_path, is_exact=True), expected_of(name)
    _, values = values_of(files, 0, len(expected))
    # bitsandbytes' int8 multiplies by 1/127 in float32 in another order, one unit in the last place apart
    np.testing.assert_allclose(values, expected, rtol=2e-7 if name == "bitsandbytes_int8" else 0)


@pytest.mark.parametrize("name", TYPES)
def test_rows_read_in_pieces_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    files, rows = opened(name, tmp_path), len(expected_of(name))
    _, whole = values_of(files, 0, rows)
    pieces = [values_of(files, first, min(7, rows - first))[1] for first in range(0, rows, 7)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("name", TYPES)
def test_all_tensors_of_a_matrix_are_named(name: str, tmp_path: Path) -> None:
    files = opened(name, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as stored:
        unused = set(stored.keys()) - set(files.stored_names("m.weight"))
    assert unused <= {"m.weight_format"}  # a label
