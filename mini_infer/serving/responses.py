"""``/v1/responses``: OpenAI's newer endpoint, whose answers are kept, so that the next request goes on from them."""

import secrets
from collections.abc import AsyncGenerator, Iterator
from collections.abc import Sequence as Seq
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Query, Request, Response

from mini_infer.engine.intake import Prompt
from mini_infer.engine.tools import ToolFormat
from mini_infer.outputs import GenerateOutput, TokenLogprobs
from mini_infer.serving.answers import Whole, event
from mini_infer.serving.errors import ApiError
from mini_infer.serving.kept import Kept
from mini_infer.serving.limits import MAX_MESSAGES
from mini_infer.serving.logprobs import chat_logprobs, check_num_top
from mini_infer.serving.messages import Message as Answer
from mini_infer.serving.protocol import Message
from mini_infer.serving.reasoning import Thinking, num_reasoning_tokens, thinks
from mini_infer.serving.responses_body import ResponsesBody, input_items
from mini_infer.serving.routes import body_router
from mini_infer.serving.service import Service, now, render
from mini_infer.serving.tool_fields import answer_form, tool_use

KEPT_RESPONSES = 4096
"""How many responses are kept at most; the oldest go first."""

KEPT_SECONDS = 3600
"""How long each is kept."""

KEPT_CHARACTERS = 64 << 20
"""What their conversations may come to."""


class KeptResponse(NamedTuple):
    """A response, and what the next request goes on from.

    Attributes:
        response: as its caller got it.
        conversation: all messages up to its end, without the instructions, which are those of one request.
    """

    response: dict[str, Any]
    conversation: tuple[Message, ...]


