"""Beam search: the likeliest completions of a prompt, looked for along several lines at once.

Greedy decoding takes the likeliest token at each place, and may miss a completion that begins less likely and ends
better. A beam search keeps the ``k`` likeliest beginnings instead, its beams. In each round every beam is extended by
every token; of all these extensions the likeliest ``k`` that go on are the next beams, and those among the likeliest
``k`` that end, by a stop token or by their length, are hypotheses. A completion y of a prompt x is scored by

    score(y) = log p(y | x) / |y| ** length_penalty

where |y| counts its tokens, the stop token among them. The search ends when ``k`` hypotheses are found and the best
beam, as long as it is now, does not score higher than the worst of them; or at the most tokens allowed. These are the
rules of ``generate(num_beams=k)`` in transformers, with which the results agree.

To the scheduler each beam is a sequence like any other. A beam that goes on in several ways forks: its blocks are
shared, and copied only where the ways part. The beams of a round may be computed in different steps, when the token
budget or the memory is short; those that are done rest, with nothing to compute, until the last one has reported.
"""

import logging
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from mini_infer.engine.describe import Answer, Wanted
from mini_infer.engine.request import Request
from mini_infer.exceptions import NotFiniteError
from mini_infer.outputs import FinishReason
from mini_infer.scheduler import Outcome, ScheduledSequence, Scheduler, Sequence
from mini_infer.typing import TokenIds

logger = logging.getLogger(__name__)

Continuations: TypeAlias = list[tuple[int, float]]
"""The likeliest next tokens of a beam and their log probabilities, best first."""


@dataclass(frozen=True, slots=True)
class BeamOptions:
    """How to search.

    Attributes:
        length_penalty: the exponent in the score; above 0 it favours long completions, below 0 short ones.
        early_stopping: end as soon as ``n`` hypotheses are found.
        stop_token_ids: tokens that end a completion.
        max_length: most tokens of prompt and completion.
    """

    length_penalty: float
    early_stopping: bool
    stop_token_ids: frozenset[int]
    max_length: int


class _Extension(NamedTuple):
    """A beam and one more token; ``logprob`` is that of all its generated tokens."""

    logprob: float
    beam: Sequence
    token_id: int


class _Hypothesis(NamedTuple):
    """A completion that has ended."""

    score: float
    logprob: float
    token_ids: TokenIds
    finish_reason: FinishReason


