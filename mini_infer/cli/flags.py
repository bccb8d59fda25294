"""Command-line flags that are fields of a dataclass: ``EngineConfig`` and ``SamplingParams`` say what there is.

A field becomes a flag with its name, its description and its default; a true-or-false one is ``--name`` or
``--no-name``. Other engines' names for a field are flags too, hidden but for a mention, and take a value as they do
there.
"""

import functools
import inspect
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints, overload

import typer
from rich.markup import escape

from mini_infer.compat.options import ENGINE_ALIASES, SAMPLING_ALIASES, aliases_of
from mini_infer.config import GROUPS, EngineConfig
from mini_infer.exceptions import InvalidConfigError, InvalidRequestError
from mini_infer.fields import respelled
from mini_infer.sampling import SamplingParams

Command: TypeAlias = Callable[..., None]

NO_FLAGS = ("prompt_embedding", "structured_outputs")
"""Options that are no words on a command line: one of outputs that it does not show, and one that is a whole schema,
for which commands have a flag of their own."""


@overload
def engine_flags(command: Command, /) -> Command: ...
@overload
def engine_flags(*, model_argument: bool) -> Callable[[Command], Command]: ...
def engine_flags(
    command: Command | None = None, /, *, model_argument: bool = False
) -> Command | Callable[[Command], Command]:
    """Give a command a flag for every field of ``EngineConfig``, in place of its parameter ``config``::

        @app.command()
        @engine_flags(model_argument=True)
        def bench(config: EngineConfig, rounds: Annotated[int, typer.Option(help="How often.")] = 3) -> None:
            ...

    The command is called with the finished configuration, by keyword. One that cannot be used ends the program with
    one line and status 2 before the command begins.

    Args:
        model_argument: the model may be given without ``--model``, too: ``mini-infer bench MODEL``.
    """
    flags = [flag for name, group in GROUPS.items() for flag in _flags(group, name.capitalize(), ENGINE_ALIASES)]
    if model_argument:
        model = typer.Argument(metavar="MODEL", help="The same as --model.", show_default=False)
        flags.append(_Flag("model", str, _parameter("model_argument", str, model)))

    def decorate(command: Command) -> Command:
        return _with_flags(command, "config", flags, lambda given: EngineConfig(**given))

    return decorate if command is None else decorate(command)


def sampling_flags(command: Command) -> Command:
    """Give a command a flag for every field of ``SamplingParams``, in place of its parameter ``sampling``.

    The command is called with a dictionary of those that were given; for the others the model's own choice holds, so
    no defaults are shown. A field whose name ``EngineConfig`` has too is a flag with the prefix ``sampling-``.
    """

    def checked(given: dict[str, Any]) -> dict[str, Any]:
        SamplingParams(**{"max_tokens": None, **given})  # a bad one is refused before a model is loaded
        return given

    taken = {field.name for field in fields(EngineConfig)}
    flags = _flags(SamplingParams, "Sampling", SAMPLING_ALIASES, prefixed=taken, show_defaults=False)
    return _with_flags(command, "sampling", list(flags), checked)


def hints(cls: type) -> dict[str, Any]:
    """The type of each field of a dataclass."""
    types = get_type_hints(cls)
    return {field.name: types[field.name] for field in fields(cls)}


def parse(hint: Any, texts: Sequence[str]) -> Any:
    """A value as a person writes it, for a field of type ``hint``; several texts where it holds several values.

    Numbers of a list may also share a text, as in ``3,5``; a mapping is written ``3=0.5,5=-1``, and so are the fields
    of another dataclass. What cannot be read stays text, so that the dataclass refuses it in its own words.
    """
    kinds = _kinds(hint)
    try:
        if Mapping in kinds:
            pairs = [item.split("=") for text in texts for item in text.split(",")]
            return {int(key): float(value) for key, value in pairs}
        if is_dataclass(kinds[0]):
            inner = hints(kinds[0])  # type: ignore[arg-type]
            pairs = [item.split("=") for text in texts for item in text.split(",")]
            return {key: _parse_one(_kinds(inner.get(key, str)), value) for key, value in pairs}
        if list in kinds:
            return list(texts) if str in kinds else [int(item) for text in texts for item in text.split(",")]
    except ValueError:
        return " ".join(texts)
    return _parse_one(kinds, texts[-1])


