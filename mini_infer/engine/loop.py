"""The loop: schedule, copy, forward, sample, update. One call of ``advance`` is one step of the engine."""

import logging
import math
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from torch import Tensor, tensor

from mini_infer.engine.beam_search import BeamSearch, Continuations, best_continuations
from mini_infer.engine.device import send
from mini_infer.engine.logprobs import token_logprobs
from mini_infer.engine.model_runner import ModelRunner
from mini_infer.engine.request import Completion, Request
from mini_infer.engine.sampler import Draw, sample
from mini_infer.engine.tokenizer import Tokenizer
from mini_infer.exceptions import NotFiniteError
from mini_infer.outputs import FinishReason
from mini_infer.scheduler import Scheduler, SchedulerOutputs, Sequence

logger = logging.getLogger(__name__)

_LOGPROB_ROWS = 64
"""Rows of the vocabulary that prompt log probabilities are computed for at once, to bound their memory."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did.

    Attributes:
        plan: who ran.
        finished: requests that ended in it.
    """

    plan: SchedulerOutputs
    finished: list[Request]


@dataclass(slots=True)
class LoopCounts:
    """Totals since the start: steps, tokens computed in prompt chunks, those computed one at a time, tokens sampled."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_decode_tokens: int = 0
    num_generated_tokens: int = 0


class EngineLoop:
    """Moves all requests along, one step at a time.

    Args:
        scheduler, runner, tokenizer: the parts.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, tokenizer: Tokenizer) -> None:
        self.scheduler = scheduler
        self.requests: dict[str, Request] = {}
        self.counts = LoopCounts()
        self._runner = runner
        self._tokenizer = tokenizer
        self._completions: dict[Sequence, Completion] = {}

    @property
    def num_waiting_requests(self) -> int:
        """Requests that have not begun."""
        return sum(request.first_scheduled_time is None for request in self.requests.values())

    def enqueue(self, request: Request) -> None:
        """Queue a request. Its other completions fork from the first when the prompt is computed, as far as there are
        seats; those beyond queue as sequences of their own."""
        self.requests[request.request_id] = request
        if isinstance(request, BeamSearch):
            request.start(self.scheduler)
            return
        self._completions.update({completion.sequence: completion for completion in request.completions})
        first, *others = [completion.sequence for completion in request.completions]
        for sequence in (first, *others[first.num_forks :]):
            self.scheduler.add(sequence)

    def abort(self, request: Request) -> None:
        """End a request, wherever it is; its listener is told."""
        if isinstance(request, BeamSearch):
            request.abort(self.scheduler)
        for completion in request.completions:
            if not completion.done:
                self.scheduler.finish(completion.sequence, "abort")
                self._close(completion, request, "", [])
        self._retire(request)

    def is_finished(self) -> bool:
        """Whether there is nothing left to do for ``advance``."""
        return self.scheduler.is_finished()

    def advance(self) -> StepResult:
        """Run one step.

        If it fails nothing is lost: the requests are as they were before it, and the next call tries again.
        """
        plan = self.scheduler.schedule()
        if not plan.scheduled:
            return StepResult(plan, [])
        self._note_start(plan)
        try:
            self._runner.copy_blocks(plan)
            hidden = self._runner.forward(plan.scheduled)
            self._note_prompt_logprobs(plan, hidden)
            groups = self._sampling_groups(plan)
            completions = [completion for group in groups for completion in group]
            token_ids = self._sample(hidden, self._rows(plan, groups), completions) if completions else []
            beams = [] if all(groups) else self._extend_beams(plan, hidden)  # where nobody samples
        except BaseException:
            self.scheduler.undo(plan)
            raise
        self._count(plan)
        only_prompts = self.scheduler.advance(plan)
        for group in groups:
            for other in group[1:]:
                self.scheduler.fork(group[0].sequence, other.sequence)
        return StepResult(plan, self._publish(completions, token_ids, only_prompts) + self._search(beams))

    def _retire(self, request: Request) -> None:
        request.finished_time = time.monotonic()
        del self.requests[request.request_id]

    # ---- before the results --------------------------------------------------------------------------------------

    def _note_start(self, plan: SchedulerOutputs) -> None:
        now = time.monotonic()
        for sequence, _ in plan.scheduled:
            request = self.requests[sequence.request_id]
            request.first_scheduled_time = request.first_scheduled_time or now

    def _count(self, plan: SchedulerOutputs) -> None:
        num_decodes = sum(n == 1 and len(s) > s.num_prompt_tokens for s, n in plan.scheduled)
        self.counts.num_steps += 1
        self.counts.num_decode_tokens += num_decodes
        self.counts.num_prompt_tokens += plan.num_tokens - num_decodes

    def _sampling_groups(self, plan: SchedulerOutputs) -> list[list[Completion]]:
        """Who samples from each row of logits: one completion, or all ``n`` about to fork; nobody if it is a beam's."""
        groups: list[list[Completion]] = []
        for item in plan.scheduled:
            if item.samples:
                sequence, num_forks = item.sequence, item.sequence.num_forks
                request = self.requests[sequence.request_id]
                if isinstance(request, BeamSearch):
                    groups.append([])
                else:
                    groups.append(
                        request.completions[: num_forks + 1] if num_forks else [self._completions[item.sequence]]
                    )
        return groups

    def _rows(self, plan: SchedulerOutputs, groups: Seq[Seq[Completion]]) -> list[int]:
        return [row for row, group in zip(plan.sampling_rows, groups, strict=True) for _ in group]

    def _sample(self, hidden: Tensor, rows: list[int], completions: list[Completion]) -> list[int]:
        """One token for each completion from its row of hidden states; notes their log probabilities."""
        logits = self._runner.compute_logits(hidden[send(tensor(rows), hidden.device)])
        sampled, logprobs = sample(logits, [Draw.of(completion) for completion in completions])
        asking = [row for row, completion in enumerate(completions) if completion.params.logprobs is not None]
        if asking:
            wanted = send(tensor(asking), logits.device)
            num_top = [completions[row].params.logprobs or 0 for row in asking]
            places = token_logprobs(logits[wanted], sampled[wanted], num_top, self._tokenizer.decode_token)
            for row, place in zip(asking, places, strict=True):
                completions[row].logprobs.append(place)
        for completion, logprob in zip(completions, logprobs.tolist(), strict=True):
            completion.cumulative_logprob += logprob
        token_ids: list[int] = sampled.tolist()
        return token_ids

    def _extend_beams(self, plan: SchedulerOutputs, hidden: Tensor) -> list[tuple[BeamSearch, Sequence, Continuations]]:
        """The beams whose last token this step computes, and how each could go on."""
        rows, searches, beams = [], [], []
        sampling = [item.sequence for item in plan.scheduled if item.samples]
        for row, beam in zip(plan.sampling_rows, sampling, strict=True):
            request = self.requests[beam.request_id]
            if isinstance(request, BeamSearch):
                rows.append(row)
                searches.append(request)
                beams.append(beam)
        logits = self._runner.compute_logits(hidden[send(tensor(rows), hidden.device)])
        continuations = best_continuations(logits, [search.num_continuations for search in searches])
        return list(zip(searches, beams, continuations, strict=True))

    def _note_prompt_logprobs(self, plan: SchedulerOutputs, hidden: Tensor) -> None:
        """For requests that want them, the log probability of each prompt token given those before it."""
        start = 0
        for sequence, num_new in plan.scheduled:
            rows = hidden[start : start + num_new]
            start += num_new
            request = self.requests[sequence.request_id]
            num_top = request.params.prompt_logprobs
            if num_top is None or sequence is not request.completions[0].sequence:
                continue
            if not request.prompt_logprobs:
                request.prompt_logprobs.append(None)
            # Row i of the chunk predicts the token after it. After a preemption, what is known is not added again.
            known, offset = len(request.prompt_logprobs), sequence.num_computed_tokens + 1
            targets = sequence.token_ids[max(known, offset) : min(offset + num_new, sequence.num_prompt_tokens)]
            rows = rows[max(known, offset) - offset :][: len(targets)]
            for first in range(0, len(targets), _LOGPROB_ROWS):
                part = send(tensor(targets[first : first + _LOGPROB_ROWS]), hidden.device)
                logits = self._runner.compute_logits(rows[first : first + _LOGPROB_ROWS])
                request.prompt_logprobs += token_logprobs(
                    logits, part, [num_top] * len(part), self._tokenizer.decode_token
                )

    # ---- with the results ----------------------------------------------------------------------------------------

    def _publish(
        self, completions: list[Completion], token_ids: list[int], only_prompts: list[Sequence]
    ) -> list[Request]:
        """New tokens become text, sequences end, listeners are told. Returns the requests that this finished."""
        now = time.monotonic()
        touched = []
        for completion, token_id in zip(completions, token_ids, strict=True):
            request = self.requests[completion.sequence.request_id]
            request.first_token_time = request.first_token_time or now
            self._add_token(completion.sequence, token_id)
            text = self._read_token(completion, token_id)
            touched.append(request)
            if completion.sequence.finish_reason is None:
                request.tell(completion, text, [token_id], None)
            else:
                self._close(completion, request, text, [token_id])
        for sequence in only_prompts:
            request = self.requests[sequence.request_id]
            touched.append(request)
            for completion in request.completions:
                self._end(completion.sequence, "length")
                self._close(completion, request, "", [])
        self.counts.num_generated_tokens += len(token_ids)
        finished = [request for request in dict.fromkeys(touched) if request.finished]
        for request in finished:
            self._retire(request)
        return finished

    def _add_token(self, sequence: Sequence, token_id: int) -> None:
        self.scheduler.append(sequence, token_id)

    def _search(self, beams: list[tuple[BeamSearch, Sequence, Continuations]]) -> list[Request]:
        """Hand beams' continuations to their searches. Returns the searches that this ended."""
        now = time.monotonic()
        finished: list[Request] = []
        for search, beam, continuations in beams:
            search.first_token_time = search.first_token_time or now
            search.report(beam, continuations, self.scheduler)
            if search.finished:
                self._retire(search)
                finished.append(search)
        self.counts.num_generated_tokens += len(beams)
        return finished

    def _read_token(self, completion: Completion, token_id: int) -> str:
        """The text that a new token releases; ends the sequence if that completes a stop string."""
        sequence = completion.sequence
        if math.isnan(completion.cumulative_logprob):
            error = NotFiniteError(
                f"request {sequence.request_id}: its logits are not finite, so it ends here; a wider dtype may help"
            )
            logger.error("%s", error)
            self.requests[sequence.request_id].error = error
            self._end(sequence, "error")
            return ""
        if sequence.finish_reason == "stop":  # by this token, which is not part of the text
            asked_for = token_id in (completion.params.stop_token_ids or ())
            completion.stop_reason = token_id if asked_for else None
            return ""
        text = completion.append(token_id)
        if completion.stop_reason is not None:
            self._end(sequence, "stop")  # also when this token was the last one that max_tokens allowed
        return text

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence for a reason that goes before the one it may just have ended for."""
        if sequence.finish_reason is None:
            self.scheduler.finish(sequence, reason)
        sequence.finish_reason = reason

    def _close(self, completion: Completion, request: Request, text: str, token_ids: list[int]) -> None:
        """A completion's sequence has ended: release the rest of its text and tell the listener."""
        text += completion.end()
        del self._completions[completion.sequence]
        request.tell(completion, text, token_ids, completion.sequence.finish_reason)
