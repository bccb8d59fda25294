"""Collects what rules change in a step's logits."""

import numpy as np
import numpy.typing as npt

from mini_infer.step import NO_FLOATS, NO_INTS, NO_MASKS, Floats, Ints, LogitEdits


class Edits:
    """Entries of many rules, to become the arrays of ``LogitEdits``."""

    def __init__(self) -> None:
        self._scaled: list[tuple[Ints, Ints, Floats]] = []
        self._added: list[tuple[Ints, Ints, Floats]] = []
        self._masks: dict[int, npt.NDArray[np.uint8]] = {}
        self._forced: dict[int, int] = {}

    def scale(self, draw: int, token_ids: Ints, factor: float) -> None:
        """Divide these tokens' logits by a factor if they are positive, else multiply; each token once for a draw."""
        self._scaled.append((np.full(len(token_ids), draw), token_ids, np.full(len(token_ids), factor)))

    def add(self, draw: int, token_ids: Ints, terms: Floats) -> None:
        """Add a term to the logit of each of these tokens."""
        self._added.append((np.full(len(token_ids), draw), token_ids, terms))

    def mask(self, draw: int, allowed: npt.NDArray[np.uint8]) -> None:
        """Let a draw give only the tokens whose bits are set, as ``LogitEdits.masks`` has them."""
        self._masks[draw] = allowed

    def force(self, draw: int, token_id: int) -> None:
        """Have a draw give this token."""
        self._forced[draw] = token_id

    def finish(self) -> LogitEdits:
        if not (self._scaled or self._added or self._masks or self._forced):
            return LogitEdits()
        return LogitEdits(
            *_joined(self._scaled),
            *_joined(self._added),
            masked_draws=np.fromiter(self._masks, dtype=np.int64),
            masks=np.stack(list(self._masks.values())) if self._masks else NO_MASKS,
            forced_draws=np.fromiter(self._forced, dtype=np.int64),
            forced_ids=np.fromiter(self._forced.values(), dtype=np.int64),
        )


def _joined(parts: list[tuple[Ints, Ints, Floats]]) -> tuple[Ints, Ints, Floats]:
    if not parts:
        return NO_INTS, NO_INTS, NO_FLOATS
    draws, token_ids, values = zip(*parts, strict=True)
    return np.concatenate(draws), np.concatenate(token_ids), np.concatenate(values)
