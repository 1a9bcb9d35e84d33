"""The hub's client against a small hub on loopback: only the few routes it asks."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import save

from noodle.cluster.measuring import StoreProgress
from noodle.errors import ModelNotFound, NotWritable, StartError, UnsupportedModel
from services.coordinator.models import hub as model_hub
from services.coordinator.models.hub import is_hub_id, wanted_files
from services.coordinator.models.store import prepare_model
from tests.support.models.tiny_gguf import TinyLlama, tiny_weights
from tests.support.network.hub import Hub, running_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {
        "config.json": b"{}",
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": save(tiny_weights(TinyLlama())),
        "pytorch_model.bin": b"pickle",
        "modeling_tiny.py": b"print('ran')",
        "README.md": b"",
    }
    with running_hub(files, monkeypatch) as running:
        yield running


def silent(_progress: StoreProgress) -> None:
    return None


def test_only_safetensors_config_and_tokenizer_are_fetched(hub: Hub, tmp_path: Path) -> None:
    prepared = prepare_model("org/tiny", tmp_path, silent)
    assert prepared.name == "tiny"
    assert {path.name for path in prepared.path.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (prepared.path / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert sorted(hub.fetched) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_second_start_asks_the_hub_nothing(hub: Hub, tmp_path: Path) -> None:
    first = prepare_model("org/tiny", tmp_path, silent)
    hub.status = 500
    assert prepare_model("org/tiny", tmp_path, silent) == first


def test_a_download_that_was_interrupted_is_finished(hub: Hub, tmp_path: Path) -> None:
    folder = prepare_model("org/tiny", tmp_path, silent).path
    (folder / "model.safetensors").unlink()
    assert (prepare_model("org/tiny", tmp_path, silent).path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("status", "code", "message", "cure"),
    [
        (404, "RepoNotFound", "has no model org/tiny", "spelling"),
        (404, "RevisionNotFound", "no such revision", "branches"),
        (403, "GatedRepo", "is gated", "HF_TOKEN"),
        (500, "", "could not be fetched", "Connect this machine"),
    ],
)
def test_a_refusal_of_the_hub_is_explained_with_the_cure(
    hub: Hub, tmp_path: Path, status: int, code: str, message: str, cure: str
) -> None:
    hub.status, hub.error_code = status, code
    with pytest.raises(ModelNotFound, match=message) as caught:
        prepare_model("org/tiny@main", tmp_path, silent)
    assert cure in caught.value.cure


def test_a_hub_that_cannot_be_reached_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelNotFound, match="could not be fetched from the hub") as caught:
        prepare_model("org/tiny", tmp_path, silent)
    assert "a folder or a .gguf file" in caught.value.cure


def test_a_repository_of_pickle_alone_is_refused_before_anything_is_fetched(hub: Hub, tmp_path: Path) -> None:
    del hub.files["model.safetensors"]
    with pytest.raises(UnsupportedModel, match="no weights as safetensors"):
        prepare_model("org/tiny", tmp_path, silent)
    assert hub.fetched == []


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = model_hub.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(model_hub.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(StartError, match="1000 free"):
        prepare_model("org/tiny", tmp_path, silent)
    assert hub.fetched == []


def test_a_cache_that_cannot_be_written_is_not_blamed_on_the_network(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("not a folder")
    with pytest.raises(NotWritable, match="cannot be written") as caught:
        prepare_model("org/tiny", tmp_path, silent)
    assert str(tmp_path / "hub") in caught.value.message
    assert "NOODLE_CACHE_DIR" in caught.value.cure


def test_a_download_is_used_although_its_record_cannot_be_written(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_space(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_hub, "write_atomically", no_space)
    assert prepare_model("org/tiny", tmp_path, silent).path.is_dir()
    assert "No space left on device" in caplog.text


def test_variants_of_the_same_weights_are_left_out() -> None:
    sizes = dict.fromkeys(
        ["config.json", "model.safetensors", "model.fp16.safetensors", "consolidated.safetensors", "onnx/config.json"],
        1,
    )
    assert set(wanted_files(sizes, "org/tiny")) == {"config.json", "model.safetensors"}


def test_all_shards_of_an_index_are_wanted() -> None:
    sizes = dict.fromkeys(
        ["config.json", "model.safetensors.index.json", "model-1-of-2.safetensors", "model-2-of-2.safetensors"], 1
    )
    assert wanted_files(sizes, "org/tiny") == sizes


@pytest.mark.parametrize(
    ("model", "is_one"),
    [
        ("org/name", True),
        ("HuggingFaceTB/SmolLM2-1.7B@refs/pr/3", True),
        ("name", False),
        ("./name", False),
        ("../name", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("a/.b", False),
    ],
)
def test_a_hub_id_is_distinguished_from_a_path(model: str, is_one: bool) -> None:
    assert is_hub_id(model) is is_one
