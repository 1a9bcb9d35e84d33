"""The command line of the measurements, and the loops that products are compared with."""

import numpy as np
import pytest

from noodle.errors import GgmlUnavailable
from services.stage.executors.ggml.kernels.library import own_library
from tests.measure.__main__ import parse
from tests.measure.kernels.limits import READ_BYTES, Limits
from tests.measure.report import processor_flags


def test_an_option_belongs_to_the_measurement_before_it():
    asked = parse(["speed", "kernels", "--instructions", "avx2", "--rows", "1,64", "costs=FILE"])
    assert [(each.name, each.value, each.options) for each in asked] == [
        ("speed", "", {}),
        ("kernels", "", {"instructions": "avx2", "rows": "1,64"}),
        ("costs", "FILE", {}),
    ]


@pytest.mark.parametrize("words", [["kernel"], ["speed", "--rows", "1"], ["kernels", "--rows"], ["--rows", "1"]])
def test_what_no_measurement_takes_is_refused(words):
    with pytest.raises(ValueError, match=r"measurement|takes no"):
        parse(words)


@pytest.mark.parametrize("instructions", ["avx2", "avx512"])
def test_the_reading_loop_reads_every_byte(instructions):
    try:
        library = own_library()
    except GgmlUnavailable:
        library = None
    if library is None or not hasattr(library, f"noodle_limit_read_{instructions}"):
        pytest.skip("noodle's kernels were not built with these instructions")
    if {"avx2": "avx2", "avx512": "avx512f"}[instructions] not in processor_flags():
        pytest.skip(f"this processor has no {instructions}")
    numbers = np.random.default_rng(1).integers(0, 1 << 63, 16 * READ_BYTES // 8, dtype=np.uint64)
    read = Limits(library, instructions).function("read")
    assert read(numbers.ctypes.data, numbers.nbytes) == int(numbers.sum())
