"""Scores a text paragraph by paragraph on the running cluster, and compares the formats that it was started with."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from noodle import __version__
from noodle.config.environment import command_config, process_environment
from noodle.errors import ConfigurationError, GenerationFailed, NotReady
from services.cli.client.health import require_ready
from services.cli.client.http_client import post_json
from services.cli.client.progress import Progress, open_progress
from services.cli.client.reports import print_json, print_table
from services.cli.client.target import Target, find_target
from services.cli.quality.scores import (
    EXACT,
    REFERENCES,
    Piece,
    Quality,
    TextScore,
    keep_score,
    quality_of,
    read_scores,
    reference_of,
)

TEXT_PATH = Path(__file__).with_name("text.txt")
FIGURES = ("tokens", "perplexity", "times the reference", "same likeliest token")


def quality(options: argparse.Namespace) -> int:
    """Score the text in the cluster's format unless that was done, and print every kept format of this model."""
    config = command_config(process_environment())
    target = find_target(config, options.url, options.key)
    health = require_ready(target)
    computed = format_of([stage for stage in health.stages if stage.get("layers")])
    digest, model = str(health.answer.get("model_digest") or ""), str(health.answer.get("model") or "")
    if not digest:
        raise NotReady(f"The cluster at {target.url} has no plan yet.", cure="See `noodle status`.")
    folder = config.cache_dir / "quality"
    paragraphs = read_paragraphs()
    kept = {each.format: each for each in read_scores(folder, digest, __version__)}
    if options.weights in (None, computed):
        score = kept.get(computed) or TextScore(model, digest, computed, __version__)
        with contextlib.closing(open_progress(sys.stderr)) as progress:
            kept[computed] = score_text(target, model, score, paragraphs, folder=folder, progress=progress)
    whole = [each for each in kept.values() if len(each.pieces) == len(paragraphs)]
    if options.weights is not None and all(each.format != options.weights for each in whole):
        raise ConfigurationError(
            f"The cluster computes in {computed}, and no earlier run in {options.weights} is kept.",
            cure=f"Start every stage with {setting_of(options.weights)}, then run `noodle quality` again.",
        )
    print_qualities(whole, options.weights, as_json=options.json)
    return 0


def read_paragraphs() -> list[str]:
    """The paragraphs of the text, each scored by itself."""
    return [text.strip() for text in TEXT_PATH.read_text(encoding="utf-8").split("\n\n") if text.strip()]


def format_of(stages: Sequence[Mapping[str, Any]]) -> str:
    """What the cluster computes in: exact, a value of NOODLE_WEIGHTS, or what differs between its stages."""
    names = set()
    for stage in stages:
        weights, kv_dtype, dtype = (str(stage.get(field)) for field in ("weights", "kv_dtype", "dtype"))
        hops = sorted({str(each) for each in stage.get("hop_dtypes") or []} - {dtype})
        name = EXACT if (weights, kv_dtype) == ("f32", "f32") else weights
        names.add(" ".join([name, *(f"sent in {each}" for each in hops)]))
    return " + ".join(sorted(names))


def setting_of(name: str) -> str:
    return "NOODLE_QUALITY=exact" if name == EXACT else f"NOODLE_WEIGHTS={name}"


def score_text(
    target: Target, model: str, score: TextScore, paragraphs: Sequence[str], *, folder: Path, progress: Progress
) -> TextScore:
    """Score the paragraphs that are still missing, keeping each in `folder`; raises NoodleError."""
    for index in range(len(score.pieces), len(paragraphs)):
        done = f"{score.format}: {index} of {len(paragraphs)} paragraphs"
        progress.show("score", done, index / len(paragraphs))
        piece = score_paragraph(target, model, paragraphs[index])
        score = replace(score, pieces=(*score.pieces, piece))
        keep_score(folder, score)
    progress.finish("score")
    return score


def score_paragraph(target: Target, model: str, text: str) -> Piece:
    """Ask for the log-probabilities of a text's own tokens; raises NoodleError."""
    body = {"model": model, "prompt": text, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
    answer = post_json(f"{target.url}/v1/completions", body, target.credential)
    try:
        found = answer["choices"][0]["logprobs"]
        likely: list[dict[str, float]] = [found["top_logprobs"][index] for index in range(1, len(found["tokens"]))]
        return Piece(
            tuple(str(token) for token in found["tokens"][1:]),
            tuple(float(logprob) for logprob in found["token_logprobs"][1:]),
            tuple(max(each, key=lambda token: each[token]) for each in likely),
        )
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise GenerationFailed(
            f"{target.url}/v1/completions answered without log-probabilities of the prompt ({error!r}).",
            cure="Use the same version of noodle for the coordinator and this command.",
        ) from error


def print_qualities(scores: Sequence[TextScore], weights: str | None, *, as_json: bool) -> None:
    """Print the formats against the reference, or what is needed to compare them."""
    reference = reference_of(scores)
    shown = [each for each in scores if weights in (None, each.format) or each is reference]
    found = [quality_of(each, reference) for each in shown if _same_tokens(each, reference)]
    found.sort(key=lambda each: (each.format != reference.format, each.perplexity))
    if as_json:
        print_json({"model": reference.model, "reference": reference.format, "formats": found})
        return
    print(f"{reference.model}, against {reference.format}:")
    print_table(("format", *FIGURES), [_cells(each) for each in found], right=FIGURES)
    if reference.format not in REFERENCES:
        print(f"To compare with the file's own formats, start every stage without {setting_of(reference.format)}.")
    elif len(found) == 1:
        print("To compare a format, start every stage with it (NOODLE_WEIGHTS=q8_0), then run this again.")


def _same_tokens(score: TextScore, reference: TextScore) -> bool:
    return [piece.tokens for piece in score.pieces] == [piece.tokens for piece in reference.pieces]


def _cells(each: Quality) -> tuple[str, ...]:
    return (
        each.format,
        str(each.tokens),
        f"{each.perplexity:.3f}",
        f"{each.perplexity_ratio:.4f} ± {each.ratio_error:.4f}",
        f"{each.greedy_agreement:.1%}",
    )
