"""Scores of a text that an imagined cluster answers; the expected perplexities are computed by hand."""

import argparse
import json
import math

import pytest

from noodle.errors import ConfigurationError, GenerationFailed, LinkLost
from services.cli.client.health import Health
from services.cli.client.target import Target
from services.cli.quality import command
from services.cli.quality.command import format_of, read_paragraphs
from services.cli.quality.scores import (
    Piece,
    TextScore,
    keep_score,
    quality_of,
    read_scores,
    reference_of,
    score_path,
)

TARGET = Target("http://127.0.0.1:1", "key", "token", None)


def a_score(name, *logprobs, likeliest=("a", "b"), version="1"):
    pieces = (Piece(("a", "b"), logprobs, likeliest),) if logprobs else ()
    return TextScore("model", "d" * 64, name, version, pieces)


def test_a_format_is_compared_by_perplexity_and_by_the_likeliest_token():
    reference = a_score("stored", -1.0, -2.0)
    found = quality_of(a_score("q8_0", -1.5, -2.1, likeliest=("a", "c")), reference)
    assert found.perplexity == pytest.approx(math.exp(1.8))
    assert found.perplexity_ratio == pytest.approx(math.exp(0.3))
    assert found.ratio_error == pytest.approx(math.exp(0.3) * 0.2 / math.sqrt(2))  # 0.5 and 0.1 lie 0.2 from 0.3
    assert found.greedy_agreement == 0.5
    assert quality_of(reference, reference).perplexity_ratio == 1.0


def test_the_reference_is_exact_where_it_was_scored_else_the_files_own_formats():
    names = ("q8_0", "stored", "exact")
    scores = [a_score(name, -1.0, -1.0) for name in names]
    assert reference_of(scores).format == "exact"
    assert reference_of(scores[:2]).format == "stored"
    assert reference_of(scores[:1]).format == "q8_0"


def test_scores_are_kept_by_model_format_and_version(tmp_path):
    score = a_score("stored + q8_0 sent in float16", -1.0, -2.0)
    keep_score(tmp_path, score)
    keep_score(tmp_path, a_score("stored", -1.0, -2.0, version="2"))
    assert read_scores(tmp_path, "d" * 64, "1") == [score]
    assert read_scores(tmp_path, "e" * 64, "1") == []
    score_path(tmp_path, score).write_text("{")
    assert read_scores(tmp_path, "d" * 64, "1") == []


@pytest.mark.parametrize(
    ("stages", "name"),
    [
        ([("stored", "f16", [])], "stored"),
        ([("f32", "f32", ["float32"]), ("f32", "f32", [])], "exact"),
        ([("f32", "f16", [])], "f32"),
        ([("stored", "f16", ["float16"]), ("q8_0", "f16", [])], "q8_0 + stored sent in float16"),
    ],
)
def test_a_cluster_is_named_by_what_its_stages_compute_in(stages, name):
    fields = ("weights", "kv_dtype", "hop_dtypes")
    assert format_of([{"dtype": "float32", **dict(zip(fields, each, strict=True))} for each in stages]) == name


def test_the_text_has_paragraphs_that_are_scored_by_themselves():
    found = read_paragraphs()
    assert len(found) == 7
    assert all(len(text) > 100 for text in found)


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """A cluster whose answers are set by a test: what it computes in, and after which request it breaks."""
    monkeypatch.setenv("NOODLE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(command, "find_target", lambda *_: TARGET)
    state = argparse.Namespace(weights="stored", asked=[], fails_at=None, loss=1.0)

    def post_json(url, body, _credential):
        if len(state.asked) == state.fails_at:
            raise LinkLost("gone")
        state.asked.append(body["prompt"])
        assert (body["echo"], body["max_tokens"]) == (True, 0)
        assert url == f"{TARGET.url}/v1/completions"
        logprobs = {
            "tokens": ["A", "b"],
            "token_logprobs": [None, -state.loss],
            "top_logprobs": [None, {"b": -state.loss, "c": -0.5}],
        }
        return {"choices": [{"logprobs": logprobs}]}

    def health(_target):
        stage = {"layers": [0, 2], "weights": state.weights, "kv_dtype": "f16", "dtype": "float32"}
        return Health("ready", answer={"model_digest": "d" * 64, "model": "m", "stages": [stage]})

    monkeypatch.setattr(command, "post_json", post_json)
    monkeypatch.setattr(command, "require_ready", health)
    return state


def run(weights=None, *, as_json=True):
    return command.quality(argparse.Namespace(url=None, key=None, weights=weights, json=as_json))


def test_an_interrupted_run_goes_on_where_it_stopped(cluster, capsys):
    cluster.fails_at = 3
    with pytest.raises(LinkLost):
        run()
    cluster.fails_at = None
    assert run() == 0
    assert cluster.asked == read_paragraphs()  # each of them once
    run()
    assert len(cluster.asked) == len(read_paragraphs())
    assert json.loads(capsys.readouterr().out.split("}\n{")[0].removesuffix("}") + "}")["reference"] == "stored"


def test_a_second_run_in_another_format_is_compared_with_the_first(cluster, capsys):
    run()
    capsys.readouterr()
    cluster.weights, cluster.loss = "q8_0", 1.25
    run()
    found = json.loads(capsys.readouterr().out)
    assert found["reference"] == "stored"
    assert [each["format"] for each in found["formats"]] == ["stored", "q8_0"]
    assert found["formats"][1]["perplexity_ratio"] == pytest.approx(math.exp(0.25))
    cluster.weights = "stored"
    run("q8_0", as_json=False)
    assert "q8_0" in capsys.readouterr().out


def test_a_format_that_was_never_scored_is_refused_with_the_setting_that_scores_it(cluster):
    with pytest.raises(ConfigurationError, match="computes in stored") as caught:
        run("q4_K")
    assert "NOODLE_WEIGHTS=q4_K" in caught.value.cure
    assert cluster.asked == []


def test_without_a_reference_the_perplexity_is_printed_with_what_to_do(cluster, capsys):
    cluster.weights = "q8_0"
    assert run(as_json=False) == 0
    assert "without NOODLE_WEIGHTS=q8_0" in capsys.readouterr().out


def test_an_answer_without_scores_is_an_error_that_names_the_route(cluster, monkeypatch):
    monkeypatch.setattr(command, "post_json", lambda *_: {"choices": [{"text": "x"}]})
    with pytest.raises(GenerationFailed, match="/v1/completions"):
        run()
