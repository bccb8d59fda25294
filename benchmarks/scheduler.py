"""The scheduler and the block manager alone: ``python -m benchmarks.scheduler``.

One step with 256 sequences of 8,000 tokens, and 100,000 requests from arrival to end with a stand-in for the model.
"""

import random
import resource
import statistics
import time
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.report import save
from mini_infer.memory import BlockManager
from mini_infer.scheduler import Outcome, Scheduler, SchedulerOutputs, Sequence

BLOCK_SIZE = 16


def outcomes(plan: SchedulerOutputs, token_id: int) -> list[Outcome]:
    """The same token for everyone who samples."""
    return [Outcome(item.sequence, (token_id,), item.end) for item in plan.scheduled if item.num_logits]


def time_step(prefix_caching: bool, num_sequences: int = 256, num_tokens: int = 8000, steps: int = 200) -> float:
    """Median milliseconds of ``schedule`` and ``commit`` when every sequence decodes."""
    blocks = num_sequences * -(-(num_tokens + steps + 1) // BLOCK_SIZE)
    scheduler = Scheduler(
        num_sequences,
        num_tokens + steps + 10,
        BLOCK_SIZE,
        max_num_batched_tokens=num_sequences * num_tokens,
        block_manager=BlockManager(BLOCK_SIZE, blocks + num_sequences),
        watermark=0,
        prefix_caching=prefix_caching,
    )
    for number in range(num_sequences):
        scheduler.add(Sequence(str(number), [number] * num_tokens, num_tokens, num_tokens + steps + 5))
    scheduler.commit(outcomes(scheduler.schedule(), 7))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        came = outcomes(plan, 7)
        committing = time.perf_counter()
        scheduler.commit(came)
        times.append(time.perf_counter() - committing + planned - start)
        assert len(plan.scheduled) == num_sequences
    return statistics.median(times) * 1e3


def run_requests(num_requests: int, num_prompt: int, num_output: int, num_fitting: int) -> dict[str, Any]:
    """Requests per second through scheduler and block manager, prefix cache on, and what memory they took."""
    draw = random.Random(0)
    blocks = num_fitting * -(-(num_prompt + num_output) // BLOCK_SIZE)
    scheduler = Scheduler(
        256,
        num_prompt + num_output,
        BLOCK_SIZE,
        max_num_batched_tokens=8192,
        block_manager=BlockManager(BLOCK_SIZE, blocks),
        prefix_caching=True,
    )
    stem = [draw.randrange(50_000) for _ in range(num_prompt // 4)]
    start, steps, memory = time.perf_counter(), 0, []
    for done in track(range(0, num_requests, 1000), description=f"{num_requests:,} requests"):
        for number in range(done, done + 1000):
            prompt = stem + [draw.randrange(50_000) for _ in range(num_prompt - len(stem))]
            scheduler.add(Sequence(str(number), prompt, num_prompt, num_prompt + num_output))
        while len(scheduler.waiting) > 300 or (done + 1000 >= num_requests and not scheduler.is_finished()):
            plan = scheduler.schedule()
            scheduler.commit(outcomes(plan, steps % 50_000))
            steps += 1
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    seconds = time.perf_counter() - start
    manager = scheduler.block_manager
    assert manager.num_used_blocks == 0
    return {
        "requests": num_requests,
        "seconds": round(seconds, 1),
        "requests_per_second": round(num_requests / seconds),
        "steps": steps,
        "prefix_hit_rate": round(scheduler.counts.num_prefix_hits / scheduler.counts.num_prefix_queries, 3),
        "preemptions": scheduler.counts.num_recompute_preemptions,
        "peak_memory_mb": round(memory[-1]),
        "peak_memory_mb_after_a_tenth": round(memory[len(memory) // 10]),
    }


def main() -> None:
    steps = {
        "step_ms_256_sequences_of_8000_tokens": round(time_step(prefix_caching=False), 3),
        "step_ms_with_prefix_caching": round(time_step(prefix_caching=True), 3),
    }
    figures = steps | run_requests(100_000, num_prompt=512, num_output=128, num_fitting=200)
    table = Table("figure", "value", title="Scheduler and block manager alone")
    for name, value in figures.items():
        table.add_row(name, f"{value:,}")
    console = Console()
    console.print(table)
    console.print(f"written to {save('scheduler', 'python -m benchmarks.scheduler', figures)}")


if __name__ == "__main__":
    main()
