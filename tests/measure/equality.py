"""Greedy tokens of 20 prompts against the unsplit model, and drawn texts, for several numbers of stages."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.measure.report import Section
from tests.support.cluster import running_cluster
from tests.support.equality import assert_equal_or_tied
from tests.support.prompts import PROMPTS
from tests.support.real_model import real_model_folder
from tests.support.whole_model import WholeModel

NEW_TOKENS = 64
STAGES = (1, 2, 3, 5)


def measure() -> Section:
    """Fails when a token differs where the two best logits are not tied."""
    section = Section("equality", "Does the split change anything?")
    folder = real_model_folder()
    whole = WholeModel(folder)
    section.say(
        f"SmolLM2-135M-Instruct, float32, {len(PROMPTS)} prompts, {NEW_TOKENS} new tokens, greedy, against "
        "transformers' `generate()`; drawn: temperature 0.8, top_p 0.95, seed 1234, against one stage."
    )
    rows: list[list[object]] = []
    drawn: dict[int, list[str]] = {}
    for stages in STAGES:
        tied = tokens = 0
        lengths = []
        with tempfile.TemporaryDirectory() as scratch, running_cluster(Path(scratch) / "s", folder, stages) as cluster:
            for prompt in PROMPTS:
                answer = cluster.generate(prompt, max_new_tokens=NEW_TOKENS, details=True)
                details = answer["details"]
                got = [token["id"] for token in details["tokens"]]
                tied += assert_equal_or_tied(whole, details["prompt_token_ids"], got, NEW_TOKENS)
                tokens += len(got)
                lengths.append(details["prompt_tokens"])
            drawn[stages] = [
                cluster.generate(prompt, max_new_tokens=NEW_TOKENS, temperature=0.8, top_p=0.95, seed=1234)[
                    "generated_text"
                ]
                for prompt in PROMPTS
            ]
        same = sum(left == right for left, right in zip(drawn[STAGES[0]], drawn[stages], strict=True))
        rows.append([stages, f"{len(PROMPTS) - tied} of {len(PROMPTS)}", tied, tokens, f"{same} of {len(PROMPTS)}"])
    section.say(f"The prompts have {min(lengths)} to {max(lengths)} tokens.")
    section.table(["stages", "prompts equal", "parted at a tie (< 1e-3)", "tokens", "drawn texts equal"], rows)
    return section
