"""A server whose ranks are killed: at first its clients wait a moment, and in the end it says so and ends, too."""

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from mini_infer import LLM, SamplingParams
from tests.engine.executors import PATIENCE
from tests.executor.layouts import is_running, make_model

from .running import wait_until

pytestmark = pytest.mark.slow

FLAGS = "--dtype float64 --device cpu --kernel-backend reference --num-gpu-blocks 400 --block-size 4"


@contextmanager
def served(model: Path, *flags: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The command, as a process; and its address."""
    command = [sys.executable, "-m", "mini_infer", "serve", str(model), "--port", "0", *FLAGS.split(), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        yield process, next(m[0] for line in process.stderr if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
    finally:
        process.kill()
        process.wait()


def ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    """Process ids; a rank's command names its module."""
    found = []
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"mini_infer.executor.rank" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


def test_dead_for_good_is_503_and_the_end(tmp_path: Path) -> None:
    model = make_model(tmp_path)
    body = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 90, "ignore_eos": True, "n": 20}
    with (
        served(model, "--tensor-parallel-size", "2", "--served-model-name", "m") as (process, url),
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        first = ranks_of(process)
        assert len(first) == 2
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            os.kill(first[0], signal.SIGKILL)
            *rest, done = lines
            assert done == "data: [DONE]"
            finished = [json.loads(line[6:])["choices"][0]["finish_reason"] for line in rest]
            assert finished.count("length") == 20, "it was a pause, and no more"
        second = ranks_of(process)
        assert len(second) == 2 and not set(first) & set(second)
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            os.kill(second[1], signal.SIGKILL)
            *_, last, done = lines
        error = json.loads(last[6:] if "error" in last else done[6:])["error"]
        assert error["code"] == "unavailable" and "SIGKILL" in error["message"], error
        with pytest.raises(httpx.HTTPError):  # until it has gone, it says 503
            while True:
                late = client.post("/v1/completions", json=body)
                assert late.status_code == 503 and late.json()["error"]["code"] in ("unavailable", "draining")
        assert process.wait(PATIENCE) == 1
        assert process.stderr is not None and "rank 1" in process.stderr.read()
        wait_until(lambda: not any(map(is_running, [*first, *second])))


NUM_CLIENTS = 100


def test_a_hundred_streams_while_a_rank_is_killed(tmp_path: Path) -> None:
    """Two replicas of two ranks: those of one are started anew; every answer is that of an engine alone."""
    model = make_model(tmp_path)
    draw = random.Random(7)
    prompts = [[draw.randrange(256) for _ in range(draw.randint(1, 30))] for _ in range(NUM_CLIENTS)]
    lengths = [draw.randint(20, 60) for _ in prompts]
    seeds = [draw.randrange(1000) for _ in prompts]
    with LLM(
        model, dtype="float64", device="cpu", kernel_backend="reference", num_gpu_blocks=400, block_size=4
    ) as alone:
        params = [
            SamplingParams(temperature=0.8, seed=seed, max_tokens=length, ignore_eos=True)
            for seed, length in zip(seeds, lengths, strict=True)
        ]
        expected = [output.text for output in alone.generate(prompts, params, use_tqdm=False)]

    async def ask(client: httpx.AsyncClient, place: int, started: asyncio.Semaphore) -> tuple[str, Any]:
        body = {"prompt": prompts[place], "max_tokens": lengths[place], "seed": seeds[place], "temperature": 0.8}
        text, error = "", None
        async with client.stream(
            "POST", "/v1/completions", json={**body, "model": "m", "ignore_eos": True, "stream": True}
        ) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    error = event.get("error", error)
                    text += "".join(choice["text"] for choice in event.get("choices", []))
                    started.release()
        return text, error

    async def run(process: "subprocess.Popen[str]", url: str) -> list[tuple[str, Any]]:
        started = asyncio.Semaphore(0)
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, timeout=180, limits=limits) as client:
            tasks = [asyncio.create_task(ask(client, place, started)) for place in range(NUM_CLIENTS)]
            for _ in range(3 * NUM_CLIENTS):  # of some 4,000 pieces
                await started.acquire()
            os.kill(draw.choice(ranks_of(process)), signal.SIGKILL)
            return await asyncio.gather(*tasks)

    with served(model, "--tensor-parallel-size", "2", "--data-parallel-size", "2", "--served-model-name", "m") as (
        process,
        url,
    ):
        before = ranks_of(process)
        assert len(before) == 4
        answers = asyncio.run(run(process, url))
        after = ranks_of(process)
        assert len(after) == 4 and len(set(before) & set(after)) == 2, "one replica's were started anew"
    errors = [error for _, error in answers if error is not None]
    assert errors == []
    assert [text for text, _ in answers] == expected
