"""The fields of a request that are about tools and about the form of its answer, as OpenAI has them, and what they mean
for the engine."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mini_infer.engine.tools import MAX_TOOLS, Tool, ToolFormat, ToolUse, choose
from mini_infer.exceptions import InvalidRequestError
from mini_infer.structured import StructuredOutputsParams


class Lenient(BaseModel):
    """Clients put more into these objects than a server needs."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


class FunctionField(Lenient):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of the arguments")
    strict: bool | None = Field(None, description="Hold the model to the schema even where it is free not to call")


class ToolField(Lenient):
    type: Literal["function"]
    function: FunctionField

    def tool(self) -> Tool:
        function = self.function
        return Tool(function.name, function.description or "", function.parameters, function.strict or False)


class _Name(Lenient):
    name: str


class NamedTool(Lenient):
    type: Literal["function"]
    function: _Name


class _Allowed(Lenient):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Lenient):
    type: Literal["allowed_tools"]
    allowed_tools: _Allowed


def nested_function(value: Any) -> Any:
    """A tool as chats have it, ``{"type", "function": {...}}``, of one as responses do, with all on one floor."""
    if isinstance(value, dict) and value.get("type") == "function" and "function" not in value:
        return {"type": "function", "function": {name: item for name, item in value.items() if name != "type"}}
    return value


def nested_choice(value: Any) -> Any:
    """The same of ``tool_choice``."""
    if isinstance(value, dict) and value.get("type") == "allowed_tools" and "allowed_tools" not in value:
        tools = value.get("tools")
        named = [nested_function(tool) for tool in tools] if isinstance(tools, list) else tools
        return {"type": "allowed_tools", "allowed_tools": {"mode": value.get("mode"), "tools": named}}
    return nested_function(value)


ToolsField = Annotated[list[ToolField], Field(fail_fast=True, max_length=MAX_TOOLS)]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool | AllowedTools, Field(union_mode="left_to_right")
]


class CalledFunction(Lenient):
    name: str
    arguments: str = "{}"


class ToolCall(Lenient):
    """A call that an earlier answer made."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class _JsonSchema(Lenient):
    name: str = "answer"
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Lenient):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = Field(None, description="With type json_schema: {name, schema, strict}")


def tool_use(tools: list[ToolField] | None, choice: Any, several: bool | None, format: ToolFormat) -> ToolUse | None:
    """What an answer may call; None for nothing.

    Raises:
        InvalidRequestError: the choice and the tools do not go together.
    """
    known = [tool.tool() for tool in tools or ()]
    many = several is not False
    if isinstance(choice, NamedTool):
        return choose(known, "required", [choice.function.name], False, format)
    if isinstance(choice, AllowedTools):
        names = [tool.function.name for tool in choice.allowed_tools.tools]
        return choose(known, choice.allowed_tools.mode, names, many, format)
    return choose(known, choice or "auto", None, many, format)


def answer_form(
    tools: ToolUse | None, structured: StructuredOutputsParams | None, special_tokens: Mapping[int, str]
) -> dict[str, Any]:
    """Sampling options that hold an answer to a form: that of the calls it may make, or one that the caller asks for.

    Args:
        special_tokens: id and text of each; the marks of calls are such tokens in some vocabularies.
    """
    if tools is None:
        return {"structured_outputs": structured}
    special = {text: token_id for token_id, text in special_tokens.items()}
    form: dict[str, Any] = {"skip_special_tokens": False} if tools.format.mark in special else {}
    if tools.is_constrained or structured is not None:
        otherwise = None if structured is None else structured.as_rule()
        form["structured_outputs"] = StructuredOutputsParams(grammar=tools.grammar(special, otherwise))
    return form


def structured_outputs(
    response_format: ResponseFormat | None, extension: Mapping[str, Any] | None, guided: Mapping[str, Any]
) -> StructuredOutputsParams | None:
    """What the text must be like.

    Args:
        extension: the field ``structured_outputs``.
        guided: the older ``guided_...`` fields that were given, by the names of ``StructuredOutputsParams``.

    Raises:
        InvalidRequestError: it is said twice, or malformed.
    """
    wanted = [StructuredOutputsParams(**extension)] if extension else []
    if guided:
        wanted.append(StructuredOutputsParams(**guided))
    if response_format is not None and response_format.type == "json_object":
        wanted.append(StructuredOutputsParams(json_object=True))
    elif response_format is not None and response_format.type == "json_schema":
        given = response_format.json_schema
        if given is None or given.json_schema is None:
            raise InvalidRequestError('response_format of type json_schema needs {"json_schema": {"schema": {...}}}')
        wanted.append(StructuredOutputsParams(json=given.json_schema))
    if len(wanted) > 1:
        raise InvalidRequestError("response_format, structured_outputs and guided_... say the same thing; give one")
    return wanted[0] if wanted else None
