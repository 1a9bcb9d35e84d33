"""Turns token ids into text as they come: only whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT_CHARACTER = "\ufffd"
MAXIMUM_BYTES_IN_DOUBT = 3  # an unfinished UTF-8 character has at most three of its four bytes
MAXIMUM_WINDOW_TOKENS = 32
CONTEXT_TOKENS = 8  # of the prompt: enough for a character and for what a decoder does to the first word

Decode = Callable[[list[int]], str]


class TextStream:
    """The text of one answer: push its tokens one by one, finish at the end.

    `context_ids` are the prompt's ids if the answer continues the prompt's text: sentencepiece vocabularies drop the
    space before a text's first word, so that "The sky is" would continue with "blue" and not with " blue".
    """

    def __init__(self, decode: Decode, stop: tuple[str, ...] = (), context_ids: Sequence[int] = ()) -> None:
        self._detokenizer = Detokenizer(decode, context_ids)
        self._stop_strings = StopStrings(stop)
        self.characters = 0  # of the tokens so far, including those that are held back

    @property
    def finished(self) -> bool:
        """Whether a stop string has come; nothing may be pushed after it."""
        return self._stop_strings.found

    def push(self, token_id: int) -> str:
        """Take the next token. Returns the text that is final; unfinished characters or stop strings are held back."""
        if self.finished:
            raise ValueError("a token was pushed after the stop string")
        return self._release(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """Return the text that was held back. An unfinished character becomes U+FFFD."""
        if self.finished:
            return ""
        text = self._release(self._detokenizer.finish())
        return text if self.finished else text + self._stop_strings.finish()

    def _release(self, text: str) -> str:
        self.characters += len(text)
        return self._stop_strings.push(text)


def text_offsets(decode: Decode, token_ids: Sequence[int]) -> tuple[str, list[int]]:
    """Return the text of token ids, and for each token the number of characters before its own."""
    detokenizer = Detokenizer(decode)
    pieces: list[str] = []
    offsets: list[int] = []
    characters = 0
    for token_id in token_ids:
        offsets.append(characters)
        pieces.append(detokenizer.push(token_id))
        characters += len(pieces[-1])
    return "".join(pieces) + detokenizer.finish(), offsets


class Detokenizer:
    """The text of a growing list of tokens, at a cost per token that does not grow with it.

    Only a window of the last tokens is decoded. It starts where the text was whole, at least one token before the
    newest, so that what a decoder does to the first token of a text (dropping its space) affects a token whose text is
    out already. All texts together equal the decoded whole, with one exception: sentencepiece decoders turn a whole run
    of byte tokens into U+FFFD, one for each, if one of its bytes is wrong. Here the characters before that byte are out
    by then and stay; and U+FFFD itself, written as bytes several times in a row, looks the same and comes out once for
    each byte.
    """

    def __init__(self, decode: Decode, context_ids: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context_ids[-CONTEXT_TOKENS:])
        self._text = decode(self._window) if self._window else ""
        self._shown = self._text  # the part of it that is out
        self._whole_tokens = 0 if self._text.endswith(REPLACEMENT_CHARACTER) else len(self._window)

    def push(self, token_id: int) -> str:
        """Take the next token. Returns the text that it makes final."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text == self._text and not self._decode([token_id, token_id]):
            self._window.pop()  # special, or outside the vocabulary: it never has text
            return ""
        self._text = text
        in_doubt = self._characters_in_doubt()
        fresh = self._take(in_doubt)
        self._shorten_window(text_is_whole=in_doubt == 0)
        return fresh

    def finish(self) -> str:
        return self._take(0)

    def _characters_in_doubt(self) -> int:
        """Count the characters at the end that may change when more bytes come.

        A byte-level decoder shows an unfinished character as one U+FFFD. A sentencepiece decoder shows one for each
        byte of the run, but at most three of its tokens, a byte each, are the unfinished character.
        """
        trailing = len(self._text) - len(self._text.rstrip(REPLACEMENT_CHARACTER))
        if len(self._window) - self._whole_tokens > MAXIMUM_BYTES_IN_DOUBT:
            return min(trailing, 1)
        return trailing

    def _take(self, in_doubt: int) -> str:
        """Return the text before the characters in doubt that is not out yet."""
        end = len(self._text) - in_doubt
        if not self._text.startswith(self._shown) and (not in_doubt or end >= len(self._shown)):
            self._leave_a_spoiled_run()
            end = len(self._text) - in_doubt
        fresh = self._text[len(self._shown) : end]
        if fresh:
            self._shown = self._text[:end]
        return fresh

    def _leave_a_spoiled_run(self) -> None:
        """Start the window after the text that is out, because that text now reads differently."""
        if self._whole_tokens:
            self._window = self._window[self._whole_tokens :]
            self._text = self._decode(self._window)
            self._shown = ""
            self._whole_tokens = 0
        else:
            self._shown = self._text[: len(self._shown.rstrip(REPLACEMENT_CHARACTER))]

    def _shorten_window(self, text_is_whole: bool) -> None:
        """Start the window at the last whole text, or anywhere if it grows too long; text that is out stays out."""
        must_shorten = len(self._window) > MAXIMUM_WINDOW_TOKENS
        start = MAXIMUM_WINDOW_TOKENS // 2 if must_shorten else self._whole_tokens if text_is_whole else 0
        text = self._decode(self._window[start:]) if start else ""
        if text or must_shorten:
            kept_back = len(self._text) - len(self._shown)
            self._window = self._window[start:]
            self._text = text
            self._shown = text[: max(0, len(text) - kept_back)]
            self._whole_tokens = max(0, self._whole_tokens - start)
        if text_is_whole:
            self._whole_tokens = len(self._window)


class StopStrings:
    """Releases text up to the first complete stop string; the longer one counts if two end there.

    Text that could be the beginning of one is held back. The cost of a character does not depend on earlier text.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self._stop = stop
        self._borders = [_borders(text) for text in stop]
        self._matched = [0] * len(stop)  # characters of each stop string that the text so far ends with
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return the text so far that is not part of a stop string; nothing after one is found."""
        if not self._stop:
            return text
        if self.found:
            return ""
        for index, character in enumerate(text):
            longest = self._match(character)
            if longest:
                self.found = True
                released = (self._held + text[: index + 1])[:-longest]
                self._held = ""
                return released
        self._held += text
        hold = max(self._matched)
        released = self._held[: len(self._held) - hold]
        self._held = self._held[len(self._held) - hold :]
        return released

    def finish(self) -> str:
        """Return the text that was held back and is no stop string."""
        held, self._held = self._held, ""
        return held

    def _match(self, character: str) -> int:
        """Advance every stop string by one character. Returns the length of the longest that is complete, or 0."""
        longest = 0
        for number, stop in enumerate(self._stop):
            matched = self._matched[number]
            while matched and stop[matched] != character:
                matched = self._borders[number][matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                longest = max(longest, matched)
                matched = self._borders[number][matched - 1]
            self._matched[number] = matched
        return longest


def _borders(text: str) -> list[int]:
    """Return for each prefix of the text the length of its longest proper prefix that is also its suffix (KMP)."""
    borders = [0] * len(text)
    length = 0
    for index in range(1, len(text)):
        while length and text[index] != text[length]:
            length = borders[length - 1]
        if text[index] == text[length]:
            length += 1
        borders[index] = length
    return borders
