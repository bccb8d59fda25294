"""EngineConfig: every choice that is made once per engine, and the source of every command-line flag.

Whoever writes a configuration names fields: ``EngineConfig(model="x", block_size=32)``. Each belongs to the group of
whoever reads it, ``config.cache.block_size``, which defines its fields and checks them; ``EngineConfig`` inherits from
all groups, so a field is written down once and its flat name has its type.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from mini_infer.compat.options import ENGINE_ALIASES, ENGINE_REFUSED
from mini_infer.exceptions import InvalidConfigError
from mini_infer.fields import check_bool, check_choice, check_int, check_number, named_options, option
from mini_infer.plugins import names_a_file
from mini_infer.typing import SchedulingPolicy

T = TypeVar("T")

BUNDLED_MODEL = str(Path(__file__).parent / "assets" / "tutor")
"""Directory of the model that comes with the package; what ``EngineConfig()`` loads."""

PreemptionMode: TypeAlias = Literal["recompute", "swap", "auto"]

DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")

QUANTIZATIONS = ("int8", "int4")

KV_CACHE_DTYPES = ("auto", "int8", "fp8")

POLICY_NAMES = ("fcfs", "priority")

MAX_DEPTH = 4
"""Most steps that may be under way at once."""


@dataclass(frozen=True)
class CheckpointOptions:
    """Which model and tokenizer, from where, and in which dtype: what loading reads."""

    model: str | os.PathLike[str] | None = option(
        None, "Checkpoint directory, .gguf file or Hugging Face Hub name; None is the bundled tutor"
    )
    tokenizer: str | os.PathLike[str] | None = option(None, "Tokenizer directory or Hub name; None is the model's own")
    tokenizer_mode: str = option("auto", "'auto' takes the fast tokenizer where there is one, 'slow' never does")
    revision: str | None = option(None, "Branch, tag or commit of the Hub repository")
    trust_remote_code: bool = option(False, "Let a tokenizer run code from its repository; models never do")
    cache_dir: str | os.PathLike[str] | None = option(None, "Where Hub downloads are kept; None is its own default")
    dtype: str = option("auto", "auto (the checkpoint's own), float16, bfloat16, float32 or float64")
    quantization: str | None = option(
        None, "Quantise weights that are not yet, while they load: int8 or int4; None leaves all as they are"
    )

    def __post_init__(self) -> None:
        if self.model is None:
            object.__setattr__(self, "model", BUNDLED_MODEL)
        for name in ("model", "tokenizer", "cache_dir"):
            _settle_path(self, name)
        check_choice(InvalidConfigError, "tokenizer_mode", self.tokenizer_mode, ("auto", "slow"))
        check_bool(InvalidConfigError, "trust_remote_code", self.trust_remote_code)
        check_choice(InvalidConfigError, "dtype", self.dtype, DTYPES)
        if self.quantization is not None:
            check_choice(InvalidConfigError, "quantization", self.quantization, QUANTIZATIONS)


@dataclass(frozen=True)
class ExecutorOptions:
    """Where and how a step is computed."""

    device: str | Sequence[str] = option(
        "auto", "auto (a GPU where there is one), cpu, cuda:N; or several: cuda:0,cuda:1, cuda:0-3, cuda:*, cpu:2"
    )
    kernel_backend: str | None = option(
        None, "Kernel backend for every op, as NAME or FILE:NAME; None takes the best for the device"
    )
    enforce_eager: bool = option(
        False, "Never record decode steps and replay them (CUDA graphs, and their like on a CPU)"
    )

    def __post_init__(self) -> None:
        if isinstance(self.device, list | tuple) and self.device and all(isinstance(each, str) for each in self.device):
            object.__setattr__(self, "device", ",".join(self.device))
        if not isinstance(self.device, str):
            raise InvalidConfigError(
                f"device must be a string such as 'cpu' or 'cuda:0,cuda:1', or a list of such, got {self.device!r}"
            )
        check_bool(InvalidConfigError, "enforce_eager", self.enforce_eager)


@dataclass(frozen=True)
class CacheOptions:
    """How much KV memory there is, in which pieces, and whether prompts share it."""

    block_size: int = option(16, "Tokens per KV block")
    kv_cache_dtype: str = option(
        "auto", "Keys and values in 8 bits, with a scale per token and head: int8 or fp8; auto keeps them as computed"
    )
    num_gpu_blocks: int | None = option(
        None, "KV blocks on the model's device; None (or -1) measures a GPU, and takes 1 GiB on a CPU"
    )
    num_cpu_blocks: int = option(0, "KV blocks in CPU memory for swapped sequences")
    gpu_memory_utilization: float = option(0.9, "Share of the GPU's memory for weights, activations and KV blocks")
    enable_prefix_caching: bool = option(False, "Share full blocks between prompts that begin alike")

    def __post_init__(self) -> None:
        if self.num_gpu_blocks == -1:  # nano-vllm's spelling of "automatic"
            object.__setattr__(self, "num_gpu_blocks", None)
        check_int(InvalidConfigError, "block_size", self.block_size, 1)
        check_choice(InvalidConfigError, "kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        if self.num_gpu_blocks is not None:
            check_int(InvalidConfigError, "num_gpu_blocks", self.num_gpu_blocks, 1)
        check_int(InvalidConfigError, "num_cpu_blocks", self.num_cpu_blocks, 0)
        check_number(InvalidConfigError, "gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, open_low=True)
        check_bool(InvalidConfigError, "enable_prefix_caching", self.enable_prefix_caching)


@dataclass(frozen=True)
class SchedulerOptions:
    """Who runs in a step, how much of each, and who gives way."""

    max_num_seqs: int = option(256, "Most sequences that run at once")
    max_model_len: int | None = option(None, "Most tokens of one sequence; None is the model's own limit")
    max_num_batched_tokens: int | None = option(None, "Token budget of one step; None is 2048, or 8192 when offline")
    offline: bool = option(False, "Throughput before latency: a larger default token budget")
    scheduling_policy: str | SchedulingPolicy = option(
        "fcfs", "Who goes first: fcfs (by arrival), priority (then by arrival), or a class of your own as FILE:NAME"
    )
    preemption_mode: PreemptionMode = option(
        "recompute", "What becomes of a preempted sequence's KV: recompute, swap, or auto"
    )
    watermark: float = option(0.01, "Share of the blocks that admission leaves free for running sequences")

    def __post_init__(self) -> None:
        check_int(InvalidConfigError, "max_num_seqs", self.max_num_seqs, 1)
        for name in ("max_model_len", "max_num_batched_tokens"):
            if getattr(self, name) is not None:
                check_int(InvalidConfigError, name, getattr(self, name), 1)
        check_bool(InvalidConfigError, "offline", self.offline)
        policy = self.scheduling_policy
        if isinstance(policy, str) and not names_a_file(policy):
            check_choice(InvalidConfigError, "scheduling_policy", policy, POLICY_NAMES)
        elif not isinstance(policy, str) and (isinstance(policy, type) or not callable(getattr(policy, "key", None))):
            raise InvalidConfigError(
                f"scheduling_policy must be {', '.join(map(repr, POLICY_NAMES))}, FILE:NAME, or an object with a "
                f"method key(sequence), got {policy!r}"
            )
        check_choice(InvalidConfigError, "preemption_mode", self.preemption_mode, ("recompute", "swap", "auto"))
        check_number(InvalidConfigError, "watermark", self.watermark, 0, 0.5)

    @property
    def token_budget(self) -> int:
        """``max_num_batched_tokens``, or its default."""
        return self.max_num_batched_tokens or (8192 if self.offline else 2048)


@dataclass(frozen=True)
class ParallelOptions:
    """How many devices share the model, how, and how their processes are started."""

    tensor_parallel_size: int = option(1, "Devices that share each layer")
    pipeline_parallel_size: int = option(1, "Stages that each hold some of the layers")
    data_parallel_size: int | None = option(
        None, "Replicas of the model; None is as many as the devices named are enough for"
    )
    launch: str = option(
        "processes",
        "Who starts the ranks: processes (of this machine), join (by hand, with mini-infer rank), or ray (its cluster)",
    )
    rank_address: str = option("127.0.0.1:0", "HOST:PORT that ranks join at, with launch=join; port 0 takes a free one")
    start_timeout: float = option(600.0, "Seconds that ranks have to come and to load their share")
    rank_timeout: float = option(120.0, "Seconds without an answer after which a rank is taken to hang")

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if name != "data_parallel_size" or self.data_parallel_size is not None:
                check_int(InvalidConfigError, name, getattr(self, name), 1)
        check_choice(InvalidConfigError, "launch", self.launch, ("processes", "join", "ray"))
        for name in ("start_timeout", "rank_timeout"):
            check_number(InvalidConfigError, name, getattr(self, name), 0, open_low=True)


@dataclass(frozen=True)
class EngineOptions:
    """What the engine itself reads: its queue, its loop, and what it writes down."""

    seed: int = option(0, "Source of the seeds of requests that bring none")
    max_waiting: int | None = option(None, "add_request refuses when this many requests wait; None never does")
    overlap: bool | int = option(
        False, "Plan a step and read the last one while one computes; or how many may be under way at once, 1 to 4"
    )
    trace: str | os.PathLike[str] | None = option(
        None, "File that every step is written to, for Perfetto or `mini-infer trace`; of replicas, one for each"
    )

    def __post_init__(self) -> None:
        check_int(InvalidConfigError, "seed", self.seed, 0, 2**63 - 1)
        if self.max_waiting is not None:
            check_int(InvalidConfigError, "max_waiting", self.max_waiting, 1)
        if not isinstance(self.overlap, bool):
            check_int(InvalidConfigError, "overlap", self.overlap, 0)
            if self.overlap > MAX_DEPTH:
                raise InvalidConfigError(
                    f"overlap={self.overlap!r}: at most {MAX_DEPTH} steps may be under way at once"
                )
        _settle_path(self, "trace")

    @property
    def depth(self) -> int:
        """How many steps may be under way at once: 1 plans a step when the last one is done, 2 while it computes."""
        return 2 if self.overlap is True else max(1, int(self.overlap))


GROUPS: Mapping[str, type] = {
    "checkpoint": CheckpointOptions,
    "executor": ExecutorOptions,
    "cache": CacheOptions,
    "scheduler": SchedulerOptions,
    "parallel": ParallelOptions,
    "engine": EngineOptions,
}
"""The groups by the attribute of ``EngineConfig`` that holds them, in the order in which help and pages show them."""


@named_options(InvalidConfigError, ENGINE_ALIASES, ENGINE_REFUSED)
@dataclass(frozen=True)
class EngineConfig(  # a dataclass takes over the fields of its last base first
    EngineOptions, ParallelOptions, SchedulerOptions, CacheOptions, ExecutorOptions, CheckpointOptions
):
    """Configuration of an engine, validated when it is made: the fields of all groups.

    Raises:
        InvalidConfigError: a value is out of range, or an option is unknown or not supported yet.
    """

    def __post_init__(self) -> None:
        for group in GROUPS.values():
            group.__post_init__(self)  # type: ignore[attr-defined]
        if self.preemption_mode == "swap" and self.num_cpu_blocks == 0:
            raise InvalidConfigError(
                "preemption_mode='swap' but num_cpu_blocks=0: say how many blocks may be swapped to CPU memory"
            )

    @property
    def checkpoint(self) -> CheckpointOptions:
        """What ``models/`` and the tokenizer read."""
        return _group(self, CheckpointOptions)

    @property
    def executor(self) -> ExecutorOptions:
        """What ``executor/`` and ``kernels/`` read."""
        return _group(self, ExecutorOptions)

    @property
    def cache(self) -> CacheOptions:
        """What ``memory/`` reads."""
        return _group(self, CacheOptions)

    @property
    def scheduler(self) -> SchedulerOptions:
        """What ``scheduler/`` reads."""
        return _group(self, SchedulerOptions)

    @property
    def parallel(self) -> ParallelOptions:
        """What ``parallel/`` reads."""
        return _group(self, ParallelOptions)

    @property
    def engine(self) -> EngineOptions:
        """What ``engine/`` reads."""
        return _group(self, EngineOptions)


def _group(config: EngineConfig, options: type[T]) -> T:
    """One group of a configuration, as an object of its own."""
    return options(**{field.name: getattr(config, field.name) for field in fields(options)})  # type: ignore[arg-type]


def _settle_path(options: Any, name: str) -> None:
    """Keep a path, where there is one, as a plain string."""
    value = getattr(options, name)
    if value is None:
        return
    if not isinstance(value, str | os.PathLike) or not os.fspath(value):
        raise InvalidConfigError(f"{name} must be a non-empty path or name, got {value!r}")
    object.__setattr__(options, name, os.fspath(value))
