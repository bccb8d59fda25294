"""A whole engine without tensors: an executor that keeps token ids where a real one keeps keys and values.

Its "model" is a function of the tokens before, which it reads back from its paged cache through the block tables, as
attention does. So a block that is shared, copied, swapped, freed or written wrongly, or anything that is missing from a
`StepInput`, changes the tokens; `completions_alone` says what they must be, from the prompt alone.

Nothing here imports torch, directly or by way of Mini-Infer.
"""

import ctypes
import random
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from mini_infer import EngineConfig, LLMEngine, SamplingParams, StructuredOutputsParams
from mini_infer.engine.build import Parts, make_loop, make_scheduler
from mini_infer.engine.generation_config import GenerationDefaults
from mini_infer.engine.intake import Intake
from mini_infer.engine.no_tokenizer import NoTokenizer
from mini_infer.engine.rules import Grammar
from mini_infer.random import uniforms
from mini_infer.scheduler import PreemptionCosts
from mini_infer.step import Draws, Floats, StepFuture, StepInput, StepOutput, TokenScore

VOCAB_SIZE = 40
EOS = VOCAB_SIZE - 1
NOBODY = -7


@cache
def logits_after(tokens: tuple[int, ...]) -> Floats:
    """``[VOCAB_SIZE]``: what the "model" says after these tokens. All of them matter, and in their order."""
    draw = random.Random(repr(tokens))
    return 2 * np.array([draw.gauss(0, 1) for _ in range(VOCAB_SIZE)])


def log_softmax(logits: Floats) -> Floats:
    return logits - np.logaddexp.reduce(logits)


def choose(logits: Floats, temperature: float, key: tuple[int, int, int]) -> int:
    """The likeliest token, or the one that the random number of this key falls on."""
    if temperature == 0 or np.isneginf(logits).all():
        return int(logits.argmax())
    cumulative = np.exp(log_softmax(logits / temperature)).cumsum()
    uniform = uniforms([key[0]], [key[1]], [key[2]])[0]
    return int(min(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"), VOCAB_SIZE - 1))


TOY = StructuredOutputsParams(grammar="toy")
"""Asks for the grammar that `ways_on` is."""


@cache
def ways_on(generated: tuple[int, ...]) -> tuple[frozenset[int], bool]:
    """Which tokens a text of the toy grammar goes on with, and whether it may end here: one way, several, or none."""
    draw = random.Random(repr(generated[-2:]) + str(len(generated)))
    if len(generated) == 14:
        return frozenset(), True
    if draw.random() < 0.6:
        return frozenset({draw.randrange(4, EOS)}), False
    return frozenset({*draw.sample(range(EOS), 5), draw.randrange(4, EOS)}), draw.random() < 0.3


class ToyMatcher:
    """The toy grammar, as llguidance's matchers are called."""

    def __init__(self) -> None:
        self._taken: tuple[int, ...] = ()

    def compute_ff_tokens(self) -> list[int]:
        taken = self._taken
        while len(ways := ways_on(taken)[0]) == 1:
            taken = (*taken, *ways)
        return list(taken[len(self._taken) :])

    def try_consume_tokens(self, token_ids: Sequence[int]) -> int:
        for place, token_id in enumerate(token_ids):
            if token_id not in ways_on(self._taken)[0]:
                return place
            self._taken += (token_id,)
        return len(token_ids)

    def consume_token(self, token_id: int) -> bool:
        assert self.try_consume_tokens([token_id]) == 1
        return True

    def validate_tokens(self, token_ids: Sequence[int]) -> int:
        num_taken = self.try_consume_tokens(token_ids)
        self.rollback(num_taken)
        return num_taken

    def rollback(self, num_tokens: int) -> None:
        self._taken = self._taken[: len(self._taken) - num_tokens]

    def is_accepting(self) -> bool:
        return ways_on(self._taken)[1]

    def is_error(self) -> bool:
        return False

    def unsafe_compute_mask_ptr(self, pointer: int, num_bytes: int) -> None:
        bits = np.zeros(num_bytes * 8, dtype=np.uint8)
        bits[list(ways_on(self._taken)[0])] = 1
        ctypes.memmove(pointer, np.packbits(bits, bitorder="little").tobytes(), num_bytes)


class ToyGrammars:
    """Compiles the toy grammar."""

    def compile(self, params: StructuredOutputsParams, stop_token_ids: Collection[int], count: int) -> list[Grammar]:
        assert params == TOY
        return [Grammar(ToyMatcher(), VOCAB_SIZE, {EOS}, stop_token_ids) for _ in range(count)]  # type: ignore[arg-type]


def completions_alone(
    prompt: Sequence[int], params: SamplingParams, max_model_len: int
) -> list[tuple[list[int], str, float]]:
    """Tokens, finish reason and log probability of each completion, by the definitions of SamplingParams.

    The request must have a seed, and its completions are generated one after the other, token by token.
    """
    assert params.seed is not None
    stop = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else (EOS,))}
    room = max_model_len - len(prompt)
    most = room if params.max_tokens is None else min(room, params.max_tokens)
    completions = []
    for index in range(params.n):
        generated: list[int] = []
        total, reason = 0.0, "length"
        while len(generated) < most:
            raw = logits_after((*prompt, *generated))
            logits = raw.copy()
            for token_id in {*prompt, *generated}:
                factor = params.repetition_penalty
                logits[token_id] *= 1 / factor if logits[token_id] > 0 else factor
            for token_id in set(generated):
                logits[token_id] -= params.presence_penalty + params.frequency_penalty * generated.count(token_id)
            for token_id, bias in (params.logit_bias or {}).items():
                logits[token_id] += bias
            if len(generated) < params.min_tokens:
                logits[list(stop)] = -np.inf
            ways, is_complete = ways_on(tuple(generated)) if params.structured_outputs else (frozenset(), False)
            if params.structured_outputs:
                allowed = ways | (stop if is_complete else frozenset())
                logits[[i for i in range(VOCAB_SIZE) if i not in allowed]] = -np.inf
                if is_complete and np.isneginf(logits).all():
                    reason = "stop"
                    break
            if len(ways) == 1:
                (token_id,) = ways
            else:
                token_id = choose(logits, params.temperature, (params.seed, index, len(prompt) + len(generated)))
            generated.append(token_id)
            total += float(log_softmax(raw)[token_id])
            if token_id in stop:
                reason = "stop"
                break
        completions.append((generated, reason, total))
    return completions


