"""A sequence: one stream of tokens, and how far its keys and values are computed."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NamedTuple

from mini_infer.outputs import FinishReason
from mini_infer.typing import BlockTable, TokenIds

PLACEHOLDER = -1
"""Stands in ``token_ids`` for a token that a step under way is about to sample."""


class SequenceStatus(Enum):
    NEW = auto()  # not handed to a scheduler yet, or to be forked from another
    WAITING = auto()  # in the queue
    RUNNING = auto()  # holds blocks and a seat
    RESTING = auto()  # without blocks, and nothing to compute until it is committed
    FINISHED = auto()


class Reuse(NamedTuple):
    """What a step computes of a canvas, and what it takes as an earlier step left it.

    Attributes:
        start, end: the tokens that it computes.
        num_kept: keys and values of so many others are in the sequence's blocks; those of these tokens follow there.
    """

    start: int
    end: int
    num_kept: int


@dataclass(eq=False, slots=True)
class Sequence:
    """One stream of tokens being generated for a request.

    Its tokens are *known*, and behind them may stand *provisional* ones, which a step under way settles: placeholders
    for what it samples, or drafts that were proposed. Everything from ``status`` on is written by the scheduler alone.

    Attributes:
        request_id: the request it belongs to.
        token_ids: prompt and generated tokens, then the provisional ones.
        num_prompt_tokens: how many of them are the prompt.
        max_length: length at which it ends with reason "length".
        priority: higher goes first, where the policy looks at it.
        caller: whose it is; while others want something, too, no caller takes more than a share.
        cache_salt: prefixes are shared only between sequences of the same salt.
        reads_prefix_cache: whether it may skip computing what is cached; not if its prompt's logits are wanted.
        decides_late: how it goes on is not one sampled token for each step, so that the next step can be planned only
            when the last one was committed; a beam, for example.
        mask_token_id: what stands for a gap in its tokens, if it has any.
        is_whole: every token sees all others, so that a step computes all of it, and keeps no keys and values but those
            for a ``reuse``.
        span: so many neighbouring tokens see each other, counted from the first, so that a step computes all of them at
            once; one for a causal model.
        num_kept_slots: of how many tokens it keeps keys and values; None is all that it has.
        twin: computed with it, step by step, from a prompt of masks; nothing is drawn from it, but its logits guide.
        forks: sequences that start from it once its prompt is computed, and draw their first token beside it.
        num_seats: seats that are kept for it and for what will fork from it.
        arrival: its place among all that arrived.
        order: the policy's key; the smallest goes first.
        num_computed_tokens: how many tokens have keys and values in the cache once the steps under way are computed;
            0 again after a preemption.
        num_placeholders, num_drafts, num_masks: provisional tokens of either kind; never two at once. Those of a
            diffusion model's canvas, from its first mask on, count as masks even where they are written already: a
            step rewrites them in place.
        is_undecided: a step under way says how many tokens it goes on by; until then it is not planned again.
        reuse: what the next step computes of a canvas of which it need not compute all.
        block_table: the blocks that hold its keys and values.
        content_ids: places in the prefix cache of its first full blocks.
        swapped_blocks: after a preemption by swapping, the CPU block that holds each of its blocks; None for one that
            others still hold on the GPU.
        num_swapped_tokens: how many tokens those hold.
    """

    request_id: str
    token_ids: TokenIds
    num_prompt_tokens: int
    max_length: int
    priority: int = 0
    caller: Hashable = None
    cache_salt: str | None = None
    reads_prefix_cache: bool = True
    decides_late: bool = False
    num_masks: int = 0
    mask_token_id: int | None = None
    is_whole: bool = False
    span: int = 1
    num_kept_slots: int | None = None
    twin: "Sequence | None" = None
    forks: "tuple[Sequence, ...]" = ()
    num_seats: int = 1
    status: SequenceStatus = SequenceStatus.NEW
    finish_reason: FinishReason | None = None
    arrival: int = 0
    order: tuple[float, ...] = ()
    num_computed_tokens: int = 0
    num_placeholders: int = 0
    num_drafts: int = 0
    is_undecided: bool = False
    reuse: Reuse | None = None
    num_preemptions: int = 0
    block_table: BlockTable = field(default_factory=list)
    content_ids: list[int] = field(default_factory=list)
    swapped_blocks: list[int | None] = field(default_factory=list)
    num_swapped_tokens: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_known_tokens(self) -> int:
        return len(self.token_ids) - self.num_placeholders - self.num_drafts - self.num_masks

    @property
    def num_generated_tokens(self) -> int:
        return self.num_known_tokens - self.num_prompt_tokens

    @property
    def generated_token_ids(self) -> TokenIds:
        return self.token_ids[self.num_prompt_tokens : self.num_known_tokens]

    @property
    def canvas(self) -> tuple[int | None, ...]:
        """What stands at each place of a diffusion model's answer: a token, or None for a mask. Of others, nothing."""
        if self.mask_token_id is None:
            return ()
        return tuple(None if i == self.mask_token_id else i for i in self.token_ids[self.num_prompt_tokens :])

    @property
    def num_slots(self) -> int:
        """Places for keys and values that it needs."""
        return len(self.token_ids) if self.num_kept_slots is None else self.num_kept_slots

    @property
    def uncomputed(self) -> tuple[int, int]:
        """Where that begins and ends which the next step may compute; more than one token and its drafts for a prompt,
        or after a preemption."""
        if self.reuse is not None:
            return self.reuse.start, self.reuse.end
        return self.num_computed_tokens, len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        start, end = self.uncomputed
        return end - start

    @property
    def least_tokens(self) -> int:
        """What a step must have room for to compute any of it."""
        least = self.num_uncomputed_tokens if self.is_whole else min(self.num_uncomputed_tokens, self.span)
        return least if self.twin is None else 2 * least

    @property
    def can_step(self) -> bool:
        """Whether there is something to plan for it now. The last token that it may have is never computed."""
        if self.is_undecided or len(self.token_ids) == self.num_computed_tokens:
            return False
        return not self.num_placeholders or len(self.token_ids) < self.max_length
