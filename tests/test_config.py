"""EngineConfig: its defaults, its other spellings, and what it refuses."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mini_infer.compat.options import ENGINE_ALIASES
from mini_infer.config import BUNDLED_MODEL, DTYPES, GROUPS, CacheOptions, EngineConfig
from mini_infer.exceptions import InvalidConfigError, MiniInferError

DEFAULTS = {
    # As documented, but for dtype: a bfloat16 checkpoint overflows in float16.
    "model": BUNDLED_MODEL,
    "tokenizer": None,
    "max_num_seqs": 256,
    "max_model_len": None,
    "block_size": 16,
    "gpu_memory_utilization": 0.9,
    "dtype": "auto",
    "trust_remote_code": False,
    "device": "auto",
    "seed": 0,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "data_parallel_size": None,
    "preemption_mode": "recompute",
    "enable_prefix_caching": False,
    "num_gpu_blocks": None,
}

ALIASES: list[tuple[str, str, Any]] = [
    ("kvcache_block_size", "block_size", 32),
    ("num_kvcache_blocks", "num_gpu_blocks", 99),
    ("paged_attention_num_blocks", "num_gpu_blocks", 99),
    ("spare_blocks_ratio", "watermark", 0.25),
    ("max_processing_samples", "max_waiting", 7),
    ("npu_queue_limit", "overlap", 1),
    ("is_offline", "offline", True),
    ("devices", "device", "cpu"),
]

ACCEPTED: list[dict[str, Any]] = [
    {"model": Path("some") / "where"},
    {"model": "Qwen/Qwen3-0.6B", "revision": "main"},
    {"tokenizer": Path("some")},
    {"tokenizer_mode": "slow"},
    *[{"dtype": dtype} for dtype in DTYPES],
    *[{"device": device} for device in ("auto", "cpu", "cuda", "cuda:1")],
    *[{"gpu_memory_utilization": value} for value in (0.01, 0.5, 1, 1.0)],
    *[{"watermark": value} for value in (0, 0.5)],
    *[{"max_model_len": value} for value in (None, 1, 10**9)],
    *[{"max_waiting": value} for value in (None, 1)],
    *[{"num_gpu_blocks": value} for value in (None, 1)],
    *[{"overlap": value} for value in (False, True, 0, 1, 2, 4)],
    *[{"seed": value} for value in (0, 2**63 - 1)],
    {"cache_dir": "~/models"},
    {"kernel_backend": "reference"},
    {"enforce_eager": True},
]

REFUSED: list[tuple[str, Any]] = [
    *[("max_num_seqs", value) for value in (0, -1, 2.0, "2", None, True)],
    *[("block_size", value) for value in (0, -16, 16.0, None)],
    *[("max_model_len", value) for value in (0, -1, 1.5, "4k", False)],
    *[("max_num_batched_tokens", value) for value in (0, -1, 1e4)],
    *[("num_gpu_blocks", value) for value in (0, -2, "many")],
    *[("num_cpu_blocks", value) for value in (-1, 1.5, None)],
    *[("gpu_memory_utilization", value) for value in (0, -0.1, 1.01, math.nan, math.inf, "90%", None, True)],
    *[("watermark", value) for value in (-0.01, 0.51, math.nan, None)],
    *[("max_waiting", value) for value in (0, -1, 0.5)],
    *[("seed", value) for value in (-1, 2**63, 0.5, None)],
    *[("dtype", value) for value in ("fp16", "int8", None, 16)],
    *[("device", value) for value in (None, 0, [], ["cpu", 1])],
    *[("tokenizer_mode", value) for value in ("fast", None)],
    *[("preemption_mode", value) for value in ("swap", "never", None)],
    *[("overlap", value) for value in (5, -1, 2.0, "yes", None, math.nan, math.inf)],
    *[("enable_prefix_caching", value) for value in (1, None)],
    *[(name, value) for name in ("trust_remote_code", "offline", "enforce_eager") for value in (1, 0, "yes", None)],
    *[
        (f"{kind}_parallel_size", value)
        for kind in ("tensor", "pipeline", "data")
        for value in (0, -1, 1.5, True, "2", *([] if kind == "data" else [None]))
    ],
    *[(name, value) for name in ("model", "tokenizer", "cache_dir") for value in ("", 5, ["a"], b"a")],
    ("quantization", "awq"),
]


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items(), ids=DEFAULTS)
def test_defaults(name: str, default: Any) -> None:
    assert getattr(EngineConfig(), name) == default


@pytest.mark.parametrize(("alias", "name", "value"), ALIASES, ids=[alias for alias, _, _ in ALIASES])
def test_aliases(alias: str, name: str, value: Any) -> None:
    assert EngineConfig(**{alias: value}) == EngineConfig(**{name: value})
    with pytest.raises(InvalidConfigError, match=f"'{name}' is given twice"):
        EngineConfig(**{alias: value, name: value})


def test_every_alias_is_tested() -> None:
    assert {alias: name for alias, name, _ in ALIASES} == ENGINE_ALIASES


def test_every_field_has_a_line_of_help() -> None:
    """The command line shows it."""
    for field in dataclasses.fields(EngineConfig):
        assert field.metadata["help"] and "\n" not in field.metadata["help"]


@pytest.mark.parametrize("fields", ACCEPTED, ids=str)
def test_accepted(fields: dict[str, Any]) -> None:
    config = EngineConfig(**fields)
    for name, value in fields.items():
        assert getattr(config, name) == (str(value) if isinstance(value, Path) else value)


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{name}={value!r}" for name, value in REFUSED])
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        EngineConfig(**{name: value})
    assert name in str(caught.value) and repr(value) in str(caught.value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, MiniInferError)


@pytest.mark.parametrize("value", [-1, None])
def test_automatic_number_of_blocks(value: int | None) -> None:
    assert EngineConfig(num_kvcache_blocks=value).num_gpu_blocks is None


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("max_num_seq", "max_num_seqs"), ("blocksize", "block_size"), ("kv_cache_block_size", "kvcache_block_size")],
)
def test_a_typo_is_an_error_that_helps(typo: str, meant: str) -> None:
    with pytest.raises(InvalidConfigError, match=rf"'{typo}' \(given: 5\); did you mean '{meant}'"):
        EngineConfig(**{typo: 5})


def test_an_option_like_none_shows_what_there_is() -> None:
    with pytest.raises(InvalidConfigError, match="max_num_seqs"):
        EngineConfig(zzz=1)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().block_size = 8  # type: ignore[misc]


def test_equal_and_hashable() -> None:
    assert EngineConfig("a", block_size=8) == EngineConfig(model="a", kvcache_block_size=8)
    assert len({EngineConfig("a"), EngineConfig(Path("a")), EngineConfig("b")}) == 2


def test_replace_checks_again() -> None:
    config = EngineConfig(block_size=8)
    assert dataclasses.replace(config, max_num_seqs=3).block_size == 8
    with pytest.raises(InvalidConfigError, match="max_num_seqs"):
        dataclasses.replace(config, max_num_seqs=0)


def test_the_token_budget() -> None:
    assert EngineConfig().token_budget == 2048
    assert EngineConfig(offline=True).token_budget == 8192
    assert EngineConfig(offline=True, max_num_batched_tokens=5).token_budget == 5


def test_each_field_is_of_one_group() -> None:
    names = [field.name for group in GROUPS.values() for field in dataclasses.fields(group)]
    assert names == [field.name for field in dataclasses.fields(EngineConfig)]
    assert not set(names) & set(GROUPS)


def test_a_group_is_an_object_of_its_own() -> None:
    config = EngineConfig("some/model", kvcache_block_size=8, num_gpu_blocks=-1, max_num_seqs=3, overlap=True)
    assert config.cache == CacheOptions(block_size=8)
    assert (config.scheduler.max_num_seqs, config.checkpoint.model, config.engine.depth) == (3, "some/model", 2)
    for name, group in GROUPS.items():
        part = getattr(config, name)
        assert type(part) is group
        assert all(getattr(part, field.name) == getattr(config, field.name) for field in dataclasses.fields(group))
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(group)[0].name, None)


@pytest.mark.parametrize(("overlap", "depth"), [(False, 1), (0, 1), (1, 1), (True, 2), (2, 2), (4, 4)])
def test_the_depth(overlap: bool | int, depth: int) -> None:
    assert EngineConfig(overlap=overlap, trace="trace.json").depth == depth


def test_a_policy_may_be_an_object_or_in_a_file() -> None:
    class Latest:
        def key(self, sequence: Any) -> tuple[float, ...]:
            return (-sequence.arrival,)

    mine = Latest()
    assert EngineConfig(scheduling_policy=mine).scheduling_policy is mine
    assert EngineConfig(scheduling_policy="mine.py:Latest").scheduling_policy == "mine.py:Latest"
    for wrong in ("lottery", Latest, object(), None, 5):
        with pytest.raises(InvalidConfigError, match=r"scheduling_policy must .*'fcfs', 'priority'"):
            EngineConfig(scheduling_policy=wrong)  # type: ignore[arg-type]


def test_it_is_ready_before_torch_is() -> None:
    """A command line that only shows its help must not wait for torch."""
    code = (
        "import sys, mini_infer; mini_infer.EngineConfig(); mini_infer.SamplingParams(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
