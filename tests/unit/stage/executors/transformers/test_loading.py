"""Loading a slice: its own tensors and no other bytes, whole or refused with the reason."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from noodle.errors import ModelNotFound, PlanDoesNotFit, UnsupportedModel
from services.stage.executors.transformers.loading import load_slice
from tests.support.models.tiny_model import make_tiny_model
from tests.support.stages.slice_pipeline import (
    STEPS,
    SlicePipeline,
    random_sessions,
    relative_difference,
    unsplit_logits,
)

LENGTHS = (23, 9, 14)


def load(folder, start, end, **options):
    settings = {"device": "cpu", "dtype": "float32", "context_length": 256, **options}
    return load_slice(folder, start, end, **settings)


def tensor_bytes(folder: Path) -> dict[str, int]:
    sizes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            sizes.update({key: file.get_tensor(key).nbytes for key in file.keys()})  # noqa: SIM118 - not a dict
    return sizes


def bytes_of(sizes: dict[str, int], start: int, end: int, *others: str) -> int:
    layers = tuple(f"model.layers.{layer}." for layer in range(start, end))
    return sum(size for key, size in sizes.items() if key.startswith(layers) or key in others)


def punch_out_all_but(folder: Path, start: int, end: int, *others: str) -> None:
    """Rewrite each weights file with holes in place of the tensors of other slices."""
    layers = tuple(f"model.layers.{layer}." for layer in range(start, end))
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        header_bytes = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + header_bytes])
        path.unlink()
        with path.open("wb") as file:
            file.write(content[: 8 + header_bytes])
            file.truncate(len(content))
            for key, entry in header.items():
                if key.startswith(layers) or key in others:
                    begin, finish = (8 + header_bytes + offset for offset in entry["data_offsets"])
                    file.seek(begin)
                    file.write(content[begin:finish])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "60KB"])
def test_only_a_slices_own_tensors_are_read_and_the_others_may_be_holes(tied, shard, tmp_path):
    folder = make_tiny_model(tmp_path / "whole", "llama", max_shard_size=shard, tie_word_embeddings=tied)
    if shard == "60KB":
        assert len(list(folder.glob("*.safetensors"))) > 3
    sizes = tensor_bytes(folder)
    sessions = random_sessions(LENGTHS)
    expected = unsplit_logits(folder, sessions)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    own = [(0, 2, ("model.embed_tokens.weight",)), (2, 5, ()), (5, 6, ("model.norm.weight", head))]
    pipeline = SlicePipeline(folder, (0, 2, 5, 6))
    pipeline.slices = []
    for start, end, others in own:
        punched = shutil.copytree(folder, tmp_path / f"holes {start}")
        punch_out_all_but(punched, start, end, *others)
        loaded = load(punched, start, end)
        assert loaded.bytes_read == bytes_of(sizes, start, end, *others)
        rotary_bytes = 2 * 8 * 4  # frequencies are made, not read
        assert loaded.weight_bytes == loaded.bytes_read + rotary_bytes
        pipeline.slices.append(loaded)
    assert relative_difference(pipeline.run(sessions, STEPS), expected) < 1e-4


def test_shards_that_a_slice_does_not_need_may_be_missing(tmp_path):
    folder = make_tiny_model(tmp_path, "llama", max_shard_size="60KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for key, file in index.items() if key.startswith(("model.layers.2.", "model.layers.3."))}
    for path in folder.glob("*.safetensors"):
        if path.name not in needed:
            path.unlink()
    assert load(folder, 2, 4).weight_bytes > 0
    with pytest.raises(ModelNotFound) as refusal:
        load(folder, 0, 6)
    assert ".safetensors" in str(refusal.value)


def test_a_slice_with_both_ends_holds_a_tied_tensor_once(tmp_path):
    folder = make_tiny_model(tmp_path, "llama", tie_word_embeddings=True)
    loaded = load(folder, 0, 6)
    assert loaded.bytes_read == sum(tensor_bytes(folder).values())
    assert loaded.weight_bytes == loaded.bytes_read + 2 * 8 * 4


def test_experts_are_read_only_for_the_own_layers(tmp_path):
    folder = make_tiny_model(tmp_path, "mixtral")
    loaded = load(folder, 2, 4)
    assert loaded.bytes_read == bytes_of(tensor_bytes(folder), 2, 4)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_weights_of_another_dtype_are_converted_as_they_are_read(stored, tmp_path):
    folder = make_tiny_model(tmp_path, "llama", dtype=stored, vocab_size=9000)  # embeddings larger than one piece
    loaded = load(folder, 0, 6)
    assert loaded.dtype == "float32"
    assert loaded.bytes_read * 2 == loaded.weight_bytes - 2 * 8 * 4
    tensors = load_file(folder / "model.safetensors")
    embeddings = loaded._base.embed_tokens.weight
    assert torch.equal(embeddings, tensors["model.embed_tokens.weight"].float())


def test_progress_ends_at_all_bytes(tmp_path):
    folder = make_tiny_model(tmp_path, "llama")
    told = []
    loaded = load(folder, 1, 4, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (loaded.bytes_read, loaded.bytes_read)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_loading_needs_no_network_and_prints_nothing(tmp_path, monkeypatch, capfd):
    folder = make_tiny_model(tmp_path, "llama")
    capfd.readouterr()

    def no_network(*_arguments, **_options):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    load(folder, 0, 3)
    assert capfd.readouterr() == ("", "")


def test_a_folder_without_weights_and_one_that_is_not_there_are_refused(tmp_path):
    folder = make_tiny_model(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound) as refusal:
        load(folder, 0, 6)
    assert "no weights" in str(refusal.value)
    with pytest.raises(ModelNotFound):
        load(tmp_path / "nothing", 0, 6)


def test_pickle_weights_are_refused_and_the_reason_is_said(tmp_path):
    folder = make_tiny_model(tmp_path, "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel) as refusal:
        load(folder, 0, 6)
    assert "pytorch_model.bin" in str(refusal.value)
    assert "safetensors" in refusal.value.cure


@pytest.mark.parametrize("left_bytes", [0, 5, 100, -1])
def test_a_weights_file_that_is_cut_short_is_refused_and_named(left_bytes, tmp_path):
    folder = make_tiny_model(tmp_path, "llama")
    path = folder / "model.safetensors"
    os.truncate(path, left_bytes if left_bytes >= 0 else path.stat().st_size - 1)
    with pytest.raises(ModelNotFound) as refusal:
        load(folder, 0, 6)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("config", ["", "[]", "{", '{"model_type": 3}'])
def test_a_config_that_is_none_is_refused(config, tmp_path):
    folder = make_tiny_model(tmp_path, "llama")
    (folder / "config.json").write_text(config)
    with pytest.raises((ModelNotFound, UnsupportedModel)):
        load(folder, 0, 6)


def test_a_config_with_a_value_that_transformers_does_not_know_is_refused_by_file_and_value(tmp_path):
    make_tiny_model(tmp_path, "llama")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_act": "sideways"}))
    with pytest.raises(UnsupportedModel, match=r"config\.json describes .*sideways"):
        load(tmp_path, 0, 2)


def test_an_index_that_names_what_its_files_lack_is_refused(tmp_path):
    folder = make_tiny_model(tmp_path, "llama", max_shard_size="60KB")
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    key = "model.layers.2.mlp.up_proj.weight"
    others = sorted(set(index["weight_map"].values()) - {index["weight_map"][key]})
    index["weight_map"][key] = others[0]
    index_path.write_text(json.dumps(index))
    with pytest.raises(ModelNotFound) as refusal:
        load(folder, 2, 3)
    assert key in str(refusal.value)
    index_path.write_text("{}")
    with pytest.raises(ModelNotFound):
        load(folder, 2, 3)


def test_weights_that_lack_a_tensor_have_a_foreign_one_or_another_shape_are_refused(tmp_path):
    folder = make_tiny_model(tmp_path, "llama")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.2.mlp.up_proj.weight"
    for change in ({key: None}, {key: torch.zeros(3, 3)}, {"model.layers.2.mlp.up_proj.qzeros": torch.zeros(3)}):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, path)
        with pytest.raises(ModelNotFound) as refusal:
            load(folder, 2, 4)
        assert "model.layers.2.mlp.up_proj" in str(refusal.value)
        assert load(folder, 3, 5).weight_bytes > 0


@pytest.mark.parametrize(("start", "end"), [(0, 7), (3, 3), (4, 2), (-1, 2)])
def test_layers_that_the_model_has_not_are_refused(start, end, tmp_path):
    folder = make_tiny_model(tmp_path, "llama")
    with pytest.raises(PlanDoesNotFit) as refusal:
        load(folder, start, end)
    assert "6" in str(refusal.value)


def test_taking_all_layers_of_a_slice_makes_no_list_again(tmp_path):
    layers = load(make_tiny_model(tmp_path / "m", "llama"), 1, 3)._base.layers
    count = len(layers)
    assert layers[:count] is layers
    assert layers[: count + 1] is layers
    assert list(layers[1:]) == list(layers)[1:]
    assert list(layers[::-1]) == list(layers)[::-1]
    assert layers[0] is next(iter(layers))
