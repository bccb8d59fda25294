"""Every field of the dataclasses is a flag, in every spelling, and arrives."""

import random
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import typer
from typer.testing import CliRunner

import mini_infer.cli
from mini_infer.cli.flags import NO_FLAGS, engine_flags, sampling_flags
from mini_infer.cli.group import Group
from mini_infer.compat.options import ENGINE_ALIASES, aliases_of
from mini_infer.config import DTYPES, GROUPS, EngineConfig
from mini_infer.sampling import SamplingParams

ENGINE_COMMANDS = ("generate", "chat", "serve", "info", "bench")

ENGINE_VALUES: dict[str, Any] = {
    "model": lambda r: r.choice(["some/model", "目录/模型", "a b"]),
    "tokenizer": lambda r: r.choice(["some/tokenizer", "./x"]),
    "tokenizer_mode": lambda r: r.choice(["auto", "slow"]),
    "revision": lambda r: r.choice(["main", "none", "1", "true"]),
    "trust_remote_code": lambda r: r.random() < 0.5,
    "cache_dir": lambda r: "/some/where",
    "dtype": lambda r: r.choice(DTYPES),
    "quantization": lambda r: r.choice(["int8", "int4"]),
    "device": lambda r: r.choice(["cpu", "cuda:3", "cuda:0,cuda:1", "cpu:2"]),
    "kernel_backend": lambda r: r.choice(["reference", "mine"]),
    "enforce_eager": lambda r: r.random() < 0.5,
    "block_size": lambda r: r.randint(1, 512),
    "kv_cache_dtype": lambda r: r.choice(["auto", "int8", "fp8"]),
    "num_gpu_blocks": lambda r: r.choice([None, -1, 1, 10**9]),
    "num_cpu_blocks": lambda r: r.randint(1, 100),
    "gpu_memory_utilization": lambda r: r.uniform(0.01, 1),
    "enable_prefix_caching": lambda r: r.random() < 0.5,
    "max_num_seqs": lambda r: r.randint(1, 10**6),
    "max_model_len": lambda r: r.choice([None, 1, 4096]),
    "max_num_batched_tokens": lambda r: r.choice([None, 1, 8192]),
    "offline": lambda r: r.random() < 0.5,
    "scheduling_policy": lambda r: r.choice(["fcfs", "priority", "mine.py:Mine"]),
    "preemption_mode": lambda r: r.choice(["recompute", "swap", "auto"]),
    "watermark": lambda r: r.choice([0.0, 1e-3, r.uniform(0, 0.5)]),
    "tensor_parallel_size": lambda r: r.randint(1, 8),
    "pipeline_parallel_size": lambda r: r.randint(1, 8),
    "data_parallel_size": lambda r: r.choice([None, 1, 4]),
    "launch": lambda r: r.choice(["processes", "join"]),
    "rank_address": lambda r: "10.0.0.1:7000",
    "start_timeout": lambda r: r.uniform(1, 1000),
    "rank_timeout": lambda r: r.uniform(1, 1000),
    "seed": lambda r: r.randrange(2**63),
    "max_waiting": lambda r: r.choice([None, 1, 1000]),
    "overlap": lambda r: r.choice([False, 0, 1, 4]),
    "trace": lambda r: "trace.json",
}
"""How a value of each field is drawn."""

SAMPLING_VALUES: dict[str, Any] = {
    "n": lambda r: r.randint(1, 1024),
    "temperature": lambda r: r.uniform(0, 2),
    "top_p": lambda r: r.uniform(0.1, 1),
    "top_k": lambda r: r.choice([-1, 0, 50]),
    "min_p": lambda r: r.uniform(0, 1),
    "repetition_penalty": lambda r: r.uniform(0.1, 2),
    "presence_penalty": lambda r: r.uniform(-2, 2),
    "frequency_penalty": lambda r: r.uniform(-2, 2),
    "logit_bias": lambda r: {r.randrange(1000): r.uniform(-100, 100) for _ in range(r.randint(1, 4))},
    "seed": lambda r: r.choice([None, r.randint(-(2**63), 2**64 - 1)]),
    "max_tokens": lambda r: r.choice([None, 1024]),
    "min_tokens": lambda r: r.randint(0, 1024),
    "stop": lambda r: [r.choice(["\n", "a,b", "结束", "none", "7"]) for _ in range(r.randint(1, 3))],
    "stop_token_ids": lambda r: [r.randrange(1000) for _ in range(r.randint(1, 3))],
    "ignore_eos": lambda r: r.random() < 0.5,
    "logprobs": lambda r: r.choice([None, 0, 5]),
    "prompt_logprobs": lambda r: r.choice([None, 0, 5]),
    "cache_salt": lambda r: r.choice(["salt", "none"]),
    "skip_special_tokens": lambda r: r.random() < 0.5,
    "gen_length": lambda r: r.choice([None, 1, 8192]),
    "steps": lambda r: r.choice([None, 1, 8192]),
    "block_length": lambda r: r.choice([None, 32]),
    "cfg_scale": lambda r: r.choice([None, r.uniform(0, 4)]),
    "remasking": lambda r: r.choice(["low_confidence", "random"]),
    "alg": lambda r: r.choice(["origin", "entropy"]),
    "alg_temp": lambda r: r.choice([None, r.uniform(0, 2)]),
    "threshold": lambda r: r.choice([None, r.uniform(0, 1)]),
    "factor": lambda r: r.choice([None, r.uniform(0.1, 3)]),
    "kv_reuse": lambda r: r.choice(["prefix", "dual"]),
    "refresh_interval": lambda r: r.choice([None, 8]),
    "sparse_config": lambda r: {
        "enabled": r.random() < 0.5,
        "retention_ratio": r.uniform(0.1, 1),
        "delay_step": r.randrange(4),
    },
}


