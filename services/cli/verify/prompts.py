"""The prompts of `noodle verify`: 20 of about 5 to 400 tokens, in English and German, with numbers and code."""

from __future__ import annotations

_RIVER = """\
The river comes down from the hills in three steps. At the first it is a noisy child that jumps from stone to \
stone and is too cold to bathe in even in August. At the second, below the old paper mill, it has learned to \
carry things: leaves, branches, once a whole wooden bridge, which the people of the village found two days later \
in a meadow eleven kilometres further down, upside down but otherwise in good health. At the third step it \
enters the plain and becomes slow and brown and a little proud, as rivers do when ships begin to use them. \
Walkers who follow it from the spring to the harbour need four days and good shoes. On the first evening there \
is an inn whose owner cooks only what she likes herself, so that guests either stay for a week or leave before \
breakfast. On the second evening there is nothing at all, and one sleeps under a roof of hazel and listens to \
the water, which talks all night and never repeats itself. On the third evening the first lights of the town can \
be seen, and most people walk faster from there on, although the lights do not come nearer for hours. The fourth \
day is flat. One meets cyclists, dogs, a man who measures the height of the water and writes it into a book that \
his grandfather began. He will tell you, if you ask, that the river has never been the same two years in a row, \
and that the book proves it: dry summers, wet ones, the winter in which it froze so hard that the market was \
held on the ice, and the spring after that, when it took the market hall with it by way of a reply. Then he \
closes the book, because it is noon, and at noon he eats. At the end stands the harbour with its two cranes, one \
of which works. The river does not notice any of it. It goes out into the bay the way a sentence ends that has \
said what it had to say, and if you stand on the last pier in the evening, you can see where the brown water and \
the green water"""

_WORKSHOP = """\
Before you replace the bearing, write down what the machine does wrong, and when. Does it howl only while it is \
cold? Does the sound follow the speed of the shaft, or that of the belt? An hour with a notebook has saved many \
a bearing that was not broken. If you are sure, proceed as follows. First, disconnect the power and hang your \
own lock on the switch; a note is not a lock. Second, take a photograph of everything that you are about to \
loosen. Third, remove the guard (six screws, 5 mm), then the belt, then the pulley, which sits on a cone and \
comes off with a puller and patience, never with a hammer. Clean the seat of the bearing with a cloth that \
leaves no threads. Measure the shaft in three places: 24.98 mm or more is good, 24.95 mm is the limit, and below \
that the new bearing will turn on the shaft instead of on its balls and you will do all of this again in a \
month. Warm the new bearing to 90 degrees in oil, not over a flame, and slide it on in one go, because it will \
not wait for you"""


def _first_words(text: str, count: int) -> str:
    return " ".join(text.split()[:count])


PROMPTS: tuple[str, ...] = (
    "The best thing about winter",
    "Once upon a time, in a",
    "Question: What is the capital of France?\nAnswer:",
    "2, 3, 5, 7, 11, 13,",
    "def greatest_common_divisor(a: int, b: int) -> int:\n    ",
    "Dear Ms Okafor,\n\nthank you for your letter of 4 March. I am sorry that the parcel",
    "Der Zug nach Leipzig hatte an diesem Morgen zwanzig Minuten Verspätung, und auf dem Bahnsteig",
    '{"name": "Ada", "born": 1815, "works": ["Notes on the Analytical Engine"], "languages": ["English", ',
    "Here is a simple recipe for bread. You need flour, water, salt, yeast and one evening. First, mix",
    "for (int row = 0; row < rows; row++) {\n    for (int column = 0; column < columns; column++) {\n        sum +=",
    _first_words(_RIVER, 40),
    _first_words(_WORKSHOP, 55),
    _first_words(_RIVER, 75),
    _first_words(_WORKSHOP, 95),
    _first_words(_RIVER, 120),
    _first_words(_WORKSHOP, 140),
    _first_words(_RIVER, 165),
    _first_words(_RIVER, 215),
    _first_words(_RIVER, 270),
    _first_words(_RIVER, 355),
)
