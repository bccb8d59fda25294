"""How many KV blocks there should be."""

from mini_infer.exceptions import OutOfMemoryError

CPU_KV_CACHE_BYTES = 1 << 30
"""KV memory on a CPU when nothing is said: 1 GiB, taken only as it is touched."""


def block_bytes(block_size: int, num_layers: int, num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Bytes of one block: keys and values of ``block_size`` tokens in every layer."""
    return 2 * block_size * num_layers * num_kv_heads * head_dim * itemsize


def open_num_blocks(memory: int, bytes_per_block: int, max_num_seqs: int, longest: int, block_size: int) -> int:
    """KV blocks when the configuration leaves the number open: what fits into ``memory`` bytes, at least 0.

    Never more than ``max_num_seqs`` sequences of ``longest`` tokens could fill.
    """
    return max(0, min(max_num_seqs * -(-longest // block_size), memory // bytes_per_block))


def step_bytes(
    num_tokens: int, num_sequences: int, hidden_size: int, intermediate_size: int, vocab_size: int, itemsize: int
) -> int:
    """About what the largest step takes beside weights and KV blocks; an engine on a GPU measures it instead.

    The wider of a feed-forward layer for every token (two streams, gate, up and their product) and of sampling (the
    logits, and in float32 copied, as probabilities and sorted, with their indices).
    """
    feed_forward = num_tokens * (2 * hidden_size + 3 * intermediate_size) * itemsize
    sampling = num_sequences * vocab_size * (itemsize + 4 + 4 + 4 + 8)
    return max(feed_forward, sampling)


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
