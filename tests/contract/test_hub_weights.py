"""Tensors that only a hub has: passed on by the coordinator, so that each machine fetches its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from noodle.errors import LinkLost
from noodle.model.files import model_digest, read_tensor_entries
from noodle.model.weight_cache import WeightCache
from services.coordinator.models import hub_download, hub_headers, hub_tensors
from services.coordinator.models.store import prepare_model
from services.coordinator.text.tokenizer import Tokenizer
from tests.contract.test_weights import TOKEN, cache_of, no_progress, serving
from tests.support.models.tiny_gguf import TinyLlama, split_in_two, write_tiny_gguf
from tests.support.network.hub import Hub, running_hub

MODEL = "org/tiny:F32"
HEADER_BYTES = 8192  # of the tiny model, read as 4096 and 4096


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("hub") / "tiny-F32.gguf", TinyLlama())


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, whole: Path) -> Iterator[Hub]:
    monkeypatch.setattr(hub_download, "RETRY_FIRST_SECONDS", 0.01)
    monkeypatch.setattr(hub_headers, "FIRST_BYTES", 4096)
    with running_hub({whole.name: whole.read_bytes()}, monkeypatch) as running:
        yield running


@pytest.fixture
def model(hub: Hub, tmp_path: Path) -> Path:
    """The coordinator's model, of which only the header is here."""
    path = prepare_model(MODEL, tmp_path / "a", lambda _progress: None, is_whole=False).path
    assert hub.sent_bytes <= HEADER_BYTES
    return path


def test_a_header_is_enough_for_tokenizer_and_plan(model: Path, whole: Path) -> None:
    assert Tokenizer(model).encode("the tea", True, 64) == Tokenizer(whole).encode("the tea", True, 64)
    ours, theirs = read_tensor_entries(model), read_tensor_entries(whole)
    assert {name: (entry.dtype, entry.shape, entry.first_byte) for name, entry in ours.items()} == {
        name: (entry.dtype, entry.shape, entry.first_byte) for name, entry in theirs.items()
    }
    assert model.stat().st_blocks * 512 <= 4 * HEADER_BYTES  # the rest is a hole


def test_a_machine_fetches_its_own_tensors_and_no_others(hub: Hub, model: Path, whole: Path, tmp_path: Path) -> None:
    wanted = {name: entry for name, entry in read_tensor_entries(whole).items() if "blk.1." in name}
    before_bytes = hub.sent_bytes
    with serving(model, tmp_path / "a") as url:
        cache = cache_of(tmp_path / "b", url)
        held = cache.prepare()
        cache.ensure(wanted, no_progress)
        assert model_digest(held) == model_digest(model)
        again = cache_of(tmp_path / "b", url)
        again.prepare()
        again.ensure(wanted, no_progress)
    for entry in wanted.values():
        with held.open("rb") as ours, whole.open("rb") as theirs:
            ours.seek(entry.first_byte)
            theirs.seek(entry.first_byte)
            assert ours.read(entry.byte_count) == theirs.read(entry.byte_count)
    assert hub.sent_bytes - before_bytes == sum(entry.byte_count for entry in wanted.values())
    assert again.fetched_bytes == 0


def test_a_cut_of_the_hub_is_not_seen_by_the_stage(hub: Hub, model: Path, whole: Path, tmp_path: Path) -> None:
    with serving(model, tmp_path / "a") as url:
        cache = cache_of(tmp_path / "b", url)
        held = cache.prepare()
        before_bytes, hub.cut_after, hub.busy = hub.sent_bytes, [100, 0, 3000, None, 17], 1
        entries = read_tensor_entries(whole)
        cache.ensure(entries, no_progress)
    assert held.read_bytes() == whole.read_bytes()
    assert hub.sent_bytes - before_bytes == sum(entry.byte_count for entry in entries.values())


def test_a_damaged_tensor_of_the_cache_is_fetched_again(model: Path, whole: Path, tmp_path: Path) -> None:
    entries = read_tensor_entries(whole)
    entry = entries["blk.0.attn_q.weight"]
    with serving(model, tmp_path / "a") as url:
        cache = cache_of(tmp_path / "b", url)
        held = cache.prepare()
        cache.ensure(entries, no_progress)
        with held.open("r+b") as file:
            file.seek(entry.first_byte + 50)
            file.write(b"\xff\xfe\xfd\xfc")
        again = cache_of(tmp_path / "b", url)
        again.prepare()
        again.ensure(entries, no_progress)
    assert again.fetched_bytes == entry.byte_count
    assert held.read_bytes() == whole.read_bytes()


def test_a_hub_that_refuses_is_waited_for_and_named(
    hub: Hub, model: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_tensors, "GIVE_UP_SECONDS", 0.05)
    with serving(model, tmp_path / "a") as url:
        stopping = threading.Event()
        cache = WeightCache(tmp_path / "b", url, TOKEN, stopping, "machine B")
        cache.prepare()
        hub.status, hub.error_code = 403, "GatedRepo"
        stopping.set()
        with pytest.raises(LinkLost, match=r"The hub does not send tiny-F32\.gguf"):
            cache.ensure(read_tensor_entries(whole), no_progress)


def test_parts_of_a_split_file_are_passed_on(hub: Hub, whole: Path, tmp_path: Path) -> None:
    parts = split_in_two(whole, tmp_path / "tiny-F16-00001-of-00002.gguf")
    hub.files |= {path.name: path.read_bytes() for path in parts}
    model = prepare_model("org/tiny:F16", tmp_path / "a", lambda _progress: None, is_whole=False).path
    with serving(model, tmp_path / "a") as url:
        cache = cache_of(tmp_path / "b", url)
        held = cache.prepare()
        cache.ensure(read_tensor_entries(held), no_progress)
    for ours, theirs in zip(sorted(held.parent.glob("*.gguf")), parts, strict=True):
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_start_without_the_hub_uses_the_header_that_is_here(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.status = 500
    assert prepare_model(MODEL, tmp_path / "a", lambda _progress: None, is_whole=False).path == model
