"""One token after the other, each drawn from the logits after the last one.

Where some of the next tokens can be foreseen they are *drafts*: one step computes them all, and draws a token after
each. As long as the drawn token is the draft that stands there, the one after it was drawn rightly, too. So what comes
out is the same with drafts and without, token for token; drafts that turn out right are steps saved.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from mini_infer.engine.decoding.lifecycle import close_completion, start_all, stop_all
from mini_infer.engine.describe import Answer, Wanted
from mini_infer.engine.request import Completion, Request
from mini_infer.engine.rules import Grammar, Rule, needs_last_token
from mini_infer.engine.token_logprobs import PlaceLogprobs
from mini_infer.exceptions import NotFiniteError
from mini_infer.outputs import FinishReason
from mini_infer.scheduler import Outcome, ScheduledSequence, Scheduler, Sequence
from mini_infer.step import TokenScore
from mini_infer.typing import TokenIds

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stream:
    """What makes one sequence's tokens a completion.

    Attributes:
        completion: where they go.
        rules: what they change in the logits.
        grammar: the one among them that the text must keep to, if there is one; it foresees tokens.
    """

    completion: Completion
    rules: tuple[Rule, ...]
    grammar: Grammar | None = None


def make_forks(make: Callable[[], Sequence], n: int, num_seats: int) -> list[Sequence]:
    """The sequences of ``n`` completions of one prompt, whose keys and values they share.

    As many as there can be seats for fork from the first once it is computed. The others queue for themselves, see
    ``Autoregressive.start``.
    """
    first, *others = (make() for _ in range(n))
    first.forks = tuple(others[: num_seats - 1])
    first.num_seats = 1 + len(first.forks)
    return [first, *others]


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
        start_all(scheduler, (first, *others[len(first.forks) :]))

    def want(self, request: Request, item: ScheduledSequence, first_row: int, wanted: Wanted) -> None:
        if item.num_logits:
            known = item.end + 1 - item.num_logits
            first_drawn = first_row + item.num_tokens - item.num_logits
            for sequence in (item.sequence, *item.forks):
                stream = self._streams[sequence]
                drafts = sequence.token_ids[known : known + item.num_logits - 1]
                for place in range(item.num_logits):
                    key = (self._seed, stream.completion.index, known + place)
                    wanted.draw(first_drawn + place, sequence, key, request.params, stream.rules, drafts[:place])
        num_top = request.params.prompt_logprobs
        if num_top is not None and self._streams[item.sequence].completion.index == 0:
            # The row of each token predicts the one after it. After a preemption, what is known is not asked for again.
            first = max(item.start + 1, len(request.prompt_logprobs))
            for position in range(first, min(item.end + 1, item.sequence.num_prompt_tokens)):
                wanted.score(first_row + position - 1 - item.start, item.sequence.token_ids[position], num_top)

        if request.params.prompt_embedding and self._streams[item.sequence].completion.index == 0:
            first = max(item.start, request.num_pooled)
            if first < (end := min(item.end, item.sequence.num_prompt_tokens)):
                wanted.pool(first_row + first - item.start, first_row + end - item.start)

    def decide(self, request: Request, item: ScheduledSequence, answer: Answer) -> list[Outcome]:
        if not item.num_logits:
            return [] if item.end < item.sequence.max_length else [Outcome(item.sequence, (), item.end)]
        end, outcomes = item.end, []
        known = end + 1 - item.num_logits
        for sequence, token_ids, logprobs, _ in _drawn(item, answer):
            settled: TokenIds = []
            reason: FinishReason | None = None
            for token_id, logprob in zip(token_ids, logprobs, strict=True):
                if math.isnan(logprob):
                    reason = "error"
                    break
                settled.append(token_id)
                length = known + len(settled)
                if token_id in self._stop_token_ids and _may_stop(request, sequence, length):
                    reason = "stop"
                    break
                if length > end or token_id != sequence.token_ids[length - 1]:
                    break  # what was drawn after it followed something else
            grammar = self._streams[sequence].grammar
            if grammar is not None and (num_accepted := grammar.num_accepted(settled)) < len(settled):
                # Where it allows nothing, not even an end, the draw gives a token all the same.
                del settled[num_accepted:]
                reason = "stop" if grammar.is_complete_after(settled) else "error"
            num_valid = known + len(settled) - 1 if settled else known
            outcomes.append(Outcome(sequence, tuple(settled), num_valid, reason))
        return outcomes

    def publish(self, request: Request, item: ScheduledSequence, answer: Answer, scheduler: Scheduler) -> int:
        if request.params.prompt_logprobs is not None and self._streams[item.sequence].completion.index == 0:
            self._note_prompt_logprobs(request, item, answer)
        for hidden_sum in answer.pooled:
            request.pool(hidden_sum, min(item.end, item.sequence.num_prompt_tokens))
        if not item.num_logits:
            if item.sequence.finish_reason is not None:  # nothing is to follow the prompt
                self.stop(request, scheduler, item.sequence.finish_reason)
            return 0
        num_generated = 0
        known = item.end + 1 - item.num_logits
        for sequence, _, logprobs, scores in _drawn(item, answer):
            stream = self._streams[sequence]
            completion = stream.completion
            if completion.finish_reason is not None:  # it ended before these tokens
                continue
            text, num_new = "", 0
            for token_id in sequence.token_ids[known : sequence.num_known_tokens]:
                place = PlaceLogprobs(token_id, scores[num_new], self._decode_token) if scores else None
                logprob = logprobs[num_new]
                num_new += 1
                stops = (
                    sequence.finish_reason == "stop"
                    and token_id in self._stop_token_ids
                    and _may_stop(request, sequence, known + num_new)
                )
                if not stops:
                    for rule in stream.rules:
                        rule.accept(token_id)
                text += completion.append(token_id, logprob, place, is_text=not stops)
                if stops:
                    asked_for = token_id in (request.params.stop_token_ids or ())
                    completion.stop_reason = token_id if asked_for else None
                elif completion.stop_reason is not None:
                    scheduler.finish(sequence, "stop")  # also if it was the last token allowed
                    break
            num_generated += num_new
            if sequence.finish_reason == "error":
                self._blame(request, stream, logprobs[num_new])
            if sequence.finish_reason is not None:
                close_completion(request, sequence, completion, sequence.finish_reason, text, num_new)
                continue
            request.emit(completion, text, num_new)
            if stream.grammar is not None:
                scheduler.propose(sequence, stream.grammar.forced)
        return num_generated

    def _blame(self, request: Request, stream: Stream, logprob: float) -> None:
        """Say why a completion has ended with an error, from the log probability of the token that should follow."""
        if math.isnan(logprob) or stream.grammar is None:
            request.error = NotFiniteError(
                f"request {request.request_id!r}: its logits are not finite; a wider dtype may help"
            )
        else:
            request.error = stream.grammar.dead_end(request.request_id)
        logger.error("%s", request.error)

    def stop(self, request: Request, scheduler: Scheduler, reason: FinishReason) -> None:
        completions = ((sequence, stream.completion) for sequence, stream in self._streams.items())
        stop_all(request, scheduler, completions, reason)

    def _note_prompt_logprobs(self, request: Request, item: ScheduledSequence, answer: Answer) -> None:
        if not request.prompt_logprobs:
            request.prompt_logprobs.append(None)  # nothing comes before the first token
        end = min(item.end + 1, item.sequence.num_prompt_tokens)
        for position, score in enumerate(answer.scores, end - len(answer.scores)):
            if position == len(request.prompt_logprobs):
                token_id = item.sequence.token_ids[position]
                request.prompt_logprobs.append(PlaceLogprobs(token_id, score, self._decode_token))


def _may_stop(request: Request, sequence: Sequence, length: int) -> bool:
    """Whether a stop token that makes a sequence so long ends it."""
    return length - sequence.num_prompt_tokens > request.params.min_tokens


def _drawn(
    item: ScheduledSequence, answer: Answer
) -> Iterable[tuple[Sequence, TokenIds, list[float], Seq[TokenScore]]]:
    """What was drawn for a sequence, one token or one after each of its drafts, and for those that fork from it: the
    tokens, their log probabilities, and their scores if those were asked for."""
    token_ids, logprobs, scores = answer.token_ids, answer.logprobs, answer.token_scores
    if not item.forks:
        return [(item.sequence, token_ids, logprobs, scores)]
    parts = [slice(i * item.num_logits, (i + 1) * item.num_logits) for i in range(1 + len(item.forks))]
    sequences = (item.sequence, *item.forks)
    return [(s, token_ids[p], logprobs[p], scores[p]) for s, p in zip(sequences, parts, strict=True)]
