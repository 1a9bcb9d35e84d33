"""Parameters of which an ordinary run takes a sample; `make test-all` (pytest's `--all`) takes all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def sampled(names: str | tuple[str, ...], values: Iterable[Any], sample: Collection[Any]) -> pytest.MarkDecorator:
    """Return `pytest.mark.parametrize` of all values, with those outside of the sample marked `full`."""

    def parameters(value: Any) -> Any:
        marks = () if value in sample else (pytest.mark.full,)
        return pytest.param(*(value if isinstance(names, tuple) else (value,)), marks=marks)

    return pytest.mark.parametrize(names, [parameters(value) for value in values])
