"""How large anything may be that one caller sends or asks for, so that whoever waits for it is that caller alone."""

from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass

from mini_infer.engine.intake import Prompt
from mini_infer.exceptions import InvalidRequestError
from mini_infer.sampling import MAX_STOP_STRING_LENGTH, MAX_STOP_STRINGS, MAX_STOP_TOKEN_IDS, SamplingParams
from mini_infer.serving.logprobs import MAX_TOP

MAX_CHOICES = 1024
"""Most completions of one HTTP request, over all its prompts."""

MAX_MESSAGES = 2048
"""Most messages of one conversation."""

MAX_LOGIT_BIAS = 1024
"""Most entries of ``logit_bias``."""


@dataclass(frozen=True)
class Limits:
    """The limits of one server, as ``/v1/models`` shows them.

    Attributes:
        body_bytes: largest body of a request.
        held_body_bytes: of all bodies that are still coming in, beyond the first 64 KiB of each.
        json_values: most numbers, strings, lists and objects in one body.
        choices: completions of one request, ``n`` times prompts.
        messages, stop, stop_characters, stop_token_ids, logit_bias: most entries of these fields; longest stop string.
        logprobs: most of the likeliest tokens at each place.
        answer_size: most numbers that an answer may come to: choices x max_tokens x (logprobs + 1).
        held_logprobs: the same over all requests under way that ask for log probabilities.
        held_prompt_tokens: prompt tokens of all requests that run or wait, those of each choice counted.
        prompt_characters: longest text of a prompt, of a rendered conversation, and at ``/tokenize``.
        detokenize_ids: most ids at ``/detokenize``.
        waiting_requests: requests that may wait.
    """

    body_bytes: int
    held_body_bytes: int
    json_values: int
    choices: int
    messages: int
    stop: int
    stop_characters: int
    stop_token_ids: int
    logit_bias: int
    logprobs: int
    answer_size: int
    held_logprobs: int
    held_prompt_tokens: int
    prompt_characters: int
    detokenize_ids: int
    waiting_requests: int

    @classmethod
    def of(cls, max_model_len: int, body_bytes: int, waiting_requests: int) -> "Limits":
        """Those of a model; one choice with everything that can be asked about it always fits."""
        whole = (MAX_TOP + 1) * max_model_len
        return cls(
            body_bytes=body_bytes,
            held_body_bytes=32 << 20,
            json_values=max(1 << 18, 2 * max_model_len),
            choices=MAX_CHOICES,
            messages=MAX_MESSAGES,
            stop=MAX_STOP_STRINGS,
            stop_characters=MAX_STOP_STRING_LENGTH,
            stop_token_ids=MAX_STOP_TOKEN_IDS,
            logit_bias=MAX_LOGIT_BIAS,
            logprobs=MAX_TOP,
            answer_size=max(1 << 20, whole),
            held_logprobs=max(1 << 20, 2 * whole),
            held_prompt_tokens=max(1 << 24, 64 * max_model_len),
            prompt_characters=max(1 << 18, 8 * max_model_len),
            detokenize_ids=max(1 << 16, max_model_len),
            waiting_requests=waiting_requests,
        )

    def as_dict(self) -> dict[str, int]:
        return asdict(self)

    def check_text(self, name: str, text: str) -> None:
        """Raise ``InvalidRequestError`` for a text that is too long to be read for one caller."""
        if len(text) > self.prompt_characters:
            raise InvalidRequestError(
                f"{name} has {len(text)} characters; the most is prompt_characters={self.prompt_characters}"
            )

    def check_answer(self, prompts: Seq[Prompt], params: SamplingParams, max_model_len: int) -> int:
        """How many log probabilities an answer may bring.

        Raises:
            InvalidRequestError: it may become too large.
        """
        max_tokens = max_model_len if params.max_tokens is None else min(params.max_tokens, max_model_len)
        num_choices = len(prompts) * params.n
        num_logprobs = num_choices * max_tokens * ((params.logprobs or 0) + 1)
        size = num_logprobs
        if params.prompt_logprobs is not None:
            lengths = sum(min(len(prompt), max_model_len) for prompt in prompts)
            size += params.n * lengths * (params.prompt_logprobs + 1)
        if size > self.answer_size:
            raise InvalidRequestError(
                f"n={params.n} for {len(prompts)} prompts with max_tokens={max_tokens} and logprobs={params.logprobs} "
                f"may come to an answer of {size} numbers; the most is answer_size={self.answer_size}, ask for less"
            )
        return 0 if params.logprobs is None and params.prompt_logprobs is None else size
