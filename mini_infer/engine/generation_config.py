"""What a checkpoint's ``generation_config.json`` says about stopping and sampling."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_infer.exceptions import InvalidCheckpointError, InvalidRequestError
from mini_infer.sampling import SamplingParams

_SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerationDefaults:
    """How a model wants to be sampled.

    Attributes:
        eos_token_ids: tokens that end a sequence, all that are named anywhere.
        sampling: used for requests that bring no ``SamplingParams``; 100 tokens at most.
    """

    eos_token_ids: frozenset[int]
    sampling: SamplingParams

    @classmethod
    def from_directory(
        cls, directory: Path, tokenizer_ends: Collection[int], vocab_size: int, writes_masks: bool = False
    ) -> "GenerationDefaults":
        """Read them. Those of a diffusion model, which writes masks, name options that only such a model has.

        Every token that any of three places names as the end of a sequence is one: ``generation_config.json``,
        ``config.json`` and the tokenizer. They often differ, a base model's config beside a chat's tokenizer for
        example, and a model that is not stopped goes on to play both sides. Ids that the vocabulary does not have, such
        as -1 for "none", can never be generated and are left out.

        Raises:
            InvalidCheckpointError: a value in a file is malformed.
        """
        path = directory / "generation_config.json"
        generation = _read_json(path)
        given = {key: generation[key] for key in _SAMPLING_KEYS if key in generation}
        top_k = given.get("top_k")
        if isinstance(top_k, float) and top_k.is_integer():
            given["top_k"] = int(top_k)
        if generation.get("do_sample") is False:
            given["temperature"] = 0.0
        if writes_masks:
            given["remasking"] = "low_confidence"
            given["block_length"] = generation.get("block_length")
        try:
            sampling = SamplingParams(max_tokens=100, **given)
        except InvalidRequestError as error:
            raise InvalidCheckpointError(f"{path}: {error}") from error
        ends = {
            *_eos_token_ids(path, generation),
            *_eos_token_ids(directory / "config.json", _read_json(directory / "config.json")),
            *tokenizer_ends,
        }
        return cls(frozenset(token_id for token_id in ends if 0 <= token_id < vocab_size), sampling)


def _eos_token_ids(path: Path, content: Mapping[str, Any]) -> list[int]:
    value = content.get("eos_token_id", [])
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise InvalidCheckpointError(f"{path}: eos_token_id must be an id or a list of ids, got {value!r}")
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    """The file's contents; nothing if there is no such file. ``null`` values count as absent."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidCheckpointError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise InvalidCheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return {key: value for key, value in content.items() if value is not None}
