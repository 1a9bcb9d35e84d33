"""Weights between two machines: the real routes and the real cache, over connections that are cut."""

import http.client
import json
import os
import shutil
import socket
import threading
from contextlib import contextmanager

import pytest
from flask import Flask
from werkzeug.serving import make_server

from noodle.errors import LinkLost, ModelNotFound, StartError
from noodle.model.files import digest_of_range, model_digest, read_tensor_entries
from noodle.model.gguf import read_gguf
from noodle.model.weight_cache import WeightCache
from noodle.web.service import install_error_handlers
from services.coordinator.models.weight_server import WeightStore, install_weight_routes
from services.stage.executors.transformers.loading import load_slice
from tests.support.models.tiny_gguf import TinyLlama, split_in_two, write_tiny_gguf
from tests.support.models.tiny_model import tiny_llama_folder

TOKEN = "a token that the machines share"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_llama_folder(tmp_path_factory.mktemp("model"))


@contextmanager
def serving(folder, cache_dir):
    """Serve the coordinator's weight routes on their own port; yield URL and store."""
    store = WeightStore(cache_dir)
    store.serve(folder, "tiny")
    app = Flask("weights")
    install_error_handlers(app)
    install_weight_routes(app, store, TOKEN)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


@contextmanager
def cutting(url, after_bytes):
    """Run a relay that cuts each connection after a number of bytes of the answer."""
    port = int(url.rsplit(":", 1)[1])
    listener = socket.create_server(("127.0.0.1", 0))

    def relay(client):
        with client, socket.create_connection(("127.0.0.1", port)) as upstream:
            upstream.sendall(client.recv(65536))
            left = after_bytes
            while left > 0 and (data := upstream.recv(min(left, 65536))):
                client.sendall(data)
                left -= len(data)

    def accept():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=relay, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def cache_of(folder, url, token=TOKEN, *, patient=True):
    stopping = threading.Event()
    if not patient:
        stopping.set()
    return WeightCache(folder, url, token, stopping, "machine B")


def no_progress(_done, _total):
    pass


def load(folder, start, end, fetch):
    return load_slice(folder, start, end, device="cpu", dtype="float32", context_length=64, fetch=fetch)


def test_a_slice_fetches_its_own_tensors_and_no_others(model, tmp_path):
    with serving(model, tmp_path / "a") as url:
        cache = cache_of(tmp_path / "b", url)
        folder = cache.prepare()
        assert model_digest(folder) == model_digest(model)
        got = load(folder, 1, 3, lambda keys: cache.ensure(keys, no_progress))
    whole = load(model, 1, 3, lambda keys: None)
    assert cache.fetched_bytes == whole.bytes_read == got.bytes_read


def test_a_second_start_fetches_nothing_and_a_moved_cut_only_the_new_layer(model, tmp_path):
    with serving(model, tmp_path / "a") as url:
        first = cache_of(tmp_path / "b", url)
        load(first.prepare(), 0, 2, lambda keys: first.ensure(keys, no_progress))
        again = cache_of(tmp_path / "b", url)
        load(again.prepare(), 0, 2, lambda keys: again.ensure(keys, no_progress))
        assert again.fetched_bytes == 0
        load(again.folder, 0, 3, lambda keys: again.ensure(keys, no_progress))
    entries = read_tensor_entries(model)
    assert again.fetched_bytes == sum(e.byte_count for name, e in entries.items() if ".layers.2." in name)


