"""``benchmarks.compare``: real engines in processes of their own, on a tiny random model."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.compare import Scenario, agrees, compare, start
from benchmarks.workers.driver import Engine, Worker, WorkerError
from mini_infer.cli.bench import Workload
from tests.engine.checkpoints import make_engine_checkpoint

THREADS = {"OMP_NUM_THREADS": "1"}
OURS = Engine("mini-infer", "ours", {"dtype": "float32", "max_model_len": 256}, environment=THREADS)
STATIC = Engine("transformers", "hf_generate", {"dtype": "float32"}, environment=THREADS)
PAGED = Engine("transformers-batch", "hf_continuous", {"dtype": "float32"}, environment=THREADS)
ABSENT = Engine("absent", "vllm_offline", {}, environment=THREADS)  # this environment has no vLLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(tmp_path_factory.mktemp("model"), use_sliding_window=False, rope_scaling=None)


@pytest.fixture(scope="module")
def workers(model: Path) -> Iterator[list[Worker]]:
    with start([OURS, STATIC, PAGED, ABSENT], model) as workers:
        yield workers
    assert not any(_processes(worker) for worker in workers)


def _processes(worker: Worker) -> dict[int, str]:
    """Its processes, and the state of each."""
    states = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if os.getsid(int(stat.parent.name)) == worker._process.pid:
                states[int(stat.parent.name)] = stat.read_text().rsplit(") ", 1)[1].split()[0]
        except OSError:
            continue
    return states


def test_engines_that_are_not_there_are_left_out(workers: list[Worker]) -> None:
    assert [worker.engine for worker in workers] == [OURS, STATIC, PAGED]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_nobody_runs_out_of_turn(workers: list[Worker]) -> None:
    workers[0].ask("run", [[1, 2, 3]], [5], 0.0, -1, 1.0)
    for worker in workers:
        assert _processes(worker)
        deadline = time.monotonic() + 30
        while set(_processes(worker).values()) != {"T"}:  # stopped; a signal takes a moment
            assert time.monotonic() < deadline, _processes(worker)


def test_a_scenario(workers: list[Worker], model: Path) -> None:
    scenario = Scenario("three", 3, (2, 30), (1, 12), sampled_too=True)
    found = compare(scenario, workers, model, rounds=2, dtype="float32")
    workload = Workload.draw(3, (2, 30), (1, 12))
    assert (found["input_tokens"], found["output_tokens"]) == (workload.num_input_tokens, workload.num_output_tokens)
    assert found["failed"] == {}
    assert list(found["engines"]) == ["mini-infer", "transformers", "transformers-batch", "mini-infer, sampled"]
    for label, row in found["engines"].items():
        assert len(row["tokens_per_second_of_each_round"]) == 2
        assert row["ttft_p50_seconds"] > 0 and 0 < row["ready_seconds"] <= row["first_token_seconds"]
        if label in ("mini-infer", "transformers-batch"):
            assert row["agreement"]["agrees"] is True, row["agreement"]
        else:
            assert "agreement" not in row
    assert found["engines"]["mini-infer"]["mini_infer_is_times_as_fast"] == 1


def test_times_lie_within_the_run(workers: list[Worker]) -> None:
    """On every engine's own clock: first tokens come after the beginning, last ones after them, all before the end."""
    workload = Workload.draw(20, (2, 30), (1, 12), seed=1)  # more than one static batch
    for worker in workers:
        seconds, token_ids, first, last, _ = worker.ask("run", workload.prompts, workload.num_outputs, 0.8, 5, 0.9)
        assert [len(tokens) for tokens in token_ids] == workload.num_outputs
        assert all(0 < a <= b <= seconds + 1e-3 for a, b in zip(first, last, strict=True)), worker.engine


def test_a_worker_that_fails_says_why(model: Path) -> None:
    with pytest.raises(WorkerError, match=r"mini-infer failed: InvalidConfigError: .*max_model_len") as caught:
        Worker(Engine("mini-infer", "ours", {"max_model_len": -1}, environment=THREADS), str(model))
    log = Path(caught.value.log)
    assert "Traceback" in log.read_text()
    log.unlink()


def test_when_tokens_agree() -> None:
    assert agrees([], "float64") and agrees([], "float32")
    assert not agrees([1e-9], "float64")
    assert agrees([9e-5, 0.0], "float32") and not agrees([9e-5, 2e-4], "float32")
    assert agrees([], "bfloat16") is None
