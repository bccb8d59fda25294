"""Log probabilities in the two shapes that OpenAI's endpoints have for them."""

import math
from collections.abc import Sequence as Seq
from typing import Any

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


def completion_logprobs(places: Seq[TokenLogprobs | None], offset: int, first: str = "") -> dict[str, Any]:
    """The shape of ``/v1/completions``: one list for each kind of information.

    Args:
        places: one for each token; None for a prompt's first token, which nothing precedes.
        offset: characters before the first of them.
        first: that first token's text.
    """
    shape: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for place in places:
        chosen = None if place is None else next(iter(place.values()))
        token = first if chosen is None else chosen.decoded_token
        shape["tokens"].append(token)
        shape["token_logprobs"].append(None if chosen is None else _number(chosen))
        shape["top_logprobs"].append(None if place is None else _by_text(place))
        shape["text_offset"].append(offset)
        offset += len(token)
    return shape


def _by_text(place: TokenLogprobs) -> dict[str, float]:
    """Where two tokens have the same text, as parts of characters do, the likelier one counts."""
    best: dict[str, float] = {}
    for entry in place.values():
        best[entry.decoded_token] = max(_number(entry), best.get(entry.decoded_token, LEAST))
    return best


def chat_logprobs(places: Seq[TokenLogprobs], num_top: int) -> dict[str, Any]:
    """The shape of ``/v1/chat/completions``: one object for each token."""
    return {
        "content": [
            _entry(next(iter(place.values())))
            | {"top_logprobs": [_entry(entry) for entry in sorted(place.values(), key=_rank)[:num_top]]}
            for place in places
        ]
    }


def _rank(entry: Logprob) -> int:
    return entry.rank


def _number(entry: Logprob) -> float:
    return entry.logprob if math.isfinite(entry.logprob) else LEAST


def _entry(entry: Logprob) -> dict[str, Any]:
    text = entry.decoded_token
    # A token that is part of a character shows as a replacement character, whose bytes are not the token's.
    return {"token": text, "logprob": _number(entry), "bytes": None if "\ufffd" in text else list(text.encode())}
