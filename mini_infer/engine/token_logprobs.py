"""What is reported of a place in a text: the token that is there, and the likeliest ones."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mini_infer.outputs import Logprob
from mini_infer.step import TokenScore


class PlaceLogprobs(Mapping[int, Logprob]):
    """The token that is there first, then the likeliest ones in order. It reads as a dict does.

    An answer may have thousands of such places, so each is kept as the few numbers that it is: its entries are made
    when somebody looks at them. A copy is a dict.

    Args:
        token_id: the token that is there.
        decode: the text of one token.
    """

    __slots__ = ("_decode", "_score", "_token_id")

    def __init__(self, token_id: int, score: TokenScore, decode: Callable[[int], str]) -> None:
        self._token_id, self._score, self._decode = token_id, score, decode

    def __getitem__(self, token_id: int) -> Logprob:
        score = self._score
        if token_id == self._token_id:
            return Logprob(score.logprob, score.rank, self._decode(token_id))
        try:
            place = score.top_ids.index(token_id)
        except ValueError:
            raise KeyError(token_id) from None
        return Logprob(score.top_logprobs[place], place + 1, self._decode(token_id))

    def __iter__(self) -> Iterator[int]:
        yield self._token_id
        for token_id in self._score.top_ids:
            if token_id != self._token_id:
                yield token_id

    def __len__(self) -> int:
        return len(self._score.top_ids) + (self._token_id not in self._score.top_ids)

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)
