"""Numbers for Prometheus, under names that parallel vLLM's: ``vllm:NAME`` there is ``mini_infer:NAME`` here."""

import time
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from mini_infer.engine import EngineStats
from mini_infer.engine.request import Request
from mini_infer.outputs import Increment

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)

_GAUGES = {
    "num_requests_running": ("Sequences that run", lambda s: s.num_running),
    "num_requests_waiting": ("Sequences that wait, swapped ones included", lambda s: s.num_waiting),
    "num_requests_swapped": ("Sequences whose KV waits in CPU memory", lambda s: s.num_swapped),
    "kv_cache_usage_perc": (
        "Share of the KV blocks that sequences hold, 0 to 1",
        lambda s: s.num_used_blocks / s.num_blocks,
    ),
    "kv_cache_cached_perc": (
        "Share of the KV blocks that only the prefix cache keeps, 0 to 1",
        lambda s: s.num_cached_blocks / s.num_blocks,
    ),
}
_COUNTERS = {
    "prompt_tokens": ("Prompt tokens computed, again after a preemption", lambda s: s.num_prompt_tokens),
    "generation_tokens": ("Tokens generated", lambda s: s.num_generated_tokens),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", lambda s: s.num_prefix_queries),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache", lambda s: s.num_prefix_hits),
    "num_preemptions": ("Sequences whose blocks were taken away", lambda s: s.num_preemptions),
    "engine_steps": ("Steps of the engine", lambda s: s.num_steps),
}


class Metrics:
    """Watches an engine's increments; each server has its own.

    Args:
        model_name: the label that every metric carries.
    """

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._labels = [model_name]
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token", _SECONDS)
        self._itl = self._histogram("inter_token_latency_seconds", "From one token to the next", _SHORT_SECONDS)
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the end", _SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step", _SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request", _TOKENS)
        self._generation = self._histogram("request_generation_tokens", "Generated tokens of a request", _TOKENS)
        self._ended = Counter(
            "mini_infer:request_success",
            "Requests that ended, by the reason of their first completion",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._last_token: dict[tuple[str, int], float] = {}

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(f"mini_infer:{name}", help, ["model_name"], buckets=buckets, registry=self._registry)
        return metric.labels(*self._labels)

    def observe(self, request: Request, increment: Increment) -> None:
        """Take in one increment, on the engine's thread."""
        now = time.monotonic()
        key = (request.request_id, increment.index)
        if increment.token_ids:
            last = self._last_token.get(key)
            if last is not None:
                self._itl.observe(now - last)
            elif increment.index == 0:
                self._ttft.observe(now - request.arrival_time)
            self._last_token[key] = now
        if increment.finish_reason is not None:
            self._last_token.pop(key, None)
        if increment.output is not None:
            self._note_end(increment)

    def _note_end(self, increment: Increment) -> None:
        output = increment.output
        assert output is not None
        times = output.metrics
        self._e2e.observe(times.latency)
        if times.first_scheduled_time is not None:
            self._queue.observe(times.first_scheduled_time - times.arrival_time)
        self._prompt.observe(len(output.prompt_token_ids))
        self._generation.observe(sum(len(completion.token_ids) for completion in output.outputs))
        self._ended.labels(*self._labels, output.finish_reason).inc()

    def render(self, stats: Sequence[EngineStats], num_queued: int) -> bytes:
        """All of it in Prometheus' text format.

        Args:
            stats: of each replica; where there are several, each has a label.
            num_queued: requests that wait for their turn before the engine has them.
        """
        now = CollectorRegistry()
        now.register(_StatsCollector(stats, num_queued, self._labels))
        return generate_latest(self._registry) + generate_latest(now)


class _StatsCollector(Collector):
    """The engine's own numbers as metrics."""

    def __init__(self, stats: Sequence[EngineStats], num_queued: int, labels: list[str]) -> None:
        self._num_queued = num_queued
        self._labels = labels
        self._names = ["model_name"] if len(stats) == 1 else ["model_name", "replica"]
        own = [[]] if len(stats) == 1 else [[str(number)] for number in range(len(stats))]
        self._replicas = [([*labels, *label], each) for label, each in zip(own, stats, strict=True)]

    def collect(self) -> Iterable[Metric]:
        for name, (help, value) in _GAUGES.items():
            gauge = GaugeMetricFamily(f"mini_infer:{name}", help, labels=self._names)
            for labels, stats in self._replicas:
                gauge.add_metric(labels, value(stats))
            yield gauge
        queued = GaugeMetricFamily(
            "mini_infer:num_requests_queued", "Requests that wait for their turn at the door", labels=["model_name"]
        )
        queued.add_metric(self._labels, self._num_queued)
        yield queued
        for name, (help, value) in _COUNTERS.items():
            counter = CounterMetricFamily(f"mini_infer:{name}", help, labels=self._names)
            for labels, stats in self._replicas:
                counter.add_metric(labels, value(stats))
            yield counter
