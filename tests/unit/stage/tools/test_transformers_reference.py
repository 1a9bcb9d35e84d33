from pathlib import Path

import msgspec
import pytest

from noodle.cluster.measuring import GreedyAnswer, ReferenceQuestion
from noodle.errors import GenerationFailed, ModelNotFound, UnsupportedModel
from services.stage.tools import transformers_reference
from services.stage.tools.transformers_reference import compare_with_transformers
from tests.support.models.quantized_model import quantize_model

NEW_TOKENS = 12


def compared(folder, answer, report=lambda _done: None):
    return compare_with_transformers(ReferenceQuestion(str(folder), 256, (answer,)), report)[0]


def test_the_models_own_tokens_are_equal(folder: Path, answered: GreedyAnswer) -> None:
    result = compared(folder, answered)
    assert result.tokens == NEW_TOKENS
    assert result.differences == ()
    assert result.largest_logprob_error < 1e-4


def test_another_token_is_found_with_its_gap(folder: Path, answered: GreedyAnswer) -> None:
    token_ids = list(answered.token_ids)
    token_ids[5] = (token_ids[5] + 1) % 300
    result = compared(folder, msgspec.structs.replace(answered, token_ids=tuple(token_ids)))
    first = result.differences[0]
    assert (first.index, first.token_id, first.best_token_id) == (5, token_ids[5], answered.token_ids[5])
    assert first.logit_gap >= first.two_best_gap > 0
    assert result.largest_logprob_error > 0.01


def test_a_wrong_logprob_is_found(folder: Path, answered: GreedyAnswer) -> None:
    logprobs = (answered.logprobs[0] + 0.5, *answered.logprobs[1:])
    told: list[int] = []
    result = compared(folder, msgspec.structs.replace(answered, logprobs=logprobs), told.append)
    assert result.largest_logprob_error == pytest.approx(0.5, abs=1e-3)
    assert told == [0, 1]


def test_other_tokens_of_the_prompt_are_refused(folder: Path, answered: GreedyAnswer) -> None:
    with pytest.raises(GenerationFailed, match="other tokens of 'the cat sat on'"):
        compared(folder, msgspec.structs.replace(answered, prompt_ids=(1, *answered.prompt_ids)))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound):
        compare_with_transformers(ReferenceQuestion(str(tmp_path), 256, ()), lambda _done: None)


def test_a_model_that_is_larger_than_the_memory_is_not_loaded(
    folder: Path, answered: GreedyAnswer, monkeypatch
) -> None:
    monkeypatch.setitem(transformers_reference.ITEM_BYTES, "float32", 1 << 40)
    with pytest.raises(UnsupportedModel, match="GB are free"):
        compared(folder, answered)


def test_a_quantized_folder_whose_package_is_missing_here_is_unsupported_by_name(folder: Path, tmp_path: Path) -> None:
    quantized, _ = quantize_model(folder, tmp_path, "gptq")
    with pytest.raises(UnsupportedModel, match=r"transformers cannot read .* here"):
        transformers_reference.load_whole_model(quantized, "float32", 64)
