"""The plan of a step, and what becomes of it: plain data, complete and frozen when made."""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

from mini_infer.outputs import FinishReason
from mini_infer.scheduler.sequence import Reuse, Sequence


class BlockCopy(NamedTuple):
    """Copy one block's keys and values, in every layer."""

    source: int
    target: int


class ScheduledSequence(NamedTuple):
    """What a step computes of one sequence.

    Attributes:
        sequence: whose tokens; it moves on while the step is under way, so what is true of the step stands here.
        start: position of the first token that is computed.
        num_tokens: how many are.
        num_logits: of how many of them, the last ones, logits are wanted: 1 to sample the next token, one more for each
            draft, 0 for a chunk that does not reach the end.
        is_decode: it computes the token that was sampled last, and drafts behind it, and nothing else.
        forks: sequences that start with this step, drawing from the same logits.
        reuse: what it takes from the cache instead of all that stands before its tokens.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    num_logits: int
    is_decode: bool
    forks: tuple[Sequence, ...] = ()
    reuse: Reuse | None = None

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_whole(self) -> bool:
        """Whether it computes all of a sequence whose every token sees all others, and needs nothing of the cache."""
        return self.sequence.is_whole and self.reuse is None

    @property
    def num_rows(self) -> int:
        """Tokens that the step computes for it, those of its twin among them."""
        return self.num_tokens if self.sequence.twin is None else 2 * self.num_tokens


@dataclass(frozen=True, slots=True)
class SchedulerOutputs:
    """The plan of one step. The copies come first, in the order of the fields; then the forward pass.

    Attributes:
        scheduled: who runs: canvases that are computed whole, then sequences with one token, then those with several.
        num_tokens: how many tokens are computed in all.
        preempted: sequences whose blocks were taken away to make room.
        swap_out: from GPU blocks to CPU blocks.
        copy: from shared GPU blocks to the ones that their writers get for themselves.
        swap_in: from CPU blocks to GPU blocks.
        remembered: blocks that this step fills and that the prefix cache knows from now on.
    """

    scheduled: tuple[ScheduledSequence, ...] = ()
    num_tokens: int = 0
    preempted: tuple[Sequence, ...] = ()
    swap_out: tuple[BlockCopy, ...] = ()
    copy: tuple[BlockCopy, ...] = ()
    swap_in: tuple[BlockCopy, ...] = ()
    remembered: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do, not even copies of preempted sequences."""
        return not self.scheduled and not self.preempted

    @property
    def only_decodes(self) -> bool:
        """Whether every sequence computes just what it sampled last; of an empty plan that is true."""
        return all(item.is_decode for item in self.scheduled)


@dataclass(slots=True)
class PlanDraft:
    """A plan while it is made.

    Attributes:
        budget: tokens that it may still have.
        room: sequences that it may have in all.
        most_of_prompts: tokens of prompts that it may have of one caller.
        served: callers whose prompts have as many.
    """

    budget: int
    room: int
    most_of_prompts: int
    served: set[Hashable] = field(default_factory=set)
    scheduled: list[ScheduledSequence] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    swap_out: list[BlockCopy] = field(default_factory=list)
    copy: list[BlockCopy] = field(default_factory=list)
    swap_in: list[BlockCopy] = field(default_factory=list)
    remembered: list[int] = field(default_factory=list)
    _prompt_tokens: Counter[Hashable] = field(default_factory=Counter)

    @property
    def is_full(self) -> bool:
        return not self.budget or len(self.scheduled) == self.room

    def charge(self, caller: Hashable, num_tokens: int, least: int) -> int:
        """How many of a prompt's tokens a caller may have, ``least`` in any case; they count as its own from now on."""
        num_tokens = min(num_tokens, max(least, self.most_of_prompts - self._prompt_tokens[caller]))
        self._prompt_tokens[caller] += num_tokens
        if self._prompt_tokens[caller] >= self.most_of_prompts:
            self.served.add(caller)
        return num_tokens

    def finish(self, num_tokens: int) -> SchedulerOutputs:
        single = [item for item in self.scheduled if item.num_tokens == 1]
        if len(single) < len(self.scheduled):
            single += [item for item in self.scheduled if item.num_tokens > 1]
            single.sort(key=lambda item: not item.is_whole)
        return SchedulerOutputs(
            scheduled=tuple(single),
            num_tokens=num_tokens,
            preempted=tuple(self.preempted),
            swap_out=tuple(self.swap_out),
            copy=tuple(self.copy),
            swap_in=tuple(self.swap_in),
            remembered=tuple(self.remembered),
        )


class Outcome(NamedTuple):
    """What a step brought to one sequence.

    Attributes:
        sequence: whose outcome it is.
        token_ids: tokens that are known from now on, in place of provisional ones.
        num_valid: positions, from the first token on, whose keys and values are valid; those before the step stay so.
        finish_reason: why it ends with them; None if it goes on, or ends by its length, which the scheduler sees.
        canvas: what stands behind them, where the provisional tokens are a canvas of masks.
        reuse: what the next step computes of that; None is all.
    """

    sequence: Sequence
    token_ids: tuple[int, ...]
    num_valid: int
    finish_reason: FinishReason | None = None
    canvas: tuple[int, ...] = ()
    reuse: Reuse | None = None