def words(name: str, value: Any, draw: random.Random, alias: bool = False) -> list[str]:
    """A flag and its value as a person could write them."""
    if name == "overlap" and not isinstance(value, bool):  # a number is for the name that other engines have for it
        name = "npu_queue_limit"
    spelled = name if draw.random() < 0.5 else name.replace("_", "-")
    if isinstance(value, bool) and not alias:
        return [f"--{spelled}" if value else draw.choice(["--no-", "--no_"]) + spelled]
    if isinstance(value, dict):
        return [word for key, number in value.items() for word in (f"--{spelled}", f"{key}={number!r}")]
    if isinstance(value, list):
        return [word for item in value for word in (f"--{spelled}", str(item))]
    return [f"--{spelled}={value}"] if draw.random() < 0.5 else [f"--{spelled}", str(value)]


Seen: TypeAlias = list[Any]
"""What the commands below were called with."""


class Commands:
    """Two commands that only note what they were called with; building them takes longer than running them."""

    def __init__(self, seen: Seen) -> None:
        app = typer.Typer(cls=Group, context_settings=mini_infer.cli.app.info.context_settings)

        @app.command()
        @engine_flags(model_argument=True)
        def engine(config: EngineConfig, rounds: int = 3) -> None:
            seen.append((config, rounds))

        @app.command()
        @engine_flags
        @sampling_flags
        def both(config: EngineConfig, sampling: dict[str, Any], prompts: list[str]) -> None:
            seen.append((config, sampling, prompts))

        self._group = typer.main.get_command(app)

    def run(self, *arguments: str) -> int:
        """The exit status."""
        return self._group.main(list(arguments), prog_name="mini-infer", standalone_mode=False) or 0


@pytest.fixture(scope="module")
def seen() -> Seen:
    return []


@pytest.fixture(scope="module")
def commands(seen: Seen) -> Commands:
    return Commands(seen)


def test_every_field_has_values_here() -> None:
    assert list(ENGINE_VALUES) == [field.name for field in fields(EngineConfig)]
    assert list(SAMPLING_VALUES) == [field.name for field in fields(SamplingParams) if field.name not in NO_FLAGS]


@pytest.mark.parametrize("name", ENGINE_VALUES)
def test_each_engine_flag_arrives(name: str, commands: Commands, seen: Seen) -> None:
    """Alone, under each of its names."""
    draw = random.Random(name)
    needs = {"num_cpu_blocks": 8} if name == "preemption_mode" else {}
    for spelling in (name, *aliases_of(name, ENGINE_ALIASES)):
        for _ in range(4):
            value = ENGINE_VALUES[name](draw)
            given = words(spelling, value, draw, alias=spelling != name)
            assert (
                commands.run("engine", *given, *(word for key, n in needs.items() for word in words(key, n, draw))) == 0
            )
            assert seen.pop() == (EngineConfig(**{name: value}, **needs), 3), given


def test_all_engine_flags_at_once(commands: Commands, seen: Seen) -> None:
    for seed in range(30):
        draw = random.Random(seed)
        chosen = [name for name in ENGINE_VALUES if draw.random() < 0.7] + ["num_cpu_blocks"]
        values = {name: ENGINE_VALUES[name](draw) for name in chosen}
        flags = [words(name, value, draw) for name, value in values.items()]
        draw.shuffle(flags)
        given = ["engine", *(word for flag in flags for word in flag), "--rounds", "7"]
        assert commands.run(*given) == 0
        assert seen.pop() == (EngineConfig(**values), 7), (seed, given)


