"""The loop for which the device never waits: while a step computes, the next one is planned and the last one is read.

    host      plan 1 | plan 2 . read 1 | plan 3 . read 2 | plan 4 . read 3 | ...
    device             step 1 --------> step 2 --------> step 3 -------->

A step is planned before the tokens of the one before it are known. Which sequences go on is all that planning needs:
each is taken to, and its next token has a place in the sequence but no value. On the device the value is there in time,
as the result of the step before. The host sees it one step late, so a sequence may turn out to have ended, by a stop
token, a stop string or an abort, with one more step under way: what that step samples for it is dropped.

Blocks are given back as soon as the host knows that they are not needed. Whoever gets them next writes in a later step,
and the device takes the steps in their order, so a step under way is never disturbed.

The tokens are those of ``EngineLoop``, which is the one to read first.
"""

from dataclasses import dataclass

import torch

from mini_infer.engine.beam_search import BeamSearch
from mini_infer.engine.device import send
from mini_infer.engine.loop import EngineLoop, StepResult
from mini_infer.engine.model_runner import ModelRunner
from mini_infer.engine.request import Completion, Request
from mini_infer.engine.sampler import Draw, sample
from mini_infer.engine.step_queue import QueuedStep, Sampled, StepQueue
from mini_infer.engine.tokenizer import Tokenizer
from mini_infer.scheduler import Scheduler, SchedulerOutputs, Sequence


@dataclass(frozen=True, slots=True)
class _Flight:
    """A step under way.

    Attributes:
        plan: who runs.
        completions: who samples a token each.
        only_prompts: sequences that end with it and sample nothing.
        step: its result, sooner or later.
    """

    plan: SchedulerOutputs
    completions: list[Completion]
    only_prompts: list[Sequence]
    step: QueuedStep

    @property
    def sequences(self) -> list[Sequence]:
        """All that it has touched."""
        scheduled = [item.sequence for item in self.plan.scheduled]
        return scheduled + self.plan.preempted + [completion.sequence for completion in self.completions]


