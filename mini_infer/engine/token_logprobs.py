"""What is reported of a place in a text: the token that is there, and the likeliest ones."""

from collections.abc import Callable

from mini_infer.outputs import Logprob, TokenLogprobs
from mini_infer.step import TokenScore


def token_logprobs(token_id: int, score: TokenScore, decode: Callable[[int], str]) -> TokenLogprobs:
    """The token that is there first, then the likeliest ones in order.

    Args:
        decode: the text of one token.
    """
    entries = {token_id: (score.logprob, score.rank)}
    for rank, (likely_id, logprob) in enumerate(score.top, start=1):
        entries.setdefault(likely_id, (logprob, rank))
    return {entry: Logprob(logprob, rank, decode(entry)) for entry, (logprob, rank) in entries.items()}