def _parse_one(kinds: Sequence[Any], text: str) -> Any:
    if str in kinds:
        return text
    words = {"none": type(None), "true": bool, "false": bool}
    if words.get(text.lower()) in kinds:
        return {"none": None, "true": True, "false": False}[text.lower()]
    for number in (int, float):
        if number in kinds:
            try:
                return number(text)
            except ValueError:
                continue
    return text


# ---- from fields to parameters -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Flag:
    """A flag or argument, and what becomes of it.

    Attributes:
        field: whose value it is.
        hint: the field's type.
        parameter: how typer sees it.
        negative: it stands for False.
        is_alias: its name is another engine's.
    """

    field: str
    hint: Any
    parameter: inspect.Parameter
    negative: bool = False
    is_alias: bool = False


def _flags(
    cls: type, panel: str, table: Mapping[str, str], *, prefixed: Container[str] = (), show_defaults: bool = True
) -> Iterator[_Flag]:
    for field, hint in zip(fields(cls), hints(cls).values(), strict=True):
        if field.name in NO_FLAGS:
            continue
        name = f"sampling_{field.name}" if field.name in prefixed else field.name
        kinds, aliases = _kinds(hint), aliases_of(field.name, table)
        several = list in kinds or Mapping in kinds or is_dataclass(kinds[0])
        help = field.metadata["help"] + "".join(f"; also {_spelled(alias)}" for alias in aliases)
        help += "; may be repeated." if several else "."
        if show_defaults and field.default not in (None, False):
            help += f" [default: {field.default}]"
        look: dict[str, Any] = {"help": escape(help), "rich_help_panel": panel, "show_default": False}
        if bool in kinds:
            # Two options instead of "--name/--no-name": --help would cut the names short to show both.
            yield _Flag(field.name, hint, _parameter(name, bool, typer.Option(_spelled(name), metavar="", **look)))
            no = typer.Option(_spelled(f"no_{name}"), hidden=True)
            yield _Flag(field.name, hint, _parameter(f"no_{name}", bool, no), negative=True)
        else:
            option = typer.Option(_spelled(name), metavar=_metavar(kinds), **look)
            yield _Flag(field.name, hint, _parameter(name, list[str] if several else str, option))
        for alias in aliases:
            option = typer.Option(_spelled(alias), hidden=True)
            yield _Flag(field.name, hint, _parameter(alias, list[str] if several else str, option), is_alias=True)


def _spelled(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parameter(name: str, kind: Any, info: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _kinds(hint: Any) -> list[Any]:
    """The plain types that a field's type allows: ``list`` for ``list[int]``, ``str`` for a choice of strings."""
    members = get_args(hint) if get_origin(hint) not in (list, tuple, Mapping, Literal) else (hint,)
    origins = {Literal: str, os.PathLike: str, Mapping: Mapping}
    return [origins.get(get_origin(member), get_origin(member)) or member for member in members or (hint,)]


def _metavar(kinds: Sequence[Any]) -> str:
    if Mapping in kinds:
        return "ID=VALUE"
    if is_dataclass(kinds[0]):
        return "NAME=VALUE"
    return "TEXT" if str in kinds else "NUMBER" if float in kinds else "INTEGER"


def _with_flags(
    command: Command, replaced: str, flags: Sequence[_Flag], make: Callable[[dict[str, Any]], Any]
) -> Command:
    """The command with these flags instead of one parameter, which gets what is made of them."""

    @functools.wraps(command)
    def run(**values: Any) -> None:
        given: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        for flag in flags:
            value = values.pop(flag.parameter.name)
            if value is None or value == []:
                continue
            if isinstance(value, bool):
                value = value is not flag.negative
            else:
                value = parse(flag.hint, value if isinstance(value, list) else [value])
            if flag.field in given:
                raise InvalidConfigError(
                    f"{flag.field!r} is given twice: {given[flag.field]!r} and {value!r}; give it once"
                )
            given[flag.field] = value
            if flag.is_alias:
                spelled[flag.field] = _spelled(flag.parameter.name)
        try:
            made = make(given)
        except (InvalidConfigError, InvalidRequestError) as error:
            raise type(error)(respelled(str(error), spelled)) from error
        command(**values, **{replaced: made})

    signature = inspect.signature(command)
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != replaced]
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own, *(flag.parameter for flag in flags)]
    )
    return run
