"""One token after the other, each drawn from the logits after the last one."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mini_infer.engine.describe import Answer, Wanted
from mini_infer.engine.request import Completion, Request
from mini_infer.engine.rules import Rule, needs_last_token
from mini_infer.engine.token_logprobs import token_logprobs
from mini_infer.exceptions import NotFiniteError
from mini_infer.outputs import FinishReason
from mini_infer.scheduler import Outcome, ScheduledSequence, Scheduler, Sequence

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stream:
    """What makes one sequence's tokens a completion.

    Attributes:
        completion: where they go.
        rules: what they change in the logits.
    """

    completion: Completion
    rules: tuple[Rule, ...]


class Autoregressive:
    """The usual decoding, for ``n`` completions that share their prompt.

    Args:
        streams: each completion's sequence. Those that fork from the first, which are its ``forks``, start with it; the
            others, for whom there were no seats, queue for themselves.
        stop_token_ids: tokens that end a sequence, if ``min_tokens`` come before.
        seed: the request's.
        decode_token: the text of one token.
    """

    def __init__(
        self,
        streams: Mapping[Sequence, Stream],
        stop_token_ids: frozenset[int],
        seed: int,
        decode_token: Callable[[int], str],
    ) -> None:
        self._streams = streams
        self._stop_token_ids = stop_token_ids
        self._seed = seed
        self._decode_token = decode_token
        self.needs_last_token = any(needs_last_token(stream.rules) for stream in streams.values())

    def start(self, scheduler: Scheduler) -> None:
        first, *others = self._streams
        try:
            for sequence in (first, *others[len(first.forks) :]):
                scheduler.add(sequence)
        except BaseException:  # all of them or none; the policy may be somebody's own
            for sequence in self._streams:
                scheduler.finish(sequence, "error")
            raise

    def want(self, request: Request, item: ScheduledSequence, first_row: int, wanted: Wanted) -> None:
        last_row = first_row + item.num_tokens - 1
        if item.num_logits:
            for sequence in (item.sequence, *item.forks):
                stream = self._streams[sequence]
                key = (self._seed, stream.completion.index, item.end)
                wanted.draw(last_row, sequence, key, request.params, stream.rules)
        num_top = request.params.prompt_logprobs
        if num_top is not None and self._streams[item.sequence].completion.index == 0:
            # The row of each token predicts the one after it. After a preemption, what is known is not asked for again.
            first = max(item.start + 1, len(request.prompt_logprobs))
            for position in range(first, min(item.end + 1, item.sequence.num_prompt_tokens)):
                wanted.score(first_row + position - 1 - item.start, item.sequence.token_ids[position], num_top)

    def decide(self, request: Request, item: ScheduledSequence, answer: Answer) -> list[Outcome]:
        if not item.num_logits:
            return [] if item.end < item.sequence.max_length else [Outcome(item.sequence, (), item.end)]
        outcomes = []
        for sequence, token_ids, logprobs in zip(
            (item.sequence, *item.forks), answer.token_ids, answer.logprobs, strict=True
        ):
            if any(map(math.isnan, logprobs)):
                outcomes.append(Outcome(sequence, (), item.end, "error"))
                continue
            (token_id,) = token_ids
            num_generated = item.end + 1 - sequence.num_prompt_tokens
            stops = token_id in self._stop_token_ids and num_generated > request.params.min_tokens
            outcomes.append(Outcome(sequence, (token_id,), item.end, "stop" if stops else None))
        return outcomes

    def publish(self, request: Request, item: ScheduledSequence, answer: Answer, scheduler: Scheduler) -> int:
        if request.params.prompt_logprobs is not None and self._streams[item.sequence].completion.index == 0:
            self._note_prompt_logprobs(request, item, answer)
        if not item.num_logits:
            if item.sequence.finish_reason is not None:  # nothing is to follow the prompt
                self.stop(request, scheduler, item.sequence.finish_reason)
            return 0
        num_generated = 0
        scores = answer.token_scores if request.params.logprobs is not None else [[]] * len(answer.token_ids)
        for sequence, (token_id,), (logprob,), score in zip(
            (item.sequence, *item.forks), answer.token_ids, answer.logprobs, scores, strict=True
        ):
            completion = self._streams[sequence].completion
            if completion.finish_reason is not None:  # it ended before this token
                continue
            if sequence.finish_reason == "error":
                request.error = NotFiniteError(
                    f"request {request.request_id!r}: its logits are not finite; a wider dtype may help"
                )
                logger.error("%s", request.error)
                self._close(request, sequence, completion, "error", "", 0)
                continue
            for rule in self._streams[sequence].rules:
                rule.accept(token_id)
            stops = sequence.finish_reason == "stop"
            places = [token_logprobs(token_id, known, self._decode_token) for known in score]
            text = completion.append(token_id, logprob, places[0] if places else None, is_text=not stops)
            num_generated += 1
            if stops:
                asked_for = token_id in (request.params.stop_token_ids or ())
                completion.stop_reason = token_id if asked_for else None
            elif completion.stop_reason is not None:
                scheduler.finish(sequence, "stop")
                self._close(request, sequence, completion, "stop", text, 1)  # also if it was the last token allowed
                continue
            if sequence.finish_reason is None:
                request.emit(completion, text, 1)
            else:
                self._close(request, sequence, completion, sequence.finish_reason, text, 1)
        return num_generated

    def stop(self, request: Request, scheduler: Scheduler, reason: FinishReason) -> None:
        going_on = [
            (sequence, stream.completion)
            for sequence, stream in self._streams.items()
            if stream.completion.finish_reason is None
        ]
        for sequence, _ in going_on:  # all of them before anything can raise
            scheduler.finish(sequence, reason)
        for sequence, completion in going_on:
            self._close(request, sequence, completion, reason, "", 0)

    def _close(
        self,
        request: Request,
        sequence: Sequence,
        completion: Completion,
        reason: FinishReason,
        text: str,
        num_tokens: int,
    ) -> None:
        """A completion's sequence has ended: release the rest of its text and tell the listener."""
        text += completion.end(reason)
        request.num_preemptions += sequence.num_preemptions
        request.emit(completion, text, num_tokens)

    def _note_prompt_logprobs(self, request: Request, item: ScheduledSequence, answer: Answer) -> None:
        if not request.prompt_logprobs:
            request.prompt_logprobs.append(None)  # nothing comes before the first token
        end = min(item.end + 1, item.sequence.num_prompt_tokens)
        for position, score in enumerate(answer.scores, end - len(answer.scores)):
            if position == len(request.prompt_logprobs):
                token_id = item.sequence.token_ids[position]
                request.prompt_logprobs.append(token_logprobs(token_id, score, self._decode_token))
