"""Masked diffusion: an answer begins as a canvas of masks, and every step writes some of them, wherever it is surest.

A step runs the whole sequence, prompt and canvas, through the model, which sees both sides of every gap. For each mask
of the block that is being written it says a token, drawn like any other, and how likely that was; the likeliest are
kept, and the others stay masked for the next step ("low-confidence remasking"). Blocks are written one after the other,
each with its share of the steps. These are the rules of LLaDA's sampler, with which tokens agree, save that

- a mask is never an answer, neither inside a block nor anywhere else;
- steps in which nothing would be written are left out;
- lengths, blocks and steps need not divide each other;
- the answer ends as soon as all before its first end-of-sequence token is written. As what is written never changes,
  the text is the same as if the rest had been written, too.

Two options are faster and another algorithm: to keep as many tokens as are sure enough, instead of equally many each
step; and, within a block, not to compute again what stands before it.

Nie et al., Large Language Diffusion Models, 2025, https://arxiv.org/abs/2502.09992
Wu et al., Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding, 2025,
https://arxiv.org/abs/2505.22618
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from mini_infer.engine.decoding.lifecycle import close_completion, start_all, stop_all
from mini_infer.engine.describe import Answer, Wanted
from mini_infer.engine.request import Completion, Request
from mini_infer.engine.rules import Rule
from mini_infer.engine.token_logprobs import PlaceLogprobs
from mini_infer.exceptions import NotFiniteError
from mini_infer.outputs import FinishReason
from mini_infer.random import uniforms
from mini_infer.scheduler import Outcome, ScheduledSequence, Scheduler
from mini_infer.scheduler import Sequence as TokenSequence
from mini_infer.step import TokenScore

logger = logging.getLogger(__name__)

_ROUND = 1 << 32
"""Added to a position for each step before, so that every step draws anew; positions are smaller."""

_ORDERS = 1 << 62
"""Added where a number decides the order in which tokens are kept, and not a token."""


def counts(gen_length: int, steps: int, block_length: int) -> tuple[int, ...]:
    """How many tokens each step of an answer writes.

    Every block gets its share of the steps, the first ones one more if they do not divide, and at least one. In a block
    every step writes equally many, the first ones one more; a block of fewer tokens than steps takes no more steps than
    tokens.
    """
    plan: list[int] = []
    num_blocks = -(-gen_length // block_length)
    for number in range(num_blocks):
        length = min(block_length, gen_length - number * block_length)
        num_steps = min(length, max(1, steps // num_blocks + (number < steps % num_blocks)))
        plan += [length // num_steps + (i < length % num_steps) for i in range(num_steps)]
    return tuple(plan)


@dataclass(frozen=True, slots=True)
class DiffusionOptions:
    """How a request's canvases are written.

    Attributes:
        mask_token_id: what they are made of.
        shift: 1 where the logits after a token are for the next one.
        gen_length, block_length: masks of an answer, and of what is written before any behind it.
        counts: how many tokens each step writes, unless one of the next two says so.
        threshold: a step keeps every token that is at least so likely, and the likeliest in any case.
        factor: a step keeps the n likeliest, as many as (n + 1) (1 - p) is less for the n-th of them; one in any case.
        reuses_prefix: only the first step of a block computes what stands before it, and the others take it as it was.
        refresh_interval: it is computed again every so many steps; None is never.
        cfg_scale: how far to go away from what would be said without the prompt; 0 asks nobody.
        in_random_order: keep tokens wherever, and not where they are likeliest.
        stop_token_ids: tokens that end an answer.
        rules: what changes the logits.
        seed: the request's.
    """

    mask_token_id: int
    shift: int
    gen_length: int
    block_length: int
    counts: tuple[int, ...]
    threshold: float | None
    factor: float | None
    reuses_prefix: bool
    refresh_interval: int | None
    cfg_scale: float
    in_random_order: bool
    stop_token_ids: frozenset[int]
    rules: tuple[Rule, ...]
    seed: int


class _Written(NamedTuple):
    """A token that a step keeps, where, and how likely it was."""

    position: int
    token_id: int
    logprob: float
    score: TokenScore | None


@dataclass(slots=True)
class _Canvas:
    """One completion while it is written.

    Attributes:
        completion: where the tokens go that nothing unwritten stands before.
        step: how many steps are done.
        block_step: and how many since everything before the block was computed.
        written: what stands behind those tokens, by position.
    """

    completion: Completion
    step: int = 0
    block_step: int = 0
    written: dict[int, _Written] = field(default_factory=dict)


class Diffusion:
    """The decoding of a masked diffusion model, for ``n`` independent answers.

    Args:
        completions: each answer's sequence, whose tokens are the prompt and ``gen_length`` masks.
        options: how to write them.
        decode_token: the text of one token.
    """

    needs_last_token = True

    def __init__(
        self,
        completions: dict[TokenSequence, Completion],
        options: DiffusionOptions,
        decode_token: Callable[[int], str],
    ) -> None:
        self._canvases = {sequence: _Canvas(completion) for sequence, completion in completions.items()}
        self._options = options
        self._decode_token = decode_token

    def start(self, scheduler: Scheduler) -> None:
        start_all(scheduler, self._canvases)

    def want(self, request: Request, item: ScheduledSequence, first_row: int, wanted: Wanted) -> None:
        options, canvas = self._options, self._canvases[item.sequence]
        for position in self._gaps(item.sequence):
            row = first_row + position - options.shift - item.start
            key = (options.seed, canvas.completion.index, position + _ROUND * canvas.step)
            wanted.draw(row, item.sequence, key, request.params, options.rules, [])
            if item.sequence.twin is not None:
                wanted.guide(row + item.num_tokens, options.cfg_scale)

    def decide(self, request: Request, item: ScheduledSequence, answer: Answer) -> list[Outcome]:
        sequence, kept = item.sequence, self._kept(item.sequence, answer)
        if kept is None:
            return [Outcome(sequence, (), 0, "error")]
        known, num_valid = sequence.num_known_tokens, self._num_valid(sequence, kept)
        canvas = sequence.token_ids[known:]
        for written in kept:
            canvas[written.position - known] = written.token_id
        mask = self._options.mask_token_id
        num_settled = canvas.index(mask) if mask in canvas else len(canvas)
        for place in range(num_settled):
            if canvas[place] in self._options.stop_token_ids:
                return [Outcome(sequence, tuple(canvas[: place + 1]), 0, "stop")]
        return [Outcome(sequence, tuple(canvas[:num_settled]), num_valid, None, tuple(canvas[num_settled:]))]

    def publish(self, request: Request, item: ScheduledSequence, answer: Answer, scheduler: Scheduler) -> int:
        sequence, canvas = item.sequence, self._canvases[item.sequence]
        completion = canvas.completion
        kept = self._kept(sequence, answer)
        if kept is None:
            request.error = NotFiniteError(
                f"request {request.request_id!r}: its logits are not finite; a wider dtype may help"
            )
            logger.error("%s", request.error)
            close_completion(request, sequence, completion, "error", "", 0)
            return 0
        canvas.step += 1
        canvas.block_step = canvas.block_step + 1 if self._num_valid(sequence, kept) else 0
        canvas.written |= {written.position: written for written in kept}
        text, num_new = "", 0
        first = sequence.num_prompt_tokens + len(completion.token_ids)
        for position in range(first, sequence.num_known_tokens):
            _, token_id, logprob, score = canvas.written.pop(position)
            stops = token_id in self._options.stop_token_ids
            place = None if score is None else PlaceLogprobs(token_id, score, self._decode_token)
            text += completion.append(token_id, logprob, place, is_text=not stops)
            num_new += 1
            if stops:
                completion.stop_reason = token_id if token_id in (request.params.stop_token_ids or ()) else None
            elif completion.stop_reason is not None:
                scheduler.finish(sequence, "stop")  # also if it was the last token
                break
        if sequence.finish_reason is not None:
            close_completion(request, sequence, completion, sequence.finish_reason, text, num_new)
        else:
            request.emit(completion, text, num_new, sequence.canvas)
        return num_new

    def stop(self, request: Request, scheduler: Scheduler, reason: FinishReason) -> None:
        completions = ((sequence, canvas.completion) for sequence, canvas in self._canvases.items())
        stop_all(request, scheduler, completions, reason)

    def _gaps(self, sequence: TokenSequence) -> list[int]:
        """Positions of the masks that the next step may write."""
        canvas = self._canvases[sequence]
        settled = sequence.num_prompt_tokens + len(canvas.completion.token_ids)
        return [i for i in range(settled, self._block(sequence)[1]) if i not in canvas.written]

    def _block(self, sequence: TokenSequence) -> tuple[int, int]:
        """Where the block that is being written begins and ends: it has the first mask."""
        first, options = sequence.num_prompt_tokens, self._options
        num_settled = len(self._canvases[sequence].completion.token_ids)
        start = num_settled - num_settled % options.block_length
        return first + start, first + min(start + options.block_length, options.gen_length)

    def _num_valid(self, sequence: TokenSequence, kept: list[_Written]) -> int:
        """How many of the sequence's keys and values the next step shall not compute again. Right they are never, for
        they depend on what was written just now."""
        options, canvas = self._options, self._canvases[sequence]
        ends = len(kept) == len(self._gaps(sequence))
        if not options.reuses_prefix or ends or canvas.block_step + 1 == options.refresh_interval:
            return 0
        return self._block(sequence)[0] - options.shift

    def _kept(self, sequence: TokenSequence, answer: Answer) -> list[_Written] | None:
        """What a step writes: the likeliest tokens, of equals the leftmost. None if the logits are not finite."""
        options, canvas = self._options, self._canvases[sequence]
        gaps = self._gaps(sequence)
        written = [
            _Written(position, token_id, logprob, scores[0] if scores else None)
            for position, (token_id,), (logprob,), scores in zip(
                gaps, answer.token_ids, answer.logprobs, answer.token_scores, strict=True
            )
        ]
        if any(math.isnan(one.logprob) for one in written):
            return None
        if options.in_random_order:
            keys = [position + _ROUND * canvas.step + _ORDERS for position in gaps]
            order = uniforms([options.seed] * len(gaps), [canvas.completion.index] * len(gaps), keys).tolist()
        else:
            order = [one.logprob for one in written]
        best = [written[i] for i in sorted(range(len(gaps)), key=lambda i: (-order[i], i))]
        return best[: self._count(canvas, [math.exp(one.logprob) for one in best])]

    def _count(self, canvas: _Canvas, likely: list[float]) -> int:
        """How many of some tokens are kept, given their probabilities, the largest first."""
        options = self._options
        if options.threshold is not None:
            return max(1, sum(p >= options.threshold for p in likely))
        if options.factor is not None:
            return max([1, *(n for n, p in enumerate(likely, start=1) if (n + 1) * (1 - p) < options.factor)])
        return options.counts[canvas.step]
