"""Which executor and formats a stage takes, and what it says when it refuses."""

import pytest

from noodle.errors import ConfigurationError, TransformersUnavailable
from services.stage.executors.candidate import Candidate
from services.stage.executors.load import check_kv_format
from services.stage.selection import select
from services.stage.selection.select import ExecutorOptions, candidate_of, choose_executor

NO_GGML = "ggml is not installed here. Build it."


@pytest.fixture(autouse=True)
def transformers(monkeypatch):
    """Set whether transformers is installed; it is by default."""

    def is_installed(answer):
        monkeypatch.setattr(select, "has_transformers", lambda: answer)

    is_installed(True)
    return is_installed


def test_ggml_computes_the_files_own_weights_without_being_asked():
    assert choose_executor(ExecutorOptions(), "")[0] == "ggml"
    assert candidate_of("ggml", ExecutorOptions(), "float32") == Candidate("ggml", "stored", "f16", "float32")


def test_the_reason_is_a_file_or_device_that_ggml_alone_computes_and_configured_only_where_it_is():
    assert choose_executor(ExecutorOptions(), "", only_ggml="m.gguf is a GGUF file") == (
        "ggml",
        "m.gguf is a GGUF file",
    )
    assert choose_executor(ExecutorOptions(executor="ggml"), "", only_ggml="m") == ("ggml", "configured")


def test_exact_holds_weights_and_rows_in_float32():
    exact = ExecutorOptions(quality="exact")
    assert candidate_of("ggml", exact, "float32") == Candidate("ggml", "f32", "f32", "float32")
    assert candidate_of("transformers", exact, "float16") == Candidate("transformers", "f32", "f32", "float32")


@pytest.mark.parametrize("weights", ["stored", "q8_0", "f16", "f32"])
def test_a_named_format_is_used_and_rows_stay_in_16_bits(weights):
    options = ExecutorOptions(weights=weights)
    assert choose_executor(options, "")[0] == "ggml"
    assert candidate_of("ggml", options, "float32") == Candidate("ggml", weights, "f16", "float32")


@pytest.mark.parametrize("kv_format", ["f16", "q8_0", "f32"])
def test_a_named_format_of_kv_rows_is_used_and_is_for_ggml_alone(kv_format):
    options = ExecutorOptions(kv_format=kv_format)
    assert choose_executor(options, "") == ("ggml", "configured")
    assert candidate_of("ggml", options, "float32") == Candidate("ggml", "stored", kv_format, "float32")
    with pytest.raises(ConfigurationError, match=f"NOODLE_KV={kv_format}, but ggml"):
        choose_executor(options, NO_GGML)


@pytest.mark.parametrize(
    ("sizes", "wrong"),
    [
        ({"hidden_size": 320}, 80),
        ({"hidden_size": 256}, 0),
        ({"hidden_size": 320, "head_dim": 64}, 0),
        ({"hidden_size": 256, "head_dim": 48}, 48),
    ],
)
def test_rows_in_blocks_are_refused_at_the_start_for_heads_that_are_no_whole_blocks(sizes, wrong):
    config = {"model_type": "llama", "num_attention_heads": 4, **sizes}
    check_kv_format(config, Candidate("ggml", "stored", "f16", "float32"))
    candidate = Candidate("ggml", "stored", "q8_0", "float32")
    if not wrong:
        check_kv_format(config, candidate)
        return
    with pytest.raises(ConfigurationError, match=f"NOODLE_KV is q8_0.* multiple of 32, and this model's is {wrong}"):
        check_kv_format(config, candidate)


def test_transformers_computes_what_ggml_cannot_and_the_reason_is_said():
    executor, why = choose_executor(ExecutorOptions(), NO_GGML)
    assert executor == "transformers"
    assert NO_GGML in why
    assert candidate_of("transformers", ExecutorOptions(), "float16").weights == "f16"


def test_where_neither_computes_the_command_that_installs_it_is_named(transformers):
    transformers(False)
    with pytest.raises(TransformersUnavailable, match="not installed here") as caught:
        choose_executor(ExecutorOptions(), NO_GGML)
    assert "make transformers" in caught.value.cure


@pytest.mark.parametrize("options", [ExecutorOptions(executor="transformers"), ExecutorOptions(dtype="bfloat16")])
def test_a_choice_of_transformers_or_its_dtype_takes_it_and_is_refused_where_it_is_not_installed(options, transformers):
    assert choose_executor(options, "")[0] == "transformers"
    transformers(False)
    with pytest.raises(TransformersUnavailable, match="transformers is not installed") as caught:
        choose_executor(options, "")
    assert "make transformers" in caught.value.cure


@pytest.mark.parametrize("options", [ExecutorOptions(executor="ggml"), ExecutorOptions(weights="q8_0")])
def test_what_was_asked_for_and_cannot_be_had_is_named_with_the_cure(options):
    with pytest.raises(ConfigurationError, match="not installed here"):
        choose_executor(options, NO_GGML)


def test_a_named_format_of_transformers_is_its_dtype():
    options = ExecutorOptions(executor="transformers", weights="bf16")
    assert candidate_of("transformers", options, "float32") == Candidate("transformers", "bf16", "bf16", "bfloat16")


def test_a_gguf_file_that_ggml_cannot_compute_is_not_answered_with_a_command_that_would_not_help(transformers):
    transformers(False)
    only = "model.gguf is a GGUF file"
    assert choose_executor(ExecutorOptions(), "", only_ggml=only)[0] == "ggml"
    with pytest.raises(ConfigurationError, match=f"{only}, but models of type mamba") as caught:
        choose_executor(ExecutorOptions(), "models of type mamba are unknown to it.", only_ggml=only)
    assert "make transformers" not in str(caught.value)
    with pytest.raises(ConfigurationError, match=f"{only}, where ggml alone computes"):
        choose_executor(ExecutorOptions(executor="transformers"), "", only_ggml=only)
