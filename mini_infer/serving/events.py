"""What the engine is doing, as a stream of events: who runs, who waits, who holds which block."""

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

from mini_infer.engine import AsyncLLMEngine
from mini_infer.engine.stats import EngineSnapshot, SequenceView
from mini_infer.exceptions import MiniInferError
from mini_infer.serving.answers import event

SHORTEST_PAUSE = 0.125
"""Seconds between two events while the engine steps."""

MAX_WAITING = 256
"""Most waiting sequences of one event; the statistics count them all."""

LONGEST_PAUSE = 1.0
"""Seconds between two events while nothing happens."""


class EngineEvents:
    """Events for any number of listeners, who share each snapshot of the engine. Without listeners nothing is done.

    Args:
        engine: what is watched.
        model_name: how the model is called.
        stopping: set when the listeners should leave.
    """

    def __init__(self, engine: AsyncLLMEngine, model_name: str, stopping: asyncio.Event) -> None:
        self._engine = engine
        self._model_name = model_name
        self._stopping = stopping
        self._turn = asyncio.Lock()
        self._taken = -LONGEST_PAUSE
        self._num_steps = -1
        self._event = b""

    async def listen(self) -> AsyncGenerator[bytes, None]:
        """One event at once, then one whenever the engine has stepped, but at least one each second."""
        sent_steps, sent_at = -1, -LONGEST_PAUSE
        while not self._stopping.is_set():
            try:
                num_steps, news = await self._latest()
            except MiniInferError:  # the engine was shut down
                return
            if num_steps != sent_steps or time.monotonic() - sent_at >= LONGEST_PAUSE:
                sent_steps, sent_at = num_steps, time.monotonic()
                yield news
            try:
                await asyncio.wait_for(self._stopping.wait(), SHORTEST_PAUSE)
            except asyncio.TimeoutError:
                continue

    async def _latest(self) -> tuple[int, bytes]:
        """The newest snapshot, unless the last one is hardly old; and after how many steps it was taken."""
        async with self._turn:
            if time.monotonic() - self._taken >= 0.9 * SHORTEST_PAUSE:
                snapshot = await self._engine.snapshot()
                self._taken, self._num_steps = time.monotonic(), snapshot.stats.num_steps
                self._event = event(self._as_json(snapshot))
            return self._num_steps, self._event

    def _as_json(self, snapshot: EngineSnapshot) -> dict[str, Any]:
        return {
            "model": self._model_name,
            "has_canvas": bool(self._engine.default_sampling_params.diffusion_options),
            "block_size": self._engine.config.block_size,
            "num_blocks": snapshot.stats.num_blocks,
            "num_cpu_blocks": snapshot.stats.num_cpu_blocks,
            "running": [_view(sequence) for sequence in snapshot.running],
            "waiting": [_view(sequence) | {"swapped": sequence.swapped} for sequence in snapshot.waiting[:MAX_WAITING]],
            "cached_blocks": snapshot.cached_blocks,
            "stats": asdict(snapshot.stats),
        }


def _view(sequence: SequenceView) -> dict[str, Any]:
    return {
        "request_id": sequence.request_id,
        "num_tokens": sequence.num_tokens,
        "num_computed_tokens": sequence.num_computed_tokens,
        "num_prompt_tokens": sequence.num_prompt_tokens,
        "blocks": sequence.blocks,
    }
