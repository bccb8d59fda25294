"""The names that other engines have for options, and the options that only they have."""

from collections.abc import Mapping

ENGINE_ALIASES: Mapping[str, str] = {
    "devices": "device",
    "kvcache_block_size": "block_size",
    "num_kvcache_blocks": "num_gpu_blocks",
    "paged_attention_num_blocks": "num_gpu_blocks",
    "spare_blocks_ratio": "watermark",
    "is_offline": "offline",
    "max_processing_samples": "max_waiting",
    "npu_queue_limit": "overlap",
}
"""Other names for fields of ``EngineConfig``."""

SAMPLING_ALIASES: Mapping[str, str] = {"stop_strings": "stop"}
"""Other names for fields of ``SamplingParams``."""

ENGINE_REFUSED: Mapping[str, str] = {}
"""Options of an engine that others have and this one does not, each with the reason."""

SAMPLING_REFUSED: Mapping[str, str] = {}
"""The same for a request."""


def aliases_of(name: str, table: Mapping[str, str]) -> tuple[str, ...]:
    """The other names of one field, as in ``aliases_of("block_size", ENGINE_ALIASES)``."""
    return tuple(alias for alias, field in table.items() if field == name)
