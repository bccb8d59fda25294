"""From a plan to a step: integers in lists become arrays, complete and independent of the sequences they came from."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, takewhile
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mini_infer.engine.rules import Edits, Rule
from mini_infer.sampling import SamplingParams
from mini_infer.scheduler import BlockCopy, Reuse, ScheduledSequence, SchedulerOutputs, SequenceStatus
from mini_infer.scheduler import Sequence as TokenSequence
from mini_infer.scheduler.sequence import PLACEHOLDER
from mini_infer.step import (
    CONFIDENCES,
    NO_COPIES,
    NO_INTS,
    Draws,
    Ints,
    Keeps,
    Pools,
    Scores,
    StepInput,
    StepOutput,
    TokenScore,
)
from mini_infer.typing import BlockTable, TokenIds


class Answer(NamedTuple):
    """What a step gives to one scheduled sequence.

    Attributes:
        token_ids, logprobs: what its draws gave, and the log probabilities of that.
        token_scores: of the same tokens; empty if it did not ask for them.
        scores: of the rows that it wanted scored.
        pooled: of the runs of rows that it wanted summed.
        confidences: of its draws; empty if it did not ask how sure they are.
    """

    token_ids: list[int]
    logprobs: list[float]
    token_scores: tuple[TokenScore, ...]
    scores: tuple[TokenScore, ...]
    pooled: tuple[npt.NDArray[np.float32], ...]
    confidences: tuple[float, ...]


class Wanted:
    """What the sequences of one step want of its logits, gathered in the order of the plan."""

    def __init__(self) -> None:
        self._sequences: list[TokenSequence] = []
        self._rows: list[int] = []
        self._keys: list[tuple[int, int, int]] = []
        self._params: list[SamplingParams] = []
        self._num_asking = 0  # for log probabilities
        self._guides: dict[int, tuple[int, float]] = {}
        self._confidences: dict[int, int] = {}
        self._edits = Edits()
        self._scores: list[tuple[int, int, int]] = []
        self._pools: list[tuple[int, int]] = []
        self._keeps: list[tuple[TokenSequence, Reuse, bool]] = []
        self._ends: list[tuple[int, int, int, int]] = []

    def draw(
        self,
        row: int,
        sequence: TokenSequence,
        key: tuple[int, int, int],
        params: SamplingParams,
        rules: Iterable[Rule],
        drafts: TokenIds,
    ) -> None:
        """Draw a sequence's next token from the logits after a row.

        Args:
            row: which of the step's tokens.
            sequence: whose token it is.
            key: the random number's: seed, index among ``n``, position of the token.
            params: how it is drawn.
            rules: what they change in the logits.
            drafts: the last tokens before it that are not certain.
        """
        for rule in rules:
            rule.apply(len(self._rows), key[2], drafts, self._edits)
        self._sequences.append(sequence)
        self._rows.append(row)
        self._keys.append(key)
        self._params.append(params)
        if params.logprobs is not None:
            self._num_asking += 1

    def guide(self, row: int, scale: float) -> None:
        """Have the last draw guided, away from the logits after another row."""
        self._guides[len(self._rows) - 1] = row, scale

    def rate(self, confidence: str) -> None:
        """Report of the last draw how sure it is, in one of the ``CONFIDENCES``."""
        self._confidences[len(self._rows) - 1] = CONFIDENCES.index(confidence)

    def score(self, row: int, target: int, num_top: int) -> None:
        """Report the log probability of a token after a row (-1: of none), and of the likeliest ones."""
        self._scores.append((row, target, num_top))

    def pool(self, start: int, end: int) -> None:
        """Report the sum of the hidden states of some of the step's tokens, ``start`` to ``end`` without that."""
        self._pools.append((start, end))

    def keep(self, sequence: TokenSequence, reuse: Reuse, by_head: bool) -> None:
        """Keep of a sequence that is computed whole what a later step takes.

        Args:
            by_head: whether each KV head keeps the tokens that matter most to it.
        """
        self._keeps.append((sequence, reuse, by_head))

    def end_sequence(self) -> None:
        """All that the next sequence of the plan wants was said."""
        self._ends.append((len(self._rows), self._num_asking, len(self._scores), len(self._pools)))

    @property
    def sequences(self) -> list[TokenSequence]:
        """Whose tokens are drawn, in the order of the draws."""
        return self._sequences

    def draws(self, table_rows: Sequence[int]) -> Draws:
        """As arrays, with the table's row of each sequence."""
        seeds, indices, positions = zip(*self._keys, strict=True) if self._keys else ((), (), ())
        params = self._params
        return Draws(
            rows=np.array(self._rows, dtype=np.int64),
            table_rows=np.array(table_rows, dtype=np.int64),
            seeds=np.array([seed % 2**64 for seed in seeds], dtype=np.uint64),
            indices=np.array(indices, dtype=np.int64),
            positions=np.array(positions, dtype=np.int64),
            temperature=np.array([p.temperature for p in params], dtype=np.float64),
            top_k=np.array([min(p.top_k, 2**31) for p in params], dtype=np.int64),
            top_p=np.array([p.top_p for p in params], dtype=np.float64),
            min_p=np.array([p.min_p for p in params], dtype=np.float64),
            num_logprobs=np.array([-1 if p.logprobs is None else p.logprobs for p in params], dtype=np.int64),
            edits=self._edits.finish(),
            confidences=self._per_draw(self._confidences) if self._confidences else NO_INTS,
            **self._guidance(),
        )

    def _per_draw(self, given: Mapping[int, int]) -> Ints:
        return np.array([given.get(draw, -1) for draw in range(len(self._rows))], dtype=np.int64)

    def _guidance(self) -> dict[str, Any]:
        if not self._guides:
            return {}
        guides, scales = zip(*(self._guides.get(draw, (-1, 0.0)) for draw in range(len(self._rows))), strict=True)
        return {"guides": np.array(guides, dtype=np.int64), "guidance": np.array(scales, dtype=np.float64)}

    def scores(self) -> Scores:
        """As arrays."""
        return Scores(*_columns(self._scores))

    def pools(self) -> Pools:
        """As arrays."""
        return Pools(*_columns(self._pools))

    @property
    def keeps(self) -> list[tuple[TokenSequence, Reuse, bool]]:
        """What ``keep`` was told."""
        return self._keeps

    def answers(self, output: StepOutput) -> Iterator[Answer]:
        """What the step gave, for each sequence of the plan."""
        token_ids, logprobs = output.token_ids, output.logprobs
        token_scores, scores = tuple(output.token_scores), tuple(output.scores)  # whose empty parts take no memory
        pooled, confidences = tuple(output.pooled), tuple(output.confidences)
        draw = asking = score = pool = 0
        for ends in self._ends:
            draw_end, asking_end, score_end, pool_end = ends
            yield Answer(
                token_ids[draw:draw_end],
                logprobs[draw:draw_end],
                token_scores[asking:asking_end],
                scores[score:score_end],
                pooled[pool:pool_end],
                confidences[draw:draw_end],
            )
            draw, asking, score, pool = ends


