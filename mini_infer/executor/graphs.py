"""Decode steps as graphs: the launches of a whole forward pass, recorded once and sent as one.

A decode step of a small model takes about a millisecond on a GPU, and is some ten launches for each layer; a launch
from Python takes longer than many of these kernels. A graph records the launches with all their arguments and replays
them at a few microseconds each. On NVIDIA's and AMD's GPUs the driver does that; on a CPU, `kernels.cpu.recording`.
What is recorded cannot change, so

- every size of batch needs a graph of its own. On a GPU, where recording takes a while, there is one for 1, 2, 4, 8
  and for multiples of 16, made as the engine is built. A step takes the next larger one, and its spare rows have slot
  -1, which writes nowhere, and a context of 0 tokens, which reads nothing. On a CPU every size is recorded when it
  first comes: that takes no longer than the step itself, while a spare row would cost time in every step;
- inputs are read from the same memory each time: static tensors, which a step's own are copied to;
- nothing may depend on values that the host would have to know. The number of programs that share a context follows
  from the width of the block tables, which is fixed; lengths are read by the kernels.

All graphs take their intermediate results from the same memory, since only one of them runs at a time. Prompt chunks
are large enough to hide their launches, and run without a graph.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from mini_infer.exceptions import NotRecordableError
from mini_infer.kernels import AttentionMetadata
from mini_infer.models import Batch

logger = logging.getLogger(__name__)

Capture: TypeAlias = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Runs a function and records what it does on the device: how to replay it, and the tensor that its result is in."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes that get a graph: 1, 2, 4, 8, multiples of 16, and the largest."""
    return sorted({size for size in (1, 2, 4, 8, *range(16, max_num_seqs, 16)) if size < max_num_seqs} | {max_num_seqs})


class DecodeGraphs:
    """One graph for each batch size, recorded when it is first needed.

    Args:
        forward: the model's forward pass, hidden states of a batch; in a stage that others precede, given what has
            arrived from there, as ``arriving``.
        sizes: numbers of sequences.
        width: most blocks of one sequence.
        device: where the model is.
        capture: how to record.
        arriving: ``[2, most sequences, hidden_size]``, where what the stage before sends is to be read; None in the
            first. Neither receiving nor sending is recorded.
    """

    def __init__(
        self,
        forward: Callable[..., Tensor],
        sizes: Iterable[int],
        width: int,
        device: torch.device,
        capture: Capture,
        arriving: Tensor | None = None,
    ) -> None:
        self._forward = forward
        self._capture = capture
        self._sizes = sorted(sizes)
        self._inputs, self._arriving = _static_batch(self._sizes[-1], width, device), arriving
        self._graphs: dict[int, tuple[Callable[[], None], Tensor]] = {}

    def record_all(self) -> None:
        """Record every size now; the largest first, so that the others fit into the memory that it took."""
        for size in reversed(self._sizes):
            if self.size_for(size) is not None:  # it has not given up
                self._record(size)

    def size_for(self, num_seqs: int) -> int | None:
        """How many rows the decodes of so many sequences are padded to; None if there is no graph of that size."""
        place = bisect_left(self._sizes, num_seqs)
        return self._sizes[place] if place < len(self._sizes) else None

    def fits(self, batch: Batch) -> bool:
        """Whether ``run`` takes the batch: decodes alone, of a graph's size."""
        num_rows = len(batch.token_ids)
        return batch.whole is None and batch.attention.num_decodes == num_rows and self.size_for(num_rows) == num_rows

    def run(self, batch: Batch, arriving: Tensor | None = None) -> Tensor:
        """What ``forward`` gives for a batch of decodes, padded to a graph's size.

        The result is overwritten by the next run.
        """
        size = len(batch.token_ids)
        ours, theirs = self._inputs.attention, batch.attention
        self._inputs.token_ids[:size].copy_(batch.token_ids)
        self._inputs.positions[:size].copy_(batch.positions)
        ours.slot_mapping[:size].copy_(theirs.slot_mapping)
        ours.context_lens[:size].copy_(theirs.context_lens)
        ours.block_tables[:size, : theirs.block_tables.shape[1]].copy_(theirs.block_tables)
        if self._arriving is not None and arriving is not None:
            self._arriving[:, :size].copy_(arriving)
        if size not in self._graphs:
            return self._record(size)
        replay, hidden = self._graphs[size]
        replay()
        return hidden

    def _record(self, size: int) -> Tensor:
        """Record one size; what it gives for the inputs as they are. Where that fails, there are no graphs any more."""
        inputs, attention = self._inputs, self._inputs.attention
        batch = Batch(
            token_ids=inputs.token_ids[:size],
            positions=inputs.positions[:size],
            attention=AttentionMetadata(
                slot_mapping=attention.slot_mapping[:size],
                query_start_loc=attention.query_start_loc[: size + 1],
                prefill_start_loc=attention.prefill_start_loc,
                context_lens=attention.context_lens[:size],
                block_tables=attention.block_tables[:size],
                num_decodes=size,
            ),
        )
        run = partial(self._forward, batch)
        if self._arriving is not None:
            run = partial(run, arriving=self._arriving[:, :size])
        try:
            self._graphs[size] = _, hidden = self._capture(run)
        except NotRecordableError as error:  # as the reference's attention is not
            logger.info("decode steps run without graphs, since they cannot be recorded: %s", error)
            self._sizes = []
            self._graphs.clear()
            return run()
        return hidden


def _static_batch(size: int, width: int, device: torch.device) -> Batch:
    """Decodes that read and write nothing, until real ones are copied into their place."""
    row = torch.zeros(size, dtype=torch.int64, device=device)
    return Batch(
        token_ids=row,
        positions=row.clone(),
        attention=AttentionMetadata(
            slot_mapping=row - 1,
            query_start_loc=torch.arange(size + 1, dtype=torch.int32, device=device),
            prefill_start_loc=torch.zeros(1, dtype=torch.int32, device=device),
            context_lens=row.to(torch.int32),
            block_tables=torch.zeros((size, width), dtype=torch.int32, device=device),
            num_decodes=size,
        ),
    )


def cuda_capture(device: torch.device) -> Capture:
    """Record CUDA graphs that share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        run()  # compiles and loads the kernels, which a recording cannot
        _refuse_questions(run)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            hidden = run()
        graph.replay()  # recording alone computes nothing
        return graph.replay, hidden

    return capture


def _refuse_questions(run: Callable[[], Tensor]) -> None:
    """Call a function, which must not ask the device for anything: a recording that failed half-way could not be left.

    Raises:
        NotRecordableError: it asks.
    """
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise NotRecordableError(str(error)) from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)