def test_sampling_flags(commands: Commands, seen: Seen) -> None:
    for seed in range(60):
        draw = random.Random(seed)
        values = {name: make(draw) for name, make in SAMPLING_VALUES.items() if draw.random() < 0.6}
        if "seed" in values:  # EngineConfig has one, too
            values["sampling_seed"] = values.pop("seed")
        given = [word for name, value in values.items() for word in words(name, value, draw)]
        assert commands.run("both", *given, "--seed", "3", "--", "--a prompt", "二") == 0
        config, sampling, prompts = seen.pop()
        if "sampling_seed" in values:
            values["seed"] = values.pop("sampling_seed")
        assert sampling == values, (seed, given)
        assert (config, prompts) == (EngineConfig(seed=3), ["--a prompt", "二"])
        replace(SamplingParams(max_tokens=1024), **sampling)


def test_the_model_as_an_argument(commands: Commands, seen: Seen, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run("engine", "some/model", "--rounds", "1") == 0
    assert seen.pop() == (EngineConfig(model="some/model"), 1)
    assert commands.run("engine", "some/model", "--model", "other") == 2
    error = capsys.readouterr().err
    assert error == "error: 'model' is given twice: 'other' and 'some/model'; give it once\n"


def test_without_flags_it_is_the_default(commands: Commands, seen: Seen) -> None:
    assert commands.run("engine") == 0
    assert seen.pop() == (EngineConfig(), 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--max-num-seqs 0", "max_num_seqs must be an integer of at least 1, got 0"),
        ("--max_num_seqs x", "max_num_seqs must be an integer of at least 1, got 'x'"),
        ("--watermark much", "watermark must be a finite number of at least 0 and at most 0.5, got 'much'"),
        ("--is-offline maybe", "--is-offline: offline must be True or False, got 'maybe'"),
        ("--npu-queue-limit 5", "--npu-queue-limit: overlap=5: at most 4 steps may be under way at once"),
        ("--tensor-parallel-size 0", "tensor_parallel_size must be an integer of at least 1, got 0"),
        ("--block-size 4 --kvcache-block-size 8", "'block_size' is given twice: 4 and 8; give it once"),
        ("--offline --no-offline", "'offline' is given twice: True and False; give it once"),
        ("--is-offline", "Option '--is-offline' requires an argument."),
        ("--max-num-seq 3", "No such option: --max-num-seq"),
    ],
)
def test_a_bad_flag_is_one_line(
    given: str, message: str, commands: Commands, seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run("engine", *given.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}".rstrip(".")) and error.count("\n") == 1
    assert not seen


@pytest.mark.parametrize("given", ["--n 0", "--top-p 2", "--logit-bias 3", "--stop-token-ids x", "--temperature nan"])
def test_bad_sampling_is_refused_before_the_command_begins(
    given: str, commands: Commands, seen: Seen, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.run("both", *given.split(), "prompt") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {given.split()[0][2:].replace('-', '_')}") or "stop_token_ids" in error
    assert error.count("\n") == 1 and not seen


@pytest.mark.parametrize("command", ENGINE_COMMANDS)
def test_every_real_command_has_every_flag(command: str) -> None:
    options = typer.main.get_command(mini_infer.cli.app).commands[command].params  # type: ignore[attr-defined]
    known = {name for option in options for name in option.opts}
    for field in fields(EngineConfig):
        for name in (field.name, *aliases_of(field.name, ENGINE_ALIASES)):
            assert f"--{name.replace('_', '-')}" in known
    assert ("model_argument" in {option.name for option in options}) == (command != "generate")


@pytest.mark.parametrize("command", ["", *ENGINE_COMMANDS, "demo", "kernels", "trace"])
def test_help_fits_and_cuts_no_name_short(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    done = CliRunner().invoke(mini_infer.cli.app, [*command.split(), "--help"])
    assert done.exit_code == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"--[\w-]+…", text)
    if command in ENGINE_COMMANDS:
        assert all(f"{group.capitalize()} ─" in text for group in GROUPS) and "[default: 256]" in text


def test_paths_stay_paths(commands: Commands, seen: Seen, tmp_path: Path) -> None:
    assert commands.run("engine", str(tmp_path), "--trace", str(tmp_path / "路径.json")) == 0
    assert seen.pop()[0] == EngineConfig(model=tmp_path, trace=tmp_path / "路径.json")
