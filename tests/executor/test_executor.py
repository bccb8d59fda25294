"""An executor by itself: the same steps give the same outputs, and its kernels are those that were asked for."""

import pickle
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_infer import LLM, EngineConfig, LLMEngine, SamplingParams
from mini_infer.exceptions import KernelError, OutOfMemoryError
from mini_infer.executor.build import build
from mini_infer.kernels import register, registry
from mini_infer.models import read_config
from mini_infer.step import StepInput, StepOutput
from tests.engine.checkpoints import make_engine_checkpoint
from tests.engine.executors import Recording, interpose


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", seed=5, num_hidden_layers=2)


FIELDS: dict[str, Any] = {
    "dtype": "float64",
    "max_model_len": 64,
    "block_size": 4,
    "num_gpu_blocks": 26,
    "num_cpu_blocks": 20,
    "preemption_mode": "swap",
    "max_num_seqs": 6,
    "max_num_batched_tokens": 24,
    "enable_prefix_caching": True,
}


def run_rich_workload(engine: LLMEngine, seed: int) -> None:
    """Requests of every kind under pressure, and a beam search among them; one leaves early. Where steps overlap there
    are no penalties, which would keep them from it."""
    draw = random.Random(seed)
    stem = [draw.randrange(250) for _ in range(17)]
    ids = []
    for _ in range(16):
        prompt = stem[: draw.choice([0, 9, 17])] + [draw.randrange(250) for _ in range(draw.randint(1, 20))]
        params = SamplingParams(
            n=draw.choice([1, 1, 2, 3]),
            temperature=draw.choice([0.0, 0.8]),
            top_k=draw.choice([-1, 20]),
            top_p=draw.choice([1.0, 0.9]),
            min_p=draw.choice([0.0, 0.01]),
            seed=draw.randrange(99),
            max_tokens=draw.randint(1, 20),
            frequency_penalty=0.5 if engine.config.depth == 1 and draw.random() < 0.3 else 0.0,
            logit_bias=draw.choice([None, {5: 1.5}]),
            logprobs=draw.choice([None, 0, 3]),
            prompt_logprobs=draw.choice([None, None, 2]),
        )
        ids.append(engine.add_request(prompt, params))
    engine.step()
    engine.abort(ids[2])
    for _ in range(30):
        engine.step()
    engine.beam_search([[1, 2, 3], [4] * 11], 3, 8, use_tqdm=False)
    while not engine.is_finished():
        engine.step()


@pytest.mark.parametrize("depth", [1, 3])
def test_a_captured_stream_of_steps_gives_the_same_outputs_again(checkpoint: Path, depth: int) -> None:
    """Bit for bit, from another executor that has never seen the requests; also from a file."""
    config = EngineConfig(model=checkpoint, overlap=depth, **FIELDS)
    engine = LLMEngine(config)
    recorded = interpose(engine, Recording)
    run_rich_workload(engine, seed=depth)
    stats = engine.stats()
    assert stats.num_swap_preemptions > 0 and stats.prefix_hit_rate > 0
    seen = Counter[str]()
    for step in recorded.steps:
        for name in ("swap_out", "copy", "swap_in", "sampled_at", "changed", "draws", "scores"):
            seen[name] += len(getattr(step, name))
        seen["edits"] += len(step.draws.edits.scaled_ids) + len(step.draws.edits.added_ids)
        seen["scored draws"] += int((step.draws.num_logprobs >= 0).sum())
    assert all(seen[name] for name in seen if name != "sampled_at") and (seen["sampled_at"] > 0) == (depth > 1), seen
    for steps in (recorded.steps, pickle.loads(pickle.dumps(recorded.steps))):
        fresh = build(config, checkpoint, read_config(checkpoint)).executor
        outputs = [fresh.submit(step).result() for step in steps]
        fresh.close()
        assert len(recorded.outputs) >= len(steps) - depth  # what was never read was dropped at the end
        for number, output in recorded.outputs.items():
            assert outputs[number] == output, number


def test_a_step_is_plain_data(checkpoint: Path) -> None:
    """Integers, floats and arrays of them, which nobody else holds: what happens later does not change a step."""
    engine = LLM(checkpoint, **FIELDS)
    frozen: list[bytes] = []

    class Watching(Recording):
        def submit(self, step: StepInput, /) -> Any:
            frozen.append(pickle.dumps(step))
            return super().submit(step)

    recorded = interpose(engine, Watching)
    run_rich_workload(engine, seed=7)
    assert [pickle.dumps(step) for step in recorded.steps] == frozen
    assert all(isinstance(output, StepOutput) for output in recorded.outputs.values())


@pytest.fixture
def backends() -> Iterator[None]:
    """Backends that a test registers are gone when it ends."""
    known = dict(registry._table)
    yield
    registry._table.clear()
    registry._table.update(known)
    registry._resolve.cache_clear()


@pytest.mark.parametrize("overlap", [False, True])
def test_the_backend_that_was_asked_for_finds_the_likeliest_tokens(
    checkpoint: Path, overlap: bool, backends: None
) -> None:
    """Also on the thread of overlapped steps, and while the engine warms up."""
    calls = 0

    @register("argmax_logprob", backend="mine")
    def argmax_logprob(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        best = logits.min(dim=-1)  # so that it shows whose answer is taken
        return best.indices, best.values

    engine = LLM(checkpoint, kernel_backend="mine", overlap=overlap, dtype="float64")
    assert calls > 0, "the warm-up runs on other kernels than the requests"
    before = calls
    (mine,) = engine.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    assert calls - before == 5
    (plain,) = LLM(checkpoint, dtype="float64").generate([[1, 2, 3]], temperature=0, max_tokens=5)
    assert mine.token_ids[0] != plain.token_ids[0]


def test_a_backend_that_knows_no_codes_is_refused_by_name(checkpoint: Path, backends: None) -> None:
    @register("write_kv", backend="mine")
    def write_kv(key: Any, value: Any, key_cache: Any, value_cache: Any, slot_mapping: Any) -> None:
        raise AssertionError

    with pytest.raises(KernelError, match="'mine' performs 'write_kv' without kv_scales"):
        LLM(checkpoint, kernel_backend="mine", kv_cache_dtype="int8")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA driver version is insufficient"), RuntimeError),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
            OutOfMemoryError,
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemoryError),
    ],
    ids=["driver", "cpu", "cuda"],
)
def test_only_a_lack_of_memory_is_reported_as_one(
    checkpoint: Path, error: Exception, expected: type[Exception], backends: None
) -> None:
    @register("allocate_kv_cache", backend="mine")
    def allocate_kv_cache(*args: Any) -> Any:
        raise error

    with pytest.raises(expected) as caught:
        LLM(checkpoint, kernel_backend="mine", num_gpu_blocks=8, max_model_len=64)
    if expected is RuntimeError:
        assert caught.value is error
    else:
        assert "8 KV blocks" in str(caught.value) and caught.value.__cause__ is error
