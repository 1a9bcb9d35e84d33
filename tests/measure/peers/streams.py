"""The same requests to noodle and to llama-server, and the rates of their tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tests.measure.performance.engine import prompt_ids
from tests.measure.performance.streams import Side, together

PROMPT_TOKENS = 16
_PREDICTED = re.compile(rb'"tokens_predicted":(\d+)')


def llama_side(port: int) -> Side:
    """Return llama-server's side: it withholds events within a character, and each one counts the tokens so far."""

    def body_of(ids: Sequence[int], new_tokens: int) -> dict[str, Any]:
        greedy = {"temperature": 0, "top_k": 1, "samplers": ["top_k"]}  # its shortest sampling
        return {"prompt": list(ids), "n_predict": new_tokens, "ignore_eos": True, "cache_prompt": False, "stream": True,
                **greedy}  # fmt: skip

    def count_tokens(event: bytes, before: int) -> int:
        found = _PREDICTED.search(event)
        return int(found[1]) if found else before

    return Side(port, "/completion", body_of, count_tokens)


def decode_rate(side: Side, streams: int, new_tokens: int) -> float:
    """Return tokens per second of all streams while all of them decode."""
    prompts = [prompt_ids(PROMPT_TOKENS, 300 + index) for index in range(streams)]
    requests = together(side, prompts, new_tokens)
    begin = max(each.counts[0][0] for each in requests)
    end = min(each.counts[-1][0] for each in requests)
    assert end > begin, "a stream had ended before the last one began: more new tokens are needed"
    return sum(each.count_at(end) - each.count_at(begin) for each in requests) / (end - begin)


def first_token_seconds(side: Side, prompt_tokens: int, number: int) -> float:
    """Return the seconds until the first token after a prompt that no other one begins like."""
    (request,) = together(side, [prompt_ids(prompt_tokens, 1000 + number)], 1)
    return request.counts[0][0] - request.sent
