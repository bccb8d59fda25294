"""How many KV blocks there should be."""

from mini_infer.exceptions import OutOfMemoryError

CPU_KV_CACHE_BYTES = 1 << 30
"""KV memory on a CPU when nothing is said: 1 GiB, taken only as it is touched."""


def block_bytes(block_size: int, num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one block: keys and values of ``block_size`` tokens in every layer."""
    return 2 * block_size * num_layers * num_kv_heads * head_dim * itemsize


def fit_max_model_len(asked: int | None, model_limit: int, num_blocks: int, block_size: int) -> tuple[int, str | None]:
    """The longest sequence to admit, and a warning when that is less than was asked for.

    Args:
        asked: ``EngineConfig.max_model_len``.
        model_limit: the most positions the model was made for.
        num_blocks, block_size: the KV memory; one sequence may fill all of it.

    Raises:
        OutOfMemoryError: a length was asked for that the KV memory cannot hold.
    """
    capacity = num_blocks * block_size
    wanted = min(asked or model_limit, model_limit)
    if asked is not None and wanted > capacity:
        raise OutOfMemoryError(
            f"max_model_len={asked} does not fit the KV memory, which holds {capacity} tokens ({num_blocks} blocks of "
            f"{block_size}); lower max_model_len to {capacity}, or raise num_gpu_blocks or gpu_memory_utilization"
        )
    if asked is not None and asked > model_limit:
        return wanted, f"max_model_len={asked} is above the model's own limit; using {model_limit}"
    if wanted > capacity:
        return capacity, (
            f"the model allows {model_limit} tokens but the KV memory holds {capacity} ({num_blocks} blocks of "
            f"{block_size}); using max_model_len={capacity}. Raise num_gpu_blocks for longer sequences"
        )
    return wanted, None
