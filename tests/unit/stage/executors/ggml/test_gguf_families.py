"""GGUF files that llama.cpp's converter writes of every family, against transformers."""

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from tests.support.converter.converter import convert
from tests.support.converter.gguf_models import make_gguf_model
from tests.support.converter.quantized import quantized_gguf, rounded_folder
from tests.support.stages.executors import need_ggml


@pytest.fixture(autouse=True)
def ggml_is_here():
    need_ggml()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K"])
def test_a_rounded_folder_holds_the_values_of_the_quantised_file(kind, tmp_path):
    folder = make_gguf_model(tmp_path / "model", "mixtral")
    quantised = quantized_gguf(convert(folder, tmp_path / "f32.gguf"), tmp_path / "quantised.gguf", kind)
    rounded = convert(rounded_folder(folder, tmp_path / "rounded", kind), tmp_path / "rounded.gguf")
    expected = {tensor.name: tensor.data for tensor in GGUFReader(rounded).tensors}
    tensors = GGUFReader(quantised).tensors
    assert len(tensors) == len(expected)
    assert kind in {tensor.tensor_type.name for tensor in tensors}
    for tensor in tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values.reshape(-1), expected[tensor.name].reshape(-1)), tensor.name
