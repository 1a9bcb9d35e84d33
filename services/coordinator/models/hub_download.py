"""Downloads single files of a hub by byte range: a cut is resumed, and the whole is checked by its digest."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path

import msgspec

from noodle.errors import ModelNotFound

log = logging.getLogger(__name__)

SILENCE_SECONDS = 30.0  # without an answer or a byte; then the rest is asked for again
GIVE_UP_SECONDS = 300.0  # without any byte
RETRY_FIRST_SECONDS = 0.5  # first wait before the rest is asked for
RETRY_LAST_SECONDS = 10.0  # longest wait before the rest is asked for
PIECE_BYTES = 1 << 20  # bytes of one read
SHA256_DIGITS = 64
RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
PARTIAL_SUFFIX = ".partial"


class HubFile(msgspec.Struct, frozen=True):
    """One file of a repository at one commit."""

    name: str
    url: str
    byte_count: int
    digest: str  # sha256 of a file that the hub keeps as LFS, else git's sha1 of it as a blob


class _Cut(Exception):
    """The connection ended before the file did, or the hub is busy; the text is the reason."""


def download(file: HubFile, path: Path, progress: Callable[[int], None]) -> None:
    """Write a file to `path`, and beside it while it is not whole; what an earlier call fetched is kept.

    `progress` is called with the number of its bytes that are here. Raises ModelNotFound, OSError, and the errors of
    huggingface_hub for refusals that stay.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    for is_last_try in (False, True):
        if _fetch_rest(file, partial, progress) == file.digest:
            partial.replace(path)
            return
        partial.unlink()
        if not is_last_try:
            log.warning("the digest of %s does not match, fetching it again", file.name)
    raise ModelNotFound(
        f"The hub sent {file.name} twice with another digest than it names ({file.url}).",
        cure="Try again later, or name another file or revision.",
    )


def begin_with(path: Path, other: Path, byte_count: int) -> None:
    """Let the `download` of a file begin with bytes of another, unless some of it are here."""
    if not bytes_here(path):
        with other.open("rb") as file, path.with_name(path.name + PARTIAL_SUFFIX).open("wb") as partial:
            partial.write(file.read(byte_count))


def bytes_here(path: Path) -> int:
    """Number of bytes of a file that an earlier `download` left here."""
    for each in (path, path.with_name(path.name + PARTIAL_SUFFIX)):
        if each.is_file():
            return each.stat().st_size
    return 0


def _fetch_rest(file: HubFile, partial: Path, progress: Callable[[int], None]) -> str:
    """Fetch the bytes that are missing; returns the digest of the whole."""
    digest = hashlib.sha256()
    if len(file.digest) != SHA256_DIGITS:
        digest = hashlib.sha1(b"blob %d\0" % file.byte_count)  # noqa: S324  # as git names a blob
    with partial.open("a+b") as out:
        if out.tell() > file.byte_count:
            out.truncate(0)
        out.seek(0)
        while piece := out.read(PIECE_BYTES):
            digest.update(piece)
            progress(out.tell())
        for piece in fetch_range(file, out.tell(), file.byte_count):
            out.write(piece)
            digest.update(piece)
            progress(out.tell())
    return digest.hexdigest()


def fetch_range(file: HubFile, first: int, end: int, give_up_seconds: float | None = None) -> Iterator[bytes]:
    """Yield the bytes [first, end) of a file; what is missing after a cut is asked for again.

    Raises ModelNotFound after `give_up_seconds` (GIVE_UP_SECONDS) without a byte, and the errors of huggingface_hub for
    refusals that stay.
    """
    limit_seconds = GIVE_UP_SECONDS if give_up_seconds is None else give_up_seconds
    done, wait_seconds, last_seconds = first, RETRY_FIRST_SECONDS, time.monotonic()
    while done < end:
        try:
            for piece in _pieces(file, done, end):
                done += len(piece)
                yield piece
                wait_seconds, last_seconds = RETRY_FIRST_SECONDS, time.monotonic()
        except _Cut as cut:
            if time.monotonic() - last_seconds > limit_seconds:
                raise ModelNotFound(
                    f"{file.name} could not be fetched from the hub beyond byte {done} of {file.byte_count} for "
                    f"{limit_seconds:.0f} s ({cut}).",
                    cure="Start again when the hub can be reached: the download goes on where it stopped.",
                ) from cut
            log.info("%s: %s; asking for the rest from byte %d", file.name, cut, done)
            time.sleep(wait_seconds)
            wait_seconds = min(wait_seconds * 2, RETRY_LAST_SECONDS)


def _pieces(file: HubFile, first: int, end: int) -> Iterator[bytes]:
    """Yield the bytes [first, end) of a file; raises _Cut if they end early."""
    # not imported above: the hub's client takes half a second to import
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]
    from huggingface_hub.utils._headers import build_hf_headers
    from huggingface_hub.utils._http import get_session, hf_raise_for_status

    headers = {**build_hf_headers(), "Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
    left = end - first
    try:
        with get_session().stream("GET", file.url, headers=headers, timeout=SILENCE_SECONDS) as answer:
            if answer.status_code in RETRIED_STATUSES:
                raise _Cut(f"the hub answers {answer.status_code}")
            if answer.is_error:
                answer.read()
            hf_raise_for_status(answer)
            skipped = first if answer.status_code == HTTPStatus.OK else 0  # it sends the whole file
            for piece in answer.iter_raw():  # as they come: bytes before a cut are kept
                wanted = piece[skipped : skipped + left]
                skipped = max(0, skipped - len(piece))
                left -= len(wanted)
                if wanted:
                    yield wanted
                if not left:
                    return
    except HfHubHTTPError:
        raise
    except HTTPError as error:
        raise _Cut(f"the connection was lost ({type(error).__name__}: {error})") from error
    raise _Cut("the connection ended early")
