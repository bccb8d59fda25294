"""How much of what stands around a block a diffusion model looks at while it writes it."""

from dataclasses import dataclass

from mini_infer.exceptions import InvalidRequestError
from mini_infer.fields import check_bool, check_int, check_number, named_options


@named_options(InvalidRequestError, {}, {})
@dataclass(frozen=True)
class SparseConfig:
    """Sparse reuse of keys and values, for one prompt of a diffusion model; faster, and approximate.

    An answer is written block after block. After ``delay_step`` steps that compute everything, one more does so whose
    keys and values are kept: of all tokens outside the block a share, those that the block's mean query scores highest
    (the names are dLLM-Serve's). The block's other steps compute the block alone, over what was kept.

    Attributes:
        enabled: False is as if there were no such configuration.
        retention_ratio: share of the tokens outside the block that each KV head keeps, above 0, at most 1. 1 keeps
            everything, as ``kv_reuse="dual"`` does.
        delay_step: steps of each block that compute everything before the one that keeps.
        default_block_len: tokens of a block, where the request has no ``block_length``.
        head_select: each KV head keeps tokens of its own choice; False makes one choice for all.

    Raises:
        InvalidRequestError: a value is out of range, or an option is unknown.
    """

    enabled: bool = True
    retention_ratio: float = 0.5
    delay_step: int = 1
    default_block_len: int = 32
    head_select: bool = True

    def __post_init__(self) -> None:
        error = InvalidRequestError
        check_bool(error, "enabled", self.enabled)
        check_number(error, "retention_ratio", self.retention_ratio, 0, 1, open_low=True)
        check_int(error, "delay_step", self.delay_step, 0)
        check_int(error, "default_block_len", self.default_block_len, 1)
        check_bool(error, "head_select", self.head_select)
