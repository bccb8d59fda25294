"""The families of models: one module for each, and nothing else about it anywhere.

A family's module has

- ``ARCHITECTURE``: its name in config.json, and ``MODEL_TYPE``, transformers' name for its config;
- ``read(hf)``: its config as a `ModelConfig`;
- ``translate(fields)``, if transformers does not know its config: another type that it does know, and the fields of
  config.json in the words of that;
- ``NAMES``: for each module of the decoder, what checkpoints call the tensors that it is made of; ``*`` is a layer's
  number.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Protocol, cast

from transformers import PretrainedConfig

from mini_infer.exceptions import InvalidCheckpointError, UnsupportedModelError
from mini_infer.models.config import ModelConfig
from mini_infer.models.gguf import GgufModel, is_gguf
from mini_infer.models.hf_config import hf_config, read_json, shorten

Names = Mapping[str, tuple[str, ...]]


class Family(Protocol):
    """What a module of this package offers."""

    ARCHITECTURE: str
    MODEL_TYPE: str
    NAMES: Names
    read: Callable[[PretrainedConfig], ModelConfig]


_modules = (cast(Family, import_module(f"{__name__}.{module.name}")) for module in iter_modules(__path__))
FAMILIES: Mapping[str, Family] = {family.ARCHITECTURE: family for family in _modules}
"""The architectures that there are."""


def read_config(directory: str | Path) -> ModelConfig:
    """Read ``directory/config.json``, as written by transformers 4 or 5, or what a GGUF file says. No code in the
    directory is run.

    Raises:
        ModelNotFoundError: there is no such directory, or no config.json in it.
        InvalidCheckpointError: the file is malformed or contradicts itself.
        UnsupportedModelError: it describes a model that Mini-Infer does not implement.
    """
    path = Path(directory)
    if is_gguf(path):
        fields = GgufModel(path).fields
    else:
        path = path / "config.json"
        fields = read_json(path)
    try:
        family = _family(fields.get("architectures"))
        if fields.get("model_type", family.MODEL_TYPE) != family.MODEL_TYPE:
            raise UnsupportedModelError(
                f"model_type {shorten(repr(fields['model_type']))} does not go with architectures "
                f"{fields['architectures']}"
            )
        translate = getattr(family, "translate", None)
        if translate is None:
            return family.read(hf_config(family.MODEL_TYPE, fields))
        if fields.get("mask_token_id") is None:
            fields["mask_token_id"] = _mask_token_id(path.parent)
        kind, translated = translate(fields)
        return family.read(hf_config(kind, {**translated, "model_type": kind}))
    except (InvalidCheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{path}: {error}") from error.__cause__
    except (TypeError, ValueError, AttributeError, ArithmeticError, LookupError) as error:
        raise InvalidCheckpointError(f"{path} cannot be used: {type(error).__name__}: {shorten(str(error))}") from error


def _mask_token_id(directory: Path) -> int | None:
    """What the tokenizer calls its mask, where it does: not every diffusion model's config says so."""
    settings, tokenizer = (
        read_json(path) if path.exists() else {}
        for path in (directory / "tokenizer_config.json", directory / "tokenizer.json")
    )
    mask = settings.get("mask_token")
    mask = mask.get("content") if isinstance(mask, dict) else mask
    ids = {token["content"]: int(number) for number, token in (settings.get("added_tokens_decoder") or {}).items()}
    ids |= {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
    return ids.get(mask)


def _family(architectures: object) -> Family:
    supported = f"supported are {', '.join(FAMILIES)}"
    match architectures:
        case [str(name)] if name in FAMILIES:
            return FAMILIES[name]
        case [str(name)]:
            raise UnsupportedModelError(f"architecture {shorten(name)} is not supported; {supported}")
        case _:
            got = shorten(repr(architectures))
            raise UnsupportedModelError(f"architectures must name one model; got {got}; {supported}")
