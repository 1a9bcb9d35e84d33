"""The length of an answer that fits into the context."""

from __future__ import annotations

import pytest

from noodle.errors import ContextTooLong, InvalidRequest
from services.coordinator.engine.request import Request, fit_into_context, refuse_what_cannot_fit


def asking(max_tokens: int | None = None, prompt_tokens: int = 0) -> Request:
    length_name = None if max_tokens is None else "max_tokens"
    return Request(max_new_tokens=max_tokens or 16, length_name=length_name, prompt_token_ids=[1] * prompt_tokens)


def fitted(prompt_tokens: int, context_length: int, max_tokens: int | None = None) -> Request:
    request = asking(max_tokens, prompt_tokens)
    return fit_into_context(request, context_length=context_length, prompt_name="prompt")


def test_a_length_that_fits_stays_and_a_default_is_cut_to_what_is_left() -> None:
    assert fitted(90, 100, max_tokens=10).max_new_tokens == 10
    assert fitted(50, 100).max_new_tokens == 16
    assert fitted(90, 100).max_new_tokens == 10
    assert fitted(99, 100).max_new_tokens == 1


def test_a_length_that_does_not_fit_is_refused_with_the_three_numbers() -> None:
    with pytest.raises(ContextTooLong) as caught:
        fitted(90, 100, max_tokens=11)
    assert "context is 100 tokens" in caught.value.message
    assert "prompt has 90" in caught.value.message
    assert "11 more are asked for" in caught.value.message
    assert "at most 10" in caught.value.cure
    assert caught.value.param == "max_tokens"
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("max_tokens", [None, 3])
def test_a_prompt_that_fills_the_context_is_refused(max_tokens: int | None) -> None:
    with pytest.raises(ContextTooLong, match="prompt has 100") as caught:
        fitted(100, 100, max_tokens)
    assert caught.value.param == "prompt"


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="'prompt' is empty"):
        fitted(0, 100)


def test_a_prompt_that_fills_the_context_at_its_shortest_is_refused_with_the_three_numbers() -> None:
    request = asking(max_tokens=3)
    refuse_what_cannot_fit(request, least_tokens=99, context_length=100, prompt_name="messages")
    with pytest.raises(ContextTooLong, match=r"context is 100 tokens.*at least 100 and 3 more are") as caught:
        refuse_what_cannot_fit(request, least_tokens=100, context_length=100, prompt_name="messages")
    assert caught.value.param == "messages"