def test_a_fetch_that_is_cut_goes_on_where_it_was(model, tmp_path):
    entries = read_tensor_entries(model)
    largest = max(entries.values(), key=lambda entry: entry.byte_count).byte_count
    with serving(model, tmp_path / "a") as url, cutting(url, largest // 2) as cut:
        honest = cache_of(tmp_path / "b", url)
        honest.prepare()
        cache = cache_of(tmp_path / "b", cut)
        cache.manifest = honest.manifest  # the manifest itself is longer than the relay passes
        cache.ensure(entries, no_progress)
    total = sum(entry.byte_count for entry in entries.values())
    assert cache.fetched_bytes == total  # not a byte twice


def test_a_damaged_tensor_of_the_cache_is_fetched_again(model, tmp_path):
    with serving(model, tmp_path / "a") as url:
        first = cache_of(tmp_path / "b", url)
        folder = first.prepare()
        entries = read_tensor_entries(model)
        first.ensure(entries, no_progress)
        name, entry = next((name, entry) for name, entry in sorted(entries.items()) if entry.byte_count > 100)
        with (folder / entry.file.name).open("r+b") as file:
            file.seek(entry.first_byte + 50)
            file.write(b"\xff\xfe\xfd\xfc")
        second = cache_of(tmp_path / "b", url)
        second.prepare()
        second.ensure(entries, no_progress)
        assert second.fetched_bytes == entry.byte_count, name
        assert (folder / entry.file.name).read_bytes() == entry.file.read_bytes()


@pytest.mark.parametrize("touched", [True, False])
def test_weights_that_changed_on_the_coordinator_are_refused_by_time_or_by_digest(model, tmp_path, touched):
    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    with serving(copy, tmp_path / "a") as url:
        cache = cache_of(tmp_path / "b", url)
        cache.prepare()
        entries = read_tensor_entries(copy)
        entry = max(entries.values(), key=lambda entry: entry.byte_count)
        before = entry.file.stat()
        with entry.file.open("r+b") as file:
            file.seek(entry.first_byte)
            file.write(b"\x01" * 64)
        if not touched:
            os.utime(entry.file, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(
            (ModelNotFound, StartError), match="has changed" if touched else "twice with a wrong digest"
        ):
            cache.ensure(entries, no_progress)


def test_a_record_of_fetches_that_another_version_left_is_ignored_with_a_line(model, tmp_path, caplog):
    with serving(model, tmp_path / "a") as url:
        cache = cache_of(tmp_path / "b", url)
        record = cache.prepare() / "fetched.json"
        name = cache.manifest.tensors[0].name
        cache.ensure([name], no_progress)
        record.write_bytes(b'{"whole": 3}')
        cache.ensure([name], no_progress)
        assert cache.fetched_bytes == 2 * cache.manifest.tensors[0].byte_count
    assert [each for each in caplog.messages if str(record) in each and "fetched again" in each]


def test_a_wrong_token_is_told_at_once_and_a_coordinator_that_is_away_is_waited_for(model, tmp_path):
    told = pytest.raises(StartError, match="rejects this machine's cluster token")
    with serving(model, tmp_path / "a") as url, told:
        cache_of(tmp_path / "b", url, "another").prepare()
    away = cache_of(tmp_path / "b", "http://127.0.0.1:9", patient=False)
    with pytest.raises(LinkLost, match="cannot be reached"):
        away.prepare()
    assert "cannot be reached" in away.waits_for


def test_a_disk_that_cannot_be_written_is_named_with_its_cure(model, tmp_path):
    (tmp_path / "b").write_text("a file where a folder should be", encoding="utf-8")
    with serving(model, tmp_path / "a") as url, pytest.raises(StartError, match="NOODLE_CACHE_DIR"):
        cache_of(tmp_path / "b", url).prepare()


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/weights", {}, 401),
        ("/weights/files/model.safetensors", {"Range": "bytes=0-9"}, 401),
        ("/weights/files/model.safetensors", {"Authorization": f"Bearer {TOKEN}"}, 400),
        ("/weights/files/model.safetensors", {"Authorization": f"Bearer {TOKEN}", "Range": "bytes=0-1,4-5"}, 400),
        (
            "/weights/files/model.safetensors",
            {"Authorization": f"Bearer {TOKEN}", "Range": "bytes=99999999999-99999999999"},
            400,
        ),
        ("/weights/files/..%2f..%2fetc%2fpasswd", {"Authorization": f"Bearer {TOKEN}", "Range": "bytes=0-9"}, 404),
        ("/weights/files/tokenizer_config.json", {"Authorization": f"Bearer {TOKEN}", "Range": "bytes=0-9"}, 404),
    ],
)
def test_only_ranges_of_the_models_files_leave_and_only_with_the_token(model, tmp_path, path, headers, status):
    with serving(model, tmp_path / "a") as url:
        cache_of(tmp_path / "b", url).prepare()
        connection = http.client.HTTPConnection("127.0.0.1", int(url.rsplit(":", 1)[1]), timeout=30)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        assert answer.status == status
        assert "message" in json.loads(answer.read())["error"]
        connection.close()


def test_of_a_split_gguf_only_the_wanted_tensors_travel_whatever_its_files_are_called(tmp_path):
    name = tmp_path / "ein Modell für zu Hause-00001-of-00002.gguf"
    parts = split_in_two(write_tiny_gguf(tmp_path / "whole.gguf", TinyLlama()), name)
    entries = read_tensor_entries(name)
    with serving(name, tmp_path / "a") as url:
        cache = cache_of(tmp_path / "b", url)
        there = cache.prepare()
        assert there.name == "model-00001-of-00002.gguf"
        assert {path.stat().st_size for path in parts} == {path.stat().st_size for path in read_gguf(there).parts}
        assert model_digest(there) == model_digest(name)
        wanted = [key for key in entries if key.startswith("blk.1.")]
        cache.ensure(wanted, no_progress)
        assert cache.fetched_bytes == sum(entries[key].byte_count for key in wanted)
        for key in wanted:
            mine, theirs = read_tensor_entries(there)[key], entries[key]
            same = (mine.first_byte, mine.byte_count)
            assert digest_of_range(mine.file, *same) == digest_of_range(theirs.file, *same)
