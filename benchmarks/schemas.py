"""Which JSON schemas can be followed, feature by feature: ``python -m benchmarks.schemas``.

In the manner of JSONSchemaBench (Geng et al., 2025), but with schemas of our own: some for each keyword of the
specification, written by hand, and random ones. Each is compiled or refused by name. Then the bundled model writes
answers at temperature 2, where it writes nonsense, and the package jsonschema says which of those that it finished are
valid.
"""

import json
import random
from collections import Counter
from typing import Annotated, Any

import jsonschema
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.report import save
from mini_infer import LLM, SamplingParams, StructuredOutputsParams
from mini_infer.exceptions import InvalidRequestError

DIGIT: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 9}
WORD: dict[str, Any] = {"type": "string", "maxLength": 5}
PAIR: dict[str, Any] = {"type": "object", "properties": {"a": DIGIT, "b": WORD}}

FEATURES: dict[str, list[Any]] = {
    "type": [{"type": name} for name in ("null", "boolean")] + [{"type": ["boolean", "null"]}],
    "enum": [{"enum": [1, 2.5, "one", None, [], {"a": 1}]}],
    "const": [{"const": {"k": ["v", 1]}}, {"const": "é\n"}],
    "boolean schemas": [True, {"items": True, "type": "array", "maxItems": 2}, False],
    "annotations": [{**DIGIT, "title": "t", "description": "d", "default": 3, "examples": [4], "$comment": "c"}],
    "minimum, maximum": [DIGIT, {"type": "number", "minimum": -1.5, "maximum": 2}],
    "exclusiveMinimum, exclusiveMaximum": [{"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 5}],
    "multipleOf": [{**DIGIT, "multipleOf": 3}, {"type": "number", "minimum": 0, "maximum": 9, "multipleOf": 0.25}],
    "minLength, maxLength": [WORD, {"type": "string", "minLength": 2, "maxLength": 4}],
    "pattern": [{"type": "string", "pattern": "^[a-c]{1,3}$"}, {"type": "string", "pattern": "^(?=a)ab$"}],
    **{
        f"format {name}": [{"type": "string", "format": name}]
        for name in (
            *("date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid"),
            *("idn-email", "iri", "json-pointer", "regex", "uri-reference"),
        )
    },
    "properties, required": [PAIR, {**PAIR, "required": ["b"]}, {**PAIR, "required": ["a", "b", "c"]}],
    "additionalProperties": [
        {**PAIR, "additionalProperties": False},
        {"type": "object", "additionalProperties": DIGIT, "maxProperties": 2},
    ],
    "patternProperties": [{"type": "object", "patternProperties": {"^x[0-9]$": DIGIT}, "additionalProperties": False}],
    "propertyNames": [{"type": "object", "propertyNames": {"maxLength": 3}, "additionalProperties": DIGIT}],
    "minProperties, maxProperties": [{**PAIR, "minProperties": 1}, {**PAIR, "maxProperties": 1}],
    "dependentRequired": [{**PAIR, "dependentRequired": {"a": ["b"]}}],
    "dependentSchemas": [{**PAIR, "dependentSchemas": {"a": {"required": ["b"]}}}],
    "unevaluatedProperties": [{"allOf": [PAIR], "unevaluatedProperties": False}],
    "items": [{"type": "array", "items": DIGIT, "maxItems": 4}],
    "prefixItems": [{"type": "array", "prefixItems": [DIGIT, WORD], "items": False}],
    "minItems, maxItems": [{"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 3}],
    "uniqueItems": [{"type": "array", "items": DIGIT, "maxItems": 3, "uniqueItems": True}],
    "contains": [{"type": "array", "items": DIGIT, "maxItems": 3, "contains": {"const": 7}}],
    "unevaluatedItems": [{"type": "array", "prefixItems": [DIGIT], "unevaluatedItems": False}],
    "anyOf": [{"anyOf": [DIGIT, WORD]}, {"anyOf": [PAIR, {"type": "null"}]}],
    "oneOf, apart": [{"oneOf": [DIGIT, WORD]}],
    "oneOf, overlapping": [{"oneOf": [DIGIT, {"type": "integer", "minimum": 5, "maximum": 12}]}],
    "allOf": [{"allOf": [DIGIT, {"minimum": 4}]}, {"allOf": [PAIR, {"properties": {"c": DIGIT}, "required": ["c"]}]}],
    "not": [{**DIGIT, "not": {"const": 4}}],
    "if, then, else": [{**PAIR, "if": {"required": ["a"]}, "then": {"required": ["b"]}}],
    "$ref, $defs": [
        {"$ref": "#/$defs/d", "$defs": {"d": DIGIT}},
        {"$ref": "#/definitions/d", "definitions": {"d": WORD}},
    ],
    "$ref to itself": [
        {"$ref": "#/$defs/l", "$defs": {"l": {"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/l"}}}}
    ],
    "$ref to another document": [{"$ref": "https://example.org/schema"}],
    "$anchor": [{"$ref": "#here", "$defs": {"d": {**DIGIT, "$anchor": "here"}}}],
    "$dynamicRef": [{"$dynamicRef": "#d", "$defs": {"d": {**DIGIT, "$dynamicAnchor": "d"}}}],
    "contentEncoding": [{"type": "string", "contentEncoding": "base64", "maxLength": 8}],
}
"""Schemas for each keyword, all of them short to answer; one of them contradicts itself, and so do some random ones."""

NAMES = ("a", "id", "name", "名字", "x y", 'q"', "properties", "type", "$ref", "longer_name_of_a_property")


def draw_schema(draw: random.Random) -> dict[str, Any]:
    """A random one. Most are small; some contradict themselves, and some say what few implementations know."""
    return {**draw_part(draw), "$defs": {"leaf": {"type": "integer", "minimum": 0, "maximum": 9}}}


def draw_part(draw: random.Random, depth: int = 0) -> Any:
    leaves = [string, number, constant, enumeration, lambda d: {"type": draw.choice(["boolean", "null"])}]
    if depth < 3 and draw.random() < (0.9 if depth == 0 else 0.4):
        inner = [draw_object, draw_array, alternatives, lambda d, _: {"$ref": "#/$defs/leaf"}]
        return draw.choices(inner, [6, 3, 2, 1])[0](draw, depth + 1)
    return draw.choice(leaves)(draw)


def string(draw: random.Random) -> Any:
    schema: dict[str, Any] = {"type": "string", "maxLength": draw.randint(0, 8)}
    if draw.random() < 0.3:
        schema["minLength"] = draw.randint(0, 9)
    if draw.random() < 0.2:
        return {"type": "string", "pattern": draw.choice(["^[a-c]{1,3}$", "^(x|yy)+z$", r"^\d{2}$", "^$"])}
    if draw.random() < 0.2:
        return {"type": "string", "format": draw.choice(["date", "time", "ipv4", "uuid"])}
    return schema


def number(draw: random.Random) -> Any:
    schema: dict[str, Any] = {"type": draw.choice(["integer", "number"])}
    low = draw.randint(-200, 200)
    if draw.random() < 0.8:
        schema[draw.choice(["minimum", "exclusiveMinimum"])] = low
        schema[draw.choice(["maximum", "exclusiveMaximum"])] = low + draw.randint(-1, 300)
    if schema["type"] == "integer" and draw.random() < 0.2:
        schema["multipleOf"] = draw.randint(1, 12)
    return schema


def constant(draw: random.Random) -> Any:
    return {"const": draw.choice([0, -1.5, "", 'é\n"\\', None, [1, []], {"k": {"v": "值"}}])}


def enumeration(draw: random.Random) -> Any:
    return {"enum": draw.sample([1, 2.5, "one", "二", True, None, [], {"a": 1}], draw.randint(1, 4))}


def draw_object(draw: random.Random, depth: int) -> Any:
    names = draw.sample(NAMES, draw.randint(0, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: draw_part(draw, depth) for name in names}}
    if draw.random() < 0.8:
        schema["required"] = draw.sample(names, draw.randint(0, len(names)))
    if draw.random() < 0.3:
        schema["additionalProperties"] = draw.choice([False, {"type": "integer", "minimum": 0, "maximum": 9}])
    if draw.random() < 0.05:
        schema["required"] = [*schema.get("required", ()), "missing"]
    return schema


def draw_array(draw: random.Random, depth: int) -> Any:
    most = draw.randint(0, 3)
    schema: dict[str, Any] = {"type": "array", "items": draw_part(draw, depth), "maxItems": most}
    if draw.random() < 0.4:
        schema["minItems"] = draw.randint(0, most + 1)
    if draw.random() < 0.2:
        schema["prefixItems"] = [draw_part(draw, depth)]
    return schema


def alternatives(draw: random.Random, depth: int) -> Any:
    parts = [draw_part(draw, depth) for _ in range(draw.randint(1, 3))]
    return {draw.choices(["anyOf", "allOf", "oneOf"], [6, 2, 1])[0]: parts}


# ---- what becomes of them ------------------------------------------------------------------------------------------


def try_all(llm: LLM, schemas: list[Any], answers: int) -> list[dict[str, Any]]:
    """For each schema why it was refused, or how its answers ended, with those that were finished and not valid."""
    found: list[dict[str, Any]] = []
    prompts: list[list[int]] = []
    params: list[SamplingParams] = []
    for schema in schemas:
        structured = StructuredOutputsParams(json=json.dumps(schema))
        try:
            llm.make_request([1], SamplingParams(structured_outputs=structured))
        except InvalidRequestError as error:
            found.append({"refused": str(error).removeprefix("structured outputs: ")[:160]})
            continue
        found.append({"refused": None, "ends": Counter[str](), "invalid": []})
        prompts.append([1, 2, 3])
        params.append(
            SamplingParams(n=answers, temperature=2.0, seed=len(params), max_tokens=200, structured_outputs=structured)
        )
    compiled = [(entry, schema) for entry, schema in zip(found, schemas, strict=True) if entry["refused"] is None]
    outputs = llm.generate(prompts, params, use_tqdm=False) if prompts else []
    for (entry, schema), output in zip(compiled, outputs, strict=True):
        judge = jsonschema.Draft202012Validator
        check = judge(schema, format_checker=judge.FORMAT_CHECKER)
        for completion in output.outputs:
            entry["ends"][completion.finish_reason] += 1
            if completion.finish_reason == "stop" and not check.is_valid(json.loads(completion.text)):
                entry["invalid"].append(completion.text)
    return found


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of some schemas were compiled and refused, and how many of their answers ended how."""
    refused = [entry["refused"] for entry in found if entry["refused"] is not None]
    ends = sum((entry["ends"] for entry in found if entry["refused"] is None), Counter[str]())
    return {
        "schemas": len(found),
        "compiled": len(found) - len(refused),
        "refused": len(refused),
        "reasons": sorted(set(refused))[:20],
        "finished": ends["stop"],
        "cut": ends["length"],
        "dead_ends": ends["error"],
        "invalid": [text for entry in found for text in entry.get("invalid", ())],
    }


def keywords(schema: Any) -> set[str]:
    """Every keyword of a schema and of its parts."""
    if isinstance(schema, list):
        return set().union(*map(keywords, schema))
    if not isinstance(schema, dict):
        return set()
    values = {key: value for key, value in schema.items() if key not in ("const", "enum")}
    for name in ("properties", "$defs"):  # keys there are names of the author's
        values[name] = list(values.get(name, {}).values())
    return set(schema).union(*map(keywords, values.values()))


def main(
    count: Annotated[int, typer.Option(help="How many random schemas.")] = 1000,
    answers: Annotated[int, typer.Option(help="Answers to each.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the random schemas.")] = 0,
    write: Annotated[bool, typer.Option(help="Write benchmarks/results/schemas.json.")] = True,
) -> None:
    """Print what is compiled and what is refused; fail if a finished answer is not valid."""
    draw = random.Random(seed)
    drawn = [draw_schema(draw) for _ in range(count)]
    with LLM(dtype="float32", num_gpu_blocks=4000, max_num_seqs=64) as llm:
        features = {name: summary(try_all(llm, schemas, answers)) for name, schemas in FEATURES.items()}
        found = try_all(llm, drawn, answers)
    by_keyword: dict[str, list[dict[str, Any]]] = {}
    for schema, entry in zip(drawn, found, strict=True):
        for keyword in sorted(keywords(schema) - {"$defs"}):
            by_keyword.setdefault(keyword, []).append(entry)
    figures: dict[str, Any] = {
        "seed": seed,
        "answers": answers,
        "features": features,
        "random": summary(found),
        "random_by_keyword": {
            name: {key: value for key, value in summary(entries).items() if isinstance(value, int)}
            for name, entries in sorted(by_keyword.items())
        },
    }
    console = Console(width=160)
    columns = ("schemas", "compiled", "refused", "finished", "cut", "dead_ends")
    table = Table("feature", *columns, "invalid", "first reason")
    for name, row in {**features, "random schemas": figures["random"]}.items():
        reason = next(iter(row["reasons"]), "")
        table.add_row(name, *(str(row[column]) for column in columns), str(len(row["invalid"])), reason[:60])
    console.print(table)
    if write:
        command = f"python -m benchmarks.schemas --count {count} --answers {answers} --seed {seed}"
        console.print(f"written to {save('schemas', command, figures)}")
    raise typer.Exit(1 if any(row["invalid"] for row in (*features.values(), figures["random"])) else 0)


if __name__ == "__main__":
    typer.run(main)
