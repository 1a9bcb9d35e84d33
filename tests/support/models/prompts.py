"""Twenty prompts of 5 to about 400 tokens, the same for every test and figure of the real model."""

from __future__ import annotations

_OPENINGS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on a mountain because",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam, I am writing to complain about",
    "Der Zug nach Berlin fährt heute",
    "The three laws of motion, in plain words, are as follows. First,",
    "A recipe for bread: take 500 g of flour,",
    "In computer networks, a packet is",
)
_PARAGRAPH = (
    "A home network joins the machines of one household. A laptop with a small graphics card stands in the study, "
    "an older computer without one hums under the stairs, and both are idle for most of the day. Someone who wants to "
    "run a language model on them has to decide which of the two computes which part, and what it costs to send the "
    "numbers from one to the other. The cable in the wall carries about a hundred megabytes each second; the radio "
    "link through two walls carries a tenth of that, and on some evenings less. "
)
PROMPTS: tuple[str, ...] = (
    *_OPENINGS,
    *(_PARAGRAPH[: 120 * length] + opening for length, opening in enumerate(_OPENINGS[:5], start=1)),
    *(_PARAGRAPH * repeats + opening for repeats, opening in ((1, "So"), (2, "In short,"), (2, "The best plan is"))),
    _PARAGRAPH * 3 + "To sum up, the owner should",
    _PARAGRAPH * 3 + _PARAGRAPH[:250] + "Question: which machine is the bottleneck? Answer:",
)
