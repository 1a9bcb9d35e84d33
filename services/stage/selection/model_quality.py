"""The quality of this model in a format: from the file where it is kept, or measured now against float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from noodle import __version__
from noodle.errors import UnsupportedModel
from noodle.model.formats import Quality
from services.stage.executors.candidate import Candidate
from services.stage.executors.load import build_of, load_by
from services.stage.executors.reading import Fetch
from services.stage.selection.benchmark import one_at_a_time
from services.stage.selection.quality import TextScore, keep_quality, kept_quality, quality_of, score_text, text_tokens

MOST_MINUTES = 15.0  # a start may wait for what a format does to a model; else only what changes nothing is used
LOCK_TIMEOUT_SECONDS = 7200.0  # a large model takes long on a small machine


class ModelQuality:
    """One model on one device; the reference is computed once, by the executor that the first candidate has."""

    def __init__(
        self,
        folder: Path,
        digest: str,
        layer_count: int,
        context_length: int,
        device: str,
        threads: int,
        cache_dir: Path,
        tell: Callable[[float, str], None],
        fetch: Fetch,
    ) -> None:
        self._folder, self._digest, self._layer_count = folder, digest, layer_count
        self._context_length, self._device, self._threads = context_length, device, threads
        self._cache_dir, self._tell, self._fetch = cache_dir, tell, fetch
        self._tokens: list[int] = []
        self._reference: TextScore | None = None

    def of(self, candidate: Candidate, token_seconds: float) -> Quality:
        """Raises UnsupportedModel when this model's text can not be read here, or would take too long.

        `token_seconds` is what a prompt's token takes in all layers. The whole model is read for it, and what of it is
        not on this machine is fetched.
        """
        parts = (self._digest, self._device, candidate, candidate.kv_dtype, build_of(candidate.executor), __version__)
        key = " | ".join(map(str, parts))
        with one_at_a_time(self._cache_dir, self._tell, LOCK_TIMEOUT_SECONDS):  # the other stages find it then
            if (known := kept_quality(self._cache_dir, key)) is not None:
                return known
            self._tokens = self._tokens or text_tokens(self._folder, self._context_length)
            minutes = 2 * len(self._tokens) * token_seconds / 60  # the reference, and the candidate
            if minutes > MOST_MINUTES:
                raise UnsupportedModel(
                    f"measuring it here would take about {minutes:.0f} minutes, more than {MOST_MINUTES:.0f}",
                    cure=f"Ask for it: NOODLE_EXECUTOR={candidate.executor} and NOODLE_WEIGHTS={candidate.weights}.",
                )
            if self._reference is None:
                self._reference = self._score(Candidate(candidate.executor, "f32", "f32", "float32"))
            quality = quality_of(self._score(candidate), self._reference)
            keep_quality(self._cache_dir, key, quality)
            return quality

    def _score(self, candidate: Candidate) -> TextScore:
        load = partial(
            load_by,
            candidate,
            self._folder,
            device=self._device,
            threads=self._threads,
            context_length=self._context_length,
            cache_dir=None,  # what is made of the weights is kept for the layers that are loaded to stay
            fetch=self._fetch,
        )
        return score_text(
            load,
            self._layer_count,
            self._tokens,
            lambda done, what: self._tell(done, f"quality of {candidate}: {what}"),
        )
