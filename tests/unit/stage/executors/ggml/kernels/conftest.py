"""noodle's kernels with each kind of instructions that this processor has."""

import pytest

from services.stage.executors.ggml.kernels.products import packed_weights
from tests.support.stages.ggml_operation import NEEDED, ggml_calls, needed


@pytest.fixture(scope="module")
def ggml():
    return ggml_calls()


@pytest.fixture(scope="module", params=NEEDED)
def kernels(request, ggml):
    return needed(lambda: packed_weights(ggml, only=request.param), NEEDED[request.param])
