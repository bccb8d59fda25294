"""What a checkpoint's ``generation_config.json`` says about stopping and sampling."""

import json
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
        eos_token_ids: tokens that end a sequence.
        sampling: used for requests that bring no ``SamplingParams``; 100 tokens at most.
    """

    eos_token_ids: frozenset[int]
    sampling: SamplingParams

    @classmethod
    def from_directory(cls, directory: Path, tokenizer_eos: int | None, vocab_size: int) -> "GenerationDefaults":
        """Read them; ``config.json`` and then the tokenizer are asked where the file does not say.

        End-of-sequence ids that the vocabulary does not have, such as -1 for "none", can never be generated and are
        left out.

        Raises:
            InvalidCheckpointError: a value in the file is malformed.
        """
        generation = _read_json(directory / "generation_config.json")
        eos = generation.get("eos_token_id", _read_json(directory / "config.json").get("eos_token_id", tokenizer_eos))
        given = {key: generation[key] for key in _SAMPLING_KEYS if generation.get(key) is not None}
        if generation.get("do_sample") is False:
            given["temperature"] = 0.0
        try:
            sampling = SamplingParams(max_tokens=100, **given)
        except InvalidRequestError as error:
            raise InvalidCheckpointError(f"{directory / 'generation_config.json'}: {error}") from error
        eos_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in eos_ids):
            raise InvalidCheckpointError(f"eos_token_id in {str(directory)!r} must be an id or a list, got {eos!r}")
        return cls(frozenset(token_id for token_id in eos_ids if 0 <= token_id < vocab_size), sampling)


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
