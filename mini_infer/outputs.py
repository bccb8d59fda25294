"""What comes back: finished outputs, and the increments of one step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mini_infer.compat.mapping import ReadsAsMapping
from mini_infer.exceptions import MiniInferError, NotFiniteError

FinishReason: TypeAlias = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log probability (natural logarithm, by the model itself before temperature and filters).

    Attributes:
        logprob: the log probability.
        rank: 1 for the most likely token of the vocabulary at this place.
        decoded_token: the token as text, wherever it stands: with its leading space. A part of a character shows as
            U+FFFD.
    """

    logprob: float
    rank: int
    decoded_token: str


TokenLogprobs: TypeAlias = Mapping[int, Logprob]
"""Token id to its log probability, at one place: the token that is there first, then the likeliest."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of a request's ``n`` completions.

    Attributes:
        index: which of the ``n``, from 0.
        text: generated text, without stop strings.
        token_ids: generated tokens, including the one that ended the sequence.
        finish_reason: "stop" (end of sequence, stop token or stop string), "length", "abort" (by the caller) or
            "error", which the output then holds.
        stop_reason: the stop string or stop token id that ended it; None for the model's own end of sequence.
        cumulative_logprob: sum of the generated tokens' log probabilities.
        logprobs: per generated token, if the request asked for it.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None
    cumulative_logprob: float
    logprobs: list[TokenLogprobs] | None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened to a request; seconds of a monotonic clock (``time.monotonic``)."""

    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float
    num_preemptions: int

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token (TTFT); None if there was none."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def latency(self) -> float:
        """Seconds from arrival to the end."""
        return self.finished_time - self.arrival_time


@dataclass(frozen=True)
class GenerateOutput(ReadsAsMapping):
    """The result of one request.

    The plain attributes (``text``, ``token_ids``, ...) are those of the first completion; ``outputs`` holds all ``n``.
    For code written against other engines it also reads as a mapping (``out["text"]``, ``dict(out)``) and prints as
    its text. It is always truthy, also when the text is empty.

    Attributes:
        request_id: the id that ``add_request`` returned.
        prompt: the prompt as given; None if it was given as token ids.
        prompt_token_ids: the prompt as the model saw it.
        outputs: one completion for each of ``n``.
        prompt_logprobs: per prompt token, if asked for; None for the first token, which nothing precedes.
        metrics: when things happened.
        num_cached_tokens: leading tokens of the prompt that were found in the prefix cache, and not computed again.
        prompt_embedding: the mean of the prompt's hidden states after the model's last norm, ``[hidden_size]``, if it
            was asked for.
        error: why a completion has finish reason "error"; None if none has.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs | None] | None
    metrics: RequestMetrics
    num_cached_tokens: int = 0
    prompt_embedding: list[float] | None = None
    error: MiniInferError | None = None

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    @property
    def cumulative_logprob(self) -> float:
        return self.outputs[0].cumulative_logprob

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.outputs[0].logprobs

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """What ``embed`` makes of one prompt.

    Attributes:
        request_id: the request's.
        prompt: as given; None if it was given as token ids.
        prompt_token_ids: as the model saw it.
        embedding: the mean of the model's hidden states after its last norm, over all tokens of the prompt,
            ``[hidden_size]``; of any length, so divide by it where only the direction matters.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    embedding: list[float]

    @property
    def outputs(self) -> "EmbeddingOutput":
        """This itself, for code that reads ``output.outputs.embedding`` as vLLM's."""
        return self


def as_embedding(output: GenerateOutput) -> EmbeddingOutput:
    """The vector of an output that was asked for one.

    Raises:
        NotFiniteError: it has numbers that are none.
    """
    vector = output.prompt_embedding
    assert vector is not None
    if not all(map(math.isfinite, vector)):
        raise NotFiniteError(f"request {output.request_id!r}: its hidden states are not finite; a wider dtype may help")
    return EmbeddingOutput(output.request_id, output.prompt, output.prompt_token_ids, vector)


@dataclass(frozen=True, slots=True)
class Increment:
    """What one step added to one completion of a request.

    Attributes:
        request_id: whose it is.
        index: which of the ``n`` completions.
        text: new text; never half a character nor the beginning of a stop string, so possibly empty.
        token_ids: new tokens.
        logprobs: for the new tokens, if asked for.
        finish_reason: set on the completion's last increment.
        stop_reason: the stop string or stop token id that ended it, on that increment.
        output: the whole result, on the last increment of the request's last completion.
        canvas: of a diffusion model, told after every step: the token at each place of the answer, None for
            a mask.
    """

    request_id: str
    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None
    output: GenerateOutput | None
    canvas: tuple[int | None, ...] = ()
