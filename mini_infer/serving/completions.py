"""``POST /v1/completions``: a prompt, or several, and what the model makes of them."""

import secrets
from collections.abc import AsyncGenerator, Iterator
from collections.abc import Sequence as Seq
from typing import Any

from fastapi import APIRouter, Request, Response

from mini_infer.engine.async_engine import Increments
from mini_infer.engine.intake import list_prompts
from mini_infer.exceptions import InvalidRequestError
from mini_infer.outputs import CompletionOutput, GenerateOutput, TokenLogprobs
from mini_infer.serving.answers import DONE, Whole, event
from mini_infer.serving.errors import ApiError
from mini_infer.serving.limits import MAX_CHOICES
from mini_infer.serving.logprobs import CompletionLogprobs, check_num_top
from mini_infer.serving.protocol import CompletionBody
from mini_infer.serving.routes import body_router
from mini_infer.serving.service import Service, now, usage


def completions_router(service: Service) -> APIRouter:
    router = body_router(service.limits, service.pools.bodies)

    @router.post("/v1/completions", summary="Complete a prompt, or several")
    async def create_completion(request: Request, body: CompletionBody) -> Response:
        completion = _TextCompletion(service, request, body)
        return service.answer(completion.events if body.stream else completion.whole, completion.id)

    return router


class _TextCompletion:
    """One call of the endpoint."""

    def __init__(self, service: Service, request: Request, body: CompletionBody) -> None:
        service.check_model(body.model)
        check_num_top("logprobs", body.logprobs)
        if body.max_tokens == 0 and not body.echo:
            raise InvalidRequestError("max_tokens is 0, so there would be nothing to send; set echo to get the prompt")
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self._service = service
        self._request = request
        self._body = body
        self._created = now()
        self._shows_canvas = service.shows_canvas(body.stream_options)
        self._prompts = list_prompts(body.prompt)
        self._scores_prompt = body.echo and (body.logprobs is not None or body.max_tokens == 0)
        self._params = body.sampling_params(
            service.defaults,
            max_tokens=body.max_tokens,
            logprobs=body.logprobs,
            prompt_logprobs=(body.logprobs or 0) if self._scores_prompt else None,
            structured_outputs=body.structured(),
        )
        if not self._prompts:
            raise ApiError(400, "prompt is an empty list; give at least one text, or token ids", param="prompt")
        if len(self._prompts) * self._params.n > MAX_CHOICES:
            raise ApiError(
                400,
                f"{len(self._prompts)} prompts with n={self._params.n}: a request has {MAX_CHOICES} choices at most",
                param="prompt",
            )
        self._tokenizer = service.engine.tokenizer
        self._special_tokens = self._tokenizer.special_tokens
        self._left_out = self._special_tokens if self._params.skip_special_tokens else {}
        several = len(self._prompts) > 1
        self._request_ids = [f"{self.id}-{place}" if several else self.id for place in range(len(self._prompts))]

    # ---- whole ---------------------------------------------------------------------------------------------------

    async def whole(self) -> Whole:
        outputs = await self._service.complete(
            self._request, self._prompts, self._params, self._request_ids, self._body.priority
        )
        choices = (
            self._whole_choice(place * self._params.n + completion.index, output, completion)
            for place, output in enumerate(outputs)
            for completion in output.outputs
        )
        num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
        num_cached = sum(output.num_cached_tokens for output in outputs)
        num_completion = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
        num_places = num_completion + (num_prompt * self._params.n if self._scores_prompt else 0)
        return Whole(
            self._frame(choices) | {"usage": usage(num_prompt, num_completion, num_cached)},
            0 if self._body.logprobs is None else num_places * (self._body.logprobs + 1),
        )

    def _whole_choice(self, index: int, output: GenerateOutput, completion: CompletionOutput) -> dict[str, Any]:
        echo = self._echo(output.prompt, output.prompt_token_ids)
        logprobs = None
        if self._body.logprobs is not None:
            made = self._begin_logprobs(echo, output.prompt, output.prompt_token_ids, output.prompt_logprobs)
            made.append(completion.text, completion.token_ids, completion.logprobs or [], left_out=self._left_out)
            logprobs = made.take(is_whole=True)
        return _choice(index, echo + completion.text, logprobs, completion.finish_reason, completion.stop_reason)

    # ---- as events -----------------------------------------------------------------------------------------------

    async def events(self) -> AsyncGenerator[bytes, None]:
        options = self._body.stream_options
        counts_all = options is not None and options.include_usage
        counts_each = options is not None and options.include_usage and options.continuous_usage_stats
        made: dict[int, CompletionLogprobs] = {}
        num_completion = 0
        with await self._service.submit(
            self._request, self._prompts, self._params, request_ids=self._request_ids, priority=self._body.priority
        ) as increments:
            yield b""  # the headers go out: the request is queued
            requests = {request.request_id: (place, request) for place, request in enumerate(increments.requests)}
            async for increment in increments:
                place, request = requests[increment.request_id]
                index = place * self._params.n + increment.index
                text, logprobs = increment.text, None
                if index not in made:  # by now the prompt was computed
                    echo = self._echo(request.prompt, request.prompt_token_ids)
                    scores = request.prompt_logprobs if self._scores_prompt else None
                    made[index] = self._begin_logprobs(echo, request.prompt, request.prompt_token_ids, scores)
                    text = echo + text
                num_completion += len(increment.token_ids)
                if self._body.logprobs is not None:
                    made[index].append(
                        increment.text, increment.token_ids, increment.logprobs or [], left_out=self._left_out
                    )
                    logprobs = made[index].take(is_whole=increment.finish_reason is not None)
                if text or increment.finish_reason or (logprobs and logprobs["tokens"]) or self._shows_canvas:
                    choice = _choice(index, text, logprobs, increment.finish_reason, increment.stop_reason)
                    choice |= self._service.canvas(increment) if self._shows_canvas else {}
                    chunk = self._frame([choice])
                    if counts_all:
                        chunk["usage"] = self._usage(increments, num_completion) if counts_each else None
                    yield event(chunk)
            last = self._frame([]) | {"usage": self._usage(increments, num_completion)}
        yield event(last) + DONE if counts_all else DONE

    # ---- parts ---------------------------------------------------------------------------------------------------

    def _usage(self, increments: Increments, num_completion: int) -> dict[str, Any]:
        num_prompt = sum(len(request.prompt_token_ids) for request in increments.requests)
        return usage(num_prompt, num_completion, sum(request.num_cached_tokens for request in increments.requests))

    def _frame(self, choices: list[dict[str, Any]] | Iterator[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self._created,
            "model": self._service.model_name,
            "system_fingerprint": self._service.fingerprint,
            "choices": choices,
        }

    def _echo(self, prompt: str | None, token_ids: Seq[int]) -> str:
        if not self._body.echo:
            return ""
        return self._service.engine.detokenize(token_ids) if prompt is None else prompt

    def _begin_logprobs(
        self, echo: str, prompt: str | None, prompt_token_ids: Seq[int], places: Seq[TokenLogprobs | None] | None
    ) -> CompletionLogprobs:
        """Those of a choice, begun with its prompt's if they are asked for."""
        made = CompletionLogprobs(self._tokenizer)
        if places:
            added = () if prompt is None else [i for i, name in self._special_tokens.items() if name not in prompt]
            made.append(echo, prompt_token_ids, places, left_out=added)
        return made


def _choice(
    index: int,
    text: str,
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
    stop_reason: str | int | None,
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }
