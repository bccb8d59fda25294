"""What all endpoints that generate have in common: the engine, the model's name, and how an answer is run."""

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Hashable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from starlette.requests import Request

import mini_infer
from mini_infer.config import EngineConfig
from mini_infer.engine import AsyncLLMEngine
from mini_infer.engine.async_engine import Increments
from mini_infer.engine.detokenizer import canvas_cells
from mini_infer.engine.intake import Prompt
from mini_infer.engine.tools import Tool
from mini_infer.outputs import GenerateOutput, Increment
from mini_infer.sampling import SamplingParams
from mini_infer.serving.admission import Admission, Budget
from mini_infer.serving.answers import Answer, Whole
from mini_infer.serving.errors import ApiError
from mini_infer.serving.limits import Limits
from mini_infer.serving.middleware import KEY
from mini_infer.serving.pools import SMALL, Pool
from mini_infer.serving.protocol import Message, StreamOptions
from mini_infer.serving.reasoning import switches
from mini_infer.serving.turns import Turns


@dataclass(frozen=True)
class Pools:
    """Threads for what takes long, apart for each kind of work.

    Attributes:
        bodies: where large bodies are read.
        prompts: where long prompts become tokens.
        tokens: for ``/tokenize`` and ``/detokenize``.
        templates: where chat templates are waited for.
        answers: where large answers are put together.
    """

    bodies: Pool
    prompts: Pool
    tokens: Pool
    templates: Pool
    answers: Pool

    @classmethod
    def make(cls) -> "Pools":
        return cls(
            bodies=Pool("bodies", 1),
            prompts=Pool("prompts", 2),
            tokens=Pool("tokens", 1),
            templates=Pool("templates", 2),
            answers=Pool("answers", 2, max_waiting=1 << 20, timeout=None),
        )

    def close(self) -> None:
        for pool in (self.bodies, self.prompts, self.tokens, self.templates, self.answers):
            pool.close()


@dataclass(frozen=True)
class Service:
    """One engine, as it is served.

    Attributes:
        model_names: what requests may call the model; answers call it by the first.
        fingerprint: the same as long as everything is that decides which tokens a seed gives.
        admission: counts the requests under way.
        request_timeout: seconds a request may take; None for any time.
        step_timeout: seconds after which a step of the engine is taken to be stuck.
        salts_by_key: callers with different keys share no cached prefixes.
        shares_by_key: those with the same key have one turn, whatever their connections.
        limits: how large anything may be.
        turns: the queue before the engine's.
        held_logprobs: log probabilities of all requests under way.
        pools: threads for what takes long.
        started: when the server was made, in Unix seconds.
    """

    engine: AsyncLLMEngine
    model_names: tuple[str, ...]
    fingerprint: str
    admission: Admission
    request_timeout: float | None
    step_timeout: float
    salts_by_key: bool
    shares_by_key: bool
    limits: Limits
    turns: Turns
    held_logprobs: Budget
    pools: Pools
    started: int

    @property
    def model_name(self) -> str:
        """What answers call the model."""
        return self.model_names[0]

    @property
    def template(self) -> str:
        """The model's chat template."""
        return self.engine.tokenizer.chat_template

    @property
    def defaults(self) -> SamplingParams:
        """What the model's authors recommend, for requests that do not say."""
        return self.engine.default_sampling_params

    def check_ready(self) -> None:
        """Raise ``ApiError`` if requests are not taken, or no longer."""
        self.admission.check()
        if not self.engine.is_running:
            raise ApiError(503, "the engine has stopped; start the server again", code="unavailable")
        if not self.engine.is_healthy:
            raise ApiError(503, "steps fail whatever is in them; start the server again", code="broken")
        if (seconds := self.engine.step_seconds) > self.step_timeout:
            raise ApiError(503, f"a step of the engine has been running for {seconds:.0f} seconds", code="stuck")

    def check_model(self, name: str | None) -> None:
        """Raise ``ApiError`` unless a request means the model that is here."""
        if name is not None and name not in self.model_names:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; this is {' or '.join(map(repr, self.model_names))}",
                param="model",
                code="model_not_found",
            )

    def shows_canvas(self, options: StreamOptions | None) -> bool:
        """Whether a stream is to show its canvas; raises ``ApiError`` if the model has none."""
        if options is None or not options.include_canvas:
            return False
        if not self.defaults.diffusion_options:
            message = "include_canvas: this is no diffusion model, and has no canvas; leave it out"
            raise ApiError(400, message, param="stream_options.include_canvas")
        return True

    def canvas(self, increment: Increment) -> dict[str, Any]:
        """The canvas after a step, as a field of a choice."""
        return {"canvas": canvas_cells(increment.canvas, self.engine.tokenizer.token_bytes)}

    def answer(
        self, work: Callable[[], Coroutine[Any, Any, Whole] | AsyncGenerator[bytes, None]], request_id: str
    ) -> Answer:
        headers = {"x-request-id": request_id}
        return Answer(work, self.admission, self.request_timeout, headers, self.pools.answers)

    def bytes_of(self, token_id: int, params: SamplingParams) -> bytes:
        """What a token adds to a text; nothing if it is left out."""
        tokenizer = self.engine.tokenizer
        is_left_out = params.skip_special_tokens and token_id in tokenizer.special_tokens
        return b"" if is_left_out else tokenizer.token_bytes(token_id)

    async def submit(
        self,
        request: Request,
        prompts: Seq[Prompt],
        params: SamplingParams,
        *,
        request_ids: Seq[str],
        priority: int,
    ) -> Increments:
        """Check what a caller asks for, and put it into the caller's line.

        Args:
            request: says who the caller is.

        The other arguments are those of ``AsyncLLMEngine.submit``.

        Raises:
            InvalidRequestError: a prompt or a parameter is unusable, or too large.
            QueueFullError: too many wait, and most of them are this caller's.
            ApiError: requests under way hold too much already.
        """
        length = 0
        for prompt in prompts:
            length += len(prompt)
            if isinstance(prompt, str):
                self.limits.check_text("a prompt", prompt)
        num_logprobs = self.limits.check_answer(prompts, params, self.engine.max_model_len)
        key: str | None = request.scope.get(KEY)
        if self.salts_by_key and key is not None:
            params = replace(params, cache_salt=f"{key}:{params.cache_salt or ''}")
        self.held_logprobs.take(num_logprobs)
        try:
            increments = await self.turns.submit(
                self._caller(request),
                prompts,
                params,
                request_ids=request_ids,
                priority=priority,
                run=asyncio.to_thread if length <= SMALL else self.pools.prompts.run,
            )
        except BaseException:
            self.held_logprobs.give_back(num_logprobs)
            raise
        increments.on_close(partial(self.held_logprobs.give_back, num_logprobs))
        return increments

    def _caller(self, request: Request) -> Hashable:
        """Who takes turns with the others: a key where there are several, else a connection."""
        return (self.shares_by_key and request.scope.get(KEY)) or request.client or "nobody"

    async def complete(
        self, request: Request, prompts: Seq[Prompt], params: SamplingParams, request_ids: Seq[str], priority: int
    ) -> list[GenerateOutput]:
        """The outputs of several prompts, in their order."""
        with await self.submit(request, prompts, params, request_ids=request_ids, priority=priority) as increments:
            outputs = {i.request_id: i.output async for i in increments if i.output is not None}
        return [outputs[request_id] for request_id in request_ids]


