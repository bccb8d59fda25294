"""The block tables of the sequences that run, kept on the device and updated by what changed."""

from collections.abc import Sequence

import numpy as np
import torch

from mini_infer.typing import BlockTable, SequenceMetadata


class BlockTables:
    """A row for every sequence that ran lately, so that a step sends only the block ids that are new.

    A decode adds a block once in ``block_size`` steps; a table of thousands of blocks is sent once, not in every step.

    Args:
        num_rows: most sequences of one step.
        width: most blocks of one sequence.
        device: where ``tensor`` lives.

    Attributes:
        host: int32 ``[num_rows, width]``, block ids; entries beyond a sequence's own blocks are arbitrary.
        tensor: the same on the device, once ``update``'s changes have been written to it. On a CPU it is the same
            memory.
    """

    def __init__(self, num_rows: int, width: int, device: torch.device) -> None:
        self.host = np.zeros((num_rows, width), dtype=np.int32)
        self.tensor = torch.from_numpy(self.host)
        if device.type != "cpu":
            self.tensor = self.tensor.to(device)
        self._rows: dict[SequenceMetadata, int] = {}
        self._known: list[BlockTable] = [[] for _ in range(num_rows)]
        self._free = list(range(num_rows - 1, -1, -1))
        self._unsent: list[int] = []

    def update(self, sequences: Sequence[SequenceMetadata]) -> tuple[np.ndarray, np.ndarray]:
        """Bring ``host`` up to date for the sequences of a step.

        Returns:
            Each sequence's row, int64 ``[S]``, and the places in the flattened table that changed, int64 ``[C]``.
        """
        for row in self._unsent:
            self._known[row] = []
        rows = [self._row_of(sequence, sequences) for sequence in sequences]
        places: list[int] = []
        for row, sequence in zip(rows, sequences, strict=True):
            table, known = sequence.block_table, self._known[row]
            if table != known:
                first = _first_difference(table, known)
                self.host[row, first : len(table)] = table[first:]
                start = row * self.host.shape[1]
                places.extend(range(start + first, start + len(table)))
                known[first:] = table[first:]
                self._unsent.append(row)
        return np.array(rows, dtype=np.int64), np.array(places, dtype=np.int64)

    def note_sent(self) -> None:
        """What ``update`` said has changed is in ``tensor``. Unless this is called, it is all said again."""
        self._unsent.clear()

    def _row_of(self, sequence: SequenceMetadata, step: Sequence[SequenceMetadata]) -> int:
        row = self._rows.get(sequence)
        if row is None:
            if not self._free:  # whoever is not in this step may have ended, or comes back with another table
                staying = set(step)
                for other in [other for other in self._rows if other not in staying]:
                    self._free.append(self._rows.pop(other))
            row = self._rows[sequence] = self._free.pop()
        return row


def _first_difference(table: BlockTable, known: BlockTable) -> int:
    if table[: len(known)] == known:
        return len(known)
    return next((i for i, (new, old) in enumerate(zip(table, known, strict=False)) if new != old), len(table))
