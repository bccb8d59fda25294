"""Token ids to text while they come: never half a character, never half a stop string."""

from collections.abc import Callable, Sequence

_REPLACEMENT = "\ufffd"  # what decoding bytes that are no character, or not yet one, gives
_CONTEXT = 6  # prompt tokens that the first generated one is decoded with: its leading space depends on them
_PATIENCE = 16  # tokens to wait for the end of a character; what is open after so many is no character


class Detokenizer:
    """Decodes one growing sequence.

    A token alone has no text: a Chinese character or an emoji may span several, and whether a word starts with a space
    can depend on the token before. So a short window of tokens is decoded again with each token, and only what is new
    and settled is released. The window starts where the text was settled the time before last, so the work per token is
    small and does not grow with the sequence.

    Args:
        decode: token ids to text.
        prompt_token_ids: the prompt; its last tokens are the first context, and are not part of the text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int]) -> None:
        self._decode = decode
        self._context = list(prompt_token_ids[-_CONTEXT:])  # tokens whose text is released
        self._context_text = _without_open_character(decode(self._context))
        self._pending: list[int] = []  # tokens after them
        self._released = ""  # what of their text is released

    def append(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens add. An unfinished character waits for its other bytes."""
        return "".join(map(self._append, token_ids))

    def _append(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        # Tokenizers that fall back on bytes decode a run of them as a whole: while its last character is unfinished,
        # the ones before it are lost too. Then the new tokens by themselves show where it stands.
        in_context = text.startswith(self._context_text)
        text = text[len(self._context_text) :] if in_context else self._decode(self._pending)
        settled = text if len(self._pending) > _PATIENCE else _without_open_character(text)
        new = settled[len(self._released) :]
        self._released += new
        if settled == text and self._released:
            self._context, self._context_text = self._pending, self._decode(self._pending)
            self._pending, self._released = [], ""
        elif len(self._pending) > _PATIENCE:  # special tokens that are skipped: they never have a text
            self._pending = []
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