class Conversation(Protocol):
    """What a body says of a chat template and its messages."""

    chat_template_kwargs: dict[str, Any]
    add_generation_prompt: bool | None
    continue_final_message: bool


async def render(
    service: Service,
    messages: Seq[Message],
    how: Conversation,
    effort: str | None = None,
    tools: Seq[Tool] = (),
) -> str:
    """The prompt that the chat template makes of a conversation.

    Args:
        effort: how much the model should think, in OpenAI's words.
        tools: what the answer may call.

    Raises:
        InvalidRequestError: it makes none of this one.
        ApiError: too many wait for theirs.
    """
    conversation = [message.for_template() for message in messages]
    begins = not how.continue_final_message if how.add_generation_prompt is None else how.add_generation_prompt
    options = {"add_generation_prompt": begins, "continue_final_message": how.continue_final_message}
    variables = options | dict(switches(service.template, effort)) | how.chat_template_kwargs
    variables |= {"tools": tools} if tools else {}
    return await service.pools.templates.run(partial(service.engine.render_chat, conversation, **variables))


def default_model_name(config: EngineConfig) -> str:
    """A directory's own name, or a Hub name as it is."""
    path = Path(str(config.model))
    return path.resolve().name if path.is_dir() else str(config.model)


def fingerprint(config: EngineConfig) -> str:
    """A name for the version and the configuration, as OpenAI's ``system_fingerprint`` is one."""
    return "fp_" + hashlib.sha256(f"{mini_infer.__version__} {config!r}".encode()).hexdigest()[:12]


def now() -> int:
    """Unix seconds, for the field ``created``."""
    return int(time.time())


def usage(
    num_prompt_tokens: int, num_completion_tokens: int, num_cached_tokens: int, num_reasoning_tokens: int | None = None
) -> dict[str, Any]:
    """The tokens that a request took, how many of its prompts' were found in the prefix cache, and how many were
    reasoning, if that is known."""
    counts: dict[str, Any] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }
    if num_reasoning_tokens is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": num_reasoning_tokens}
    return counts
