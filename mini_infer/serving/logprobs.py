"""Log probabilities in the two shapes that OpenAI's endpoints have for them."""

import codecs
import math
from collections import deque
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from typing import Any

from mini_infer.engine.tokenizer import Tokenizer
from mini_infer.exceptions import InvalidRequestError
from mini_infer.fields import check_int
from mini_infer.outputs import Logprob, TokenLogprobs

MAX_TOP = 20
"""Most of the likeliest tokens that a request may ask for at each place."""

LEAST = -9999.0
"""Stands for the logarithm of zero, which JSON has no number for."""


def check_num_top(name: str, num_top: int | None) -> None:
    """Raise ``InvalidRequestError`` if a request asks for too many of the likeliest tokens."""
    if num_top is not None:
        check_int(InvalidRequestError, name, num_top, 0, MAX_TOP)


class CompletionLogprobs:
    """Log probabilities in the shape of ``/v1/completions``, one list for each kind of information, as the text comes.

    ``tokens`` holds what each token adds to the text, so that they join to the text and each is found at its
    ``text_offset``. A special token that is left out of the text adds nothing, nor do the tokens of a stop string; of a
    character that several tokens spell, the last one adds it. A token whose text has not come yet waits for it.

    In ``top_logprobs`` the token that is there goes by what it adds, and others by their text. Where that is taken, or
    is no text, because the token is a part of a character, it is ``token_id:`` and the id: each keeps its own entry.

    Args:
        tokenizer: knows what each token stands for.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._text = b""  # what has come and no token is matched with yet
        self._waiting: deque[tuple[int, TokenLogprobs | None, bool]] = deque()
        self._characters = codecs.getincrementaldecoder("utf-8")()
        self._offset = 0

    def append(
        self,
        text: str,
        token_ids: Seq[int],
        places: Seq[TokenLogprobs | None],
        *,
        left_out: Collection[int],
    ) -> None:
        """More tokens, and the text that came with them.

        Args:
            places: one for each token; None for a prompt's first token, which nothing precedes.
            left_out: ids of tokens that are not in the text.
        """
        self._text += text.encode()
        self._waiting.extend((i, place, i in left_out) for i, place in zip(token_ids, places, strict=True))

    def take(self, *, is_whole: bool) -> dict[str, Any]:
        """The entries of the tokens that have their text, each of them once.

        Args:
            is_whole: no more text comes.
        """
        shape: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        while self._waiting:
            token_id, place, is_left_out = self._waiting[0]
            size = 0 if is_left_out else self._size(token_id, is_whole)
            if size is None:
                break
            self._waiting.popleft()
            if is_whole and not self._waiting:
                size = len(self._text)
            token = self._characters.decode(self._text[:size])
            self._text = self._text[size:]
            shape["tokens"].append(token)
            shape["token_logprobs"].append(None if place is None else _number(place[token_id]))
            shape["top_logprobs"].append(None if place is None else self._by_text(place, token_id, token))
            shape["text_offset"].append(self._offset)
            self._offset += len(token)
        return shape

    def _size(self, token_id: int, is_whole: bool) -> int | None:
        """How many of the bytes that have come are a token's; None while that is open.

        The text need not have it there: decoders drop a space in front of a text, show bad bytes in another way, and
        tokenizers may have read the prompt less exactly than it was written. Then the token may be found close by.
        """
        token = self._tokenizer.token_bytes(token_id)
        if self._text.startswith(token):
            return len(token)
        is_part = token_id in self._tokenizer.byte_tokens or "\ufffd" in self._tokenizer.token_text(token_id)
        if is_part and self._text.startswith(_REPLACEMENT):
            return len(_REPLACEMENT)
        if not is_whole and token.startswith(self._text):
            return None
        if self._offset == 0 and token.startswith(b" ") and self._text.startswith(token[1:]):
            return len(token) - 1
        place = self._text.find(token, 0, _NEAR + len(token))
        if place >= 0:
            return place + len(token)
        return 0 if is_whole or len(self._text) >= _NEAR + len(token) else None

    def _by_text(self, place: TokenLogprobs, token_id: int, token: str) -> dict[str, float]:
        numbers = {token: _number(place[token_id])}
        for other, entry in place.items():
            if other != token_id:
                text = entry.decoded_token
                is_free = text not in numbers and "\ufffd" not in text
                numbers[text if is_free else f"token_id:{other}"] = _number(entry)
        return numbers


_REPLACEMENT = "\ufffd".encode()

_NEAR = 32
"""Bytes that may lie between one token's text and the next's."""


def chat_logprobs(places: Seq[TokenLogprobs], num_top: int, bytes_of: Callable[[int], bytes]) -> dict[str, Any]:
    """The shape of ``/v1/chat/completions``: one object for each token.

    Args:
        bytes_of: what a token adds to the text; nothing if it is left out.
    """

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        own = list(bytes_of(token_id))
        return {"token": logprob.decoded_token, "logprob": _number(logprob), "bytes": own or None}

    def ranked(place: TokenLogprobs) -> list[tuple[int, Logprob]]:
        return sorted(place.items(), key=lambda item: item[1].rank)[:num_top]

    return {
        "content": [
            entry(*next(iter(place.items()))) | {"top_logprobs": [entry(*item) for item in ranked(place)]}
            for place in places
        ]
    }


def _number(entry: Logprob) -> float:
    return entry.logprob if math.isfinite(entry.logprob) else LEAST
