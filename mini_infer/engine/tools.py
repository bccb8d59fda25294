"""Tools: how a conversation tells a model of functions that it may have called, and how the model writes a call.

Every family of models writes calls in its own way. A ``ToolFormat`` is one of these, as five pieces of text::

    <tool_call>\\n{"name": "  kv_cache_size  ", "arguments":   {"tokens": 4096}  }\\n</tool_call>
    before                    the name        between         the arguments     after

So one grammar holds a model to it, and one scanner (``calls.py``) reads it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mini_infer.exceptions import InvalidRequestError

MAX_TOOLS = 128
"""Most tools of a request."""


@dataclass(frozen=True)
class Tool:
    """A function that a model may have called.

    Attributes:
        name: letters, digits, ``_``, ``-`` and ``.``, at most 64.
        description: what it does, for the model.
        parameters: a JSON schema of its arguments, which are an object.
        strict: hold the model to the schema wherever it calls, even if it is free not to.
    """

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", self.name):
            raise InvalidRequestError(
                f"a tool's name must be 1 to 64 letters, digits, '_', '-' or '.', got {repr(self.name)[:80]}"
            )

    @property
    def schema(self) -> Mapping[str, Any]:
        """The schema of its arguments; without parameters they are an empty object."""
        if not self.parameters:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return self.parameters if "type" in self.parameters else {**self.parameters, "type": "object"}

    def for_template(self) -> dict[str, Any]:
        """As chat templates have it."""
        function = {"name": self.name, "description": self.description, "parameters": self.schema}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class ToolFormat:
    """One way of writing calls.

    Attributes:
        mark: what tells that a call begins; empty where a call is bare JSON, which is then all of an answer.
        opening, closing: around all calls of an answer.
        before, between, after: around a call's name and its arguments.
        separator: between two calls.
        keys: of the name and of the arguments, where a call is a JSON object; without them ``between`` stands between
            the two, and the arguments end with their own last brace.
        knows_tools: whether the model's chat template knows tools; otherwise a system message tells of them.
        id_length: how long the ids of calls are, if the template insists.
    """

    mark: str
    opening: str
    before: str
    between: str
    after: str
    separator: str
    closing: str
    keys: tuple[str, str] | None = ("name", "arguments")
    knows_tools: bool = True
    id_length: int | None = None


HERMES = ToolFormat(
    mark="<tool_call>",
    opening="",
    before='<tool_call>\n{"name": "',
    between='", "arguments": ',
    after="}\n</tool_call>",
    separator="\n",
    closing="",
)
"""Hermes, Qwen2.5 and Qwen3."""

LLAMA3 = ToolFormat(
    mark="",
    opening="",
    before='{"name": "',
    between='", "parameters": ',
    after="}",
    separator="; ",
    closing="",
    keys=("name", "parameters"),
)
"""Llama 3.1 and on; ``<|python_tag|>`` may come before it."""

MISTRAL = ToolFormat(
    mark="[TOOL_CALLS]",
    opening="[TOOL_CALLS][",
    before='{"name": "',
    between='", "arguments": ',
    after="}",
    separator=", ",
    closing="]",
    id_length=9,
)

MISTRAL_ARGS = ToolFormat(
    mark="[TOOL_CALLS]",
    opening="",
    before="[TOOL_CALLS]",
    between="[ARGS]",
    after="",
    separator="",
    closing="",
    keys=None,
    id_length=9,
)
"""Mistral since the end of 2024."""

GENERIC = ToolFormat(
    mark="",
    opening="",
    before='{"name": "',
    between='", "arguments": ',
    after="}",
    separator="\n",
    closing="",
    knows_tools=False,
)
"""For templates that know no tools."""


def find_format(template: str | None) -> ToolFormat:
    """How a model with this chat template writes calls."""
    if template is None or not re.search(r"\btools\b", template):
        return GENERIC
    if "[TOOL_CALLS]" in template:
        return MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    if "<tool_call>" in template:
        return HERMES
    return LLAMA3 if '"parameters"' in template or "python_tag" in template else HERMES


@dataclass(frozen=True)
class ToolUse:
    """What a request may call, and whether it must.

    Attributes:
        tools: those that may be called.
        format: how.
        required: a call must come.
        several: more than one may.
    """

    tools: tuple[Tool, ...]
    format: ToolFormat
    required: bool = False
    several: bool = True

    @property
    def is_constrained(self) -> bool:
        """Whether a grammar holds the answer to the format; otherwise the model is trusted with it."""
        return self.required or not self.format.knows_tools or any(tool.strict for tool in self.tools)

    def grammar(self, special_tokens: Mapping[str, int], otherwise: str | None = None) -> str:
        """The grammar of answers, as ``StructuredOutputsParams.grammar``.

        Args:
            special_tokens: ids of the tokenizer's special tokens, by their text.
            otherwise: a rule's body for answers without a call; None allows any text.
        """
        form = self.format

        def literal(text: str) -> str:
            return _literal(text, special_tokens)

        # Any text up to the mark: the grammar does not know where that is before it is there, and it stays there.
        is_lazy = bool(form.mark) and not self.required and otherwise is None
        done = form.mark if is_lazy else ""
        names = [f"call_{place}" for place in range(len(self.tools))]
        call = f"({' | '.join(names)})"
        separator = form.separator + (done if form.before.startswith(form.mark) else "")
        rest = f" ({literal(separator)} {call})*" if self.several else ""
        lines = [f"calls: {literal(form.opening.removeprefix(done))} {call}{rest} {literal(form.closing)}"]
        for name, tool in zip(names, self.tools, strict=True):
            before = literal(form.before.removeprefix(done) + tool.name + form.between)
            lines.append(f"{name}: {before} %json {json.dumps(tool.schema)} {literal(form.after)}")
        if self.required:
            lines.append("start: calls")
        elif otherwise is not None:
            lines.append(f"start: calls | {otherwise}")
        elif is_lazy:
            lines += ["start: TEXT | mark calls", f"mark[lazy]: TEXT {literal(form.mark)}", r"TEXT: /(.|\n)*/"]
        else:  # a text that begins like a call is one
            lines += ["start: calls | TEXT", r"TEXT: /[^{\s](.|\n)*/"]
        return "\n".join(lines)


def _literal(text: str, special_tokens: Mapping[str, int]) -> str:
    """A text in a grammar; special tokens in it are themselves, not their letters."""
    found = [name for name in special_tokens if name and name in text]
    parts = re.split(f"({'|'.join(map(re.escape, sorted(found, key=len, reverse=True)))})", text) if found else [text]
    written = [
        f"<[{special_tokens[part]}]>" if part in special_tokens else json.dumps(part, ensure_ascii=False)
        for part in parts
        if part
    ]
    return " ".join(written)


# ---- conversations -----------------------------------------------------------------------------------------------


def read_tools(tools: Sequence[Any]) -> tuple[Tool, ...]:
    """Tools as OpenAI and chat templates have them, ``{"type": "function", "function": {...}}``, or as they are.

    Raises:
        InvalidRequestError: one of them is neither.
    """
    read = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if isinstance(tool, Tool):
            read.append(tool)
        elif isinstance(function, Mapping) and "name" in function:
            description, parameters = function.get("description") or "", function.get("parameters")
            read.append(Tool(function["name"], description, parameters, bool(function.get("strict"))))
        else:
            raise InvalidRequestError(
                f'a tool must be {{"type": "function", "function": {{"name": ...}}}}, got {repr(tool)[:80]}'
            )
    return tuple(read)


def prepare(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], form: ToolFormat) -> list[dict[str, Any]]:
    """A conversation as the template can show it: calls with their arguments as objects; where the template knows no
    tools, told in plain messages.

    Args:
        messages: with ``tool_calls`` as OpenAI has them, and results with role ``tool``.
        tools: what may be called now.
    """
    if form.knows_tools:
        return [_with_objects(message) for message in messages]
    told = [_in_words(message, form) for message in messages]
    if not tools:
        return told
    instructions = _instructions(tools, form)
    if told and told[0].get("role") == "system":
        return [{**told[0], "content": f"{told[0]['content']}\n\n{instructions}"}, *told[1:]]
    return [{"role": "system", "content": instructions}, *told]


def _instructions(tools: Sequence[Tool], form: ToolFormat) -> str:
    lines = ["You may call these functions:"]
    for tool in tools:
        shown = {"name": tool.name, "description": tool.description, "parameters": tool.schema}
        lines.append(json.dumps(shown, ensure_ascii=False))
    call = f"{form.before}NAME{form.between}{{...}}{form.after}"
    lines.append(f"To call one, answer with {call} alone, and you will be told the result.")
    return "\n".join(lines)


def _with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    changed = []
    for call in calls:
        function = dict(call["function"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = _object(function["arguments"])
        changed.append({**call, "function": function})
    return {**message, "content": message.get("content") or "", "tool_calls": changed}


def _in_words(message: Mapping[str, Any], form: ToolFormat) -> dict[str, Any]:
    if message.get("role") == "tool":
        return {"role": "user", "content": f"Result: {message.get('content') or ''}"}
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    written = []
    for call in calls:
        name, arguments = call["function"]["name"], call["function"].get("arguments") or "{}"
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        written.append(form.before + name + form.between + arguments + form.after)
    content = message.get("content") or ""
    return {"role": message["role"], "content": "\n".join([*([content] if content else []), *written])}


def _object(arguments: str) -> Any:
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(
            f"the arguments of a tool call must be a JSON object, got {arguments[:80]!r}"
        ) from error
    return value


# ---- what requests say -------------------------------------------------------------------------------------------

Choice = Literal["none", "auto", "required"]


def choose(
    tools: Sequence[Tool], choice: Choice, allowed: Sequence[str] | None, several: bool, format: ToolFormat
) -> ToolUse | None:
    """What may be called.

    Args:
        tools: all that there are.
        allowed: names of those that may be called now; None for all.

    Raises:
        InvalidRequestError: there are no tools to choose from, two have one name, or ``allowed`` names others.
    """
    if len(tools) > MAX_TOOLS:
        raise InvalidRequestError(f"there are {len(tools)} tools, but at most {MAX_TOOLS} are taken")
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequestError(f"two tools are called {name!r}; give each its own name")
    for name in allowed or ():
        if name not in names:
            raise InvalidRequestError(f"tool_choice names {name!r}, but the tools are: {', '.join(names) or 'none'}")
    if choice == "none" or not tools:
        if choice == "required" or allowed:
            raise InvalidRequestError("tool_choice asks for a call, but there are no tools; give tools as well")
        return None
    usable = tuple(tool for tool in tools if allowed is None or tool.name in allowed)
    if not usable:
        raise InvalidRequestError("tool_choice allows no tool; name at least one")
    return ToolUse(usable, format, choice == "required", several)
