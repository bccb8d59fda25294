"""Calls are read out of a text, however it is cut into pieces."""

import json
import random

import pytest

from mini_infer.engine.calls import Arguments, CallBegins, CallScanner, Piece, Text
from mini_infer.engine.tools import (
    GENERIC,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_ARGS,
    Tool,
    ToolFormat,
    choose,
    find_format,
    prepare,
    read_tools,
)
from mini_infer.exceptions import InvalidRequestError

FORMATS = {"hermes": HERMES, "llama3": LLAMA3, "mistral": MISTRAL, "mistral-args": MISTRAL_ARGS, "generic": GENERIC}

Answer = tuple[str, list[tuple[str, str]]]

WRITTEN: list[tuple[ToolFormat, str, Answer]] = [
    (
        HERMES,
        'Let me see.\n<tool_call>\n{"name": "f", "arguments": {"a": "x\\"}{", "b": [1]}}\n</tool_call>\n'
        '<tool_call>\n{"name":"g","arguments":{}}\n</tool_call>',
        ("Let me see.", [("f", '{"a": "x\\"}{", "b": [1]}'), ("g", "{}")]),
    ),
    (HERMES, "no <tool calls> and {} here ", ("no <tool calls> and {} here ", [])),
    (HERMES, 'a <tool_call> b {"name": "f"}', ('a <tool_call> b {"name": "f"}', [])),
    (
        HERMES,
        '<tool_call>\nbad\n</tool_call> <tool_call>{"name": "f", "arguments": {"a":1}}</tool_call> after',
        ("<tool_call>\nbad\n</tool_call>after", [("f", '{"a":1}')]),
    ),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": "cut', ("", [("f", '{"a": "cut')])),
    (HERMES, '<tool_call>\n{"name": "f", "argu', ('<tool_call>\n{"name": "f", "argu', [])),
    (
        LLAMA3,
        '<|python_tag|>{"name": "f", "parameters": {"q": "a; b"}}; {"name": "g", "parameters": {}}',
        ("", [("f", '{"q": "a; b"}'), ("g", "{}")]),
    ),
    (LLAMA3, ' {"type": "function", "name": "f", "parameters": {"q": null}}', ("", [("f", '{"q": null}')])),
    (LLAMA3, '{"json": 1}', ('{"json": 1}', [])),
    (LLAMA3, "plain {}", ("plain {}", [])),
    (
        MISTRAL,
        '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]',
        ("", [("f", '{"a": 1}'), ("g", "{}")]),
    ),
    (MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[ARGS]{}', ("", [("f", '{"a": 1}'), ("g", "{}")])),
    (MISTRAL_ARGS, 'x[TOOL_CALLS]f{"a": 1}', ("x", [("f", '{"a": 1}')])),
    (
        GENERIC,
        '{"name": "f", "arguments": {"a": {}}}\n{"name": "g", "arguments": {}}',
        ("", [("f", '{"a": {}}'), ("g", "{}")]),
    ),
    (GENERIC, "", ("", [])),
    (GENERIC, "  ", ("  ", [])),
]


def gathered(pieces: list[Piece]) -> Answer:
    text, calls = "", list[tuple[str, str]]()
    for piece in pieces:
        if isinstance(piece, Text):
            text += piece.text
        elif isinstance(piece, CallBegins):
            assert piece.index == len(calls)
            calls.append((piece.name, ""))
        else:
            assert isinstance(piece, Arguments) and piece.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.text)
    return text, calls


def scan(format: ToolFormat, text: str, cuts: list[int]) -> Answer:
    scanner, pieces = CallScanner(format), list[Piece]()
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        pieces += scanner.feed(text[start:end])
    return gathered(pieces + scanner.end())


@pytest.mark.parametrize("format, text, expected", WRITTEN, ids=lambda value: repr(value)[:40])
def test_however_it_is_cut(format: ToolFormat, text: str, expected: Answer) -> None:
    draw = random.Random(0)
    assert scan(format, text, []) == expected
    assert scan(format, text, list(range(1, len(text)))) == expected
    for _ in range(50):
        cuts = sorted(draw.choices(range(len(text) + 1), k=3))
        assert scan(format, text, cuts) == expected, cuts


def random_json(draw: random.Random, depth: int = 0) -> object:
    kind = draw.randrange(5 if depth < 3 else 3)
    if kind < 3:
        return [
            draw.choice(['"', "\\", "}{", "</tool_call>", "[TOOL_CALLS]", "值", "\n"]) * 2,
            draw.randint(-9, 9),
            None,
        ][kind]
    if kind == 3:
        return [random_json(draw, depth + 1) for _ in range(draw.randrange(3))]
    return {draw.choice('ab"}]'): random_json(draw, depth + 1) for _ in range(draw.randrange(3))}


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_read(name: str) -> None:
    """Random arguments, in the words of each format, cut anywhere."""
    form, seed = FORMATS[name], 5
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(200):
        calls = [
            (draw.choice("fgh") + name, json.dumps({"a": random_json(draw)}, ensure_ascii=draw.random() < 0.5))
            for _ in range(draw.randint(1, 3))
        ]
        written = [form.before + name + form.between + arguments + form.after for name, arguments in calls]
        text = form.opening + form.separator.join(written) + form.closing
        assert scan(form, text, sorted(draw.choices(range(len(text) + 1), k=6))) == ("", calls)


def test_nothing_certain_is_held_back() -> None:
    scanner = CallScanner(HERMES)
    assert scanner.feed("a < b <tool") == [Text("a < b")]
    assert scanner.feed("s") == [Text(" <tools")]
    assert scanner.feed('\n<tool_call>\n{"name": "f", "arguments": {"x": 12') == [
        CallBegins(0, "f"),
        Arguments(0, '{"x": 12'),
    ]
    assert scanner.feed("3") == [Arguments(0, "3")]


def test_formats_by_their_templates() -> None:
    assert find_format(None) is find_format("{{ messages }}") is GENERIC
    assert find_format("{% if tools %}<tool_call>{% endif %}") is HERMES
    assert find_format('{% if tools %}{"name": "", "parameters": {}}{% endif %}') is LLAMA3
    assert (
        find_format("{{ tools }}[TOOL_CALLS]") is MISTRAL
        and find_format("{{ tools }}[TOOL_CALLS][ARGS]") is MISTRAL_ARGS
    )


def test_a_conversation_for_a_template_without_tools() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "7", "tool_call_id": "1"},
    ]
    told = prepare(messages, [Tool("f", "does it")], GENERIC)
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert told[0]["content"].startswith("Be brief.\n\n") and '"does it"' in told[0]["content"]
    assert told[2]["content"] == '{"name": "f", "arguments": {"a": 1}}' and told[3]["content"].endswith("7")
    as_objects = prepare(messages, [], HERMES)
    assert as_objects[2]["tool_calls"][0]["function"]["arguments"] == {"a": 1} and as_objects[3] == messages[3]


def test_what_cannot_be_chosen() -> None:
    one = Tool("f")
    assert choose([one], "none", None, True, HERMES) is None and choose([], "auto", None, True, HERMES) is None
    for tools, choice, allowed in (
        ([], "required", None),
        ([one], "auto", ["g"]),
        ([one, one], "auto", None),
        ([one], "auto", []),
    ):
        with pytest.raises(InvalidRequestError):
            choose(tools, choice, allowed, True, HERMES)  # type: ignore[arg-type]
    for unusable in ("f", {"name": "f"}, {"function": {"name": "a b"}}):
        with pytest.raises(InvalidRequestError):
            read_tools([unusable])
