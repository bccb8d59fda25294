"""Sequences that a diffusion model computes whole: they share one layer's worth of memory, and leave it to the next.

An autoregressive model keeps keys and values of every layer, because later tokens read them. Where every token sees all
others nothing that was kept would be right in the next step. So all a layer needs is a place for the keys and values of
this step's tokens until its own attention has read them.
"""

from dataclasses import dataclass

import numpy as np
import torch

from mini_infer.executor.device import send_arrays
from mini_infer.kernels import AttentionMetadata
from mini_infer.models.batch import KVCache, Whole
from mini_infer.models.keeping import Keep
from mini_infer.step import StepInput


@dataclass(frozen=True)
class Scratch:
    """That memory.

    Attributes:
        cache: one layer's, with room for the largest step.
        block_size: tokens of its blocks.
    """

    cache: KVCache
    block_size: int

    def lay_out(self, step: StepInput, span: int, device: torch.device) -> Whole:
        """Give each of a step's whole sequences the next free blocks.

        Args:
            span: how many neighbouring tokens see each other.
        """
        starts, keeps = step.query_start_loc[: step.num_whole + 1], step.keeps
        lengths = np.diff(starts)
        num_blocks = -(-lengths // self.block_size)
        first_blocks = np.cumsum(num_blocks) - num_blocks
        tables = (first_blocks[:, None] + np.arange(num_blocks.max())).astype(np.int32)  # the rest is not looked at
        slots = np.repeat(first_blocks * self.block_size - starts[:-1], lengths) + np.arange(starts[-1])
        arrays = [slots.astype(np.int64), starts, lengths.astype(np.int32), tables, keeps.slots]
        slot_mapping, query_start_loc, context_lens, block_tables, kept = send_arrays(arrays, device)
        parts = kept.split(keeps.num_kept.tolist())
        columns = (keeps.sequences, keeps.starts, keeps.ends, keeps.by_head)
        return Whole(
            num_tokens=int(starts[-1]),
            attention=AttentionMetadata(
                slot_mapping=slot_mapping,
                query_start_loc=query_start_loc,
                prefill_start_loc=query_start_loc,
                context_lens=context_lens,
                block_tables=block_tables,
                num_decodes=0,
                span=span,
            ),
            cache=self.cache,
            keeps=tuple(
                Keep(slice(int(starts[number]), int(starts[number + 1])), start, end, bool(by_head), part)
                for number, start, end, by_head, part in zip(*(c.tolist() for c in columns), parts, strict=True)
            ),
        )
