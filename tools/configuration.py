"""Writes the tables of the configuration page: ``python -m tools.configuration``.

The fields, their types, defaults, aliases and English meanings come from the code; the Chinese meanings from
``configuration.zh.yaml`` beside this file.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from benchmarks.tables import fill
from mini_infer.cli.flags import hints
from mini_infer.compat.options import ENGINE_ALIASES, SAMPLING_ALIASES, aliases_of
from mini_infer.config import GROUPS, EngineConfig
from mini_infer.sampling import SamplingParams

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {"en": DOCS / "configuration.md", "zh": DOCS / "zh" / "configuration.md"}
ALIASES: Mapping[type, Mapping[str, str]] = {EngineConfig: ENGINE_ALIASES, SamplingParams: SAMPLING_ALIASES}

WORDS: Mapping[str, Mapping[str, str]] = {
    "en": {"head": "| field | type | default | meaning |", "or": " or ", "also": " Also `{}`.", "end": "."}
    | {"group": "{} (`config.{}`)"},
    "zh": {"head": "| 字段 | 类型 | 默认值 | 含义 |", "or": " 或 ", "also": "也可写作 `{}`。", "end": "。"}
    | {"group": "{}（`config.{}`）"}
    | {
        "checkpoint": "检查点",
        "executor": "执行",
        "cache": "KV 缓存",
        "scheduler": "调度",
        "parallel": "并行",
        "engine": "引擎",
    },
}


def chinese() -> dict[str, dict[str, str]]:
    """The Chinese meanings: class, then field."""
    read: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_suffix(".zh.yaml").read_text(encoding="utf-8"))
    return read


def tables(language: str) -> dict[str, str]:
    """The tables of a page by the name in their markers."""
    words, parts = WORDS[language], []
    for name, group in GROUPS.items():
        parts.append("### " + words["group"].format(words.get(name, name.capitalize()), name))
        parts.append(_table(EngineConfig, [field.name for field in fields(group)], language))
    sampling = _table(SamplingParams, [field.name for field in fields(SamplingParams)], language)
    return {"EngineConfig": "\n\n".join(parts), "SamplingParams": sampling}


def _table(cls: type, names: Sequence[str], language: str) -> str:
    words, types, own = WORDS[language], hints(cls), {field.name: field for field in fields(cls)}
    lines = [words["head"], "|---|---|---|---|"]
    for name in names:
        kinds = words["or"].join(f"`{kind}`" for kind in dict.fromkeys(_kinds(types[name])))
        meaning = _meaning(cls, own[name], language).replace("|", "\\|")
        lines.append(f"| `{name}` | {kinds} | `{own[name].default!r}` | {meaning} |")
    return "\n".join(lines)


def _meaning(cls: type, field: "Field[Any]", language: str) -> str:
    words = WORDS[language]
    help = field.metadata["help"] if language == "en" else chinese()[cls.__name__][field.name]
    aliases = "`, `".join(aliases_of(field.name, ALIASES[cls]))
    return help + words["end"] + (words["also"].format(aliases) if aliases else "")


def _kinds(hint: Any) -> Iterator[str]:
    """The types that a field takes, each as one word or two: a path is text to whoever writes it."""
    if get_origin(hint) is Literal:
        yield from map(repr, get_args(hint))
    elif get_origin(hint) in (list, Mapping):
        inner = ", ".join(argument.__name__ for argument in get_args(hint))
        yield f"{'list' if get_origin(hint) is list else 'dict'}[{inner}]"
    elif get_origin(hint) is os.PathLike:
        yield "Path"
    elif get_origin(hint) is tuple:  # beside a list, which says enough
        return
    elif get_args(hint):
        for member in get_args(hint):
            yield from _kinds(member)
    else:
        yield "None" if hint is type(None) else hint.__name__


def pages() -> dict[Path, str]:
    """Each page as it should be."""
    made = {}
    for language, path in PAGES.items():
        made[path] = path.read_text(encoding="utf-8")
        for name, table in tables(language).items():
            made[path] = fill(made[path], name, table)
    return made


def main() -> None:
    for path, content in pages().items():
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
