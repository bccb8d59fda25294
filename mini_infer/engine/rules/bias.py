"""Rules that add a fixed number to some logits."""

import numpy as np

from mini_infer.engine.rules.edits import Edits
from mini_infer.step import Floats, Ints
from mini_infer.typing import TokenIds


class Bias:
    """``logit_bias``: a term for each of some tokens.

    Args:
        token_ids: ``[E]``.
        terms: ``[E]``.
    """

    needs_last_token = False

    def __init__(self, token_ids: Ints, terms: Floats) -> None:
        self._token_ids, self._terms = token_ids, terms

    def apply(self, draw: int, position: int, drafts: TokenIds, edits: Edits) -> None:
        edits.add(draw, self._token_ids, self._terms)

    def accept(self, token_id: int) -> None:
        pass


class Ban:
    """``min_tokens``: some tokens must not be drawn before a position.

    Args:
        token_ids: ``[E]``, the tokens that would end the sequence.
        before: position of the first token that may be one of them.
    """

    needs_last_token = False

    def __init__(self, token_ids: Ints, before: int) -> None:
        self._token_ids, self._before = token_ids, before
        self._terms = np.full(len(token_ids), -np.inf)

    def apply(self, draw: int, position: int, drafts: TokenIds, edits: Edits) -> None:
        if position < self._before:
            edits.add(draw, self._token_ids, self._terms)

    def accept(self, token_id: int) -> None:
        pass
