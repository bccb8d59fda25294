"""Reading prompts: from arguments, from a text file, or from JSON lines. Nothing here knows the engine."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mini_infer.compat.options import SAMPLING_ALIASES
from mini_infer.exceptions import InvalidRequestError
from mini_infer.sampling import SamplingParams

KINDS = ("prompt", "prompt_token_ids", "messages")


@dataclass(frozen=True)
class Item:
    """A prompt to complete.

    Attributes:
        index: which of all prompts, from 0.
        place: where it comes from, for messages.
        kind: one of ``KINDS``.
        content: the text, the token ids or the conversation.
        sampling: sampling options of its own, by their canonical names.
    """

    index: int
    place: str
    kind: str
    content: Any
    sampling: Mapping[str, Any]

    def key(self, *settings: Any) -> str:
        """Tells whether a result that was written earlier is this prompt's, under the same settings."""
        text = json.dumps([self.kind, self.content, sorted(self.sampling.items()), *settings], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class BadLine:
    """A line that is no prompt, and why; it counts like one.

    Attributes:
        index, place: as of an ``Item``.
        reason: what is wrong.
    """

    index: int
    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def read_arguments(prompts: list[str]) -> list[Item | BadLine]:
    """Each argument is a prompt."""
    return [Item(index, f"prompt {index + 1}", "prompt", text, {}) for index, text in enumerate(prompts)]


def read_lines(stream: BinaryIO, name: str, jsonl: bool) -> Iterator[Item | BadLine]:
    """Each line is a prompt: a text, or with ``jsonl`` an object. Blank lines do not count.

    Args:
        stream: UTF-8, with or without a byte order mark.
        name: what messages call it.
    """
    index = 0
    for number, line in enumerate(stream, 1):
        place = f"{name}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield BadLine(index, place, f"byte {error.start + 1} is 0x{line[error.start]:02x}, which is not UTF-8")
            index += 1
            continue
        if not text.strip():
            continue
        try:
            yield _parse_object(text, index, place) if jsonl else Item(index, place, "prompt", text, {})
        except (InvalidRequestError, ValueError, RecursionError) as error:
            yield BadLine(index, place, str(error))
        index += 1


def is_jsonl(file: Path) -> bool:
    """Whether a file's name says that it holds JSON lines."""
    return file.suffix.lower() in (".jsonl", ".ndjson")


def _parse_object(text: str, index: int, place: str) -> Item:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
    if not isinstance(options, dict):
        raise InvalidRequestError(f'must be a JSON object such as {{"prompt": "..."}}, got {text[:40]}')
    kinds = [kind for kind in KINDS if kind in options]
    if len(kinds) != 1:
        has = " and ".join(kinds) or "none of them"
        raise InvalidRequestError(f"must have one of {', '.join(KINDS)}; it has {has}")
    content = options.pop(kinds[0])
    wanted = str if kinds[0] == "prompt" else list
    if not isinstance(content, wanted):
        raise InvalidRequestError(f"{kinds[0]} must be a {wanted.__name__}, got {content!r}")
    return Item(index, place, kinds[0], content, _sampling_options(options))


def _sampling_options(options: dict[str, Any]) -> dict[str, Any]:
    """A line's sampling options, checked, with aliases replaced; JSON has only strings as keys."""
    bias = options.get("logit_bias")
    if isinstance(bias, dict):
        options["logit_bias"] = {int(key) if key.lstrip("-").isdecimal() else key: bias[key] for key in bias}
    SamplingParams(**{"max_tokens": None, **options})
    return {SAMPLING_ALIASES.get(name, name): value for name, value in options.items()}
