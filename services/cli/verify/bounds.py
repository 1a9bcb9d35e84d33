"""What "equal to the unsplit model" means for each number format (design D3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from noodle.cluster.measuring import Difference, PromptResult
from noodle.errors import UnsupportedModel


@dataclass(frozen=True)
class Bound:
    """The limits for a cluster's difference from the unsplit model."""

    largest_logprob_error: float
    top1_agreement: float  # expected share of tokens that are the reference's most likely, at the least
    largest_tie_gap: float | None = None  # logit gap within which a token may differ; None: any


# In float32 two orders of the same sum differ by 2e-4 in the largest logit (measured), so a token may differ only if
# the two best are closer than 1e-3, and only once in TOKENS_PER_TIE tokens. The bounds of float16 and bfloat16 follow
# from their rounding and are not yet confirmed on real cards.
BOUNDS = {
    "float32": Bound(1e-3, 0.0, largest_tie_gap=1e-3),
    "float16": Bound(0.05, 0.95),
    "bfloat16": Bound(0.3, 0.90),
    # ggml's: about twice what was measured on 785 tokens of the default model (0.03, 0.1, 0.5 and 5.5)
    "f16": Bound(0.1, 0.95),
    "bf16": Bound(0.3, 0.90),
    "q8_0": Bound(1.0, 0.85),
    "stored": Bound(1.0, 0.85),
    "q4_K": Bound(8.0, 0.45),
    "q4_0": Bound(8.0, 0.45),
}
# Against the same executor, formats and file in one process. Where noodle's kernels compute on one kind of processor no
# bit of a logit differs (measured: 100 %, and 2e-8 from the sum of a log-probability). The bound is for those without
# these kernels, and for machines of several instruction sets, whose ggml differs in some operations (ADR 37): measured
# with ggml's own products on 640 tokens of the default model, whose file is Q4_1, 0.25 and 98.1 %.
SAME_BOUNDS = {**BOUNDS, "stored": Bound(0.75, 0.94)}
# dtypes of the unsplit model; ggml's formats are compared with the weights that they were made from
REFERENCE_DTYPES = ("float32", "float16", "bfloat16")
TOKENS_PER_TIE = 1000  # tokens of which one may differ by a tie
CHANCE = 0.999  # a format at its bound holds with this probability, however few tokens are compared
ENOUGH_TOKENS = 500  # of fewer the advice is to compare more, because chance still moves the bound much


@dataclass(frozen=True)
class Verdict:
    """Whether the bound holds, and each limit that is broken."""

    dtype: str
    tokens: int
    top1_agreement: float
    largest_logprob_error: float
    broken: tuple[str, ...]


def format_of(stage: Mapping[str, Any]) -> str:
    """Return the name of a stage's bound from what the coordinator reports about it."""
    dtype = str(stage.get("dtype"))
    if stage.get("executor") == "ggml" and (stage.get("weights"), stage.get("kv_dtype")) != ("f32", "f32"):
        return str(stage["weights"])
    hops = [str(each) for each in stage.get("hop_dtypes") or []]
    return "q8_0" if "int8" in hops else loosest([dtype, *hops])


def reference_dtype(bound: str) -> str:
    return bound if bound in REFERENCE_DTYPES else "float32"


def loosest(dtypes: Sequence[str]) -> str:
    """Return the format with the loosest bound; raises UnsupportedModel for a format without one."""
    order = list(BOUNDS)
    for dtype in dtypes:
        if dtype not in BOUNDS:
            raise UnsupportedModel(f"`noodle verify` has no bound for {dtype}.", cure=f"It has bounds for {order}.")
    return max(dtypes, key=order.index)


def judge(dtype: str, bound: Bound, results: Sequence[PromptResult]) -> Verdict:
    """Hold the results against a bound; `dtype` is the name of the format that it is for."""
    tokens = sum(result.tokens for result in results)
    differences = [difference for result in results for difference in result.differences]
    agreement = 1 - len(differences) / tokens if tokens else 0.0
    error = max((result.largest_logprob_error for result in results), default=0.0)
    broken = []
    if not tokens:
        broken.append("nothing was generated")
    if not error <= bound.largest_logprob_error:  # written so that not-a-number breaks it
        broken.append(f"a log-probability differs by {error:.2g}, the bound is {bound.largest_logprob_error:g}")
    allowed = allowed_differences(tokens, bound.top1_agreement)
    if len(differences) > allowed:
        broken.append(
            f"{len(differences)} of {tokens} tokens are not the unsplit model's most likely; "
            f"the bound of {bound.top1_agreement:.0%} and chance allow {allowed}"
        )
    if bound.largest_tie_gap is not None:
        broken += _broken_ties(differences, tokens, bound.largest_tie_gap)
    return Verdict(dtype, tokens, agreement, error, tuple(broken))


def allowed_differences(tokens: int, agreement: float) -> int:
    """The most tokens that differ with probability CHANCE if each one differs with probability 1 - `agreement`."""
    if not 0 < agreement < 1:
        return tokens if agreement <= 0 else 0
    probability = 0.0  # of at most `count` differences
    for count in range(tokens):
        ways = math.lgamma(tokens + 1) - math.lgamma(count + 1) - math.lgamma(tokens - count + 1)
        probability += math.exp(ways + count * math.log(1 - agreement) + (tokens - count) * math.log(agreement))
        if probability >= CHANCE:
            return count
    return tokens


def advice(verdict: Verdict) -> str:
    """What a person does about a broken bound."""
    if verdict.tokens < ENOUGH_TOKENS:
        return "Run `noodle verify` without --prompts and --new-tokens: more tokens show more surely what is wrong."
    if verdict.dtype == "float32":
        return "A stage computes wrongly: stop it (`noodle status` lists them), or let it compute by NOODLE_DEVICE=cpu."
    return (
        "Start every stage with NOODLE_QUALITY=exact and run `noodle verify` again. If that holds, the format rounds "
        "more than usual for this model; if it does not, a stage computes wrongly (`noodle status` lists them)."
    )


def _broken_ties(differences: Sequence[Difference], tokens: int, largest_gap: float) -> list[str]:
    far = [each for each in differences if not each.logit_gap < largest_gap]
    allowed = max(1, tokens // TOKENS_PER_TIE)
    broken = []
    if far:
        worst = max(each.logit_gap for each in far)
        broken.append(f"{len(far)} tokens differ by more than rounding (a logit gap of {worst:.2g})")
    if len(differences) > allowed:
        broken.append(f"{len(differences)} tokens differ, the bound is {allowed} of {tokens}")
    return broken
