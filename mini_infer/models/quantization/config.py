"""``quantization_config`` of a config.json: which `Format` each matrix of the checkpoint has."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mini_infer.exceptions import InvalidCheckpointError, UnsupportedModelError
from mini_infer.models.checkpoint import Stored
from mini_infer.models.linear import DENSE, Format
from mini_infer.models.quantization import awq, compressed, fp8, gptq
from mini_infer.models.quantization.rules import Rules

Read = Callable[[Mapping[str, Any]], Rules]

METHODS: Mapping[str, Read] = {
    "compressed-tensors": compressed.read,
    "gptq": gptq.read,
    "awq": awq.read,
    "fp8": fp8.read,
}
"""By ``quant_method``."""


@dataclass(frozen=True)
class Quantization:
    """What the config says.

    Attributes:
        method: its ``quant_method``.
        rules: what that means for each matrix.
    """

    method: str
    rules: Rules

    def format(self, matrix: str, stored: Mapping[str, Stored]) -> Format:
        """How a matrix is written down, by its name and what the files hold: plain numbers, if they are there."""
        plain = stored.get(f"{matrix}.weight")
        format = self.rules.format(matrix, stored)
        if format is None or (plain is not None and plain.dtype in {"F64", "F32", "F16", "BF16"}):
            return DENSE
        return format


def read_quantization(config: Any) -> Quantization | None:
    """What a ``quantization_config`` says; None if there is none.

    Raises:
        UnsupportedModelError: it names a method or an option that is not implemented.
        InvalidCheckpointError: it makes no sense.
    """
    if config is None:
        return None
    fields = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
    method = fields.get("quant_method")
    if method == "gptq" and fields.get("checkpoint_format") == "awq":
        method = "awq"
    read = METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        raise UnsupportedModelError(
            f"quantization_config has quant_method {str(method)[:80]!r}, which is not supported; supported are "
            f"{', '.join(METHODS)}"
        )
    try:
        return Quantization(str(method), read(fields))
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        if isinstance(error, InvalidCheckpointError | UnsupportedModelError):
            raise
        raise InvalidCheckpointError(
            f"quantization_config cannot be used: {type(error).__name__}: {str(error)[:200]}"
        ) from error
