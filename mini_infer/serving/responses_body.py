"""What a request to ``/v1/responses`` may say, and which messages of a chat that makes.

Its input is a list of items: messages, the calls of an answer, and what the functions gave. A chat has the same in
messages, so whoever answers needs to know only those.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationError

from mini_infer.engine.tools import MAX_TOOLS
from mini_infer.exceptions import InvalidRequestError
from mini_infer.serving.limits import MAX_MESSAGES
from mini_infer.serving.protocol import IGNORED, NOT_YET, Body, Message, OpenAIBody, TemplateVariables, says
from mini_infer.serving.tool_fields import (
    ResponseFormat,
    ToolChoice,
    ToolField,
    nested_choice,
    nested_function,
    structured_outputs,
)
from mini_infer.structured import StructuredOutputsParams


class ReasoningOptions(Body):
    effort: str | None = Field(None, description="How much to think, where the chat template has a switch for that")
    summary: Any = Field(None, description="Accepted and ignored: reasoning is given whole.")
    generate_summary: Any = Field(None, description="Accepted and ignored.")


def _nested_format(value: Any) -> Any:
    """A format as chats have it, of one as responses do, with all on one floor."""
    if isinstance(value, dict) and value.get("type") == "json_schema" and "json_schema" not in value:
        schema = {name: item for name, item in value.items() if name != "type"}
        return {"type": "json_schema", "json_schema": schema}
    return value


class TextOptions(Body):
    format: Annotated[ResponseFormat, BeforeValidator(_nested_format)] | None = Field(
        None, description="text, json_object, or json_schema with a schema"
    )
    verbosity: Literal["medium"] | None = Field(None, description="Nothing but medium")


_LOGPROBS = "message.output_text.logprobs"

_Items = Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]


class ResponsesBody(OpenAIBody):
    input: Annotated[
        str | _Items, Field(union_mode="left_to_right"), says("input", "a text, or a list of input items")
    ] = Field(description="A text, or items: messages, and the items of earlier responses")
    instructions: str | None = Field(None, description="A system message for this response alone")
    previous_response_id: str | None = Field(None, description="Go on from this response, which must still be kept")
    store: bool | None = Field(None, description="false keeps nothing, so that no request can go on from this response")
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = Field(None, description="Given back with the response")
    max_output_tokens: int | None = Field(
        None, description="Most tokens to generate, reasoning included; null for as many as the context holds"
    )
    reasoning: ReasoningOptions | None = Field(None, description="How much to think")
    text: TextOptions | None = Field(None, description="The form of the answer")
    include: list[str] | None = Field(None, description=f"Only {_LOGPROBS} is there to be included")
    top_logprobs: int | None = Field(None, description="With that, this many of the likeliest tokens at each place")
    chat_template_kwargs: TemplateVariables = Field({}, description="Extension. Further variables of the chat template")
    add_generation_prompt: bool | None = Field(None, description="Extension. As in chats")
    continue_final_message: bool = Field(False, description="Extension. As in chats")
    tools: (
        Annotated[
            list[Annotated[ToolField, BeforeValidator(nested_function)]], Field(fail_fast=True, max_length=MAX_TOOLS)
        ]
        | None
    ) = Field(None, description="Functions that the answer may call")
    tool_choice: Annotated[ToolChoice, BeforeValidator(nested_choice)] | None = Field(
        None, description="none, auto (if there are tools), required, one function, or a selection with a mode"
    )
    parallel_tool_calls: bool | None = Field(None, description="false allows one call at most")
    max_tool_calls: Any = Field(None, description=IGNORED)
    truncation: Any = Field(None, description=NOT_YET)
    background: Any = Field(None, description=NOT_YET)
    conversation: Any = Field(None, description=NOT_YET)
    prompt: Any = Field(None, description=NOT_YET)

    _NOT_SUPPORTED: ClassVar = {
        "truncation": (("disabled",), "nothing is cut off in silence; leave truncation out"),
        "background": ((False,), "background is not supported; /v1/generate is asked now and fetched later"),
        "conversation": ((), "conversations are not kept here; use previous_response_id"),
        "prompt": ((), "prompts are not kept here; send it as input"),
        "n": ((1,), "a response is one answer; ask for it n times"),
        "include": (([], [_LOGPROBS]), f"nothing but {_LOGPROBS} can be included"),
    }

    def structured(self) -> StructuredOutputsParams | None:
        wanted = None if self.text is None else self.text.format
        if wanted is not None and wanted.type != "text":
            return structured_outputs(wanted, self.structured_outputs, {})
        return super().structured()

    @property
    def wants_logprobs(self) -> bool:
        """Whether each token's log probability is to be reported."""
        return bool(self.include) or bool(self.top_logprobs)

    def messages(self) -> list[Message]:
        """What the input adds to the conversation.

        Raises:
            InvalidRequestError: an item is of a kind that is not known here, or malformed.
        """
        if isinstance(self.input, str):
            return [Message.of("user", self.input)]
        messages: list[Message] = []
        for place, item in enumerate(self.input):
            message = _message_of(place, item)
            if message is None:
                continue
            before = messages[-1] if messages else message
            if message.tool_calls and before is not message and before.role == "assistant":
                # The calls of one answer, and the text before them, are items of their own.
                calls = [*(before.tool_calls or ()), *message.tool_calls]
                messages[-1] = before.model_copy(update={"tool_calls": calls})
            else:
                messages.append(message)
        return messages


def input_items(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A conversation as the items that it came from, each under the id of its place."""
    items: list[dict[str, Any]] = []

    def add(prefix: str, **fields: Any) -> None:
        items.append({"id": f"{prefix}_{len(items)}", "status": "completed", **fields})

    for message in messages:
        text = message.content or ""
        if message.role == "tool":
            add("fco", type="function_call_output", call_id=message.tool_call_id or "", output=text)
            continue
        if message.content is not None:
            is_answer = message.role == "assistant"
            part = {"type": "output_text" if is_answer else "input_text", "text": text}
            content: list[dict[str, Any]] = [part | {"annotations": []} if is_answer else part]
            add("msg", type="message", role=message.role, content=content)
        for call in message.tool_calls or ():
            function = {"name": call.function.name, "arguments": call.function.arguments}
            add("fc", type="function_call", call_id=call.id, **function)
    return items


def _message_of(place: int, item: Mapping[str, Any]) -> Message | None:
    """The message that an input item is; the reasoning of an earlier response is none."""
    kind = item.get("type", "message")
    if kind == "reasoning":
        return None
    if kind not in ("message", "function_call", "function_call_output"):
        raise InvalidRequestError(
            f"input[{place}] is of type {repr(kind)[:40]}; supported are messages, and calls of functions with their "
            "outputs"
        )
    content = item.get("output" if kind == "function_call_output" else "content")
    if isinstance(content, list):
        content = [_plain_part(part) for part in content]
    try:
        if kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            return Message.of("assistant", None, tool_calls=[call])
        if kind == "function_call_output":
            return Message.of("tool", content, tool_call_id=item.get("call_id"))
        return Message.model_validate({"role": item.get("role"), "content": content})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f".{part}" for part in first["loc"])
        raise InvalidRequestError(f"input[{place}]{where}: {first['msg']}") from error


def _plain_part(part: Any) -> Any:
    """A part of a message as chats have it."""
    if isinstance(part, dict) and part.get("type") in ("input_text", "output_text"):
        return {"type": "text", "text": part.get("text")}
    return part
