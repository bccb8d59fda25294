"""A request on its way through the engine: its sequences, and the output that grows from them."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mini_infer.engine.detokenizer import Detokenizer, StopStringMatcher
from mini_infer.exceptions import MiniInferError
from mini_infer.outputs import (
    CompletionOutput,
    FinishReason,
    GenerateOutput,
    RequestMetrics,
    StepOutput,
    TokenLogprobs,
)
from mini_infer.sampling import SamplingParams
from mini_infer.scheduler import Sequence


@dataclass(eq=False, slots=True)
class Completion:
    """One of a request's ``n`` completions while it is generated.

    Attributes:
        index: which of the ``n``.
        params: the request's sampling parameters.
        seed: the request's seed.
        sequence: its tokens.
        detokenizer, stop_strings: turn tokens into text that can be shown.
        text: released so far.
        stop_reason: the stop string or stop token id that ended it.
        done: the sequence has ended, and all its text is released.
        logprobs: per generated token, if asked for.
    """

    index: int
    params: SamplingParams
    seed: int
    sequence: Sequence
    detokenizer: Detokenizer
    stop_strings: StopStringMatcher
    text: str = ""
    stop_reason: str | int | None = None
    done: bool = False
    cumulative_logprob: float = 0.0
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def append(self, token_id: int) -> str:
        """Take in the token that was just added to the sequence; the text that it releases.

        Sets ``stop_reason`` if a stop string is complete; the caller then ends the sequence.
        """
        piece = self.detokenizer.append([token_id])
        stop = None
        if self.sequence.num_generated_tokens > self.params.min_tokens:
            piece, stop = self.stop_strings.append(piece)
        self.stop_reason = stop
        self.text += piece
        return piece

    def end(self) -> str:
        """No more tokens come: release what was held back as the possible beginning of a stop string."""
        self.done = True
        piece = "" if isinstance(self.stop_reason, str) else self.stop_strings.flush()
        self.text += piece
        return piece

    def output(self) -> CompletionOutput:
        assert self.sequence.finish_reason is not None
        return CompletionOutput(
            index=self.index,
            text=self.text,
            token_ids=self.sequence.generated_token_ids,
            finish_reason=self.sequence.finish_reason,
            stop_reason=self.stop_reason,
            cumulative_logprob=self.cumulative_logprob,
            logprobs=self.logprobs if self.params.logprobs is not None else None,
        )


@dataclass(eq=False, slots=True)
class Request:
    """A request while the engine works on it.

    Attributes:
        prompt: as given; None for token ids.
        completions: one for each of ``params.n``.
        listener: told of every increment as it happens; such a request's output is handed over by its last one.
            Without a listener the output waits for ``get_output``.
        error: why it could not go on.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    completions: list[Completion]
    listener: Callable[[StepOutput], None] | None
    arrival_time: float = field(default_factory=time.monotonic)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    error: MiniInferError | None = None

    @property
    def finished(self) -> bool:
        return all(completion.done for completion in self.completions)

    def tell(self, completion: Completion, text: str, token_ids: list[int], reason: FinishReason | None) -> None:
        """Tell the listener, if there is one, what a step added to a completion."""
        if self.listener is not None:
            wants_logprobs = self.params.logprobs is not None
            logprobs = completion.logprobs[len(completion.logprobs) - len(token_ids) :] if wants_logprobs else None
            output = self.output() if self.finished else None
            self.listener(StepOutput(self.request_id, completion.index, text, token_ids, logprobs, reason, output))

    def output(self) -> GenerateOutput:
        return GenerateOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[completion.output() for completion in self.completions],
            prompt_logprobs=self.prompt_logprobs if self.params.prompt_logprobs is not None else None,
            metrics=RequestMetrics(
                arrival_time=self.arrival_time,
                first_scheduled_time=self.first_scheduled_time,
                first_token_time=self.first_token_time,
                finished_time=self.finished_time or time.monotonic(),
                num_preemptions=sum(completion.sequence.num_preemptions for completion in self.completions),
            ),
            error=self.error,
        )
