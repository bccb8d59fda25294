"""Workloads that anybody can draw again: random prompts and output lengths, from a seed."""

import random
from dataclasses import dataclass
from typing import TypeAlias

from mini_infer.exceptions import InvalidConfigError

Range: TypeAlias = tuple[int, int]
"""Lowest and highest length, both inclusive."""


@dataclass(frozen=True)
class Workload:
    """Requests that are asked at once.

    Attributes:
        prompts: token ids of each request, from 0 to 250: ids that every vocabulary has.
        num_outputs: tokens to generate for each, whatever they are.
    """

    prompts: list[list[int]]
    num_outputs: list[int]

    @classmethod
    def draw(cls, num_requests: int, input_len: Range, output_len: Range, seed: int = 0) -> "Workload":
        """Draw the prompts one after the other, each its length and then its ids; then the output lengths."""
        draw = random.Random(seed)
        prompts = [[draw.randint(0, 250) for _ in range(draw.randint(*input_len))] for _ in range(num_requests)]
        return cls(prompts, [draw.randint(*output_len) for _ in range(num_requests)])

    @property
    def num_input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def num_output_tokens(self) -> int:
        return sum(self.num_outputs)


def parse_range(name: str, text: str) -> Range:
    """``"32:256"`` or ``"32"`` as a range of lengths.

    Raises:
        InvalidConfigError: it is no such thing; the message calls it ``name``.
    """
    low, _, high = text.partition(":")
    try:
        bounds = int(low), int(high or low)
    except ValueError:
        bounds = 0, 0
    if not 1 <= bounds[0] <= bounds[1]:
        raise InvalidConfigError(f"{name} must be LOW:HIGH with 1 <= LOW <= HIGH, or one number; got {text!r}")
    return bounds