class Describer:
    """Makes steps of plans, and remembers which block tables the executor has, so that a step sends what is new.

    A sequence that runs has a row of the executor's table; a decode adds a block to it once in ``block_size`` steps.

    Args:
        num_rows: most sequences that run at once.
        width: most blocks of one sequence.
        block_size: tokens per block.
    """

    def __init__(self, num_rows: int, width: int, block_size: int) -> None:
        self._block_size = block_size
        self._host = np.zeros((num_rows, width), dtype=np.int32)  # what lies beyond a sequence's own blocks is old
        self._rows: dict[TokenSequence, int] = {}
        self._known: list[BlockTable] = [[] for _ in range(num_rows)]
        self._free = list(range(num_rows - 1, -1, -1))

    def describe(self, plan: SchedulerOutputs, wanted: Wanted) -> StepInput:
        """A step, from a plan that was made just now.

        Everything is computed in numpy, a handful of vector operations for the whole step.
        """
        draw_rows = self._rows_of(wanted.sequences)
        copies = (_pairs(plan.swap_out), _pairs(plan.copy), _pairs(plan.swap_in))
        scheduled = list(_with_twins(plan.scheduled))
        starts = np.array([item.start for item in scheduled], dtype=np.int32)
        counts = np.array([item.num_tokens for item in scheduled], dtype=np.int32)
        query_start_loc = np.zeros(len(scheduled) + 1, dtype=np.int32)
        np.add.accumulate(counts, out=query_start_loc[1:])
        token_ids = np.fromiter(
            chain.from_iterable([i.sequence.token_ids[i.start : i.start + i.num_tokens] for i in scheduled]),
            dtype=np.int64,
            count=plan.num_tokens,
        )
        owners = np.arange(len(scheduled)).repeat(counts)
        positions = np.arange(plan.num_tokens) + (starts - query_start_loc[:-1])[owners]
        # Of how many tokens before its own a sequence's blocks have the keys and values.
        cached = np.array([i.start if i.reuse is None else i.reuse.num_kept for i in scheduled], dtype=np.int32)
        places = positions + (cached - starts)[owners]  # among those that the sequence keeps
        num_whole = len(list(takewhile(attrgetter("is_whole"), scheduled)))
        rows = self._rows_of([item.sequence for item in scheduled])
        table_rows = np.array(rows, dtype=np.int64)
        tables = [item.sequence.block_table for item in scheduled]
        changed = self._update(rows, tables)
        token_rows = table_rows[owners]
        slots = self._slots(token_rows, places)
        slots[: query_start_loc[num_whole]] = -1
        (sampled_at,) = (token_ids == PLACEHOLDER).nonzero()
        token_ids[sampled_at] = 0
        return StepInput(
            *copies,
            token_ids=token_ids,
            sampled_at=sampled_at,
            sampled_from=token_rows[sampled_at],
            positions=positions,
            slot_mapping=slots,
            query_start_loc=query_start_loc,
            context_lens=cached + counts,
            table_rows=table_rows,
            changed=changed,
            changed_blocks=self._host.ravel()[changed],
            width=max(map(len, tables), default=0),
            num_decodes=int(np.count_nonzero(counts == 1)),
            draws=wanted.draws(draw_rows),
            scores=wanted.scores(),
            pools=wanted.pools(),
            num_whole=num_whole,
            keeps=self._keeps(wanted, scheduled),
        )

    def _slots(self, table_rows: Ints, places: Ints) -> Ints:
        """Where in the cache the tokens at some places of their sequences' blocks are."""
        blocks, offsets = np.divmod(places, self._block_size)
        slots: Ints = self._host[table_rows, blocks].astype(np.int64) * self._block_size + offsets
        return slots

    def _keeps(self, wanted: Wanted, scheduled: Sequence[ScheduledSequence]) -> Keeps:
        if not wanted.keeps:
            return Keeps()
        numbers = {item.sequence: number for number, item in enumerate(scheduled)}
        rows = [
            (numbers[sequence], reuse.start, reuse.end, reuse.num_kept, by_head)
            for sequence, reuse, by_head in wanted.keeps
        ]
        slots = [
            self._slots(np.array(self._rows_of([sequence])), np.arange(reuse.num_kept))
            for sequence, reuse, _ in wanted.keeps
        ]
        return Keeps(*[*_columns(rows), np.concatenate(slots)])

    def forget(self) -> None:
        """A step failed, so that it is not known what the executor has: all tables are sent again."""
        self._known = [[] for _ in self._known]

    def _update(self, rows: Sequence[int], tables: Sequence[BlockTable]) -> Ints:
        """Bring the tables up to date; the places in the flattened table that changed."""
        places: list[int] = []
        for row, table in zip(rows, tables, strict=True):
            known = self._known[row]
            if table != known:
                first = _first_difference(table, known)
                self._host[row, first : len(table)] = table[first:]
                start = row * self._host.shape[1]
                places.extend(range(start + first, start + len(table)))
                known[first:] = table[first:]
        return np.array(places, dtype=np.int64)

    def _rows_of(self, sequences: Sequence[TokenSequence]) -> list[int]:
        return [self._rows[sequence] if sequence in self._rows else self._new_row(sequence) for sequence in sequences]

    def _new_row(self, sequence: TokenSequence) -> int:
        if not self._free:  # there are as many rows as sequences can run, so some have stopped
            for other in [other for other in self._rows if other.status is not SequenceStatus.RUNNING]:
                self._free.append(self._rows.pop(other))
        row = self._rows[sequence] = self._free.pop()
        return row


def _with_twins(scheduled: Sequence[ScheduledSequence]) -> Iterator[ScheduledSequence]:
    """To the executor a twin is a sequence like any other, behind the one that it belongs to."""
    for item in scheduled:
        yield item
        if item.sequence.twin is not None:
            yield item._replace(sequence=item.sequence.twin)


def _columns(rows: Sequence[tuple[int, ...]]) -> Iterable[Ints]:
    """None at all if there are no rows."""
    return np.ascontiguousarray(np.array(rows, dtype=np.int64).T) if rows else ()


def _pairs(copies: Sequence[BlockCopy]) -> Ints:
    return np.array(copies, dtype=np.int64) if copies else NO_COPIES


def _first_difference(table: BlockTable, known: BlockTable) -> int:
    if table[: len(known)] == known:
        return len(known)
    return next((i for i, (new, old) in enumerate(zip(table, known, strict=False)) if new != old), len(table))
