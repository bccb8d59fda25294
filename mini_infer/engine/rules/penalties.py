"""Penalties for tokens that occurred before."""

from collections import Counter

import numpy as np

from mini_infer.engine.rules.edits import Edits
from mini_infer.sampling import SamplingParams
from mini_infer.step import Ints
from mini_infer.typing import TokenIds


class Penalties:
    """Repetition penalty over prompt and generated tokens (Keskar et al., "CTRL", 2019); presence and frequency
    penalties over the generated ones (as the OpenAI API defines them):

        z < 0: z * repetition    z > 0: z / repetition        then  z - presence - frequency * count

    Args:
        repetition, presence, frequency: the penalties.
        prompt_ids: the prompt's tokens, each once.
        in_prompt: the same as a set.
    """

    needs_last_token = True

    def __init__(
        self, repetition: float, presence: float, frequency: float, prompt_ids: Ints, in_prompt: frozenset[int]
    ) -> None:
        self._repetition, self._presence, self._frequency = repetition, presence, frequency
        self._prompt_ids, self._in_prompt = prompt_ids, in_prompt
        self._counts: Counter[int] = Counter()

    @classmethod
    def of(cls, params: SamplingParams, prompt_ids: Ints, in_prompt: frozenset[int]) -> "Penalties":
        return cls(params.repetition_penalty, params.presence_penalty, params.frequency_penalty, prompt_ids, in_prompt)

    def apply(self, draw: int, position: int, drafts: TokenIds, edits: Edits) -> None:
        counts = self._counts + Counter(drafts) if drafts else self._counts
        if self._repetition != 1:
            edits.scale(draw, self._prompt_ids, self._repetition)
            others = [token_id for token_id in counts if token_id not in self._in_prompt]
            edits.scale(draw, np.array(others, dtype=np.int64), self._repetition)
        if counts and (self._presence or self._frequency):
            terms = -(self._presence + self._frequency * np.fromiter(counts.values(), dtype=np.float64))
            edits.add(draw, np.fromiter(counts, dtype=np.int64), terms)

    def accept(self, token_id: int) -> None:
        self._counts[token_id] += 1
