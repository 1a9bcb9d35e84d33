"""What "equal" means for greedy tokens in float32 (design D3)."""

from __future__ import annotations

from collections.abc import Sequence

from tests.support.models.whole_model import WholeModel

TIE_GAP = 1e-3  # two best logits closer than this are a tie: rounding may choose either


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Where two token lists part, None when they are equal."""
    for index, (left, right) in enumerate(zip(expected, got, strict=False)):
        if left != right:
            return index
    return None if len(expected) == len(got) else min(len(expected), len(got))


def assert_equal_or_tied(whole: WholeModel, prompt_ids: Sequence[int], got: Sequence[int], new_tokens: int) -> int:
    """0 when the tokens equal transformers' own, 1 when they part at a tie; fails otherwise."""
    expected = whole.generate_once(tuple(prompt_ids), new_tokens)
    parted_at = first_difference(expected, got)
    if parted_at is None:
        return 0
    gap = whole.best_two_gap([*prompt_ids, *expected[:parted_at]])
    assert gap < TIE_GAP, f"token {parted_at} differs where the two best logits are {gap:.2e} apart"
    return 1