def responses_router(service: Service) -> APIRouter:
    router = body_router(service.limits, service.pools.bodies)
    kept: Kept[str, KeptResponse] = Kept(KEPT_RESPONSES, KEPT_SECONDS, KEPT_CHARACTERS)

    @router.post("/v1/responses", summary="Answer a conversation, and remember it")
    async def create_response(request: Request, body: ResponsesBody) -> Response:
        response = _Response(service, kept, request, body)
        return service.answer(response.events if body.stream else response.whole, response.id)

    @router.get("/v1/responses/{response_id}", summary="Fetch a response again")
    async def fetch_response(response_id: str) -> dict[str, Any]:
        return _found(kept.get(response_id), response_id, 404).response

    @router.get("/v1/responses/{response_id}/input_items", summary="List what a response answers")
    async def list_input_items(
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> dict[str, Any]:
        items = input_items(_found(kept.get(response_id), response_id, 404).conversation[:-1])
        items = items if order == "asc" else items[::-1]
        ids = [item["id"] for item in items]
        if after is not None and after not in ids:
            raise ApiError(400, f"response {response_id!r} has no input item {after[:100]!r}", param="after")
        rest = items if after is None else items[ids.index(after) + 1 :]
        page = rest[:limit]
        ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
        return {"object": "list", "data": page, **ends, "has_more": len(rest) > limit}

    @router.delete("/v1/responses/{response_id}", summary="Forget a response")
    async def delete_response(response_id: str) -> dict[str, Any]:
        _found(kept.pop(response_id), response_id, 404)
        return {"id": response_id, "object": "response", "deleted": True}

    return router


def _found(kept: KeptResponse | None, response_id: str, status: int, param: str | None = None) -> KeptResponse:
    if kept is None:
        raise ApiError(
            status,
            f"no response {response_id[:100]!r}, or no longer: the last {KEPT_RESPONSES} are kept for {KEPT_SECONDS} "
            "seconds, unless they were asked for with store=false",
            param=param,
            code="response_not_found" if status == 404 else "previous_response_not_found",
        )
    return kept


class _Response:
    """One call of the endpoint."""

    def __init__(self, service: Service, kept: Kept[str, KeptResponse], request: Request, body: ResponsesBody) -> None:
        service.check_model(body.model)
        check_num_top("top_logprobs", body.top_logprobs)
        self.id = f"resp_{secrets.token_hex(24)}"
        self._request_id = f"response-{secrets.token_hex(12)}"  # which events and logs show; the other opens the store
        self._service = service
        self._kept = kept
        self._request = request
        self._body = body
        self._created = now()
        self._thinks = thinks(service.template)
        tokenizer = service.engine.tokenizer
        self._tools = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls, tokenizer.tool_format)
        self._format = None if self._tools is None else self._tools.format
        self._params = body.sampling_params(
            service.defaults,
            max_tokens=body.max_output_tokens,
            logprobs=(body.top_logprobs or 0) if body.wants_logprobs else None,
            **answer_form(self._tools, body.structured(), tokenizer.special_tokens),
        )
        before: tuple[Message, ...] = ()
        if (previous := body.previous_response_id) is not None:
            before = _found(kept.get(previous), previous, 400, "previous_response_id").conversation
        self._conversation = (*before, *body.messages())
        if len(self._conversation) > MAX_MESSAGES:
            raise ApiError(400, f"{len(self._conversation)} messages, but at most {MAX_MESSAGES}", param="input")

    async def whole(self) -> Whole:
        (output,) = await self._service.complete(
            self._request, [await self._prompt()], self._params, [self._request_id], self._body.priority
        )
        items = _Items(self._format, self._thinking(output.prompt))
        for _ in items.add(output.text, self._places(output), is_last=True):
            pass  # nobody listens
        return Whole(self._finish(output, items), self._num_places(output))

    async def events(self) -> AsyncGenerator[bytes, None]:
        number = 0

        def say(kind: str, fields: dict[str, Any]) -> bytes:
            nonlocal number
            content = {"type": kind, "sequence_number": number} | fields
            number += 1
            return event(content, kind)

        with await self._service.submit(
            self._request,
            [await self._prompt()],
            self._params,
            request_ids=[self._request_id],
            priority=self._body.priority,
        ) as increments:
            begun = {"response": self._frame("in_progress", [])}
            yield say("response.created", begun) + say("response.in_progress", begun)
            items = _Items(self._format, self._thinking(increments.requests[0].prompt))
            async for increment in increments:
                places = self._entries(increment.logprobs)
                for kind, fields in items.add(increment.text, places, is_last=increment.finish_reason is not None):
                    yield say(kind, fields)
                if increment.output is not None:
                    last = self._finish(increment.output, items)
                    yield say(f"response.{last['status']}", {"response": last})

    # ---- parts ---------------------------------------------------------------------------------------------------

    async def _prompt(self) -> Prompt:
        body = self._body
        instructions = [] if body.instructions is None else [Message.of("system", body.instructions)]
        effort = None if body.reasoning is None else body.reasoning.effort
        tools = () if self._tools is None else self._tools.tools
        return await render(self._service, [*instructions, *self._conversation], body, effort, tools)

    def _thinking(self, prompt: str | None) -> Thinking | None:
        return Thinking(prompt or "") if self._thinks else None

    def _places(self, output: GenerateOutput) -> list[dict[str, Any]]:
        """Log probabilities of the answer's tokens, without those of the reasoning."""
        return self._entries((output.logprobs or [])[self._num_reasoning(output) :])

    def _num_places(self, output: GenerateOutput) -> int:
        """Log probabilities in the answer."""
        return len(output.token_ids) * ((self._body.top_logprobs or 0) + 1) if self._body.wants_logprobs else 0

    def _entries(self, places: list[TokenLogprobs] | None) -> list[dict[str, Any]]:
        if not self._body.wants_logprobs:
            return []
        entries: list[dict[str, Any]] = chat_logprobs(places or [], self._body.top_logprobs or 0, self._bytes_of)[
            "content"
        ]
        return [entry | {"bytes": entry["bytes"] or []} for entry in entries]

    def _bytes_of(self, token_id: int) -> bytes:
        return self._service.bytes_of(token_id, self._params)

    def _num_reasoning(self, output: GenerateOutput) -> int:
        if not self._thinks:
            return 0
        return num_reasoning_tokens(output.text, output.prompt or "", output.token_ids, self._bytes_of)

    def _finish(self, output: GenerateOutput, items: "_Items") -> dict[str, Any]:
        """The whole response, which is kept from now on, unless it should not be."""
        is_cut = output.finish_reason == "length"
        if is_cut:
            items.done[-1]["status"] = "incomplete"
        response = self._frame("incomplete" if is_cut else "completed", items.done)
        num_prompt, num_completion = len(output.prompt_token_ids), len(output.token_ids)
        response |= {
            "completed_at": None if is_cut else now(),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": {
                "input_tokens": num_prompt,
                "input_tokens_details": {"cached_tokens": output.num_cached_tokens},
                "output_tokens": num_completion,
                "output_tokens_details": {"reasoning_tokens": self._num_reasoning(output)},
                "total_tokens": num_prompt + num_completion,
            },
        }
        if self._body.store is not False:
            answer = Message.of("assistant", items.content or None if items.calls else items.content, **items.calls)
            conversation = (*self._conversation, answer)
            size = sum(len(str(message.for_template())) for message in conversation) + len(output.text)
            size += len(self._body.instructions or "") + len(str(self._body.metadata)) + 100 * self._num_places(output)
            self._kept.put(self.id, KeptResponse(response, conversation), size)
        return response

    def _text_format(self) -> dict[str, Any]:
        wanted = None if self._body.text is None else self._body.text.format
        if wanted is None:
            return {"type": "text"}
        named = wanted.json_schema
        return {"type": wanted.type} | ({} if named is None else named.model_dump(by_alias=True, exclude_none=True))

    def _frame(self, status: str, output: Seq[dict[str, Any]]) -> dict[str, Any]:
        body = self._body
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._service.model_name,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": body.store is not False,
            "temperature": self._params.temperature,
            "text": {"format": self._text_format()},
            "tool_choice": _flat(body.tool_choice) if body.tool_choice is not None else "auto",
            "tools": [_flat(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": self._params.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _flat(field: Any) -> Any:
    """A tool, or a choice of one, as responses have it: all on one floor."""
    if isinstance(field, str):
        return field
    plain = field.model_dump(exclude_none=True)
    if plain["type"] == "allowed_tools":
        allowed = plain["allowed_tools"]
        tools = [{"type": "function"} | tool["function"] for tool in allowed["tools"]]
        return {"type": "allowed_tools", "mode": allowed["mode"], "tools": tools}
    return {"type": "function"} | plain["function"]


class _Items:
    """The items of a response as they grow: the reasoning, if there is any, then the message, and calls of functions.

    Args:
        format: how calls are written; None if there can be none.
        thinking: tells reasoning from answer; None where there is no reasoning.

    Attributes:
        done: items that are whole.
        content: the text of the message.
    """

    def __init__(self, format: ToolFormat | None, thinking: Thinking | None) -> None:
        self._thinking = thinking
        self._answer = Answer(format, thinking)
        self.done: list[dict[str, Any]] = []
        self.content = ""
        self._open: dict[str, Any] | None = None

    @property
    def calls(self) -> dict[str, Any]:
        """The calls, as a field of a message in a chat; nothing if there are none."""
        calls = [
            {"id": item["call_id"], "function": {"name": item["name"], "arguments": item["arguments"]}}
            for item in self.done
            if item["type"] == "function_call"
        ]
        return {"tool_calls": calls} if calls else {}

    def add(self, text: str, logprobs: list[dict[str, Any]], *, is_last: bool) -> Iterator[tuple[str, dict[str, Any]]]:
        """More text; the events that tell of it, by kind.

        Args:
            logprobs: of the tokens that came with it; those of reasoning have no place to go.
            is_last: no more comes.
        """
        was_thinking = self._thinking is not None and self._thinking.is_open
        deltas = self._answer.feed(text, is_last=is_last)
        is_thinking = self._thinking is not None and self._thinking.is_open
        places = [] if (was_thinking and not is_last) or is_thinking else logprobs
        if places and not any("content" in delta for delta in deltas) and not self._answer.has_calls:
            deltas = [*deltas, {"content": ""}]  # a token without a text has a log probability all the same
        for delta in deltas:
            if "reasoning_content" in delta:
                yield from self._begin("reasoning")
                yield from self._grow("response.reasoning_text.delta", delta["reasoning_content"])
            if "content" in delta:
                yield from self._begin("message")
                self.content += delta["content"]
                yield from self._grow("response.output_text.delta", delta["content"], places)
                places = []
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    yield from self._end()
                    yield from self._begin("function_call", call)
                if arguments := call["function"]["arguments"]:
                    yield from self._grow("response.function_call_arguments.delta", arguments)
        if is_last:
            if not is_thinking and not self._answer.has_calls:
                yield from self._begin("message")  # there is always one
            yield from self._end()

    def _begin(self, kind: str, call: dict[str, Any] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._open is not None:
            if self._open["type"] == kind:
                return
            yield from self._end()
        item: dict[str, Any]
        if call is not None:
            item = {"type": kind, "id": f"fc_{secrets.token_hex(12)}", "call_id": call["id"]}
            item |= {"name": call["function"]["name"], "arguments": "", "status": "in_progress"}
            self._open = item
            yield "response.output_item.added", {"output_index": len(self.done), "item": dict(item)}
            return
        part: dict[str, Any]
        if kind == "reasoning":
            item = {"type": kind, "id": f"rs_{secrets.token_hex(12)}", "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            item = {"type": kind, "id": f"msg_{secrets.token_hex(12)}", "role": "assistant"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._open = item | {"status": "in_progress", "content": [part]}
        yield "response.output_item.added", {"output_index": len(self.done), "item": self._open | {"content": []}}
        yield "response.content_part.added", self._place() | {"part": dict(part)}

    def _grow(
        self, kind: str, text: str, logprobs: list[dict[str, Any]] | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        assert self._open is not None
        more: dict[str, Any] = {}
        if self._open["type"] == "function_call":
            self._open["arguments"] += text
        else:
            (part,) = self._open["content"]
            part["text"] += text
            if self._open["type"] == "message":
                more = {"logprobs": logprobs or []}
                part["logprobs"] += more["logprobs"]
        yield kind, self._place() | {"delta": text} | more

    def _end(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if self._open is None:
            return
        item = self._open
        if item["type"] == "function_call":
            arguments = {"name": item["name"], "arguments": item["arguments"]}
            yield "response.function_call_arguments.done", self._place() | arguments
        else:
            (part,) = item["content"]
            if item["type"] == "reasoning":
                yield "response.reasoning_text.done", self._place() | {"text": part["text"]}
            else:
                told = {"text": part["text"], "logprobs": part["logprobs"]}
                yield "response.output_text.done", self._place() | told
            yield "response.content_part.done", self._place() | {"part": part}
        place = {"output_index": len(self.done)}
        self._open = None
        self.done.append(item | {"status": "completed"})
        yield "response.output_item.done", place | {"item": self.done[-1]}

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        place = {"item_id": self._open["id"], "output_index": len(self.done)}
        return place if self._open["type"] == "function_call" else place | {"content_index": 0}
