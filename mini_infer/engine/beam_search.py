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
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mini_infer.engine.request import Request
from mini_infer.outputs import FinishReason
from mini_infer.scheduler import Scheduler, Sequence
from mini_infer.typing import TokenIds

logger = logging.getLogger(__name__)

Continuations: TypeAlias = list[tuple[int, float]]
"""The likeliest next tokens of a beam and their log probabilities, best first."""


def best_continuations(logits: Tensor, counts: Seq[int]) -> list[Continuations]:
    """How R beams could go on.

    Args:
        logits: ``[R, vocab]``, any float dtype; computed on in float32 or wider.
        counts: how many continuations each beam wants.
    """
    logits = logits if logits.dtype is torch.float64 else logits.float()
    top = logits.topk(min(max(counts), logits.shape[-1]), dim=-1)
    logprobs = top.values - logits.logsumexp(dim=-1, keepdim=True)
    rows = zip(top.indices.tolist(), logprobs.tolist(), counts, strict=True)
    return [list(zip(ids[:num], values[:num], strict=True)) for ids, values, num in rows]


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


@dataclass(eq=False, slots=True, kw_only=True)
class BeamSearch(Request):
    """A request whose ``n`` completions are the best of a beam search of that width; they are empty until it ends.

    Attributes:
        length_penalty: the exponent in the score; above 0 it favours long completions, below 0 short ones.
        early_stopping: end as soon as ``n`` hypotheses are found.
        beams: those of this round, and the log probability of what each has generated.
        reported: how those beams can go on whose last token is computed.
        hypotheses: the best ``n`` so far, best first.
    """

    length_penalty: float
    early_stopping: bool
    beams: dict[Sequence, float] = field(default_factory=dict)
    reported: dict[Sequence, Continuations] = field(default_factory=dict)
    hypotheses: list[_Hypothesis] = field(default_factory=list)

    @property
    def num_continuations(self) -> int:
        """How many continuations of a beam can matter: even if all stop tokens come first, ``n`` others are left."""
        return self.params.n + len(self._stop_token_ids)

    @property
    def _stop_token_ids(self) -> frozenset[int]:
        return self.completions[0].sequence.stop_token_ids

    def start(self, scheduler: Scheduler) -> None:
        """Queue the first beam, which has generated nothing yet."""
        beam = self._make_beam(self.prompt_token_ids, num_forks=self.params.n - 1)
        scheduler.add(beam)
        self.beams[beam] = 0.0

    def report(self, beam: Sequence, continuations: Continuations, scheduler: Scheduler) -> None:
        """A step computed the beam's last token. When that is done for every beam, the next round begins."""
        self.reported[beam] = continuations
        if len(self.reported) == len(self.beams):
            self._end_round(scheduler)

    def abort(self, scheduler: Scheduler) -> None:
        """End the search; beams count as hypotheses as they are."""
        for beam, logprob in self.beams.items():
            self._add_hypothesis(logprob, beam.generated_token_ids, "abort")
        self._conclude(scheduler)

    # ---- one round -----------------------------------------------------------------------------------------------

    def _end_round(self, scheduler: Scheduler) -> None:
        extensions = [
            _Extension(logprob + gain, beam, token_id)
            for beam, logprob in self.beams.items()
            for token_id, gain in self.reported[beam]
        ]
        if any(math.isnan(extension.logprob) for extension in extensions):
            logger.error(
                "request %s: its logits are not finite, so it is aborted; a wider dtype may help", self.request_id
            )
            self.abort(scheduler)
            return
        extensions.sort(key=lambda extension: extension.logprob, reverse=True)
        ended = [self._reason_to_finish(extension) for extension in extensions]
        for extension, reason in list(zip(extensions, ended, strict=True))[: self.params.n]:
            if reason is not None:
                token_ids = [*extension.beam.generated_token_ids, extension.token_id]
                self._add_hypothesis(extension.logprob, token_ids, reason)
        going_on = [extension for extension, reason in zip(extensions, ended, strict=True) if reason is None]
        if self._is_over(going_on):
            self._conclude(scheduler)
        else:
            self._begin_round(going_on[: self.params.n], scheduler)

    def _reason_to_finish(self, extension: _Extension) -> FinishReason | None:
        if extension.token_id in self._stop_token_ids:
            return "stop"
        return "length" if len(extension.beam) + 1 >= extension.beam.max_length else None

    def _add_hypothesis(self, logprob: float, token_ids: TokenIds, reason: FinishReason) -> None:
        hypothesis = _Hypothesis(self._score(logprob, len(token_ids)), logprob, token_ids, reason)
        ranked = sorted([*self.hypotheses, hypothesis], key=lambda known: known.score, reverse=True)
        self.hypotheses = ranked[: self.params.n]

    def _score(self, logprob: float, length: int) -> float:
        return logprob / math.pow(max(1, length), self.length_penalty)

    def _is_over(self, going_on: list[_Extension]) -> bool:
        """Whether the search ends here, its extensions that could go on being these, best first."""
        if not going_on:
            return True
        if len(self.hypotheses) < self.params.n:
            return False
        best = going_on[0]
        score = self._score(best.logprob, best.beam.num_generated_tokens + 1)
        return self.early_stopping or score <= self.hypotheses[-1].score

    def _begin_round(self, extensions: list[_Extension], scheduler: Scheduler) -> None:
        """The extensions are the new beams. The first one of a beam is the beam itself; the others fork from it."""
        by_beam: dict[Sequence, list[_Extension]] = defaultdict(list)
        for extension in extensions:
            by_beam[extension.beam].append(extension)
        for beam in self.beams:
            if beam not in by_beam:  # before the forks, so that they find its seat free
                self._drop(beam, scheduler)
        self.beams = {}
        self.reported = {}
        for beam, (first, *others) in by_beam.items():
            for extension in others:
                child = self._make_beam([*beam.token_ids, extension.token_id])
                scheduler.fork(beam, child)
                self.beams[child] = extension.logprob
            scheduler.append(beam, first.token_id)
            self.beams[beam] = first.logprob

    def _make_beam(self, token_ids: TokenIds, num_forks: int = 0) -> Sequence:
        """A sequence for the scheduler. It knows no stop tokens: a beam never ends, its hypotheses do."""
        return Sequence(
            request_id=self.request_id,
            token_ids=list(token_ids),
            num_prompt_tokens=len(self.prompt_token_ids),
            max_length=self.completions[0].sequence.max_length,
            num_forks=num_forks,
        )

    # ---- the end -------------------------------------------------------------------------------------------------

    def _drop(self, beam: Sequence, scheduler: Scheduler) -> None:
        self.completions[0].sequence.num_preemptions += beam.num_preemptions
        scheduler.finish(beam, "abort")

    def _conclude(self, scheduler: Scheduler) -> None:
        """Give the blocks back, and make the hypotheses completions."""
        for beam in self.beams:
            self._drop(beam, scheduler)
        self.beams = {}
        del self.completions[len(self.hypotheses) :]  # a tiny vocabulary may not have as many
        for completion, hypothesis in zip(self.completions, self.hypotheses, strict=True):
            completion.cumulative_logprob = hypothesis.logprob
            for token_id in hypothesis.token_ids:
                completion.sequence.token_ids.append(token_id)
                if token_id not in self._stop_token_ids:
                    completion.append(token_id)
            completion.end()
            scheduler.finish(completion.sequence, hypothesis.finish_reason)
