"""Greedy tokens of 20 prompts against the unsplit model, and drawn texts, for several numbers of stages."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.measure.report import TRANSFORMERS, Section, named, title_of
from tests.support.models.equality import assert_equal_or_tied
from tests.support.models.prompts import PROMPTS
from tests.support.models.real_model import real_model_folder
from tests.support.models.whole_model import WholeModel
from tests.support.processes.cluster import running_cluster

NEW_TOKENS = 64
STAGES = (1, 2, 3, 5)
AT_ONCE = 4  # so that steps hold tokens of several sessions, as in production
GREEDY: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "details": True}
DRAWN: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "temperature": 0.8, "top_p": 0.95, "seed": 1234}


def at_once(ask: Callable[[str], Any]) -> list[Any]:
    """Return the answers for all prompts in order, asking for a few at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, PROMPTS))


def measure(executor: str = TRANSFORMERS) -> Section:
    """Measure; fail if a token differs where the two best logits are not tied."""
    section = Section(named("equality", executor), title_of("Does the split change anything?", executor))
    folder = real_model_folder()
    whole = WholeModel(folder)
    section.say(
        f"SmolLM2-135M-Instruct, {executor}, float32, {len(PROMPTS)} prompts, {NEW_TOKENS} new tokens, greedy, against "
        f"transformers' `generate()`, {AT_ONCE} requests at once; drawn: temperature 0.8, top_p 0.95, seed 1234, "
        "against one stage."
    )
    rows: list[list[object]] = []
    drawn: dict[int, list[str]] = {}
    for stages in STAGES:
        tied = tokens = 0
        lengths = []
        with (
            tempfile.TemporaryDirectory() as scratch,
            running_cluster(Path(scratch) / "s", folder, stages, NOODLE_EXECUTOR=executor) as cluster,
        ):
            for details in at_once(lambda prompt: cluster.generate(prompt, **GREEDY)["details"]):
                got = [token["id"] for token in details["tokens"]]
                tied += assert_equal_or_tied(whole, details["prompt_token_ids"], got, NEW_TOKENS)
                tokens += len(got)
                lengths.append(details["prompt_tokens"])
            drawn[stages] = at_once(lambda prompt: cluster.generate(prompt, **DRAWN)["generated_text"])
        same = sum(left == right for left, right in zip(drawn[STAGES[0]], drawn[stages], strict=True))
        rows.append([stages, f"{len(PROMPTS) - tied} of {len(PROMPTS)}", tied, tokens, f"{same} of {len(PROMPTS)}"])
    section.say(f"The prompts have {min(lengths)} to {max(lengths)} tokens.")
    section.table(["stages", "prompts equal", "parted at a tie (< 1e-3)", "tokens", "drawn texts equal"], rows)
    return section
