"""How memory is shared out: the one plan that an engine follows and `mini-infer info` foretells."""

from collections.abc import Sequence
from dataclasses import dataclass

from mini_infer.exceptions import OutOfMemoryError
from mini_infer.memory.cache_spec import PagedKV, block_bytes

CPU_KV_CACHE_BYTES = 1 << 30
"""KV memory on a CPU when nothing is said: 1 GiB, taken only as it is touched."""


@dataclass(frozen=True)
class MemoryPlan:
    """KV memory, and the longest sequence.

    Attributes:
        block_size: tokens of a block.
        bytes_per_block: what it takes.
        memory: bytes that there were for such blocks.
        num_blocks: on the device; 0 where not one fits.
        num_cpu_blocks: in CPU memory, for swapped sequences.
        max_model_len: the most tokens of one sequence; 0 without a block.
        warning: why that is less than was asked for, or than the model allows.
    """

    block_size: int
    bytes_per_block: int
    memory: int
    num_blocks: int
    num_cpu_blocks: int
    max_model_len: int
    warning: str | None

    @property
    def kv_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block

    @property
    def blocks_per_sequence(self) -> int:
        """What the longest sequence takes."""
        return -(-self.max_model_len // self.block_size)

    def check(self, device: str) -> None:
        """Refuse a plan without a block.

        Raises:
            OutOfMemoryError: it has none.
        """
        if not self.num_blocks:
            raise OutOfMemoryError(
                f"no KV block fits on {device} beside the model: one takes {self.bytes_per_block} bytes and "
                f"{max(self.memory, 0)} are left; raise gpu_memory_utilization, lower block_size or "
                "max_num_batched_tokens, or take a smaller model"
            )


def plan_memory(
    specs: Sequence[PagedKV],
    memory: int,
    *,
    block_size: int,
    num_blocks: int | None,
    num_cpu_blocks: int,
    max_num_seqs: int,
    max_model_len: int | None,
    model_limit: int,
    keeps_all: bool = True,
) -> MemoryPlan:
    """Share out the memory that weights, rotary tables and the largest step leave.

    Args:
        specs: what each layer of the model keeps.
        memory: bytes for KV blocks if ``num_blocks`` leaves their number open. It is then what fits, but never more
            than ``max_num_seqs`` of the longest sequences could fill.
        block_size, num_blocks, num_cpu_blocks, max_num_seqs, max_model_len: as in ``EngineConfig``.
        model_limit: the longest context of the model.
        keeps_all: a sequence needs room for all its tokens; not if the model computes it whole in every step.

    Raises:
        OutOfMemoryError: ``max_model_len`` was asked for, and the KV memory cannot hold as much.
    """
    bytes_per_block = block_bytes(specs, block_size)
    wanted = min(max_model_len or model_limit, model_limit)
    if num_blocks is None:
        num_blocks = max(0, min(max_num_seqs * -(-wanted // block_size), memory // bytes_per_block))
    capacity = num_blocks * block_size if keeps_all or not num_blocks else wanted
    what_it_holds = f"{capacity} tokens ({num_blocks} blocks of {block_size})"
    warning = None
    if num_blocks and wanted > capacity:
        if max_model_len is not None:
            raise OutOfMemoryError(
                f"max_model_len={max_model_len} does not fit the KV memory, which holds {what_it_holds}; lower "
                f"max_model_len to {capacity}, or raise num_gpu_blocks or gpu_memory_utilization"
            )
        warning = (
            f"the model allows {model_limit} tokens but the KV memory holds {what_it_holds}; using "
            f"max_model_len={capacity}. Raise num_gpu_blocks for longer sequences"
        )
    elif max_model_len is not None and max_model_len > model_limit:
        warning = f"max_model_len={max_model_len} is above the model's own limit; using {model_limit}"
    return MemoryPlan(block_size, bytes_per_block, memory, num_blocks, num_cpu_blocks, min(wanted, capacity), warning)


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
