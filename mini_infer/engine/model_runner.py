"""The model runner: a plan in integers becomes a batch of tensors, and the model runs on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from mini_infer import kernels
from mini_infer.memory.kv_cache import KVCache
from mini_infer.models import Batch, Decoder
from mini_infer.scheduler import SchedulerOutputs
from mini_infer.typing import SequenceMetadata


@dataclass(frozen=True)
class ModelRunner:
    """Runs the model over the paged cache.

    Attributes:
        model: the decoder.
        kv_cache: keys and values of each layer, in whatever layout their kernels made them, and the CPU's blocks.
        block_size: tokens per block.
        device: where all of it lives.
        kernel_backend: for every op; None takes the best for the device.
    """

    model: Decoder
    kv_cache: KVCache
    block_size: int
    device: torch.device
    kernel_backend: str | None

    def copy_blocks(self, plan: SchedulerOutputs) -> None:
        """Carry out a plan's copies; each kind reads what was there before the next one writes."""
        with torch.inference_mode():
            if plan.swap_out:
                self.kv_cache.swap_out(plan.swap_out)
            if plan.copy:
                self.kv_cache.copy_blocks(plan.copy)
            if plan.swap_in:
                self.kv_cache.swap_in(plan.swap_in)

    def forward(self, scheduled: Sequence[tuple[SequenceMetadata, int]]) -> Tensor:
        """Compute the new tokens of each sequence, writing their keys and values.

        Args:
            scheduled: each sequence and how many tokens it computes; those with one come first.

        Returns:
            Hidden states ``[T, hidden_size]`` after the final norm.
        """
        return self.run(self.prepare(scheduled))

    def prepare(self, scheduled: Sequence[tuple[SequenceMetadata, int]]) -> Batch:
        """``forward``'s first half: all that depends on the sequences, which may then move on."""
        return build_batch(scheduled, self.block_size, self.device)

    def run(self, batch: Batch) -> Tensor:
        """``forward``'s second half: all that the device does."""
        with torch.inference_mode(), kernels.use_backend(self.kernel_backend):
            return self.model.forward(batch, self.kv_cache.layers)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[R, vocab_size]`` of hidden states ``[R, hidden_size]``."""
        with torch.inference_mode(), kernels.use_backend(self.kernel_backend):
            return self.model.compute_logits(hidden)


def build_batch(scheduled: Sequence[tuple[SequenceMetadata, int]], block_size: int, device: torch.device) -> Batch:
    """Flatten the scheduled tokens into one row, with each token's position and slot.

    Everything is computed in numpy, a handful of vector operations for the whole step, and sent once.
    """
    counts = np.array([num_new for _, num_new in scheduled], dtype=np.int32)
    computed = np.array([sequence.num_computed_tokens for sequence, _ in scheduled], dtype=np.int32)
    query_start = np.zeros(len(scheduled) + 1, dtype=np.int32)
    np.cumsum(counts, out=query_start[1:])

    token_ids = np.fromiter(
        chain.from_iterable(s.token_ids[s.num_computed_tokens : s.num_computed_tokens + n] for s, n in scheduled),
        dtype=np.int64,
        count=query_start[-1],
    )
    rows = np.repeat(np.arange(len(scheduled)), counts)
    positions = np.arange(query_start[-1]) - query_start[rows] + computed[rows]

    block_tables = np.zeros((len(scheduled), max(len(s.block_table) for s, _ in scheduled)), dtype=np.int32)
    for row, (sequence, _) in enumerate(scheduled):
        block_tables[row, : len(sequence.block_table)] = sequence.block_table
    slot_mapping = block_tables[rows, positions // block_size].astype(np.int64) * block_size + positions % block_size

    def send(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Batch(
        token_ids=send(token_ids),
        positions=send(positions),
        slot_mapping=send(slot_mapping),
        query_start=send(query_start),
        context_lens=send(computed + counts),
        block_tables=send(block_tables),
        num_decodes=int((counts == 1).sum()),
        max_query_len=int(counts.max()),
        max_context_len=int((computed + counts).max()),
    )
