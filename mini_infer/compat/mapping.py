"""An output that reads as a mapping: ``out["text"]``, ``dict(out)``, ``"text" in out``."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

KEYS = (
    "text",
    "token_ids",
    "finish_reason",
    "cumulative_logprob",
    "logprobs",
    "request_id",
    "prompt",
    "prompt_token_ids",
    "prompt_logprobs",
    "outputs",
    "metrics",
)


class ReadsAsMapping:
    """What ``GenerateOutput`` has beside its attributes, each of which it also gives by name."""

    def keys(self) -> tuple[str, ...]:
        """The names that ``out[name]`` knows."""
        return KEYS

    def __getitem__(self, name: str) -> Any:
        if name not in KEYS:
            raise KeyError(f"{name!r}; a {type(self).__name__} has {', '.join(KEYS)}")
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(KEYS)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers all the way down, ready for JSON."""
        plain = as_plain(self)
        return {name: plain[name] if name in plain else plain["outputs"][0][name] for name in KEYS}


def as_plain(value: Any) -> Any:
    """Dataclasses and mappings as dicts, lists of them as lists, all the way down; anything else as it is."""
    if is_dataclass(value):
        return {field.name: as_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: as_plain(part) for name, part in value.items()}
    return [as_plain(part) for part in value] if isinstance(value, list | tuple) else value
