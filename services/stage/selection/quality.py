"""What a format of weights does to a model: perplexity and greedy tokens on a text, against float32 on the same text.

The whole model is needed once, but never in memory at once: a few layers at a time compute the whole text, and their
hidden states go on to the next ones. Kept in a file beside the weights that it is about. Knows no executor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from noodle.errors import GenerationFailed, UnsupportedModel
from noodle.model.formats import Quality
from services.stage.executors.base import ModelSlice, PackedBatch, Span
from services.stage.executors.hidden_states import recast
from services.stage.selection.kept_file import read_kept, write_kept
from services.stage.worker.logprobs import log_normalizer

log = logging.getLogger(__name__)

FILE_NAME = "quality.json"
TEXT_PATH = Path(__file__).with_name("data") / "quality_text.txt"
MOST_TOKENS = 1024  # of the text: it has 650 words
CHUNK_TOKENS = 128
LAYERS_AT_ONCE = 8
LOGIT_ROWS = 32  # at once: a row is as long as the vocabulary
SESSION = "quality"
NO_ROWS = np.zeros(0, np.int64)

LoadLayers = Callable[[int, int], ModelSlice]
Tell = Callable[[float, str], None]


@dataclass(frozen=True, slots=True)
class TextScore:
    """A model's word on a text, by token after the first."""

    losses: npt.NDArray[np.float64]  # [tokens - 1], minus the log-probability of the token that follows
    greedy: npt.NDArray[np.int64]  # [tokens - 1], the likeliest one


def text_tokens(folder: Path, context_length: int) -> list[int]:
    """The text's tokens by the model's own tokenizer; raises UnsupportedModel when it can not be read here."""
    import tokenizers  # comes with transformers

    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself
        raise UnsupportedModel(f"{path} can not be read, so no text can be tried on this model.") from error
    tokens: list[int] = tokenizer.encode(TEXT_PATH.read_text(encoding="utf-8")).ids
    return tokens[: min(MOST_TOKENS, context_length)]


def score_text(
    load: LoadLayers, layer_count: int, tokens: list[int], tell: Tell, activation_dtype: str = "float32"
) -> TextScore:
    """Compute the text by a few layers at a time, with hidden states in `activation_dtype` between them.

    Raises GenerationFailed when the model overflows.
    """
    chunks = [(begin, min(begin + CHUNK_TOKENS, len(tokens))) for begin in range(0, len(tokens), CHUNK_TOKENS)]
    batches = [
        PackedBatch((Span(SESSION, begin, end - begin, len(tokens)),), NO_ROWS, token_ids=np.array(tokens[begin:end]))
        for begin, end in chunks
    ]
    losses: list[float] = []
    greedy: list[int] = []
    for start in range(0, layer_count, LAYERS_AT_ONCE):
        tell(start / layer_count, f"layers {start} to {min(start + LAYERS_AT_ONCE, layer_count) - 1}")
        layers = load(start, min(start + LAYERS_AT_ONCE, layer_count))
        following: list[PackedBatch] = []
        for batch in batches:
            output = layers.forward(batch)
            span = batch.spans[0]
            if output.hidden_states is not None:
                hidden = recast(output.hidden_states, activation_dtype)
                following.append(PackedBatch((span,), NO_ROWS, hidden_states=recast(hidden, "float32")))
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
    """Of each row minus the log-probability of its target, and the likeliest token."""
    if not np.isfinite(logits).all():
        raise GenerationFailed("the model's logits are not finite numbers in this format.")
    losses = []
    for row, target in zip(logits, targets, strict=True):
        largest, log_sum = log_normalizer(row)
        losses.append(log_sum - float(row[target] - largest))
    return losses, [int(token_id) for token_id in logits.argmax(axis=1)]


def quality_of(score: TextScore, reference: TextScore) -> Quality:
    """One score against float32's."""
    return Quality(
        perplexity_ratio=float(np.exp(score.losses.mean() - reference.losses.mean())),
        greedy_agreement=float((score.greedy == reference.greedy).mean()),
        tokens=len(reference.losses),
    )


def kept_quality(cache_dir: Path, key: str) -> Quality | None:
    """What was measured before, None when nothing was or the file is damaged."""
    entry = read_kept(cache_dir / FILE_NAME).get(key)
    try:
        return None if entry is None else msgspec.convert(entry, Quality)
    except msgspec.ValidationError:
        return None


def keep_quality(cache_dir: Path, key: str, quality: Quality) -> None:
    """Keep it for the next start; what can not be kept is measured anew."""
    kept = read_kept(cache_dir / FILE_NAME)
    kept[key] = msgspec.to_builtins(quality)
    try:
        write_kept(cache_dir / FILE_NAME, kept)
    except OSError as error:
        log.warning("the quality of %s is not kept: %s", key, error)
