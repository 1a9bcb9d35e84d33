"""The definition of equal for greedy tokens in float32 (design D3)."""

from __future__ import annotations

from collections.abc import Sequence

from tests.support.models.whole_model import WholeModel

TIE_GAP = 1e-3  # if the two best logits are closer than this, rounding may choose either


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Return the first position at which two token lists differ, or None."""
    for index, (left, right) in enumerate(zip(expected, got, strict=False)):
        if left != right:
            return index
    return None if len(expected) == len(got) else min(len(expected), len(got))


def assert_equal_or_tied(whole: WholeModel, prompt_ids: Sequence[int], got: Sequence[int], new_tokens: int) -> int:
    """Return 0 if the tokens equal those of transformers, 1 if they diverge at a tie; fail otherwise."""
    expected = whole.generate_once(tuple(prompt_ids), new_tokens)
    parted_at = first_difference(expected, got)
    if parted_at is None:
        return 0
    gap = whole.best_two_gap([*prompt_ids, *expected[:parted_at]])
    assert gap < TIE_GAP, f"token {parted_at} differs where the two best logits are {gap:.2e} apart"
    return 1
