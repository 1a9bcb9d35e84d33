"""A model with only the needed tensors: fetched from the coordinator, checked, and kept (design D7).

Each file has its full size, with holes for tensors that were never fetched, so that any reader of models can read
it. `fetched.json` records the checked tensors; an interrupted fetch resumes where it stopped.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import msgspec

from noodle.errors import LinkLost, ModelNotFound, StartError
from noodle.folders import write_atomically, writing
from noodle.http_client import HTTP_ERRORS, HttpResponse, message_of, open_request, reason_of
from noodle.model.files import DIGEST_NAME, digest_of_range
from noodle.model.weight_manifest import FILES_PATH, MANIFEST_BYTES_CAP, MANIFEST_PATH, TensorRange, WeightManifest

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_SECONDS = 5.0  # longest wait for a connection to the coordinator
READ_TIMEOUT_SECONDS = 30.0  # longest wait for the next bytes
RETRY_FIRST_SECONDS = 0.5  # first wait before a retry
RETRY_LAST_SECONDS = 2.0  # longest wait before a retry
LOCK_TIMEOUT_SECONDS = 3600.0  # longest wait for another stage of this machine that fetches the same model
LOCK_POLL_SECONDS = 0.2  # between two attempts to take the lock
PIECE_BYTES = 1 << 20  # bytes of one read
FETCHES_AT_ONCE = 2  # so that the link is in use while a tensor's digest is computed
NOTE_BYTES = 16 << 20  # most bytes that an interrupted fetch repeats
COMPANION_BYTES_CAP = 64 << 20  # largest companion file; a header may be twice as large
MAXIMUM_REFUSAL_BYTES = 64 << 10  # largest body of a refusal
FETCHED_NAME = "fetched.json"

Progress = Callable[[int, int], None]  # bytes done and total bytes
Value = TypeVar("Value")


class Fetched(msgspec.Struct):
    """The record of a folder: tensors with a correct digest, and the bytes of those that were begun.

    `digests` are those of tensors whose digest the manifest does not have, as they were fetched.
    """

    whole: set[str] = msgspec.field(default_factory=set)
    begun: dict[str, int] = msgspec.field(default_factory=dict)
    digests: dict[str, str] = msgspec.field(default_factory=dict)


class WeightCache:
    """One model of one coordinator, under `<cache_dir>/weights/<model digest>`.

    Lost connections are retried until `stopping`; other failures raise ModelNotFound or StartError.
    """

    def __init__(
        self, cache_dir: Path, coordinator_url: str, cluster_token: str, stopping: threading.Event, machine: str
    ) -> None:
        self._root = cache_dir / "weights"
        self._url, self._token, self._stopping, self._machine = coordinator_url, cluster_token, stopping, machine
        self.manifest: WeightManifest  # that `prepare` fetched
        self.fetched_bytes = 0  # of tensors, by this process
        self.waits_for = ""  # what it waits for now, for /health
        self._lock = threading.Lock()  # of the record of what was fetched, which several threads write

    @property
    def folder(self) -> Path:
        return self._root / self.manifest.model_digest

    def prepare(self) -> Path:
        """Make the files with config, headers and holes, and return the model; waits for the coordinator."""
        self.manifest = self._retried(self._fetch_manifest)
        with writing(self.folder, "NOODLE_CACHE_DIR"), self._locked():
            fetched = self._fetched()
            for companion in self.manifest.companions:
                path = self.folder / companion.name
                if not path.is_file() or digest_of_range(path, 0, path.stat().st_size) != companion.sha256:
                    data = self._retried(partial(self._small, companion.name, companion.byte_count, companion.sha256))
                    write_atomically(path, data)
            for file in self.manifest.files:
                path = self.folder / file.name
                is_there = path.is_file() and path.stat().st_size == file.byte_count
                if is_there and digest_of_range(path, 0, file.header_bytes) == file.header_sha256:
                    continue
                head = self._retried(partial(self._small, file.name, file.header_bytes, file.header_sha256))
                path.unlink(missing_ok=True)
                with path.open("wb") as holes:
                    holes.write(head)
                    holes.truncate(file.byte_count)
                lost = {tensor.name for tensor in self.manifest.tensors if tensor.file == file.name}
                fetched.whole -= lost
                fetched.begun = {name: done for name, done in fetched.begun.items() if name not in lost}
            self._note(fetched)
            write_atomically(self.folder / DIGEST_NAME, self.manifest.model_digest.encode())
        return self.folder / self.manifest.gguf if self.manifest.gguf else self.folder

    def ensure(self, names: Collection[str], progress: Progress) -> None:
        """Check the kept tensors of these, and fetch the missing or damaged ones."""
        by_name = {tensor.name: tensor for tensor in self.manifest.tensors}
        missing = sorted(set(names) - by_name.keys())
        if missing:
            raise ModelNotFound(
                f"{self._machine} needs the tensor {missing[0]}, which {self._url} does not have.",
                cure="Run the same noodle version on every machine.",
            )
        wanted = sorted((by_name[name] for name in set(names)), key=lambda tensor: (tensor.file, tensor.first_byte))
        done_bytes: dict[str, int] = {}
        all_done_bytes, total_bytes = 0, sum(tensor.byte_count for tensor in wanted)

        def ensure_one(tensor: TensorRange, fetched: Fetched) -> None:
            def tell(done: int) -> None:
                nonlocal all_done_bytes
                with self._lock:
                    all_done_bytes += done - done_bytes.get(tensor.name, 0)
                    done_bytes[tensor.name] = done
                    progress(all_done_bytes, total_bytes)

            if tensor.name in fetched.whole and not self._is_right(tensor, fetched):
                log.warning("%s in %s is damaged, fetching it again", tensor.name, self.folder / tensor.file)
                with self._lock:
                    fetched.whole.discard(tensor.name)
            if tensor.name not in fetched.whole:
                self._fetch_tensor(tensor, fetched, tell)
            tell(tensor.byte_count)

        with writing(self.folder, "NOODLE_CACHE_DIR"), self._locked():
            fetched = self._fetched()
            with ThreadPoolExecutor(FETCHES_AT_ONCE, "fetch") as threads:
                pending = [threads.submit(ensure_one, tensor, fetched) for tensor in wanted]
                try:
                    for one in pending:
                        one.result()
                except BaseException:
                    threads.shutdown(wait=False, cancel_futures=True)
                    raise

    def _fetch_tensor(self, tensor: TensorRange, fetched: Fetched, progress: Callable[[int], None]) -> None:
        for is_last_try in (False, True):
            self._retried(lambda: self._fetch_rest(tensor, fetched, progress))
            digest = self._digest(tensor)
            is_right = digest == (tensor.sha256 or digest)
            with self._lock:
                fetched.begun.pop(tensor.name, None)
                if not tensor.sha256:
                    fetched.digests[tensor.name] = digest
                if is_right:
                    fetched.whole.add(tensor.name)
            self._note(fetched)
            if is_right:
                return
            if not is_last_try:
                log.warning("the digest of %s does not match, fetching it again", tensor.name)
        raise ModelNotFound(
            f"{self._machine} received {tensor.name} from {self._url} twice with a wrong digest.",
            cure="The model files of the coordinator have changed or are damaged: restart the coordinator.",
        )

    def _fetch_rest(self, tensor: TensorRange, fetched: Fetched, progress: Callable[[int], None]) -> None:
        """Fetch the missing bytes of one tensor; records the progress also when the connection is cut."""
        done = min(fetched.begun.get(tensor.name, 0), tensor.byte_count)
        noted = done
        if done == tensor.byte_count:
            return
        path = self.folder / tensor.file
        try:
            with path.open("r+b") as file:
                file.seek(tensor.first_byte + done)
                first = tensor.first_byte + done
                for piece in self._range(tensor.file, first, tensor.first_byte + tensor.byte_count):
                    file.write(piece)
                    done += len(piece)
                    with self._lock:
                        self.fetched_bytes += len(piece)
                        fetched.begun[tensor.name] = done
                    progress(done)
                    if done - noted >= NOTE_BYTES:
                        file.flush()
                        self._note(fetched)
                        noted = done
        finally:
            self._note(fetched)

    def _is_right(self, tensor: TensorRange, fetched: Fetched) -> bool:
        return self._digest(tensor) == (tensor.sha256 or fetched.digests.get(tensor.name))

    def _digest(self, tensor: TensorRange) -> str:
        return digest_of_range(self.folder / tensor.file, tensor.first_byte, tensor.byte_count)

    # the coordinator

    def _fetch_manifest(self) -> WeightManifest:
        data = b"".join(self._get(MANIFEST_PATH, {}, 200, MANIFEST_BYTES_CAP))
        try:
            return msgspec.json.decode(data, type=WeightManifest)
        except msgspec.MsgspecError as error:
            raise StartError(
                f"{self._url}{MANIFEST_PATH} does not answer with a manifest: {error}.",
                cure="Check that NOODLE_COORDINATOR_URL is the coordinator's, and that both run the same version.",
            ) from error

    def _small(self, name: str, byte_count: int, sha256: str) -> bytes:
        if byte_count > COMPANION_BYTES_CAP * 2:
            raise ModelNotFound(f"{name} on {self._url} has {byte_count} bytes, too many for its kind.")
        data = b"".join(self._range(name, 0, byte_count)) if byte_count else b""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise LinkLost(f"{self._url} sent {name} with a wrong digest.")
        return data

    def _range(self, name: str, first: int, end: int) -> Iterator[bytes]:
        """Yield bytes [first, end) of a file in pieces; raises LinkLost when the connection is cut."""
        got = 0
        headers = {"Range": f"bytes={first}-{end - 1}"}
        for piece in self._get(f"{FILES_PATH}/{quote(name)}", headers, 206, end - first):
            got += len(piece)
            yield piece
        if got < end - first:
            raise LinkLost(f"{self._url} ended after {got} of {end - first} bytes of {name}.")

    def _get(self, path: str, headers: dict[str, str], status: int, maximum_bytes: int) -> Iterator[bytes]:
        try:
            with open_request(
                "GET",
                f"{self._url}{path}",
                token=self._token,
                headers=headers,
                connect_seconds=CONNECT_TIMEOUT_SECONDS,
                answer_seconds=READ_TIMEOUT_SECONDS,
            ) as answer:
                if answer.status != status:
                    raise _refusal(self._url, path, answer)
                left = maximum_bytes
                while piece := answer.read(PIECE_BYTES):
                    left -= len(piece)
                    if left < 0:
                        raise StartError(f"{self._url}{path} sent more than the requested {maximum_bytes} bytes.")
                    yield piece
        except HTTP_ERRORS as error:
            raise LinkLost(f"{self._url} cannot be reached: {reason_of(error)}.") from error

    def _retried(self, fetch: Callable[[], Value]) -> Value:
        """Retry until the coordinator is reachable and ready; a refusal is raised."""
        wait_seconds = RETRY_FIRST_SECONDS
        while True:
            try:
                value = fetch()
            except LinkLost as error:
                if str(error) != self.waits_for:
                    log.info("waiting for the weights: %s", error)
                self.waits_for = str(error)
                if self._stopping.wait(wait_seconds):
                    raise
                wait_seconds = min(wait_seconds * 2, RETRY_LAST_SECONDS)
                continue
            self.waits_for = ""
            return value

    # this disk

    def _fetched(self) -> Fetched:
        """Read the record of an earlier fetch; an unreadable one counts as empty, and its tensors are fetched again."""
        path = self.folder / FETCHED_NAME
        try:
            return msgspec.json.decode(path.read_bytes(), type=Fetched)
        except FileNotFoundError:
            return Fetched()
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("ignoring %s, which cannot be read: %s. Its tensors are fetched again.", path, error)
            return Fetched()

    def _note(self, fetched: Fetched) -> None:
        with self._lock:
            write_atomically(self.folder / FETCHED_NAME, msgspec.json.encode(fetched))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the folder against other processes; the system releases the lock when a process ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        end = time.monotonic() + LOCK_TIMEOUT_SECONDS
        with (self.folder / "lock").open("w") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > end:
                        raise StartError(
                            f"Another process has held {self.folder} for {LOCK_TIMEOUT_SECONDS:.0f} seconds.",
                            cure="Find a stage that hangs, and stop it.",
                        ) from error
                    self.waits_for = "waiting for another stage of this machine to fetch its weights"
                    self._stopping.wait(LOCK_POLL_SECONDS)
            self.waits_for = ""
            yield


def _refusal(url: str, path: str, answer: HttpResponse) -> LinkLost | StartError:
    """Return LinkLost for an answer that may change later, StartError for a permanent refusal."""
    text = message_of(answer.read(MAXIMUM_REFUSAL_BYTES))
    if answer.status == 401:
        return StartError(
            f"The coordinator at {url} rejects this machine's cluster token.",
            cure="Set the same NOODLE_CLUSTER_TOKEN on every machine.",
        )
    if answer.status == 409:
        return StartError(text, cure="Restart the coordinator, which opens the model again.")
    if answer.status >= 500 or answer.status in (408, 429):
        return LinkLost(f"{url} answers {answer.status}: {text}")
    return StartError(
        f"{url}{path} answers {answer.status}: {text}", cure="Run the same noodle version on every machine."
    )
