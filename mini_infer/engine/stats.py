"""Numbers about an engine: cheap enough to ask for after every step."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from mini_infer.engine.loop import EngineLoop
from mini_infer.scheduler import Sequence as TokenSequence

if TYPE_CHECKING:
    from mini_infer.engine.replicas import Replicas


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine at one moment, and what it has done so far.

    Attributes:
        num_running, num_waiting, num_swapped: sequences; swapped ones are among the waiting.
        num_blocks: KV blocks on the model's device; each is used, cached (kept for its prefix) or free.
        num_used_blocks, num_cached_blocks, num_free_blocks, peak_used_blocks: how many are, and were at most.
        num_cpu_blocks, num_used_cpu_blocks: blocks in CPU memory for swapped sequences.
        kv_waste: share of the used blocks' slots that no token will fill before the sequence grows, 0 to 1.
        prefix_hit_rate: share of the tokens looked up in the prefix cache that were found, 0 to 1.
        num_steps: steps so far; as are the following.
        num_prompt_tokens: computed in prompt chunks and recomputations, without those found in the prefix cache.
        num_decode_tokens: computed one at a time.
        num_generated_tokens: sampled.
        num_prefix_queries, num_prefix_hits: prompt tokens looked up in the prefix cache, and found there.
        num_swap_preemptions, num_recompute_preemptions: preemptions, by what became of the sequence's KV.
    """

    num_running: int
    num_waiting: int
    num_swapped: int
    num_blocks: int
    num_used_blocks: int
    num_cached_blocks: int
    num_free_blocks: int
    peak_used_blocks: int
    num_cpu_blocks: int
    num_used_cpu_blocks: int
    kv_waste: float
    prefix_hit_rate: float
    num_steps: int
    num_prompt_tokens: int
    num_decode_tokens: int
    num_generated_tokens: int
    num_prefix_queries: int
    num_prefix_hits: int
    num_swap_preemptions: int
    num_recompute_preemptions: int

    @classmethod
    def of(cls, loop: "EngineLoop | Replicas") -> "EngineStats":
        """Read them off a loop, or off several together."""
        return cls.total([cls._of(each) for each in loops_of(loop)])

    @classmethod
    def total(cls, several: "Sequence[EngineStats]") -> "EngineStats":
        """Of several engines: counts are added up, and shares weighted by what they are shares of."""
        if len(several) == 1:
            return several[0]
        sums: dict[str, Any] = {f.name: sum(getattr(stats, f.name) for stats in several) for f in fields(cls)}
        sums["kv_waste"] = sum(s.kv_waste * s.num_used_blocks for s in several) / max(1, sums["num_used_blocks"])
        sums["prefix_hit_rate"] = sums["num_prefix_hits"] / max(1, sums["num_prefix_queries"])
        return cls(**sums)

    @classmethod
    def _of(cls, loop: EngineLoop) -> "EngineStats":
        scheduler, blocks = loop.scheduler, loop.scheduler.block_manager
        used_slots = blocks.num_used_blocks * blocks.block_size
        unfilled = sum(len(s.block_table) * blocks.block_size - s.num_slots for s in scheduler.running)
        return cls(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_swapped=sum(bool(s.swapped_blocks) for s in scheduler.waiting),
            num_blocks=blocks.num_gpu_blocks,
            num_used_blocks=blocks.num_used_blocks,
            num_cached_blocks=blocks.num_cached_blocks,
            num_free_blocks=blocks.num_free_blocks,
            peak_used_blocks=blocks.peak_used_blocks,
            num_cpu_blocks=blocks.num_cpu_blocks,
            num_used_cpu_blocks=blocks.num_cpu_blocks - blocks.num_free_cpu_blocks,
            kv_waste=max(unfilled, 0) / used_slots if used_slots else 0.0,
            prefix_hit_rate=scheduler.counts.num_prefix_hits / max(1, scheduler.counts.num_prefix_queries),
            **asdict(loop.counts),
            **asdict(scheduler.counts),
        )

    @property
    def num_computed_tokens(self) -> int:
        return self.num_prompt_tokens + self.num_decode_tokens

    @property
    def num_preemptions(self) -> int:
        return self.num_swap_preemptions + self.num_recompute_preemptions


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One sequence at one moment.

    Attributes:
        request_id: the request it belongs to.
        num_tokens: prompt and generated tokens.
        num_computed_tokens: how many of them have keys and values.
        num_prompt_tokens: how many of them are the prompt.
        blocks: ids of the KV blocks that it holds on the model's device, in order.
        swapped: whether its KV waits in CPU memory.
    """

    request_id: str
    num_tokens: int
    num_computed_tokens: int
    num_prompt_tokens: int
    blocks: list[int]
    swapped: bool

    @classmethod
    def of(cls, sequence: TokenSequence, first_block: int) -> "SequenceView":
        return cls(
            request_id=sequence.request_id,
            num_tokens=len(sequence) - sequence.num_masks,
            num_computed_tokens=sequence.num_computed_tokens,
            num_prompt_tokens=sequence.num_prompt_tokens,
            blocks=[first_block + block for block in sequence.block_table],
            swapped=bool(sequence.swapped_blocks),
        )


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """Who holds which block, and who waits, between two steps.

    Attributes:
        running: in the order of urgency.
        waiting: the same.
        cached_blocks: ids of blocks that nobody holds, kept for the prefix cache.
        stats: the numbers of the same moment.
    """

    running: list[SequenceView]
    waiting: list[SequenceView]
    cached_blocks: list[int]
    stats: EngineStats

    @classmethod
    def of(cls, loop: "EngineLoop | Replicas") -> "EngineSnapshot":
        """Read it off a loop, or off several together: the blocks of each are numbered after those of the last."""
        running, waiting, cached, first = [], [], [], 0
        for each in loops_of(loop):
            scheduler, blocks = each.scheduler, each.scheduler.block_manager
            running += [SequenceView.of(sequence, first) for sequence in scheduler.running]
            waiting += [
                SequenceView.of(sequence, first) for sequence in sorted(scheduler.waiting, key=lambda s: s.order)
            ]
            cached += [first + block for block in blocks.cached_blocks]
            first += blocks.num_gpu_blocks
        return cls(running, waiting, cached, EngineStats.of(loop))


def loops_of(loop: "EngineLoop | Replicas") -> list[EngineLoop]:
    """The loop itself, or those of all replicas."""
    return [loop] if isinstance(loop, EngineLoop) else loop.loops
