"""Measures what a format of weights does to a model: perplexity and greedy tokens on a text, against float32.

The whole model is needed, but never in memory at once: a few layers at a time compute the whole text, and their hidden
states go on to the next layers. Results are kept in a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from noodle import __version__
from noodle.errors import GenerationFailed, UnsupportedModel
from noodle.model.formats import Quality
from services.stage.executors.base import Fetch, ModelSlice, PackedBatch, Span
from services.stage.executors.candidate import Candidate
from services.stage.executors.hidden_states import cast
from services.stage.executors.load import build_of, load_by
from services.stage.selection.benchmark import MeasureProgress, keep, one_at_a_time, read_kept
from services.stage.worker.logprobs import log_normalizer

FILE_NAME = "quality.json"
TEXT_PATH = Path(__file__).with_name("data") / "quality_text.txt"
MOST_TOKENS = 1024  # of the text, which has 650 words
CHUNK_TOKENS = 128
LAYERS_AT_ONCE = 8
LOGIT_ROWS = 32  # at once: a row is as long as the vocabulary
MOST_MINUTES = 15.0  # that a start may wait for a measurement; beyond that only lossless candidates are used
LOCK_TIMEOUT_SECONDS = 7200.0  # a large model takes long on a small machine
SESSION = "quality"
NO_ROWS = np.zeros(0, np.int64)

LoadLayers = Callable[[int, int], ModelSlice]


@dataclass(kw_only=True)
class ModelQuality:
    """Qualities of one model on one device, each kept or measured against a reference that is computed once."""

    folder: Path
    digest: str
    layer_count: int
    context_length: int
    device: str
    threads: int
    cache_dir: Path
    progress: MeasureProgress
    fetch: Fetch
    _tokens: list[int] = field(default_factory=list)
    _reference: TextScore | None = None

    def of(self, candidate: Candidate, token_seconds: float) -> Quality:
        """Measure a candidate's quality, or read it if it is kept.

        `token_seconds` is the time of a prompt token in all layers. Parts of the model that are not on this machine are
        fetched. Raises UnsupportedModel if the text cannot be tokenized here, or if measuring would take too long.
        """
        parts = (self.digest, self.device, candidate, candidate.kv_dtype, build_of(candidate.executor), __version__)
        key = " | ".join(map(str, parts))
        with one_at_a_time(self.cache_dir, self.progress, LOCK_TIMEOUT_SECONDS):  # other stages then find it
            if (known := read_kept(self.cache_dir / FILE_NAME, key, Quality)) is not None:
                return known
            self._tokens = self._tokens or text_tokens(self.folder, self.context_length)
            minutes = 2 * len(self._tokens) * token_seconds / 60  # the reference, and the candidate
            if minutes > MOST_MINUTES:
                raise UnsupportedModel(
                    f"measuring it here would take about {minutes:.0f} minutes, more than {MOST_MINUTES:.0f}",
                    cure=f"Ask for it: NOODLE_EXECUTOR={candidate.executor} and NOODLE_WEIGHTS={candidate.weights}.",
                )
            if self._reference is None:
                self._reference = self._score(Candidate(candidate.executor, "f32", "f32", "float32"))
            quality = quality_of(self._score(candidate), self._reference)
            keep(self.cache_dir / FILE_NAME, key, quality)
            return quality

    def _score(self, candidate: Candidate) -> TextScore:
        load = partial(
            load_by,
            candidate,
            self.folder,
            device=self.device,
            threads=self.threads,
            context_length=self.context_length,
            cache_dir=None,  # converted weights are kept only for the layers that stay loaded
            fetch=self.fetch,
        )
        return score_text(
            load,
            self.layer_count,
            self._tokens,
            lambda done, text: self.progress(done, f"quality of {candidate}: {text}"),
        )


@dataclass(frozen=True, slots=True)
class TextScore:
    """A model's predictions on a text, for each token after the first."""

    losses: npt.NDArray[np.float64]  # [tokens - 1], minus the log-probability of the token that follows
    greedy: npt.NDArray[np.int64]  # [tokens - 1], the most likely token


def text_tokens(folder: Path, context_length: int) -> list[int]:
    """Tokenize the text by the model's tokenizer; raises UnsupportedModel if it cannot be read."""
    import tokenizers  # comes with transformers

    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself
        raise UnsupportedModel(f"{path} cannot be read, so no text can be tried on this model.") from error
    tokens: list[int] = tokenizer.encode(TEXT_PATH.read_text(encoding="utf-8")).ids
    return tokens[: min(MOST_TOKENS, context_length)]


def score_text(
    load: LoadLayers, layer_count: int, tokens: list[int], progress: MeasureProgress, activation_dtype: str = "float32"
) -> TextScore:
    """Compute the text by a few layers at a time, with hidden states in `activation_dtype` between them.

    Raises GenerationFailed if the model overflows.
    """
    batches = []
    for begin in range(0, len(tokens), CHUNK_TOKENS):
        ids = np.array(tokens[begin : begin + CHUNK_TOKENS])
        batches.append(PackedBatch((Span(SESSION, begin, len(ids), len(tokens)),), NO_ROWS, token_ids=ids))
    losses: list[float] = []
    greedy: list[int] = []
    for start in range(0, layer_count, LAYERS_AT_ONCE):
        end = min(start + LAYERS_AT_ONCE, layer_count)
        progress(start / layer_count, f"layers {start} to {end - 1}")
        layers = load(start, end)
        following: list[PackedBatch] = []
        for batch in batches:
            output = layers.forward(batch)
            span = batch.spans[0]
            if output.hidden_states is not None:
                hidden = cast(output.hidden_states, activation_dtype)
                following.append(PackedBatch((span,), NO_ROWS, hidden_states=cast(hidden, "float32")))
            else:
                targets = np.array(tokens[span.first_position + 1 : span.first_position + span.token_count + 1])
                for begin in range(0, len(targets), LOGIT_ROWS):
                    rows = np.arange(begin, min(begin + LOGIT_ROWS, len(targets)))
                    loss, likeliest = _losses(layers.logits_of(rows), targets[rows])
                    losses += loss
                    greedy += likeliest
        layers.release(SESSION)
        batches = following
    return TextScore(np.array(losses), np.array(greedy))


def _losses(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]) -> tuple[list[float], list[int]]:
    """For each row minus the log-probability of its target, and the most likely token."""
    if not np.isfinite(logits).all():
        raise GenerationFailed("the model's logits are not finite numbers in this format.")
    losses = []
    for row, target in zip(logits, targets, strict=True):
        largest, log_sum = log_normalizer(row)
        losses.append(log_sum - float(row[target] - largest))
    return losses, [int(token_id) for token_id in logits.argmax(axis=1)]


def quality_of(score: TextScore, reference: TextScore) -> Quality:
    return Quality(
        perplexity_ratio=float(np.exp(score.losses.mean() - reference.losses.mean())),
        greedy_agreement=float((score.greedy == reference.greedy).mean()),
        tokens=len(reference.losses),
    )
