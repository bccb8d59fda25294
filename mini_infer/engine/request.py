"""A request on its way through the engine, and the output that grows from it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mini_infer.engine.decoding import Decoding
from mini_infer.engine.detokenizer import TextStream
from mini_infer.exceptions import MiniInferError
from mini_infer.outputs import (
    CompletionOutput,
    FinishReason,
    GenerateOutput,
    Increment,
    RequestMetrics,
    TokenLogprobs,
)
from mini_infer.sampling import SamplingParams


@dataclass(eq=False, slots=True)
class Completion:
    """One of a request's ``n`` completions while it is generated.

    Attributes:
        index: which of the ``n``.
        min_tokens: stop strings count only behind so many tokens.
        stream: turns tokens into text that can be shown.
        text: released so far.
        token_ids: generated so far.
        logprobs: for each of them, if asked for.
        finish_reason: why it has ended; None while it goes on.
        stop_reason: the stop string or stop token id that ended it.
    """

    index: int
    min_tokens: int
    stream: TextStream
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def append(self, token_id: int, logprob: float, place: TokenLogprobs | None, is_text: bool = True) -> str:
        """Take in a token; the text that it releases.

        Sets ``stop_reason`` if a stop string is complete; the caller then ends the sequence.

        Args:
            place: what to report of it, if that was asked for.
            is_text: false for a token that ends the sequence and has no part in the text.
        """
        self.token_ids.append(token_id)
        self.cumulative_logprob += logprob
        if place is not None:
            self.logprobs.append(place)
        if not is_text:
            return ""
        piece = self.stream.append(token_id, len(self.token_ids) > self.min_tokens)
        if piece:
            self.text += piece
        self.stop_reason = self.stream.stop_string
        return piece

    def end(self, reason: FinishReason) -> str:
        """No more tokens come: release what was held back as the beginning of a character or of a stop string.

        If that completes a stop string, it is why the text ends.
        """
        piece = self.stream.end()
        if self.stream.stop_string is not None:
            self.stop_reason, reason = self.stream.stop_string, "stop"
        self.finish_reason = reason
        self.text += piece
        return piece


@dataclass(eq=False, slots=True)
class Request:
    """A request while the engine works on it.

    Attributes:
        prompt: as given; None for token ids.
        completions: one for each of ``params.n``.
        decoding: how logits become its tokens.
        listener: told of every increment as it happens; such a request's output is handed over by its last one.
            Without a listener the output waits for ``get_output``.
        num_pooled, hidden_sum: how many of the prompt's tokens have given their hidden state, and the sum of those,
            ``[hidden_size]``; only with ``prompt_embedding``.
        error: why a completion has ended with reason "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    completions: list[Completion]
    decoding: Decoding
    listener: Callable[[Increment], None] | None
    arrival_time: float = field(default_factory=time.monotonic)
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_pooled: int = 0
    hidden_sum: npt.NDArray[np.float64] | None = None
    error: MiniInferError | None = None

    @property
    def finished(self) -> bool:
        for completion in self.completions:  # noqa: SIM110  (asked for often, and a generator takes twice as long)
            if completion.finish_reason is None:
                return False
        return True

    def emit(self, completion: Completion, text: str, num_tokens: int, canvas: tuple[int | None, ...] = ()) -> None:
        """Tell the listener, if there is one, what a step added to a completion: a text and its last tokens."""
        if self.listener is None:
            return
        first = len(completion.token_ids) - num_tokens
        increment = Increment(
            request_id=self.request_id,
            index=completion.index,
            text=text,
            token_ids=completion.token_ids[first:],
            logprobs=completion.logprobs[first:] if self.params.logprobs is not None else None,
            finish_reason=completion.finish_reason,
            stop_reason=None if completion.finish_reason is None else completion.stop_reason,
            output=self.output() if self.finished else None,
            canvas=canvas,
        )
        self.listener(increment)

    def pool(self, hidden_sum: npt.NDArray[np.float32], end: int) -> None:
        """Take in the hidden states of more of the prompt's tokens, up to ``end``."""
        more = hidden_sum.astype(np.float64)
        self.hidden_sum = more if self.hidden_sum is None else self.hidden_sum + more
        self.num_pooled = end

    def _prompt_embedding(self) -> list[float] | None:
        """The mean over the prompt, if all of it has been computed."""
        if self.hidden_sum is None or self.num_pooled < len(self.prompt_token_ids):
            return None
        mean: list[float] = (self.hidden_sum / self.num_pooled).astype(np.float32).tolist()
        return mean

    def output(self) -> GenerateOutput:
        return GenerateOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[self._completion_output(completion) for completion in self.completions],
            prompt_logprobs=self.prompt_logprobs if self.params.prompt_logprobs is not None else None,
            metrics=RequestMetrics(
                arrival_time=self.arrival_time,
                first_scheduled_time=self.first_scheduled_time,
                first_token_time=self.first_token_time,
                finished_time=self.finished_time or time.monotonic(),
                num_preemptions=self.num_preemptions,
            ),
            num_cached_tokens=self.num_cached_tokens,
            prompt_embedding=self._prompt_embedding(),
            error=self.error,
        )

    def _completion_output(self, completion: Completion) -> CompletionOutput:
        assert completion.finish_reason is not None
        return CompletionOutput(
            index=completion.index,
            text=completion.text,
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            cumulative_logprob=completion.cumulative_logprob,
            logprobs=completion.logprobs if self.params.logprobs is not None else None,
        )
