"""What the engine tells about itself: its event stream for the page, and its numbers for Prometheus."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from mini_infer import AsyncLLMEngine
from mini_infer.engine.stats import EngineStats

from .running import PATIENCE, Running, running, wait_until

ENDLESS: dict[str, Any] = {"max_tokens": 900, "ignore_eos": True, "stream": True}


@contextmanager
def listening(server: Running) -> Iterator[Iterator[dict[str, Any]]]:
    with (
        httpx.Client(base_url=server.url, timeout=60) as client,
        client.stream("GET", "/engine/events") as answer,
    ):
        assert answer.headers["content-type"].startswith("text/event-stream")
        deadline = time.monotonic() + PATIENCE

        def events() -> Iterator[dict[str, Any]]:
            for line in answer.iter_lines():
                assert time.monotonic() < deadline, "waited in vain"
                if line:
                    yield json.loads(line.removeprefix("data: "))

        yield events()


def check(event: dict[str, Any]) -> None:
    """That a snapshot is of one moment: it adds up."""
    stats = event["stats"]
    assert stats.keys() == {field.name for field in fields(EngineStats)}
    assert (len(event["running"]), len(event["waiting"])) == (stats["num_running"], stats["num_waiting"])
    used = {block for sequence in event["running"] for block in sequence["blocks"]}
    assert len(used) == stats["num_used_blocks"]
    assert len(event["cached_blocks"]) == stats["num_cached_blocks"] and not used & set(event["cached_blocks"])
    assert all(0 <= block < event["num_blocks"] for block in used)
    for sequence in event["running"]:
        assert sequence["num_prompt_tokens"] <= sequence["num_tokens"]
        assert len(sequence["blocks"]) >= -(-sequence["num_computed_tokens"] // event["block_size"])
    assert all(sequence["blocks"] == [] and sequence["swapped"] is False for sequence in event["waiting"])


class TestEvents:
    def test_idle(self, server: Running) -> None:
        with listening(server) as events:
            first, second = next(events), next(events)
        for event in (first, second):
            check(event)
            assert (event["model"], event["block_size"], event["num_blocks"]) == ("tutor", 16, 1024)
            assert event["num_cpu_blocks"] == 0 and event["running"] == event["waiting"] == []

    def test_a_request_comes_and_goes(self, server: Running) -> None:
        with listening(server) as events, httpx.Client(base_url=server.url, timeout=60) as client:
            check(next(events))
            with client.stream("POST", "/v1/completions", json=ENDLESS | {"prompt": ["Once", "Twice"]}) as answer:
                lines = answer.iter_lines()  # closes the connection when it is forgotten
                chunk = json.loads(next(lines).removeprefix("data: "))
                steps = []
                while len(steps) < 3:
                    event = next(events)
                    check(event)
                    if event["running"]:
                        steps.append(event["stats"]["num_steps"])
                        assert {s["request_id"] for s in event["running"]} <= {f"{chunk['id']}-{i}" for i in (0, 1)}
            assert steps == sorted(set(steps)), "an event for every time that it stepped"
            while event["running"]:
                event = next(events)
                check(event)

    def test_shared_blocks_and_the_queue(self, server: Running) -> None:
        prompt = "The same long beginning. " * 20
        body = ENDLESS | {"messages": [{"role": "user", "content": prompt}], "n": 100, "temperature": 1}
        with listening(server) as events, httpx.Client(base_url=server.url, timeout=60) as client:
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                lines = answer.iter_lines()  # closes the connection when it is forgotten
                chunk = json.loads(next(lines).removeprefix("data: "))
                event = next(e for e in events if len(e["running"]) > 1)
                check(event)
                assert {s["request_id"] for s in event["running"] + event["waiting"]} == {chunk["id"]}
                assert event["running"][0]["blocks"][0] == event["running"][1]["blocks"][0]
                assert event["waiting"], "64 of 100 have a seat"
            wait_until(server.is_idle)

    def test_many_listen(self, server: Running) -> None:
        with listening(server) as one, listening(server) as two:
            check(next(one))
            check(next(two))

    def test_they_end_with_the_server(self) -> None:
        with running(AsyncLLMEngine(num_gpu_blocks=64, max_model_len=256)) as server, listening(server) as events:
            next(events)
            server.stop()
            assert len(list(events)) < 10


class TestMetrics:
    def scrape(self, http: httpx.Client) -> dict[str, float]:
        answer = http.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        families = text_string_to_metric_families(answer.text)
        samples = [sample for family in families for sample in family.samples]
        assert all(sample.labels["model_name"] == "tutor" for sample in samples)
        return {
            sample.name + sample.labels.get("finished_reason", "") + sample.labels.get("le", ""): sample.value
            for sample in samples
        }

    def test_they_count(self, http: httpx.Client, server: Running) -> None:
        wait_until(server.is_idle)
        before = self.scrape(http)
        body = {"prompt": "Count me. " * 20, "max_tokens": 7, "ignore_eos": True, "n": 2}
        usage = http.post("/v1/completions", json=body).json()["usage"]
        http.post("/v1/completions", json=body)
        wait_until(server.is_idle)
        after = self.scrape(http)

        def grown(name: str) -> float:
            return after[f"mini_infer:{name}"] - before.get(f"mini_infer:{name}", 0)

        assert grown("generation_tokens_total") == 28 == grown("request_generation_tokens_sum")
        assert grown("request_prompt_tokens_sum") == 2 * usage["prompt_tokens"]
        assert grown("request_success_totallength") == 2
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
            assert grown(f"{name}_count") == 2 and grown(f"{name}_sum") > 0
            assert grown(f"{name}_bucket+Inf") == 2
        assert grown("inter_token_latency_seconds_count") == 4 * 6
        assert grown("prefix_cache_queries_total") == 2 * usage["prompt_tokens"]
        assert grown("prefix_cache_hits_total") >= (usage["prompt_tokens"] - 1) // 16 * 16  # the last one is computed
        assert grown("engine_steps_total") >= 14
        for name in ("num_requests_running", "num_requests_waiting", "num_requests_swapped", "kv_cache_usage_perc"):
            assert after[f"mini_infer:{name}"] == 0
        assert 0 < after["mini_infer:kv_cache_cached_perc"] <= 1

    def test_while_it_runs(self, http: httpx.Client, server: Running) -> None:
        with (
            httpx.Client(base_url=server.url, timeout=60) as client,
            client.stream("POST", "/v1/completions", json=ENDLESS | {"prompt": ["a", "b", "c"]}) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            wait_until(lambda: self.scrape(http)["mini_infer:num_requests_running"] == 3)
            assert self.scrape(http)["mini_infer:kv_cache_usage_perc"] >= 3 / 1024
        wait_until(server.is_idle)
        assert self.scrape(http)["mini_infer:request_success_totalabort"] >= 3

    def test_two_servers_in_one_process_do_not_share(self, server: Running) -> None:
        with (
            running(AsyncLLMEngine(num_gpu_blocks=64, max_model_len=256)) as other,
            httpx.Client(base_url=other.url, timeout=60) as http,
        ):
            assert self.scrape(http)["mini_infer:e2e_request_latency_seconds_count"] == 0