class BeamSearch:
    """A decoding whose ``n`` completions are the best of a search of that width; they are empty until it ends.

    Args:
        request_id, prompt_token_ids: whose prompt is completed.
        width: ``n``.
        options: how.
    """

    needs_last_token = True

    def __init__(self, request_id: str, prompt_token_ids: TokenIds, width: int, options: BeamOptions) -> None:
        self._request_id, self._prompt_token_ids = request_id, prompt_token_ids
        self._width, self._options = width, options
        self._beams: dict[Sequence, float] = {}  # of this round, and the log probability of what each has generated
        self._reported: dict[Sequence, Continuations] = {}  # of those beams whose last token is computed
        self._hypotheses: list[_Hypothesis] = []  # the best ``n`` so far, best first

    def start(self, scheduler: Scheduler) -> None:
        beam = self._make_beam(self._prompt_token_ids, num_seats=self._width)
        scheduler.add(beam)
        self._beams[beam] = 0.0

    def want(self, request: Request, item: ScheduledSequence, first_row: int, wanted: Wanted) -> None:
        if item.num_logits:
            # Even if all stop tokens come first, ``n`` others are left.
            num_continuations = self._width + len(self._options.stop_token_ids)
            wanted.score(first_row + item.num_tokens - 1, -1, num_continuations)

    def decide(self, request: Request, item: ScheduledSequence, answer: Answer) -> list[Outcome]:
        """The beam rests; how it goes on is known once all beams of the round have reported."""
        return [Outcome(item.sequence, (), item.end)] if item.num_logits else []

    def publish(self, request: Request, item: ScheduledSequence, answer: Answer, scheduler: Scheduler) -> int:
        if not item.num_logits:
            return 0
        (score,) = answer.scores
        self._reported[item.sequence] = list(zip(score.top_ids, score.top_logprobs, strict=True))
        if len(self._reported) == len(self._beams):
            self._end_round(request, scheduler)
        return 1

    def stop(self, request: Request, scheduler: Scheduler, reason: FinishReason) -> None:
        """End the search; beams count as hypotheses as they are."""
        if not request.finished:
            for beam, logprob in self._beams.items():
                self._add_hypothesis(logprob, beam.generated_token_ids, reason)
            self._conclude(request, scheduler)

    # ---- one round -----------------------------------------------------------------------------------------------

    def _end_round(self, request: Request, scheduler: Scheduler) -> None:
        extensions = [
            _Extension(logprob + gain, beam, token_id)
            for beam, logprob in self._beams.items()
            for token_id, gain in self._reported[beam]
        ]
        if any(math.isnan(extension.logprob) for extension in extensions):
            request.error = NotFiniteError(
                f"request {self._request_id!r}: its logits are not finite; a wider dtype may help"
            )
            logger.error("%s", request.error)
            self.stop(request, scheduler, "error")
            return
        extensions.sort(key=lambda extension: extension.logprob, reverse=True)
        ended = [self._reason_to_finish(extension) for extension in extensions]
        for extension, reason in list(zip(extensions, ended, strict=True))[: self._width]:
            if reason is not None:
                token_ids = [*extension.beam.generated_token_ids, extension.token_id]
                self._add_hypothesis(extension.logprob, token_ids, reason)
        going_on = [extension for extension, reason in zip(extensions, ended, strict=True) if reason is None]
        if self._is_over(going_on):
            self._conclude(request, scheduler)
        else:
            self._begin_round(request, going_on[: self._width], scheduler)

    def _reason_to_finish(self, extension: _Extension) -> FinishReason | None:
        if extension.token_id in self._options.stop_token_ids:
            return "stop"
        return "length" if len(extension.beam) + 1 >= self._options.max_length else None

    def _add_hypothesis(self, logprob: float, token_ids: TokenIds, reason: FinishReason) -> None:
        hypothesis = _Hypothesis(self._score(logprob, len(token_ids)), logprob, token_ids, reason)
        ranked = sorted([*self._hypotheses, hypothesis], key=lambda known: known.score, reverse=True)
        self._hypotheses = ranked[: self._width]

    def _score(self, logprob: float, length: int) -> float:
        return logprob / math.pow(max(1, length), self._options.length_penalty)

    def _is_over(self, going_on: list[_Extension]) -> bool:
        """Whether the search ends here, its extensions that could go on being these, best first."""
        if not going_on:
            return True
        if len(self._hypotheses) < self._width:
            return False
        best = going_on[0]
        score = self._score(best.logprob, best.beam.num_generated_tokens + 1)
        return self._options.early_stopping or score <= self._hypotheses[-1].score

    def _begin_round(self, request: Request, extensions: list[_Extension], scheduler: Scheduler) -> None:
        """The extensions are the new beams. The first one of a beam is the beam itself; the others fork from it."""
        by_beam: dict[Sequence, list[_Extension]] = defaultdict(list)
        for extension in extensions:
            by_beam[extension.beam].append(extension)
        for beam in self._beams:
            if beam not in by_beam:  # before the forks, so that they find its seat free
                self._drop(request, beam, scheduler)
        self._beams = {}
        self._reported = {}
        for beam, (first, *others) in by_beam.items():
            for extension in others:
                child = self._make_beam([*beam.token_ids, extension.token_id])
                scheduler.fork(beam, child)
                self._beams[child] = extension.logprob
            scheduler.commit([Outcome(beam, (first.token_id,), len(beam))])
            self._beams[beam] = first.logprob

    def _make_beam(self, token_ids: TokenIds, num_seats: int = 1) -> Sequence:
        """A sequence for the scheduler. A beam never ends by itself, its hypotheses do."""
        return Sequence(
            request_id=self._request_id,
            token_ids=list(token_ids),
            num_prompt_tokens=len(self._prompt_token_ids),
            max_length=self._options.max_length,
            decides_late=True,
            num_seats=num_seats,
        )

    # ---- the end -------------------------------------------------------------------------------------------------

    def _drop(self, request: Request, beam: Sequence, scheduler: Scheduler) -> None:
        request.num_preemptions += beam.num_preemptions
        scheduler.finish(beam, "abort")

    def _conclude(self, request: Request, scheduler: Scheduler) -> None:
        """Give the blocks back, and make the hypotheses completions."""
        for beam in self._beams:
            self._drop(request, beam, scheduler)
        self._beams = {}
        del request.completions[len(self._hypotheses) :]  # a tiny vocabulary may not have as many
        for completion, hypothesis in zip(request.completions, self._hypotheses, strict=True):
            if completion.token_ids:  # its text could not be read when this was tried before
                continue
            for token_id in hypothesis.token_ids:
                completion.append(token_id, 0.0, None, is_text=token_id not in self._options.stop_token_ids)
            completion.cumulative_logprob = hypothesis.logprob
            completion.end(hypothesis.finish_reason)
