"""Decode steps as CUDA graphs: the launches of a whole forward pass, recorded once and sent as one.

A decode step of a small model takes about a millisecond on a GPU, and is some ten launches for each layer; a launch
from Python takes longer than many of these kernels. A graph records the launches with all their arguments and replays
them at a few microseconds each. What is recorded cannot change, so

- every size of batch needs a graph of its own. There is one for 1, 2, 4, 8 and for multiples of 16; a step takes the
  next larger one, whose spare rows have slot -1, which writes nowhere, and a context of 0 tokens, which reads nothing;
- inputs are read from the same memory each time: static tensors, which a step's own are copied to;
- nothing may depend on values that the host would have to know. The number of programs that share a context follows
  from the width of the block tables, which is fixed; lengths are read on the device.

All graphs take their intermediate results from one pool of memory, since only one of them runs at a time. Prompt chunks
are large enough to hide their launches, and run without a graph.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mini_infer.models import Batch

Capture: TypeAlias = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records what a function does on the device: how to replay it, and the tensor that its result then is in."""


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes that get a graph: 1, 2, 4, 8, multiples of 16, and the largest."""
    return sorted({size for size in (1, 2, 4, 8, *range(16, max_num_seqs, 16)) if size < max_num_seqs} | {max_num_seqs})


class _Graph(NamedTuple):
    batch: Batch
    hidden: Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """One graph for each batch size; made once, as the engine is built.

    Args:
        forward: the model's forward pass, hidden states ``[T, hidden_size]`` of a batch.
        sizes: numbers of sequences.
        width: most blocks of one sequence.
        device: where the model is.
        capture: how to record.
    """

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        sizes: Iterable[int],
        width: int,
        device: torch.device,
        capture: Capture,
    ) -> None:
        self._graphs: dict[int, _Graph] = {}
        for size in sorted(sizes, reverse=True):  # the largest first: the others fit into the memory that it took
            batch = _static_batch(size, width, device)
            replay, hidden = capture(lambda batch=batch: forward(batch))  # type: ignore[misc]
            self._graphs[size] = _Graph(batch, hidden, replay)
        self._sizes = sorted(self._graphs)

    def size_for(self, num_seqs: int) -> int | None:
        """How many rows the decodes of so many sequences are padded to; None if there is no graph of that size."""
        place = bisect_left(self._sizes, num_seqs)
        return self._sizes[place] if place < len(self._sizes) else None

    def fits(self, batch: Batch) -> bool:
        """Whether ``run`` takes the batch: decodes alone, of a graph's size."""
        return batch.num_decodes == len(batch.token_ids) and batch.num_decodes in self._graphs

    def run(self, batch: Batch) -> Tensor:
        """What ``forward`` gives for a batch of decodes, padded to a graph's size.

        The result is overwritten by the next run.
        """
        graph = self._graphs[len(batch.token_ids)]
        for name in ("token_ids", "positions", "slot_mapping", "context_lens"):
            getattr(graph.batch, name).copy_(getattr(batch, name))
        graph.batch.block_tables[:, : batch.block_tables.shape[1]].copy_(batch.block_tables)
        graph.replay()
        return graph.hidden


def _static_batch(size: int, width: int, device: torch.device) -> Batch:
    """Decodes that read and write nothing, until real ones are copied into their place."""
    row = torch.zeros(size, dtype=torch.int64, device=device)
    return Batch(
        token_ids=row,
        positions=row.clone(),
        slot_mapping=row - 1,
        query_start=torch.arange(size + 1, dtype=torch.int32, device=device),
        context_lens=row.to(torch.int32),
        block_tables=torch.zeros((size, width), dtype=torch.int32, device=device),
        num_decodes=size,
    )


def cuda_capture() -> Capture:
    """Record CUDA graphs that share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        run()  # compiles and loads the kernels, which a recording cannot
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            hidden = run()
        return graph.replay, hidden

    return capture
