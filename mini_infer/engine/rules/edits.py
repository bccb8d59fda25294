"""Collects what rules change in a step's logits."""

import numpy as np

from mini_infer.step import NO_FLOATS, NO_INTS, Floats, Ints, LogitEdits


class Edits:
    """Entries of many rules, to become the arrays of ``LogitEdits``."""

    def __init__(self) -> None:
        self._scaled: list[tuple[Ints, Ints, Floats]] = []
        self._added: list[tuple[Ints, Ints, Floats]] = []

    def scale(self, draw: int, token_ids: Ints, factor: float) -> None:
        """Divide these tokens' logits by a factor if they are positive, else multiply; each token once for a draw."""
        self._scaled.append((np.full(len(token_ids), draw), token_ids, np.full(len(token_ids), factor)))

    def add(self, draw: int, token_ids: Ints, terms: Floats) -> None:
        """Add a term to the logit of each of these tokens."""
        self._added.append((np.full(len(token_ids), draw), token_ids, terms))

    def finish(self) -> LogitEdits:
        return LogitEdits(*_joined(self._scaled), *_joined(self._added))


def _joined(parts: list[tuple[Ints, Ints, Floats]]) -> tuple[Ints, Ints, Floats]:
    if not parts:
        return NO_INTS, NO_INTS, NO_FLOATS
    draws, token_ids, values = zip(*parts, strict=True)
    return np.concatenate(draws), np.concatenate(token_ids), np.concatenate(values)
