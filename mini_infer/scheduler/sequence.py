"""A sequence: one stream of tokens, and how far its keys and values are computed."""

from dataclasses import dataclass, field
from enum import Enum, auto

from mini_infer.outputs import FinishReason
from mini_infer.typing import BlockTable, TokenIds

PENDING = -1
"""Stands in ``token_ids`` for a token that is not known yet."""


class SequenceStatus(Enum):
    NEW = auto()  # not handed to a scheduler yet, to be forked from another, or a beam that rests without its blocks
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """One stream of tokens being generated for a request.

    Attributes:
        request_id: the request it belongs to.
        token_ids: prompt and generated tokens; grows by one each time it is sampled.
        num_prompt_tokens: how many of them are the prompt.
        max_length: length at which it ends with reason "length".
        min_length: it can end by a stop token only once it is longer than this.
        stop_token_ids: tokens that end it with reason "stop".
        priority: higher goes first, where the policy looks at it.
        cache_salt: prefixes are shared only between sequences of the same salt.
        reads_prefix_cache: whether it may skip computing what is cached; not if its prompt's logits are wanted.
        num_forks: sequences that will fork from it once its prompt is computed; their seats are kept for them.
        arrival: its place among all that arrived; set by the scheduler, as everything below.
        order: the policy's key; the smallest goes first.
        num_computed_tokens: how many tokens have keys and values in the cache; 0 again after a preemption.
        block_table: the blocks that hold them.
        content_ids: places in the prefix cache of its first full blocks.
        swapped_blocks: after a preemption by swapping, the CPU block that holds each of its blocks; None for one that
            others still hold on the GPU.
        num_swapped_tokens: how many tokens those hold.
        num_pending_tokens: how many of the last tokens are being computed by steps under way. They have a place in
            ``token_ids`` but no value yet; always 0 where steps do not overlap.
    """

    request_id: str
    token_ids: TokenIds
    num_prompt_tokens: int
    max_length: int
    min_length: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    priority: int = 0
    cache_salt: str | None = None
    reads_prefix_cache: bool = True
    num_forks: int = 0
    status: SequenceStatus = SequenceStatus.NEW
    finish_reason: FinishReason | None = None
    arrival: int = 0
    order: tuple[float, ...] = ()
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    block_table: BlockTable = field(default_factory=list)
    content_ids: list[int] = field(default_factory=list)
    swapped_blocks: list[int | None] = field(default_factory=list)
    num_swapped_tokens: int = 0
    num_pending_tokens: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """1 for a sequence that decodes; more for a prompt, or after a preemption."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_known_tokens(self) -> int:
        return len(self.token_ids) - self.num_pending_tokens

    @property
    def num_generated_tokens(self) -> int:
        return self.num_known_tokens - self.num_prompt_tokens

    @property
    def generated_token_ids(self) -> TokenIds:
        return self.token_ids[self.num_prompt_tokens : self.num_known_tokens]

    def reason_to_finish(self) -> FinishReason | None:
        """Why it should end now, judged by its known tokens alone."""
        length = self.num_known_tokens
        generates = length > max(self.num_prompt_tokens, self.min_length)
        if generates and self.token_ids[length - 1] in self.stop_token_ids:
            return "stop"
        return "length" if length >= self.max_length else None
