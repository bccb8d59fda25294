"""The model runner: a plan in integers becomes a batch of tensors, and the model runs on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from mini_infer import kernels
from mini_infer.engine.block_tables import BlockTables
from mini_infer.engine.decode_graphs import DecodeGraphs
from mini_infer.engine.device import send_arrays
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
        tables: the block tables of the sequences that run.
        graphs: how to run decodes; None runs them like everything else.
    """

    model: Decoder
    kv_cache: KVCache
    block_size: int
    device: torch.device
    kernel_backend: str | None
    tables: BlockTables
    graphs: DecodeGraphs | None

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
        num_rows = None
        if self.graphs is not None and all(num_new == 1 for _, num_new in scheduled):
            num_rows = self.graphs.size_for(len(scheduled))
        with torch.inference_mode():
            return build_batch(scheduled, self.tables, self.block_size, self.device, num_rows)

    def run(self, batch: Batch) -> Tensor:
        """``forward``'s second half: all that the device does."""
        with torch.inference_mode(), kernels.use_backend(self.kernel_backend):
            if self.graphs is not None and self.graphs.fits(batch):
                return self.graphs.run(batch)
            return self.model.forward(batch, self.kv_cache.layers)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[R, vocab_size]`` of hidden states ``[R, hidden_size]``."""
        with torch.inference_mode(), kernels.use_backend(self.kernel_backend):
            return self.model.compute_logits(hidden)


def build_batch(
    scheduled: Sequence[tuple[SequenceMetadata, int]],
    tables: BlockTables,
    block_size: int,
    device: torch.device,
    num_rows: int | None = None,
) -> Batch:
    """Flatten the scheduled tokens into one row, with each token's position and slot.

    Everything is computed in numpy, a handful of vector operations for the whole step, and sent once.

    Args:
        scheduled: as for ``ModelRunner.forward``.
        tables: the block tables on the device, which this brings up to date.
        block_size: tokens per block.
        device: where to send it.
        num_rows: pad decodes to so many, with rows that read and write nothing.
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
    table_rows, changed = tables.update([sequence for sequence, _ in scheduled])
    blocks = tables.host[table_rows[rows], positions // block_size].astype(np.int64)
    slot_mapping = blocks * block_size + positions % block_size
    context_lens = computed + counts

    if num_rows is not None:
        spare = (0, num_rows - len(scheduled))
        token_ids, positions, context_lens, table_rows = (
            np.pad(array, spare) for array in (token_ids, positions, context_lens, table_rows)
        )
        slot_mapping = np.pad(slot_mapping, spare, constant_values=-1)
        query_start = np.arange(num_rows + 1, dtype=np.int32)

    sent = send_arrays(
        [
            token_ids,
            positions,
            slot_mapping,
            query_start,
            context_lens,
            table_rows,
            changed,
            tables.host.ravel()[changed],
        ],
        device,
    )
    if device.type != "cpu" and len(changed) > 0:
        tables.tensor.view(-1)[sent[6]] = sent[7]
    tables.note_sent()
    width = max(len(sequence.block_table) for sequence, _ in scheduled)
    num_decodes = int((counts == 1).sum()) if num_rows is None else num_rows
    return Batch(
        token_ids=sent[0],
        positions=sent[1],
        attention=kernels.AttentionMetadata(
            slot_mapping=sent[2],
            query_start_loc=sent[3],
            prefill_start_loc=sent[3][num_decodes:] - num_decodes,
            context_lens=sent[4],
            block_tables=tables.tensor[:, :width].index_select(0, sent[5]),
            num_decodes=num_decodes,
        ),
    )
