"""One step as data: what the host hands to an executor, and what comes back. Arrays and numbers, nothing that lives.

So a step can be sent to another process, written to a file, replayed, or computed by a stand-in; and it means the same
however the sequences that it came from have moved on. S sequences compute T tokens in it, D tokens are drawn.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]

NO_INTS: Ints = np.zeros(0, dtype=np.int64)
NO_FLOATS: Floats = np.zeros(0, dtype=np.float64)
NO_COPIES: Ints = np.zeros((0, 2), dtype=np.int64)
NO_MASKS: npt.NDArray[np.uint8] = np.zeros((0, 0), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class LogitEdits:
    """What requests change in the logits that their tokens are drawn from, before anything else: first the factors,
    then the terms, then the masks. Entries for the same place add up. No draw has two masks or two forced tokens.

    Attributes:
        scaled_draws, scaled_ids, factors: ``[F]``; a positive logit is divided by its factor, a negative one multiplied
            (the repetition penalty of Keskar et al., "CTRL", 2019). No place occurs twice.
        added_draws, added_ids, terms: ``[E]``; -inf bans a token.
        masked_draws, masks: ``[M]`` and uint8 ``[M, ceil(vocab / 8)]``; token ``i`` may be drawn if bit ``i % 8`` of
            byte ``i // 8`` is set.
        forced_draws, forced_ids: ``[K]``; these draws give these tokens, whatever the logits say.
    """

    scaled_draws: Ints = field(default_factory=lambda: NO_INTS)
    scaled_ids: Ints = field(default_factory=lambda: NO_INTS)
    factors: Floats = field(default_factory=lambda: NO_FLOATS)
    added_draws: Ints = field(default_factory=lambda: NO_INTS)
    added_ids: Ints = field(default_factory=lambda: NO_INTS)
    terms: Floats = field(default_factory=lambda: NO_FLOATS)
    masked_draws: Ints = field(default_factory=lambda: NO_INTS)
    masks: npt.NDArray[np.uint8] = field(default_factory=lambda: NO_MASKS)
    forced_draws: Ints = field(default_factory=lambda: NO_INTS)
    forced_ids: Ints = field(default_factory=lambda: NO_INTS)

    def between(self, start: int, end: int) -> "LogitEdits":
        """Those of some draws, counted from ``start``."""
        scaled, added, masked, forced = (
            (draws >= start) & (draws < end)
            for draws in (self.scaled_draws, self.added_draws, self.masked_draws, self.forced_draws)
        )
        return LogitEdits(
            self.scaled_draws[scaled] - start,
            self.scaled_ids[scaled],
            self.factors[scaled],
            self.added_draws[added] - start,
            self.added_ids[added],
            self.terms[added],
            self.masked_draws[masked] - start,
            self.masks[masked],
            self.forced_draws[forced] - start,
            self.forced_ids[forced],
        )


CONFIDENCES = ("probability", "margin", "entropy")
"""Ways to say how sure a drawn token is; see `executor.confidence`."""


@dataclass(frozen=True, slots=True)
class Draws:
    """What decides each token that is drawn, beside its logits.

    Attributes:
        rows: int64 ``[D]``, which of the step's tokens the logits follow; several draws may share a row.
        table_rows: int64 ``[D]``, the sequence's row, under which the token is kept for the next step.
        seeds, indices, positions: ``[D]``, the key of the random number: the request's seed (uint64), which of its
            completions this is, and which token of the sequence is drawn; where one is drawn anew in several rounds,
            plus 2^32 for each round before.
        temperature: ``[D]``; 0 takes the likeliest token.
        top_k: int64 ``[D]``; below 1 keeps all.
        top_p, min_p: ``[D]``.
        num_logprobs: int64 ``[D]``, how many of the likeliest tokens to report beside the drawn one; -1 reports none.
        edits: of the logits.
        guides: int64 ``[D]``, the row of the same token without the prompt, -1 for none; or empty for no draw at all.
        guidance: float64 ``[D]``; a guided draw's logits are g + (scale + 1) (l - g), where g are those of its guide.
        confidences: int64 ``[D]``, which of ``CONFIDENCES`` to report, -1 for none; or empty for no draw at all.
    """

    rows: Ints
    table_rows: Ints
    seeds: npt.NDArray[np.uint64]
    indices: Ints
    positions: Ints
    temperature: Floats
    top_k: Ints
    top_p: Floats
    min_p: Floats
    num_logprobs: Ints
    edits: LogitEdits
    guides: Ints = field(default_factory=lambda: NO_INTS)
    guidance: Floats = field(default_factory=lambda: NO_FLOATS)
    confidences: Ints = field(default_factory=lambda: NO_INTS)

    def __len__(self) -> int:
        return len(self.rows)

    def split(self, size: int) -> "Iterator[Draws]":
        """In their order, at most ``size`` at a time."""
        if len(self) <= size:
            yield self
            return
        columns = [name.name for name in fields(self) if name.name != "edits"]
        for start in range(0, len(self), size):
            end = min(start + size, len(self))
            some = {name: getattr(self, name)[start:end] for name in columns}
            yield replace(self, **some, edits=self.edits.between(start, end))


@dataclass(frozen=True, slots=True)
class Scores:
    """Rows whose log probabilities are wanted, without drawing from them: prompt tokens, and beams.

    Attributes:
        rows: int64 ``[P]``, which of the step's tokens the logits follow.
        targets: int64 ``[P]``, the token to report; -1 where there is none.
        num_top: int64 ``[P]``, how many of the likeliest tokens to report.
    """

    rows: Ints = field(default_factory=lambda: NO_INTS)
    targets: Ints = field(default_factory=lambda: NO_INTS)
    num_top: Ints = field(default_factory=lambda: NO_INTS)

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Pools:
    """Runs of rows whose hidden states are summed, for the mean over a prompt that several steps may compute.

    Attributes:
        starts, ends: int64 ``[E]``; run ``e`` is the step's tokens ``starts[e]:ends[e]``, at least one.
    """

    starts: Ints = field(default_factory=lambda: NO_INTS)
    ends: Ints = field(default_factory=lambda: NO_INTS)

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True, slots=True)
class Keeps:
    """What stays of sequences that a step computes whole, for later steps that compute some of their tokens anew.

    Attributes:
        sequences: int64 ``[K]``, which of the step's sequences.
        starts, ends: int64 ``[K]``, the tokens that those steps will compute.
        num_kept: int64 ``[K]``, how many of the others are kept: those that these tokens attend to most.
        by_head: int64 ``[K]``; 1 where each KV head keeps its own, 0 where all keep the same.
        slots: int64 ``[sum(num_kept)]``, where their keys and values go.
    """

    sequences: Ints = field(default_factory=lambda: NO_INTS)
    starts: Ints = field(default_factory=lambda: NO_INTS)
    ends: Ints = field(default_factory=lambda: NO_INTS)
    num_kept: Ints = field(default_factory=lambda: NO_INTS)
    by_head: Ints = field(default_factory=lambda: NO_INTS)
    slots: Ints = field(default_factory=lambda: NO_INTS)

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True, slots=True)
class StepInput:
    """What an executor computes: copies of blocks first, in the order of the fields, then one forward pass, then draws.

    A plan may hold copies alone; then T and S are 0.

    Attributes:
        swap_out, copy, swap_in: int64 ``[N, 2]``, (source, target) blocks: GPU to CPU, within the GPU, CPU to GPU.
        token_ids: int64 ``[T]``.
        sampled_at, sampled_from: int64 ``[M]``; ``token_ids[sampled_at]`` are what was drawn last under the table rows
            ``sampled_from``, which the host may not know yet.
        positions: int64 ``[T]``, each token's index in its own sequence.
        slot_mapping: int64 ``[T]``, where its key and value go: ``block_id * block_size + offset``; -1 is nowhere.
        query_start_loc: int32 ``[S + 1]``; sequence ``s`` owns tokens ``query_start_loc[s]:query_start_loc[s + 1]``.
        context_lens: int32 ``[S]``, tokens of each sequence in the cache once this step's are written.
        table_rows: int64 ``[S]``, the row of each sequence in the executor's table of blocks.
        changed, changed_blocks: int64 and int32 ``[C]``; places in the flattened table, and the block ids that are to
            be written there before the step.
        width: blocks of the longest table in the step.
        num_decodes: sequences that compute exactly one token; the first behind those that are computed whole.
        draws: the tokens to draw.
        scores: the log probabilities to report.
        pools: the sums of hidden states to report.
        num_whole: leading sequences all of whose tokens are computed, and read no keys but each other's. The executor
            holds those for the time of one layer.
        keeps: what stays of them all the same.
    """

    swap_out: Ints
    copy: Ints
    swap_in: Ints
    token_ids: Ints
    sampled_at: Ints
    sampled_from: Ints
    positions: Ints
    slot_mapping: Ints
    query_start_loc: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    table_rows: Ints
    changed: Ints
    changed_blocks: npt.NDArray[np.int32]
    width: int
    num_decodes: int
    draws: Draws
    scores: Scores
    pools: Pools = field(default_factory=Pools)
    num_whole: int = 0
    keeps: Keeps = field(default_factory=Keeps)


class TokenScore(NamedTuple):
    """The log probability of one token under the model itself, before edits, temperature and filters.

    Attributes:
        logprob: natural logarithm; meaningless where no token was asked for.
        rank: 1 for the likeliest of the vocabulary.
        top_ids, top_logprobs: the likeliest tokens and their log probabilities, best first.
    """

    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gives.

    Attributes:
        token_ids: what each draw gave, in their order.
        logprobs: the log probability of each of them; NaN where the logits are not finite.
        token_scores: one for each draw that asked for log probabilities, in their order.
        scores: one for each of ``StepInput.scores``.
        pooled: float32 ``[hidden_size]`` for each of ``StepInput.pools``, hidden states after the model's last norm.
        confidences: for each draw how sure it is, if any asked for that; arbitrary for those that did not.
    """

    token_ids: list[int]
    logprobs: list[float]
    token_scores: list[TokenScore]
    scores: list[TokenScore]
    pooled: list[npt.NDArray[np.float32]] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)


class ExecutorRestarted(Exception):
    """The executor had to start anew: what was under way is not computed, and nothing is left in its memory."""


class StepFuture(Protocol):
    """A step that is computed now, or will be."""

    def result(self) -> StepOutput:
        """Wait for it; raises what the step raised. May be called again, and says the same.

        Raises:
            ExecutorRestarted: this step and all others under way are to be submitted again, once all that they read
                from the cache has been computed again.
        """


class Executor(Protocol):
    """What turns a step into tokens: this process, several ranks, a simulation. Steps run in the order they came."""

    def submit(self, step: StepInput, /) -> StepFuture:
        """Have a step computed after those that were submitted before. Does not wait for it."""

    def close(self) -> None:
        """Free everything; nothing may be submitted any more."""