class StandIn:
    """Computes steps on token ids.

    Args:
        config, num_blocks, max_model_len: the shape of the memory.
    """

    def __init__(self, config: EngineConfig, num_blocks: int, max_model_len: int) -> None:
        size = self._block_size = config.block_size
        width = -(-max_model_len // size)
        self._tables = np.full((config.max_num_seqs, width), NOBODY, dtype=np.int32)
        self._sampled = np.full(config.max_num_seqs, NOBODY, dtype=np.int64)
        # The token of each slot and its position, which tell whose it is and whether it was overwritten.
        self._cache = np.full((num_blocks, size, 2), NOBODY, dtype=np.int64)
        self._cpu_cache = np.full((config.num_cpu_blocks, size, 2), NOBODY, dtype=np.int64)

    def submit(self, step: StepInput, /) -> StepFuture:
        return _Step(self, step)

    def close(self) -> None:
        pass

    def compute(self, step: StepInput) -> StepOutput:
        for copies, source, target in (
            (step.swap_out, self._cache, self._cpu_cache),
            (step.copy, self._cache, self._cache),
            (step.swap_in, self._cpu_cache, self._cache),
        ):
            if len(copies):
                target[copies[:, 1]] = source[copies[:, 0]]
        if not len(step.token_ids):
            return StepOutput([], [], [], [])
        self._tables.reshape(-1)[step.changed] = step.changed_blocks
        tables = self._tables[step.table_rows]
        assert len(set(step.table_rows.tolist())) == len(step.table_rows)

        counts = np.diff(step.query_start_loc)
        owners = np.repeat(np.arange(len(counts)), counts)
        assert (counts[: step.num_decodes] == 1).all() and (counts[step.num_decodes :] > 1).all()
        last = np.concatenate([np.arange(end - n, end) for end, n in zip(step.context_lens, counts, strict=True)])
        assert (step.positions == last).all()
        assert step.positions.max() // self._block_size < step.width
        slots = self._slots(tables[owners], step.positions)
        assert (slots == step.slot_mapping).all()

        token_ids = step.token_ids.copy()
        token_ids[step.sampled_at] = self._sampled[step.sampled_from]
        assert ((token_ids >= 0) & (token_ids < VOCAB_SIZE)).all()
        assert len(set(slots.tolist())) == len(slots), "two sequences write to one slot"
        self._cache.reshape(-1, 2)[slots] = np.stack([token_ids, step.positions], axis=1)
        return self._answer(step, [self._read(*row) for row in zip(tables, step.context_lens, strict=True)])

    def _slots(self, tables: npt.NDArray[np.int32], positions: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Tables ``[T, width]`` and positions ``[T]`` to slots ``[T]``."""
        blocks = tables[np.arange(len(positions)), positions // self._block_size].astype(np.int64)
        assert (blocks >= 0).all()
        return blocks * self._block_size + positions % self._block_size

    def _read(self, table: npt.NDArray[np.int32], length: int) -> tuple[int, ...]:
        """A sequence's tokens, from its blocks."""
        positions = np.arange(length)
        tokens, places = self._cache.reshape(-1, 2)[self._slots(np.tile(table, (length, 1)), positions)].T
        assert (places == positions).all(), (places, positions)
        return tuple(tokens.tolist())

    def _answer(self, step: StepInput, contexts: list[tuple[int, ...]]) -> StepOutput:
        def before(row: int) -> tuple[int, ...]:
            """The tokens up to and with one of the step's."""
            owner = int(np.searchsorted(step.query_start_loc, row, side="right")) - 1
            return contexts[owner][: step.positions[row] + 1]

        draws, scores = step.draws, step.scores
        token_ids, logprobs, token_scores = [], [], []
        for draw in range(len(draws)):
            tokens = before(draws.rows[draw])
            assert draws.positions[draw] == len(tokens)
            raw = logits_after(tokens)
            token_id = self._draw(draws, draw, raw)
            token_ids.append(token_id)
            logprobs.append(float(log_softmax(raw)[token_id]))
            if draws.num_logprobs[draw] >= 0:
                token_scores.append(score(raw, token_id, int(draws.num_logprobs[draw])))
            self._sampled[draws.table_rows[draw]] = token_id
        wanted = zip(scores.rows.tolist(), scores.targets.tolist(), scores.num_top.tolist(), strict=True)
        return StepOutput(
            token_ids,
            logprobs,
            token_scores,
            [score(logits_after(before(row)), target, num_top) for row, target, num_top in wanted],
        )

    @staticmethod
    def _draw(draws: Draws, draw: int, raw: Floats) -> int:
        assert draws.top_k[draw] < 1 and draws.top_p[draw] == 1 and draws.min_p[draw] == 0, "not known here"
        edits, logits = draws.edits, raw.copy()
        some = edits.scaled_draws == draw
        for token_id, factor in zip(edits.scaled_ids[some], edits.factors[some], strict=True):
            logits[token_id] *= 1 / factor if logits[token_id] > 0 else factor
        some = edits.added_draws == draw
        np.add.at(logits, edits.added_ids[some], edits.terms[some])
        for mask in edits.masks[edits.masked_draws == draw]:
            logits[np.unpackbits(mask, count=VOCAB_SIZE, bitorder="little") == 0] = -np.inf
        for token_id in edits.forced_ids[edits.forced_draws == draw]:
            return int(token_id)
        key = (int(draws.seeds[draw]), int(draws.indices[draw]), int(draws.positions[draw]))
        return choose(logits, float(draws.temperature[draw]), key)


def score(logits: Floats, target: int, num_top: int) -> TokenScore:
    logprobs = log_softmax(logits)
    best = np.argsort(-logprobs, kind="stable")[:num_top]
    own = float(logprobs[target])
    return TokenScore(own, int((logprobs > own).sum()) + 1, tuple(best.tolist()), tuple(logprobs[best].tolist()))


class _Step:
    """Computed when its result is asked for, which the loop does in order."""

    def __init__(self, executor: StandIn, step: StepInput) -> None:
        self._executor, self._step = executor, step
        self._output: StepOutput | None = None

    def result(self) -> StepOutput:
        if self._output is None:
            self._output = self._executor.compute(self._step)
        return self._output


def make_stand_in_engine(depth: int = 1, *, num_blocks: int = 64, max_model_len: int = 64, **fields: Any) -> LLMEngine:
    """An engine whose prompts are token ids below ``VOCAB_SIZE``."""
    common = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, "overlap": depth}
    config = EngineConfig(**{**common, **fields})
    defaults = GenerationDefaults(frozenset({EOS}), SamplingParams(max_tokens=100))
    scheduler = make_scheduler(config, max_model_len, num_blocks, PreemptionCosts(1e-6, 1e-6))
    executor = StandIn(config, num_blocks, max_model_len)
    loop = make_loop(config, scheduler, executor, NoTokenizer())
    tokenizer = NoTokenizer()
    intake = Intake(tokenizer, defaults, VOCAB_SIZE, max_model_len, config)
    intake.grammars = ToyGrammars()  # type: ignore[assignment]
    return LLMEngine.of(config, Parts(tokenizer, defaults, intake, loop, executor, max_model_len))
