"""Rotary position embedding: how fast each pair of features turns, for plain RoPE and its context extensions.

RoPE (Su et al., RoFormer, 2021, https://arxiv.org/abs/2104.09864) turns feature pair i of a token at position p by
the angle p * f[i], with

    f[i] = theta ** (-2 i / d)        0 ≤ i < d / 2, d = rotary_dim

A model trained on short texts reads longer ones if its slow pairs are slowed further, so that no pair reaches an
angle never seen in training. The classes here differ only in how they do that.

All of it happens in float32 on the CPU, as in transformers: an angle at position 100,000 differs visibly between
float32 and float64, and a checkpoint was trained with the former.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mini_infer.exceptions import InvalidCheckpointError


@dataclass(frozen=True)
class Rope:
    """Plain RoPE.

    Attributes:
        theta: the base; the slowest pair has a wavelength of about 2π theta tokens.
    """

    theta: float

    def frequencies(self, rotary_dim: int) -> Tensor:
        """f, float32 ``[rotary_dim // 2]``, in radians per token."""
        return 1.0 / self.periods(rotary_dim)

    def periods(self, rotary_dim: int) -> Tensor:
        """1 / f without any extension, in tokens per radian."""
        return self.theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied by; its square scales the attention scores."""
        return 1.0

    def reach(self, max_position_embeddings: int) -> int:
        """The longest context that it was stretched to, given what config.json calls the longest."""
        return max_position_embeddings

    def within(self, max_positions: int) -> "Rope":
        """The rotation to use if no text is longer than this."""
        return self

    def check(self, rotary_dim: int) -> None:
        """Refuse parameters that make no angles.

        Raises:
            InvalidCheckpointError: they do not.
        """
        try:
            usable = (self.frequencies(rotary_dim) * 2.0**31).isfinite().all() and math.isfinite(self.magnitude)
        except (ValueError, ArithmeticError) as error:
            raise InvalidCheckpointError(f"{self} cannot be used: {error}") from error
        if not usable:
            raise InvalidCheckpointError(f"{self} cannot be used: its angles are not finite")


@dataclass(frozen=True)
class LinearRope(Rope):
    """Position interpolation: every pair is slowed by the same factor, f / factor.

    Chen et al., Extending Context Window of Large Language Models via Positional Interpolation, 2023,
    https://arxiv.org/abs/2306.15595
    """

    factor: float

    def frequencies(self, rotary_dim: int) -> Tensor:
        return super().frequencies(rotary_dim) / self.factor

    def reach(self, max_position_embeddings: int) -> int:
        return max(max_position_embeddings, _rounded(self.factor * max_position_embeddings))


@dataclass(frozen=True)
class Llama3Rope(Rope):
    """Llama 3.1: fast pairs stay, slow pairs are slowed by the factor, and those between are blended.

        turns = original_max_positions * f / 2π        how often a pair turns within the original context
        s = clip((turns - low) / (high - low), 0, 1)   with low_freq_factor and high_freq_factor
        f' = (1 - s) f / factor + s f

    Llama Team, The Llama 3 Herd of Models, 2024, https://arxiv.org/abs/2407.21783
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: float

    def frequencies(self, rotary_dim: int) -> Tensor:
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError("low_freq_factor must be less than high_freq_factor")
        plain = super().frequencies(rotary_dim)
        turns = self.original_max_positions / (2 * math.pi / plain)
        kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return (1 - kept) * plain / self.factor + kept * plain

    def reach(self, max_position_embeddings: int) -> int:
        return max(max_position_embeddings, _rounded(self.factor * self.original_max_positions))


@dataclass(frozen=True)
class YarnRope(Rope):
    """YaRN: as Llama 3.1's, but blended linearly in the pair's index, and with sharper attention.

        index(turns) = d ln(original_max_positions / (2π turns)) / (2 ln theta)   the pair that turns so often
        s[i] = 1 - clip((i - index(beta_fast)) / (index(beta_slow) - index(beta_fast)), 0, 1)
        f' = (1 - s) f / factor + s f
        cos, sin = magnitude * cos, magnitude * sin

    Peng et al., YaRN: Efficient Context Window Extension of Large Language Models, 2023,
    https://arxiv.org/abs/2309.00071

    Attributes:
        beta_fast: pairs that turn more often than this within the original context stay as they are.
        beta_slow: pairs that turn less often than this are slowed by the whole factor.
        attention_factor: the magnitude; see `yarn_attention_factor` for the usual choice.
        truncate: round the two indices outwards to whole pairs.
    """

    factor: float
    original_max_positions: float
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool

    def frequencies(self, rotary_dim: int) -> Tensor:
        first, last = self._index(self.beta_fast, rotary_dim), self._index(self.beta_slow, rotary_dim)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rotary_dim - 1)
        width = (last - first) or 0.001  # a step where the two meet, instead of 0 / 0
        kept = 1 - ((torch.arange(rotary_dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
        plain, slowed = 1.0 / self.periods(rotary_dim), 1.0 / (self.factor * self.periods(rotary_dim))
        return (1 - kept) * slowed + kept * plain

    def reach(self, max_position_embeddings: int) -> int:
        return max(max_position_embeddings, _rounded(self.factor * self.original_max_positions))

    def _index(self, turns: float, rotary_dim: int) -> float:
        return rotary_dim * math.log(self.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

    @property
    def magnitude(self) -> float:
        return self.attention_factor


@dataclass(frozen=True)
class LongRope(Rope):
    """LongRoPE: every pair is slowed by a factor of its own, found by search; one set for short contexts, one for long.

        f'[i] = f[i] / factors[i]
        cos, sin = attention_factor * cos, attention_factor * sin

    Keys in the cache keep the angle that they were written with, so a sequence cannot change sets as it grows. Which
    set holds is decided once, by the longest context that there can be: see `within`.

    Ding et al., LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens, 2024, https://arxiv.org/abs/2402.13753

    Attributes:
        short_factors, long_factors: one for each pair.
        long: whether the long ones hold.
        attention_factor: the magnitude; see `longrope_attention_factor` for the usual choice.
    """

    factor: float
    original_max_positions: float
    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    attention_factor: float
    long: bool = False

    def frequencies(self, rotary_dim: int) -> Tensor:
        for factors in (self.short_factors, self.long_factors):
            if len(factors) != rotary_dim // 2:
                raise ValueError(f"there must be {rotary_dim // 2} factors, one for each pair; got {len(factors)}")
        factors = self.long_factors if self.long else self.short_factors
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * self.periods(rotary_dim))

    def reach(self, max_position_embeddings: int) -> int:
        return max(max_position_embeddings, _rounded(self.factor * self.original_max_positions))

    def within(self, max_positions: int) -> "LongRope":
        """The long factors if texts may be longer than the original context, the short ones otherwise."""
        return replace(self, long=max_positions > self.original_max_positions)

    @property
    def magnitude(self) -> float:
        return self.attention_factor


def _rounded(positions: float) -> int:
    return int(min(positions, 2.0**62))  # which no config may reach, but infinity has no integer


def longrope_attention_factor(factor: float, original_max_positions: float) -> float:
    """LongRoPE's recommended magnitude: sqrt(1 + ln(factor) / ln(original_max_positions))."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_max_positions))


def yarn_attention_factor(factor: float, mscale: float | None = None, mscale_all_dim: float | None = None) -> float:
    """YaRN's recommended magnitude: 0.1 ln(factor) + 1, or the ratio of two such terms where a model weighs them.

    The weighted form is DeepSeek's: (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1).
    """
    if factor <= 1:
        return 1.0
    if mscale and mscale_all_dim:
        return (0.1 * mscale * math.log(factor) + 1) / (0.1 * mscale_all_dim * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def rotary_tables(rope: Rope, rotary_dim: int, max_positions: int) -> tuple[Tensor, Tensor]:
    """The cosine and sine of every angle a model can meet in texts of up to ``max_positions`` tokens.

    Returns:
        (cos, sin), each float32 ``[max_positions, rotary_dim // 2]`` on the CPU.
    """
    rope = rope.within(max_positions)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), rope.frequencies(rotary_dim))
    return angles.cos() * rope.magnitude, angles.sin() * rope.magnitude
