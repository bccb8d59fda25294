"""What becomes of a preempted sequence's keys and values: copied away, or computed again."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PreemptionCosts:
    """An estimate of what losing and regaining a sequence's KV costs.

    Attributes:
        seconds_per_swapped_block: copying one block to CPU memory and back.
        seconds_per_recomputed_token: computing one token again.
    """

    seconds_per_swapped_block: float
    seconds_per_recomputed_token: float

    @classmethod
    def estimate(
        cls, block_bytes: int, copy_bytes_per_second: float, num_parameters: int, flops_per_second: float
    ) -> "PreemptionCosts":
        """Twice a block's bytes over the bandwidth between the pools; two FLOPs per parameter and token over the
        device's speed. Attention's own FLOPs, which favour swapping for very long sequences, are left out."""
        return cls(2 * block_bytes / copy_bytes_per_second, 2 * num_parameters / flops_per_second)

    def swapping_is_cheaper(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether copying ``num_blocks`` blocks costs less than computing ``num_tokens`` tokens."""
        return num_blocks * self.seconds_per_swapped_block < num_tokens * self.seconds_per_recomputed_token
