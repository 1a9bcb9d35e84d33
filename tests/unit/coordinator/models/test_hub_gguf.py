"""One GGUF file of a hub's repository: chosen by its format, fetched with cuts, checked by its digest, used offline."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from noodle.cluster.measuring import StoreProgress
from noodle.errors import ModelNotFound, NoodleError, StartError, UnsupportedModel
from noodle.model.gguf import read_gguf
from services.coordinator.models import hub as model_hub
from services.coordinator.models import hub_download, hub_headers
from services.coordinator.models.hub_gguf import choose_gguf
from services.coordinator.models.store import prepare_model
from tests.support.models.tiny_gguf import TinyLlama, split_in_two, write_tiny_gguf
from tests.support.network.hub import Hub, running_hub

REPOSITORY = [
    "README.md", "config.json", "imatrix_tiny.gguf", "mmproj-tiny-f16.gguf", "tiny-BF16-00001-of-00002.gguf",
    "tiny-BF16-00002-of-00002.gguf", "tiny-IQ4_XS.gguf", "tiny-Q4_K_M.gguf", "tiny-Q4_K_S.gguf", "tiny-Q8_0.gguf",
    "tiny-UD-Q4_K_M.gguf", "tiny-UD-Q6_K_XL.gguf", "Q3_K/tiny-00001-of-00003.gguf", "Q3_K/tiny-00002-of-00003.gguf",
    "tiny-i1-q2_k.gguf",
]  # fmt: skip
MODEL = "org/tiny:Q4_K_M"
HEADER_BYTES = 8192  # of the tiny model, read as 4096 and 4096


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("Q4_K_M", ["tiny-Q4_K_M.gguf"]),
        ("q4_k_m", ["tiny-Q4_K_M.gguf"]),
        ("UD-Q4_K_M", ["tiny-UD-Q4_K_M.gguf"]),
        ("q6_k_xl", ["tiny-UD-Q6_K_XL.gguf"]),
        ("Q8_0", ["tiny-Q8_0.gguf"]),
        ("Q2_K", ["tiny-i1-q2_k.gguf"]),
        ("bf16", ["tiny-BF16-00001-of-00002.gguf", "tiny-BF16-00002-of-00002.gguf"]),
        ("tiny-BF16-00002-of-00002.gguf", ["tiny-BF16-00001-of-00002.gguf", "tiny-BF16-00002-of-00002.gguf"]),
        ("TINY-q8_0.gguf", ["tiny-Q8_0.gguf"]),
        ("", ["tiny-Q4_K_M.gguf"]),
    ],
)
def test_a_format_or_file_chooses_all_parts_of_one_model(wanted: str, names: list[str]) -> None:
    assert list(choose_gguf(REPOSITORY, wanted, f"org/tiny:{wanted}")) == names


@pytest.mark.parametrize(
    ("files", "wanted", "error", "message"),
    [
        (REPOSITORY, "Q4_K", ModelNotFound, "no such file, but .*tiny-Q4_K_M.gguf"),  # is no beginning of a format
        (REPOSITORY, "Q5_K_M", ModelNotFound, "no such file, but .*tiny-Q8_0.gguf"),
        (REPOSITORY, "f16", ModelNotFound, "no such file"),  # only the projector's
        (REPOSITORY, "other.gguf", ModelNotFound, "no such file"),
        (REPOSITORY, "Q3_K", ModelNotFound, "lacks Q3_K/tiny-00003-of-00003.gguf"),
        (["a-Q8_0.gguf", "b-Q8_0.gguf"], "Q8_0", UnsupportedModel, "any of these files on the hub: a-Q8_0.gguf, b-"),
        (["a-Q4_K_M.gguf", "b-Q4_K_M.gguf"], "", UnsupportedModel, "any of these files"),
        (["mmproj-x.gguf", "imatrix.gguf", "x.bin"], "Q8_0", ModelNotFound, "no GGUF file of a language model"),
        ([f"m{number}-Q8_0.gguf" for number in range(99)], "Q8_0", UnsupportedModel, "and 69 more"),
        (["x-00001-of-99999.gguf"], "x-00001-of-99999.gguf", ModelNotFound, "lacks x-00002-of-99999"),
        (["x-00005-of-00002.gguf"], "Q8_0", ModelNotFound, "no such file"),
        (["x.gguf"], "(.*)+$", ModelNotFound, "no such file"),
    ],
)
def test_a_name_that_means_no_file_or_several_is_refused_with_what_there_is(
    files: list[str], wanted: str, error: type[NoodleError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        choose_gguf(files, wanted, f"org/tiny:{wanted}")
    assert caught.value.cure


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_tiny_gguf(tmp_path_factory.mktemp("hub") / "tiny.gguf", TinyLlama()).read_bytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, content: bytes) -> Iterator[Hub]:
    monkeypatch.setattr(hub_download, "RETRY_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(hub_headers, "FIRST_BYTES", 4096)
    files = {"tiny-Q4_K_M.gguf": content, "mmproj-tiny.gguf": b"GGUF", "tiny-Q8_0.gguf": b"GGUF", "README.md": b""}
    with running_hub(files, monkeypatch) as running:
        yield running


def silent(_progress: StoreProgress) -> None:
    return None


@pytest.mark.parametrize("model", [MODEL, "org/tiny@main:q4_k_m", "org/tiny:tiny-Q4_K_M.gguf", "org/tiny"])
def test_one_file_is_fetched_and_is_the_model(hub: Hub, tmp_path: Path, content: bytes, model: str) -> None:
    reports: list[StoreProgress] = []
    prepared = prepare_model(model, tmp_path, reports.append)
    assert prepared.name == "tiny-Q4_K_M"
    assert prepared.path.read_bytes() == content
    assert read_gguf(prepared.path).architecture == "llama"
    assert set(hub.fetched) == {"tiny-Q4_K_M.gguf"}
    assert hub.sent_bytes <= len(content) + HEADER_BYTES  # at most the header is fetched twice
    assert reports[-1] == StoreProgress("download", "tiny-Q4_K_M.gguf", len(content), len(content))


def test_a_second_start_asks_the_hub_nothing(hub: Hub, tmp_path: Path) -> None:
    first = prepare_model(MODEL, tmp_path, silent)
    hub.status = 500
    assert prepare_model(MODEL, tmp_path, silent) == first


def test_another_name_of_a_file_that_is_here_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    prepare_model(MODEL, tmp_path, silent)
    hub.fetched.clear()
    prepare_model("org/tiny:tiny-Q4_K_M.gguf", tmp_path, silent)
    assert hub.fetched == []


def test_a_download_goes_on_after_each_cut_and_a_busy_hub(hub: Hub, tmp_path: Path, content: bytes) -> None:
    hub.cut_after, hub.busy = [1000, None, None, 0, 50_000, 1], 2
    assert prepare_model(MODEL, tmp_path, silent).path.read_bytes() == content
    assert hub.sent_bytes <= len(content) + HEADER_BYTES


def test_a_download_goes_on_where_the_last_start_ended(
    hub: Hub, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cut_after = [None, None, 100_000, *[0] * 99]
    monkeypatch.setattr(hub_download, "GIVE_UP_SECONDS", 0.05)
    with pytest.raises(ModelNotFound, match=f"beyond byte 10\\d\\d\\d\\d of {len(content)}") as caught:
        prepare_model(MODEL, tmp_path, silent)
    assert "goes on where it stopped" in caught.value.cure
    hub.cut_after = []
    assert prepare_model(MODEL, tmp_path, silent).path.read_bytes() == content
    assert hub.sent_bytes <= len(content) + HEADER_BYTES


def test_a_hub_without_ranges_sends_the_file_again(hub: Hub, tmp_path: Path, content: bytes) -> None:
    hub.knows_ranges, hub.cut_after = False, [100_000]
    assert prepare_model(MODEL, tmp_path, silent).path.read_bytes() == content


def test_a_wrong_digest_is_fetched_again_once(hub: Hub, tmp_path: Path, content: bytes) -> None:
    wrong = content[:-1] + b"?"
    hub.sent_instead = {"tiny-Q4_K_M.gguf": [content, content, wrong]}
    assert prepare_model(MODEL, tmp_path, silent).path.read_bytes() == content
    hub.files["tiny-Q8_0.gguf"] = content
    hub.sent_instead = {"tiny-Q8_0.gguf": [content, content, wrong, wrong]}
    with pytest.raises(ModelNotFound, match="twice with another digest"):
        prepare_model("org/tiny:Q8_0", tmp_path, silent)
    assert not list(tmp_path.rglob("*Q8_0*.partial"))


def test_all_parts_of_a_split_file_are_fetched(hub: Hub, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "whole.gguf").write_bytes(content)
    parts = split_in_two(tmp_path / "whole.gguf", tmp_path / "tiny-f16-00001-of-00002.gguf")
    hub.files |= {f"big/{path.name}": path.read_bytes() for path in parts}
    prepared = prepare_model("org/tiny:F16", tmp_path / "cache", silent)
    assert prepared.name == "tiny-f16"
    for ours, theirs in zip(read_gguf(prepared.path).parts, parts, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"GGUG" + content[4:], "not a GGUF file"),
        (lambda content: content.replace(b"llama", b"llamb"), "llamb"),
        (lambda content: content[:5000], "cut short"),
    ],
)
def test_a_model_that_noodle_does_not_run_is_refused_after_its_header(
    hub: Hub, tmp_path: Path, content: bytes, change: Callable[[bytes], bytes], message: str
) -> None:
    hub.files["tiny-Q4_K_M.gguf"] = change(content)
    with pytest.raises(UnsupportedModel, match=message) as caught:
        prepare_model(MODEL, tmp_path, silent)
    assert "tiny-Q4_K_M.gguf" in caught.value.message
    assert caught.value.cure
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("status", "code", "message", "cure"),
    [
        (404, "RepoNotFound", "has no model org/tiny", "spelling"),
        (401, "RepoNotFound", "has no model org/tiny", "HF_TOKEN"),
        (404, "RevisionNotFound", "no such revision", "branches"),
        (403, "GatedRepo", "is gated", "HF_TOKEN"),
        (401, "GatedRepo", "is gated", "HF_TOKEN"),
        (500, "", "could not be fetched", "Connect this machine"),
    ],
)
def test_a_refusal_of_the_hub_is_explained_with_the_cure(
    hub: Hub, tmp_path: Path, status: int, code: str, message: str, cure: str
) -> None:
    hub.status, hub.error_code = status, code
    with pytest.raises(ModelNotFound, match=message) as caught:
        prepare_model("org/tiny@main:Q4_K_M", tmp_path, silent)
    assert cure in caught.value.cure


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = model_hub.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(model_hub.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(StartError, match="1000 free"):
        prepare_model(MODEL, tmp_path, silent)
    assert hub.sent_bytes <= HEADER_BYTES


def test_two_starts_at_once_fetch_the_file_once(hub: Hub, tmp_path: Path, content: bytes) -> None:
    threads = [threading.Thread(target=prepare_model, args=(MODEL, tmp_path, silent)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert prepare_model(MODEL, tmp_path, silent).path.read_bytes() == content
    assert set(hub.fetched) == {"tiny-Q4_K_M.gguf"}
    assert hub.sent_bytes <= len(content) + HEADER_BYTES  # at most the header is fetched twice


def test_a_download_that_is_killed_goes_on_at_the_next_start(hub: Hub, tmp_path: Path, content: bytes) -> None:
    hub.silent_after = [None, 200_000]  # the other process reads the header in one piece
    code = (
        "import sys; from pathlib import Path; from services.coordinator.models.store import prepare_model\n"
        f"prepare_model({MODEL!r}, Path(sys.argv[1]), lambda progress: None)"
    )
    environment = {**os.environ, "HF_ENDPOINT": huggingface_hub.constants.ENDPOINT}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment) as process:
        while bytes_here(tmp_path) < 150_000:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    here = bytes_here(tmp_path)
    assert here <= 210_000
    assert prepare_model(MODEL, tmp_path, silent).path.read_bytes() == content
    assert hub.ranges[-1].startswith(f"bytes={here}-")


def bytes_here(cache_dir: Path) -> int:
    return sum(path.stat().st_size for path in cache_dir.rglob("*.partial"))
