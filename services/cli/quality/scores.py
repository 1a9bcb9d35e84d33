"""The scores of a text by one model in one format, kept in a file, and what two of them say of each other."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

from noodle.folders import write_atomically, writing
from noodle.model.formats import STORED

EXACT = "exact"
REFERENCES = (EXACT, STORED)  # the better one first


class Piece(Struct, frozen=True):
    """A paragraph: its tokens after the first, their log-probabilities, and the most likely token at each place."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    likeliest: tuple[str, ...]


class TextScore(Struct, frozen=True):
    """A model's predictions on the text, as far as it is scored."""

    model: str
    model_digest: str
    format: str
    noodle_version: str
    pieces: tuple[Piece, ...] = ()

    @property
    def logprobs(self) -> list[float]:
        return [each for piece in self.pieces for each in piece.logprobs]

    @property
    def likeliest(self) -> list[str]:
        return [each for piece in self.pieces for each in piece.likeliest]


class Quality(Struct, frozen=True):
    """One format, against a reference."""

    format: str
    tokens: int
    perplexity: float
    perplexity_ratio: float  # to the reference's
    ratio_error: float  # standard error of that ratio on a text of this length
    greedy_agreement: float  # share of places with the same most likely token


def quality_of(score: TextScore, reference: TextScore) -> Quality:
    """Compare two whole scores of the same tokens."""
    pairs = list(zip(score.likeliest, reference.likeliest, strict=True))
    lost = [other - one for one, other in zip(score.logprobs, reference.logprobs, strict=True)]
    ratio = math.exp(statistics.fmean(lost))
    return Quality(
        format=score.format,
        tokens=len(pairs),
        perplexity=math.exp(-statistics.fmean(score.logprobs)),
        perplexity_ratio=ratio,
        ratio_error=ratio * statistics.pstdev(lost) / math.sqrt(len(lost)),
        greedy_agreement=sum(one == other for one, other in pairs) / len(pairs),
    )


def reference_of(scores: Sequence[TextScore]) -> TextScore:
    """The score that others are compared with: exact, else the file's own formats, else the first."""
    return min(scores, key=lambda each: (*REFERENCES, each.format).index(each.format))


def score_path(folder: Path, score: TextScore) -> Path:
    name = re.sub(r"[^0-9A-Za-z_.]+", "-", score.format)
    return folder / f"{score.model_digest[:16]}-{name}-{score.noodle_version}.json"


def read_scores(folder: Path, model_digest: str, noodle_version: str) -> list[TextScore]:
    """Every kept score of a model by this version; a damaged file counts as none, since it can be made again."""
    found = []
    for path in sorted(folder.glob(f"{model_digest[:16]}-*-{noodle_version}.json")):
        try:
            score = msgspec.json.decode(path.read_bytes(), type=TextScore)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            continue
        if score.model_digest == model_digest and path == score_path(folder, score):
            found.append(score)
    return found


def keep_score(folder: Path, score: TextScore) -> None:
    """Write a score, whole or not; raises NotWritable."""
    path = score_path(folder, score)
    with writing(path, "NOODLE_CACHE_DIR"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, msgspec.json.encode(score))