class OverlappedLoop(EngineLoop):
    """Moves all requests along, with one step under way while the host works.

    A request whose next step depends on more than the last token, for which the host must have seen it, makes the loop
    take one step after the other as long as it runs: penalties, log probabilities, beam search.

    Args:
        scheduler, runner, tokenizer: the parts.
        queue: where steps are computed.
    """

    def __init__(self, scheduler: Scheduler, runner: ModelRunner, tokenizer: Tokenizer, queue: StepQueue) -> None:
        super().__init__(scheduler, runner, tokenizer)
        self._steps = queue
        self._flight: _Flight | None = None
        self._unhurried: set[Request] = set()

    def is_finished(self) -> bool:
        return self._flight is None and super().is_finished()

    def enqueue(self, request: Request) -> None:
        super().enqueue(request)
        if _looks_back(request):
            self._unhurried.add(request)

    def _retire(self, request: Request) -> None:
        super()._retire(request)
        self._unhurried.discard(request)

    def advance(self) -> StepResult:
        """Read one step, with the next one under way.

        If either fails nothing is lost: the requests are as they were before it, and the next call tries again.
        """
        flight = self._flight
        if self._unhurried:
            if flight is not None:
                return self._land(flight, None)
            self._steps.drain()  # of a step that nobody waited for
            return super().advance()
        if flight is None:
            self._flight = flight = self._launch(None)
        if flight is None:
            return StepResult(SchedulerOutputs(), [])
        return self._land(flight, self._launch(flight))

    def _launch(self, before: _Flight | None) -> _Flight | None:
        """Plan a step and hand it to the device; None if there is nothing to compute."""
        plan = self.scheduler.schedule()
        if not plan.scheduled:
            return None
        self._note_start(plan)
        groups = self._sampling_groups(plan)
        completions = [completion for group in groups for completion in group]
        try:
            step = self._submit(plan, self._rows(plan, groups), completions, before)
        except BaseException:
            self.scheduler.undo(plan)
            raise
        flight = _Flight(plan, completions, [], step)
        try:
            self._count(plan)
            flight.only_prompts.extend(self.scheduler.advance(plan))
            for group in groups:
                for other in group[1:]:
                    self.scheduler.fork(group[0].sequence, other.sequence)
            for completion in completions:
                self.scheduler.hold(completion.sequence)
        except BaseException:  # somebody pressed Ctrl-C
            self._rewind([flight] if before is None else [before, flight])
            raise
        return flight

    def _submit(
        self, plan: SchedulerOutputs, rows: list[int], completions: list[Completion], before: _Flight | None
    ) -> QueuedStep:
        """Take from the sequences all that the step needs, so that they may move on, and queue the rest."""
        runner = self._runner
        batch = runner.prepare(plan.scheduled)
        places, sources = _pending_tokens(plan, before)
        draws = [Draw.of(completion) for completion in completions]
        device = runner.device
        sampling, targets, origins = (send(torch.tensor(ids), device) for ids in (rows, places, sources))

        @torch.inference_mode()
        def step() -> Sampled:
            runner.copy_blocks(plan)
            if before is not None and places:
                batch.token_ids[targets] = before.step.sampled().token_ids[origins]
            hidden = runner.run(batch)
            if not draws:
                return Sampled(torch.empty(0, dtype=torch.int64), torch.empty(0))
            return Sampled(*sample(runner.compute_logits(hidden[sampling]), draws))

        return self._steps.submit(step)

    def _land(self, flight: _Flight, following: _Flight | None) -> StepResult:
        """Read a step's tokens; the one that follows it is under way."""
        try:
            token_ids, logprobs = (tensor.tolist() for tensor in flight.step.wait())
        except BaseException:
            self._rewind([flight] if following is None else [flight, following])
            raise
        self._flight = following
        completions, known = [], []
        for completion, token_id, logprob in zip(flight.completions, token_ids, logprobs, strict=True):
            if not completion.done:  # else it ended before this token
                completion.cumulative_logprob += logprob
                completions.append(completion)
                known.append(token_id)
        only_prompts = [sequence for sequence in flight.only_prompts if sequence in self._completions]
        finished = self._publish(completions, known, only_prompts)
        if not self.requests:
            self._flight = None  # nobody waits for what it still computes
        return StepResult(flight.plan, finished)

    def _add_token(self, sequence: Sequence, token_id: int) -> None:
        if sequence.num_pending_tokens:
            self.scheduler.confirm(sequence, token_id)
        else:  # the step was one of those that do not overlap
            super()._add_token(sequence, token_id)

    def _rewind(self, flights: list[_Flight]) -> None:
        """A step failed, and with it the one that builds on it."""
        self._flight = None
        touched = dict.fromkeys(sequence for flight in flights for sequence in flight.sequences)
        wanted = [sequence for sequence in touched if sequence in self._completions]
        self.scheduler.rewind([flight.plan for flight in flights], wanted)


def _looks_back(request: Request) -> bool:
    params = request.params
    asks = params.logprobs is not None or params.prompt_logprobs is not None
    return asks or params.has_penalties or isinstance(request, BeamSearch)


def _pending_tokens(plan: SchedulerOutputs, before: _Flight | None) -> tuple[list[int], list[int]]:
    """Where tokens that the host does not know stand in the step's row of tokens, and in the last step's result."""
    places: list[int] = []
    sources: list[int] = []
    if before is not None:
        row_of = {completion.sequence: row for row, completion in enumerate(before.completions)}
        end = 0
        for sequence, num_new in plan.scheduled:
            end += num_new
            if sequence.num_pending_tokens and num_new == sequence.num_uncomputed_tokens:
                places.append(end - 1)
                sources.append(row_of[sequence])
    return places, sources
