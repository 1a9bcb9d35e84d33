"""One stage, one layer a stage, and a given split give the same text; impossible splits are refused at the start."""

import json
import shutil
import subprocess
import sys

import pytest

from tests.support.models.tiny_model import make_tiny_model
from tests.support.processes.cluster import Cluster, running_cluster

pytestmark = pytest.mark.timeout(300)
LAYERS = 6
START_SECONDS = 90


def text_of(cluster):
    drawn = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 0.9, "top_p": 0.9, "seed": 3}
    body = {"inputs": "a fixed prompt", "parameters": drawn}
    status, answer = cluster.post("/generate", body, Authorization=f"Bearer {cluster.token}")
    assert status == 200, answer
    return answer["generated_text"]


def layers_of(cluster):
    stages = cluster.get("/health", cluster.token)[1]["stages"]
    return [stage["layers"][1] - stage["layers"][0] for stage in stages]


def test_as_many_stages_as_layers_say_what_one_stage_says(tiny_folder, tmp_path, keyed):
    with running_cluster(tmp_path / "one", tiny_folder, 1) as cluster:
        expected = text_of(cluster)
    with running_cluster(tmp_path / "all", tiny_folder, LAYERS) as cluster:
        assert layers_of(cluster) == [1] * LAYERS
        assert text_of(cluster) == expected
    assert layers_of(keyed) == [5, 1]
    assert text_of(keyed) == expected


def refusal(tmp_path, model, stages=2, **variables):
    """Return what `noodle up` prints when it refuses to start."""
    cluster = Cluster(tmp_path / "state", model, stages, **variables)
    command = [sys.executable, "-m", "services.cli", "up"]
    done = subprocess.run(
        command, env=cluster.environment, capture_output=True, text=True, timeout=START_SECONDS, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert not (tmp_path / "state" / "run").exists()
    return done.stdout + done.stderr


def changed_config(folder, tmp_path, **changes):
    """Return a copy of a model with a changed config."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


def test_a_type_that_is_not_on_the_list_is_refused_by_name(tiny_folder, tmp_path):
    assert "bloom" in refusal(tmp_path, changed_config(tiny_folder, tmp_path, model_type="bloom"))


def test_dynamic_rotary_scaling_is_refused_by_name(tiny_folder, tmp_path):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "dynamic" in refusal(tmp_path, changed_config(tiny_folder, tmp_path, rope_parameters=scaling))


def test_a_split_that_does_not_add_up_is_refused_with_the_numbers(tiny_folder, tmp_path):
    said = refusal(tmp_path, tiny_folder, NOODLE_SPLIT="4,4")
    assert "8" in said
    assert "6" in said


def test_more_stages_than_layers_are_refused(tmp_path):
    two_layers = tmp_path / "two"
    make_tiny_model(two_layers, "llama", tokenizer=True, vocab_size=300, num_hidden_layers=2)
    said = refusal(tmp_path, two_layers, stages=3)
    assert "3" in said
    assert "2 layers" in said or "layers" in said


def test_a_folder_without_weights_and_one_with_pickles_are_refused(tiny_folder, tmp_path):
    empty = tmp_path / "empty"
    shutil.copytree(tiny_folder, empty)
    (empty / "model.safetensors").unlink()
    assert "no weights" in refusal(tmp_path, empty)
    (empty / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pickle" in refusal(tmp_path, empty)


def test_an_unknown_variable_and_an_unknown_model_are_refused(tmp_path):
    assert "NOODLE_STAGEZ" in refusal(tmp_path, "", NOODLE_STAGEZ="2")
    assert "no folder or file" in refusal(tmp_path, "/nowhere/at/all")


def test_room_for_no_session_and_a_context_that_nobody_can_use_are_refused(tiny_folder, tmp_path):
    said = refusal(tmp_path, tiny_folder, NOODLE_KV_BYTES="1")
    assert "KV rows of 0 tokens" in said
    assert "Set NOODLE_KV_BYTES to at least" in said
    said = refusal(tmp_path, tiny_folder, NOODLE_CONTEXT_LENGTH="1")
    assert "NOODLE_CONTEXT_LENGTH is '1'" in said
    assert "from 16" in said


def test_a_cache_folder_that_is_a_file_is_refused_by_the_service_that_meets_it(tiny_folder, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    said = refusal(tmp_path, tiny_folder, NOODLE_CACHE_DIR=str(tmp_path / "cache"))
    assert f"{tmp_path / 'cache'} cannot be written (File exists)" in said
    assert "NOODLE_CACHE_DIR" in said


def test_a_folder_with_another_models_tokenizer_is_refused_by_name(tiny_folder, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["noodles"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    said = refusal(tmp_path, folder)
    assert f"{folder / 'tokenizer.json'} is not this model's" in said
    assert "'noodles' has the id 5000" in said
    assert "300 embeddings" in said
