"""An exhaustive stand-in for the model: it writes into each slot which prefix was computed there, and checks it on use.

What a real model would get wrong silently, attending to another sequence's keys, is an assertion here.
"""

from collections import Counter

from mini_infer.memory import BlockManager
from mini_infer.scheduler import Scheduler, SchedulerOutputs, Sequence

Slot = tuple[int, ...] | None
NUM_TOKENS = 3
"""Size of the vocabulary: so small that sequences often continue alike."""


def next_token(token_ids: list[int], index: int) -> int:
    """The token that follows, a function of the tokens before it and of which fork it is, like a seeded sample."""
    return hash((tuple(token_ids), index)) % NUM_TOKENS


class KVModel:
    """Carries out a scheduler's plans on pools of blocks whose slots hold the prefix that was computed there."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.sequences: list[Sequence] = []
        self._size = scheduler.block_manager.block_size
        self._gpu: dict[int, list[Slot]] = {}
        self._cpu: dict[int, list[Slot]] = {}
        self._fork_index: dict[Sequence, int] = {}

    def add(self, sequence: Sequence) -> None:
        self.sequences.append(sequence)
        self.scheduler.add(sequence)

    def step(self, fails: bool = False) -> SchedulerOutputs:
        """One step. A failing one writes garbage into every slot that it was to write, and is undone."""
        plan = self.scheduler.schedule()
        assert plan.scheduled or self.scheduler.is_finished(), "a step without work would never end"
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        assert all(0 < n <= sequence.num_uncomputed_tokens for sequence, n in plan.scheduled)
        counts = [n for _, n in plan.scheduled]
        assert counts == sorted(counts, key=lambda n: n > 1), "decodes come first"
        if fails:
            for sequence, n in plan.scheduled:
                for position in range(sequence.num_computed_tokens, sequence.num_computed_tokens + n):
                    self._write(sequence, position, None)
            self.scheduler.undo(plan)
        else:
            self._copy(plan)
            self._compute(plan)
            self._sample(plan)
        self.check_blocks()
        return plan

    def check_blocks(self) -> None:
        """Every block is free, cached, or held by exactly those whose tables name it."""
        manager = self.scheduler.block_manager
        holders = Counter(block for sequence in self.scheduler.running for block in sequence.block_table)
        assert len(holders) == manager.num_used_blocks
        assert all(manager.is_shared(block) == (count > 1) for block, count in holders.items())
        total = manager.num_used_blocks + manager.num_free_blocks + manager.num_cached_blocks
        assert total == manager.num_gpu_blocks
        swapped = [b for s in self.scheduler.waiting for b in s.swapped_blocks if b is not None]
        assert len(swapped) == len(set(swapped)) == manager.num_cpu_blocks - manager.num_free_cpu_blocks

    def check_finished(self) -> None:
        """Everything is done, nothing leaked, and every sequence has the tokens that it would have alone."""
        manager = self.scheduler.block_manager
        assert self.scheduler.is_finished()
        assert (manager.num_used_blocks, manager.num_free_cpu_blocks) == (0, manager.num_cpu_blocks)
        for sequence in self.sequences:
            alone = sequence.token_ids[: sequence.num_prompt_tokens]
            while len(alone) < len(sequence):
                alone.append(next_token(alone, self._fork_index.get(sequence, 0)))
            assert sequence.token_ids == alone
            assert sequence.finish_reason == "abort" or len(sequence) == sequence.max_length

    def _copy(self, plan: SchedulerOutputs) -> None:
        for source, target in plan.swap_out:
            self._cpu[target] = list(self._block(source))
        before = {source: list(self._block(source)) for source, _ in plan.copy}
        for source, target in plan.copy:
            self._gpu[target] = list(before[source])
        for source, target in plan.swap_in:
            self._gpu[target] = list(self._cpu[source])

    def _compute(self, plan: SchedulerOutputs) -> None:
        """In each layer all keys are written before any is read, so sequences may share what this step computes."""
        for sequence, n in plan.scheduled:
            for position in range(sequence.num_computed_tokens, sequence.num_computed_tokens + n):
                self._write(sequence, position, tuple(sequence.token_ids[: position + 1]))
        for sequence, n in plan.scheduled:
            for position in range(sequence.num_computed_tokens + n):
                block = self._block(sequence.block_table[position // self._size])
                assert block[position % self._size] == tuple(sequence.token_ids[: position + 1])

    def _sample(self, plan: SchedulerOutputs) -> None:
        sampling = [item.sequence for item in plan.scheduled if item.samples]
        self.scheduler.advance(plan)
        for parent in sampling:
            forks = [self._fork(parent, index) for index in range(1, parent.num_forks + 1)]
            for sequence in [*forks, parent]:
                token_id = next_token(sequence.token_ids, self._fork_index.get(sequence, 0))
                self.scheduler.append(sequence, token_id)

    def _fork(self, parent: Sequence, index: int) -> Sequence:
        child = Sequence(
            parent.request_id,
            list(parent.token_ids),
            parent.num_prompt_tokens,
            parent.max_length,
            cache_salt=parent.cache_salt,
        )
        self._fork_index[child] = index
        self.sequences.append(child)
        self.scheduler.fork(parent, child)
        return child

    def _block(self, block: int) -> list[Slot]:
        return self._gpu.setdefault(block, [None] * self._size)

    def _write(self, sequence: Sequence, position: int, content: Slot) -> None:
        block = sequence.block_table[position // self._size]
        self._block(block)[position % self._size] = content


def make_scheduler(block_size: int, num_blocks: int, num_cpu_blocks: int, **options: object) -> Scheduler:
    """A scheduler whose sequences may fill its whole pool."""
    return Scheduler(
        max_model_len=block_size * num_blocks,
        block_size=block_size,
        block_manager=BlockManager(block_size, num_blocks, num_cpu_blocks),
        **options,  # type: ignore[arg-type]
    )
