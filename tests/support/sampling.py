"""Parameters of which an ordinary run takes a sample; `make test-all` (pytest's `--all`) takes all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def sampled(values: Iterable[Any], is_in_sample: Callable[[Any], bool]) -> list[Any]:
    """The values for `pytest.mark.parametrize`; those outside of the sample are marked `full`."""
    return [value if is_in_sample(value) else pytest.param(value, marks=pytest.mark.full) for value in values]
