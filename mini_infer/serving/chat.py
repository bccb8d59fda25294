"""``POST /v1/chat/completions``: a conversation, and the model's next turn."""

import secrets
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from mini_infer.engine.intake import Prompt
from mini_infer.outputs import CompletionOutput, GenerateOutput, TokenLogprobs
from mini_infer.serving.answers import DONE, Whole, event
from mini_infer.serving.logprobs import chat_logprobs, check_num_top
from mini_infer.serving.messages import Message, whole_message
from mini_infer.serving.protocol import ChatBody
from mini_infer.serving.reasoning import Thinking, num_reasoning_tokens, thinks
from mini_infer.serving.routes import body_router
from mini_infer.serving.service import Service, now, render, usage
from mini_infer.serving.tool_fields import answer_form, tool_use


def chat_router(service: Service) -> APIRouter:
    router = body_router(service.limits, service.pools.bodies)

    @router.post("/v1/chat/completions", summary="Answer a conversation")
    async def create_chat_completion(request: Request, body: ChatBody) -> Response:
        completion = _ChatCompletion(service, request, body)
        return service.answer(completion.events if body.stream else completion.whole, completion.id)

    return router


class _ChatCompletion:
    """One call of the endpoint."""

    def __init__(self, service: Service, request: Request, body: ChatBody) -> None:
        service.check_model(body.model)
        check_num_top("top_logprobs", body.top_logprobs)
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self._service = service
        self._request = request
        self._body = body
        self._created = now()
        self._shows_canvas = service.shows_canvas(body.stream_options)
        self._num_top = body.top_logprobs or 0
        self._thinks = thinks(service.template)
        self._tools = tool_use(
            body.tools, body.tool_choice, body.parallel_tool_calls, service.engine.tokenizer.tool_format
        )
        self._format = None if self._tools is None else self._tools.format
        self._params = body.sampling_params(
            service.defaults,
            max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
            logprobs=self._num_top if body.logprobs else None,
            **answer_form(self._tools, body.structured(), service.engine.tokenizer.special_tokens),
        )

    async def whole(self) -> Whole:
        (output,) = await self._service.complete(
            self._request, [await self._prompt()], self._params, [self.id], self._body.priority
        )
        choices = (self._whole_choice(output.prompt or "", completion) for completion in output.outputs)
        num_completion = sum(len(completion.token_ids) for completion in output.outputs)
        content = self._frame("chat.completion", choices)
        return Whole(
            content | {"usage": self._whole_usage(output)},
            num_completion * (self._num_top + 1) if self._body.logprobs else 0,
        )

    def _whole_choice(self, prompt: str, completion: CompletionOutput) -> dict[str, Any]:
        message, has_calls = whole_message(completion.text, self._format, Thinking(prompt) if self._thinks else None)
        is_call = has_calls and completion.finish_reason == "stop"
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": "tool_calls" if is_call else completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        options = self._body.stream_options
        counts_all = options is not None and options.include_usage
        counts_each = options is not None and options.include_usage and options.continuous_usage_stats
        num_completion, output = 0, None
        with await self._service.submit(
            self._request, [await self._prompt()], self._params, request_ids=[self.id], priority=self._body.priority
        ) as increments:
            yield b""  # the headers go out: the request is queued
            (prompt,) = increments.requests
            messages: dict[int, Message] = {}

            def chunk(choices: list[dict[str, Any]], counts: bool) -> bytes:
                frame = self._frame("chat.completion.chunk", choices)
                if counts_all:
                    num_prompt, num_cached = len(prompt.prompt_token_ids), prompt.num_cached_tokens
                    frame["usage"] = usage(num_prompt, num_completion, num_cached) if counts else None
                return event(frame)

            async for increment in increments:
                if not (increment.token_ids or increment.finish_reason or self._shows_canvas):
                    continue  # a step of a diffusion model that wrote only further on
                if increment.index not in messages:  # not before: clients take the first event for the first token
                    thinking = Thinking(prompt.prompt or "") if self._thinks else None
                    messages[increment.index] = Message(self._format, thinking)
                    yield chunk([_choice(increment.index, {"role": "assistant", "content": ""})], counts_each)
                num_completion += len(increment.token_ids)
                message, reason = messages[increment.index], increment.finish_reason
                deltas = message.feed(increment.text, is_last=reason is not None)
                logprobs = self._logprobs(increment.logprobs)
                ending = message.finish_reason(reason), increment.stop_reason
                needs_one = increment.logprobs or reason or self._shows_canvas
                for place, delta in enumerate(deltas or ([{}] if needs_one else [])):
                    told = logprobs if place == 0 else None
                    end = ending if place == max(len(deltas) - 1, 0) else (None, None)
                    canvas = self._service.canvas(increment) if self._shows_canvas and place == 0 else {}
                    yield chunk([_choice(increment.index, delta, told, *end) | canvas], counts_each)
                output = increment.output
            last = self._frame("chat.completion.chunk", [])
            if output is not None:
                last["usage"] = self._whole_usage(output)
            yield event(last) + DONE if counts_all else DONE

    async def _prompt(self) -> Prompt:
        tools = () if self._tools is None else self._tools.tools
        return await render(self._service, self._body.messages, self._body, self._body.reasoning_effort, tools)

    def _frame(self, kind: str, choices: list[dict[str, Any]] | Iterator[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self._service.model_name,
            "system_fingerprint": self._service.fingerprint,
            "choices": choices,
        }

    def _logprobs(self, places: list[TokenLogprobs] | None) -> dict[str, Any] | None:
        return chat_logprobs(places or [], self._num_top, self._bytes_of) if self._body.logprobs else None

    def _whole_usage(self, output: GenerateOutput) -> dict[str, Any]:
        reasoning = None
        if self._thinks:
            reasoning = sum(
                num_reasoning_tokens(answer.text, output.prompt or "", answer.token_ids, self._bytes_of)
                for answer in output.outputs
            )
        num_completion = sum(len(completion.token_ids) for completion in output.outputs)
        return usage(len(output.prompt_token_ids), num_completion, output.num_cached_tokens, reasoning)

    def _bytes_of(self, token_id: int) -> bytes:
        return self._service.bytes_of(token_id, self._params)


def _choice(
    index: int,
    delta: dict[str, Any],
    logprobs: dict[str, Any] | None = None,
    finish_reason: str | None = None,
    stop_reason: str | int | None = None,
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }
