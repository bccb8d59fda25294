"""Masked diffusion: an answer begins as a canvas of masks, and every step writes some of them, wherever it is surest.

A step runs the whole sequence, prompt and canvas, through the model, which sees both sides of every gap. For each mask
of the block that is being written it says a token, drawn like any other, and how likely that was; the likeliest are
kept, and the others stay masked for the next step ("low-confidence remasking"). Blocks are written one after the other,
each with its share of the steps. These are the rules of LLaDA's sampler, with which tokens agree, save that

- a mask is never an answer, neither inside a block nor anywhere else;
- steps in which nothing would be written are left out;
- lengths, blocks and steps need not divide each other;
- a model that sees in blocks has its next block's masks only when it is their turn, and keeps the keys and values of
  finished blocks; its blocks are counted from the prompt's first token, and the first one may begin with a part of it;
- the answer ends as soon as all before its first end-of-sequence token is written. As what is written never changes,
  the text is the same as if the rest had been written, too.

Some options are faster and another algorithm: to keep as many tokens as are sure enough, instead of equally many each
step; and, within a block, not to compute again what stands before it, or around it, or to forget most of that.

Dream's four algorithms differ from LLaDA's in how many tokens a step writes, and in which are the surest.

Nie et al., Large Language Diffusion Models, 2025, https://arxiv.org/abs/2502.09992
Ye et al., Dream 7B: Diffusion Large Language Models, 2025, https://arxiv.org/abs/2508.15487
Wu et al., Fast-dLLM: Training-free Acceleration of Diffusion LLM by Enabling KV Cache and Parallel Decoding, 2025,
https://arxiv.org/abs/2505.22618
Song et al., Sparse-dLLM: Accelerating Diffusion LLMs with Dynamic Cache Eviction, 2025,
https://arxiv.org/abs/2508.02558
"""

import logging
import math
import sys
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from mini_infer.engine.decoding.lifecycle import close_completion, start_all, stop_all
from mini_infer.engine.describe import Answer, Wanted
from mini_infer.engine.request import Completion, Request
from mini_infer.engine.rules import Rule
from mini_infer.engine.token_logprobs import PlaceLogprobs
from mini_infer.exceptions import NotFiniteError
from mini_infer.outputs import FinishReason
from mini_infer.random import uniforms
from mini_infer.scheduler import Outcome, Reuse, ScheduledSequence, Scheduler
from mini_infer.scheduler import Sequence as TokenSequence
from mini_infer.step import TokenScore

logger = logging.getLogger(__name__)

_ROUND = 1 << 32
"""Added to a position for each step before, so that every step draws anew; positions are smaller."""

_LAST_TIME = 1e-3
"""Where Dream's schedule ends; `eps` there."""

_RATED: Mapping[str, str] = {"maskgit_plus": "probability", "topk_margin": "margin", "entropy": "entropy"}
"""Dream's names for the ways to be sure of a token."""

_ORDERS = 1 << 62
"""Added where a number decides the order in which tokens are kept, and not a token."""


def counts(gen_length: int, steps: int, block_length: int, offset: int = 0) -> tuple[int, ...]:
    """How many tokens each step of an answer writes, where so many of its first block are not its own but the prompt's.

    Every block gets its share of the steps, the first ones one more if they do not divide, and at least one. In a block
    every step writes equally many, the first ones one more; a block of fewer tokens than steps takes no more steps than
    tokens.
    """
    plan: list[int] = []
    num_blocks = -(-(offset + gen_length) // block_length)
    for number in range(num_blocks):
        start = max(number * block_length - offset, 0)
        length = min((number + 1) * block_length - offset, gen_length) - start
        num_steps = min(length, max(1, steps // num_blocks + (number < steps % num_blocks)))
        plan += [length // num_steps + (i < length % num_steps) for i in range(num_steps)]
    return tuple(plan)


def shares(steps: int) -> list[float]:
    """Which share of what is still masked each step of Dream's schedule writes: the time goes from 1 to almost 0, and
    what is masked at time t is so with probability t. The last step writes all."""
    times = [1 - (1 - _LAST_TIME) * step / steps for step in range(steps + 1)]
    return [1 - after / before for before, after in pairwise(times[:-1])] + [1.0]


def counts_by_share(gen_length: int, steps: int) -> tuple[int, ...]:
    """How many tokens each step writes where its share of the masks says so, rounded down; without those that write
    none."""
    left, plan = gen_length, []
    for share in shares(steps):
        plan.append(int(left * share))
        left -= plan[-1]
    return tuple(filter(None, plan))


@dataclass(frozen=True, slots=True)
class Keeping:
    """What of a sequence is not computed again within a block.

    Attributes:
        suffix: what stands behind the block, too, and not only what stands before it.
        share: how much of it later steps look at, by what matters most to the block.
        by_head: each KV head chooses for itself.
        delay: full steps at the beginning of a block before the one whose keys and values are kept.
        interval: a full step every so many from there on; None is one for each block.
    """

    suffix: bool
    share: float = 1.0
    by_head: bool = True
    delay: int = 0
    interval: int | None = None

    def reuse(self, start: int, end: int, length: int) -> Reuse:
        """What a step computes where the block's tokens are from ``start`` to ``end`` of so many."""
        end = end if self.suffix else length
        return Reuse(start, end, math.floor(self.share * (length - (end - start))))

    def is_full(self, step: int) -> bool:
        """Whether a block's step computes the whole sequence."""
        beyond = step - self.delay
        return beyond <= 0 or (self.interval is not None and beyond % self.interval == 0)


@dataclass(frozen=True, slots=True)
class DiffusionOptions:
    """How a request's canvases are written.

    Attributes:
        mask_token_id: what they are made of.
        shift: 1 where the logits after a token are for the next one.
        gen_length, block_length: masks of an answer, and of what is written before any behind it.
        origin: position that blocks are counted from.
        keeps_blocks: the model sees no block behind its own, so that keys and values of finished blocks stay right.
        counts: how many tokens each step writes, unless one of the next three says so.
        shares: how likely each mask is to be written in each step; Dream's ``origin``. Else empty.
        threshold: a step keeps every token that is at least so likely, and the likeliest in any case.
        factor: a step keeps the n likeliest, as many as (n + 1) (1 - p) is less for the n-th of them; one in any case.
        keeping: what most steps of a block take as it was; None computes everything in every step.
        cfg_scale: how far to go away from what would be said without the prompt; 0 asks nobody.
        rule: which tokens are kept: one of LLaDA's, "low_confidence" and "random", or of Dream's.
        alg_temp: how far chance decides beside a confidence of Dream's; 0 is not at all.
        stop_token_ids: tokens that end an answer.
        rules: what changes the logits.
        seed: the request's.
    """

    mask_token_id: int
    shift: int
    gen_length: int
    block_length: int
    origin: int
    keeps_blocks: bool
    counts: tuple[int, ...]
    shares: tuple[float, ...]
    threshold: float | None
    factor: float | None
    keeping: Keeping | None
    cfg_scale: float
    rule: str
    alg_temp: float
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
        block_step: how many of them are the block's that is being written.
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
        if not item.num_logits:  # a part of the prompt
            return
        options, canvas = self._options, self._canvases[item.sequence]
        for position in self._gaps(item.sequence):
            row = first_row + position - options.shift - item.start
            key = (options.seed, canvas.completion.index, position + _ROUND * canvas.step)
            wanted.draw(row, item.sequence, key, request.params, options.rules, [])
            if item.sequence.twin is not None:
                wanted.guide(row + item.num_tokens, options.cfg_scale)
            if options.rule in _RATED:
                wanted.rate(_RATED[options.rule])
        reuse = self._reuse(item.sequence, canvas.block_step + 1)
        if reuse is not None and item.is_whole:
            for sequence in filter(None, (item.sequence, item.sequence.twin)):
                wanted.keep(sequence, reuse, options.keeping is not None and options.keeping.by_head)

    def decide(self, request: Request, item: ScheduledSequence, answer: Answer) -> list[Outcome]:
        if not item.num_logits:
            return []
        sequence, drawn = item.sequence, self._drawn(item.sequence, answer)
        num_valid = self._block(sequence)[0] if self._options.keeps_blocks else 0
        if any(math.isnan(one.logprob) for one in drawn):
            return [Outcome(sequence, (), num_valid, "error")]
        kept = self._kept(sequence, drawn, answer.confidences)
        known = sequence.num_known_tokens
        canvas = sequence.token_ids[known:]
        for written in kept:
            canvas[written.position - known] = written.token_id
        mask = self._options.mask_token_id
        num_settled = canvas.index(mask) if mask in canvas else len(canvas)
        for place in range(num_settled):
            if canvas[place] in self._options.stop_token_ids:
                return [Outcome(sequence, tuple(canvas[: place + 1]), num_valid, "stop")]
        fills_block = len(kept) == len(drawn)
        reuse = None if fills_block else self._reuse(sequence, self._canvases[sequence].block_step + 1)
        settled, rest = canvas[:num_settled], canvas[num_settled:]
        if not rest:  # of a model that sees no masks behind a block, the next one's begin here
            rest = [mask] * min(self._options.block_length, sequence.max_length - known - num_settled)
        return [Outcome(sequence, tuple(settled), num_valid, None, tuple(rest), reuse)]

    def publish(self, request: Request, item: ScheduledSequence, answer: Answer, scheduler: Scheduler) -> int:
        if not item.num_logits:
            return 0
        sequence, canvas = item.sequence, self._canvases[item.sequence]
        completion = canvas.completion
        drawn = self._drawn(sequence, answer)
        if any(math.isnan(one.logprob) for one in drawn):
            request.error = NotFiniteError(
                f"request {request.request_id!r}: its logits are not finite; a wider dtype may help"
            )
            logger.error("%s", request.error)
            close_completion(request, sequence, completion, "error", "", 0)
            return 0
        on_canvas = sequence.token_ids
        kept = [one for one in drawn if on_canvas[one.position : one.position + 1] == [one.token_id]]
        canvas.step += 1
        canvas.block_step = canvas.block_step + 1 if len(kept) < len(drawn) else 0
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
        start = first + len(self._canvases[sequence].completion.token_ids)
        start -= (start - options.origin) % options.block_length
        return start, min(start + options.block_length, first + options.gen_length)

    def _reuse(self, sequence: TokenSequence, step: int) -> Reuse | None:
        """What a step of the block, if it is not full by then, is to compute alone. The rest is not right, for it
        depends on what was written meanwhile."""
        options = self._options
        if options.keeping is None or options.keeping.is_full(step):
            return None
        start, end = self._block(sequence)
        return options.keeping.reuse(start - options.shift, end, len(sequence))

    def _drawn(self, sequence: TokenSequence, answer: Answer) -> list[_Written]:
        """A token for every gap."""
        gaps = self._gaps(sequence)
        scores = answer.token_scores or [None] * len(gaps)
        return [_Written(*one) for one in zip(gaps, answer.token_ids, answer.logprobs, scores, strict=True)]

    def _kept(self, sequence: TokenSequence, drawn: list[_Written], confidences: Seq[float]) -> list[_Written]:
        """What a step writes: the surest tokens, of equals the leftmost."""
        options, canvas = self._options, self._canvases[sequence]
        order = confidences if options.rule in _RATED else [one.logprob for one in drawn]
        if options.rule in ("random", "origin") or options.alg_temp:
            keys = [one.position + _ROUND * canvas.step + _ORDERS for one in drawn]
            chance = uniforms([options.seed] * len(keys), [canvas.completion.index] * len(keys), keys).tolist()
            if options.rule == "origin":
                return [one for one, u in zip(drawn, chance, strict=True) if u < options.shares[canvas.step]]
            if options.rule == "random":
                order = chance
            else:
                order = [c / options.alg_temp + _gumbel(u) for c, u in zip(order, chance, strict=True)]
        best = [drawn[i] for i in sorted(range(len(drawn)), key=lambda i: (-order[i], i))]
        return best[: self._count(canvas, [math.exp(one.logprob) for one in best])]

    def _count(self, canvas: _Canvas, likely: list[float]) -> int:
        """How many of some tokens are kept, given their probabilities, the largest first."""
        options = self._options
        if options.threshold is not None:
            return max(1, sum(p >= options.threshold for p in likely))
        if options.factor is not None:
            return max([1, *(n for n, p in enumerate(likely, start=1) if (n + 1) * (1 - p) < options.factor)])
        return options.counts[canvas.step]


def _gumbel(uniform: float) -> float:
    """Noise by which the order of x + noise is that of drawing without replacement, each in proportion to e^x (Gumbel's
    trick; Vieira, 2014)."""
    return -math.log(-math.log(uniform or sys.float_info.min))
