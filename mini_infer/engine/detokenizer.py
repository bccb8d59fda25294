"""Token ids to text while they come: never half a character, never half a stop string."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what decoding bytes that are no character, or not yet one, gives
_CONTEXT = 6  # prompt tokens that the first generated one is decoded with: its leading space depends on them


class Detokenizer:
    """Decodes one growing sequence.

    A token alone has no text: a Chinese character or an emoji may span several, and whether a word starts with a space
    can depend on the token before. So a short window of tokens is decoded again at each step, and only what is new and
    settled is released. A window starts at the last place where the text was settled, so the work per token is small
    and does not grow with the sequence.

    Args:
        decode: token ids to text.
        prompt_token_ids: the prompt; its last tokens are the first context, and are not part of the text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt_token_ids[-_CONTEXT:])
        self._num_settled = len(self._window)  # tokens of the window whose text is released
        self._num_released = len(_without_open_character(decode(self._window)))  # characters of the window's text

    def append(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens add. An unfinished character waits for its other bytes."""
        self._window += token_ids
        text = self._decode(self._window)
        settled = _without_open_character(text)
        new = settled[self._num_released :]
        self._num_released = max(self._num_released, len(settled))
        if new and settled == text:
            self._window = self._window[self._num_settled :]
            self._num_settled = len(self._window)
            self._num_released = len(self._decode(self._window))
        return new


def _without_open_character(text: str) -> str:
    """The text without the replacement characters at its end that may be the beginning of one to come.

    A character has at most four bytes, so at most three of them can be unfinished.
    """
    num_open = min(3, len(text) - len(text.rstrip(_REPLACEMENT)))
    return text[: len(text) - num_open]


class StopStringMatcher:
    """Finds stop strings in text that comes in pieces, and holds back what may become one."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = stop_strings
        self._held = ""

    def append(self, piece: str) -> tuple[str, str | None]:
        """The text that can be released now, and the stop string that was found, if any."""
        text = self._held + piece
        found = [(text.index(stop), stop) for stop in self._stop_strings if stop in text]
        if found:
            position, stop = min(found)
            self._held = ""
            return text[:position], stop
        num_held = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
