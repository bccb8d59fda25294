"""EngineConfig: every choice that is made once per engine, and the source of every command-line flag."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from mini_infer.exceptions import InvalidConfigError
from mini_infer.fields import check_bool, check_choice, check_int, check_number, named_options, option

BUNDLED_MODEL = str(Path(__file__).parent / "assets" / "tutor")
"""Directory of the model that comes with the package; what ``EngineConfig()`` loads."""

PreemptionMode: TypeAlias = Literal["recompute", "swap", "auto"]

DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")


@named_options(
    InvalidConfigError,
    unsupported={"quantization": "quantised weights are not supported yet; use a checkpoint in its original dtype"},
)
@dataclass(frozen=True)
class EngineConfig:
    """Configuration of an engine, validated when it is made.

    Raises:
        InvalidConfigError: a value is out of range, or an option is unknown or not supported yet.
    """

    model: str | os.PathLike[str] | None = option(
        None, "Checkpoint directory or Hugging Face Hub name; None is the bundled tutor"
    )
    tokenizer: str | os.PathLike[str] | None = option(None, "Tokenizer directory or Hub name; None is the model's own")
    tokenizer_mode: str = option("auto", "'auto' takes the fast tokenizer where there is one, 'slow' never does")
    revision: str | None = option(None, "Branch, tag or commit of the Hub repository")
    trust_remote_code: bool = option(False, "Let a tokenizer run code from its repository; models never do")
    dtype: str = option("auto", "auto (the checkpoint's own), float16, bfloat16, float32 or float64")
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto is a GPU where there is one", aliases=("devices",))
    seed: int = option(0, "Source of the seeds of requests that bring none")
    max_num_seqs: int = option(256, "Most sequences that run at once")
    max_model_len: int | None = option(None, "Most tokens of one sequence; None is the model's own limit")
    max_num_batched_tokens: int | None = option(None, "Token budget of one step; None is 2048, or 8192 when offline")
    block_size: int = option(16, "Tokens per KV block", aliases=("kvcache_block_size",))
    num_gpu_blocks: int | None = option(
        None,
        "KV blocks on the model's device; None (or -1) measures a GPU, and takes 1 GiB on a CPU",
        aliases=("num_kvcache_blocks", "paged_attention_num_blocks"),
    )
    num_cpu_blocks: int = option(0, "KV blocks in CPU memory for swapped sequences")
    gpu_memory_utilization: float = option(0.9, "Share of the GPU's memory for weights, activations and KV blocks")
    enable_prefix_caching: bool = option(False, "Share full blocks between prompts that begin alike")
    scheduling_policy: str = option("fcfs", "Who goes first: fcfs (by arrival) or priority (then by arrival)")
    preemption_mode: PreemptionMode = option(
        "recompute", "What becomes of a preempted sequence's KV: recompute, swap, or auto"
    )
    watermark: float = option(
        0.01, "Share of the blocks that admission leaves free for running sequences", aliases=("spare_blocks_ratio",)
    )
    max_waiting: int | None = option(
        None, "add_request refuses when this many requests wait; None never does", aliases=("max_processing_samples",)
    )
    overlap: bool | int = option(
        False,
        "Plan a step and read the last one while one computes; or how many may be queued, 2",
        aliases=("npu_queue_limit",),
    )
    offline: bool = option(False, "Throughput before latency: a larger default token budget", aliases=("is_offline",))
    enforce_eager: bool = option(
        False, "Never record decode steps and replay them (CUDA graphs, and their like on a CPU)"
    )
    kernel_backend: str | None = option(None, "Kernel backend for every op; None takes the best for the device")
    cache_dir: str | os.PathLike[str] | None = option(None, "Where Hub downloads are kept; None is its own default")
    trace: str | os.PathLike[str] | None = option(
        None, "File that every step is written to, for Perfetto or `mini-infer trace`; None writes none"
    )
    tensor_parallel_size: int = option(1, "Devices that share each layer (only 1 yet)")
    pipeline_parallel_size: int = option(1, "Devices that each hold some layers (only 1 yet)")
    data_parallel_size: int = option(1, "Replicas of the model (only 1 yet)")

    def __post_init__(self) -> None:
        error = InvalidConfigError
        for name in ("model", "tokenizer", "cache_dir", "trace"):
            self._settle_path(name)
        check_choice(error, "tokenizer_mode", self.tokenizer_mode, ("auto", "slow"))
        check_choice(error, "dtype", self.dtype, DTYPES)
        if not isinstance(self.device, str):
            raise error(f"device must be a string such as 'cpu' or 'cuda:0', got {self.device!r}")
        check_int(error, "seed", self.seed, 0, 2**63 - 1)
        check_int(error, "max_num_seqs", self.max_num_seqs, 1)
        check_int(error, "block_size", self.block_size, 1)
        if self.num_gpu_blocks == -1:  # nano-vllm's spelling of "automatic"
            object.__setattr__(self, "num_gpu_blocks", None)
        for name in ("max_model_len", "max_num_batched_tokens", "num_gpu_blocks", "max_waiting"):
            if getattr(self, name) is not None:
                check_int(error, name, getattr(self, name), 1)
        check_int(error, "num_cpu_blocks", self.num_cpu_blocks, 0)
        check_number(error, "gpu_memory_utilization", self.gpu_memory_utilization, 0, 1, open_low=True)
        if self.preemption_mode == "swap" and self.num_cpu_blocks == 0:
            raise error("preemption_mode='swap' but num_cpu_blocks=0: say how many blocks may be swapped to CPU memory")
        check_choice(error, "scheduling_policy", self.scheduling_policy, ("fcfs", "priority"))
        check_number(error, "watermark", self.watermark, 0, 0.5)
        check_choice(error, "preemption_mode", self.preemption_mode, ("recompute", "swap", "auto"))
        for name in ("trust_remote_code", "enable_prefix_caching", "offline", "enforce_eager"):
            check_bool(error, name, getattr(self, name))
        if not isinstance(self.overlap, bool):
            check_int(error, "overlap", self.overlap, 0)
        if self.overlaps and self.trace is not None:
            raise error("overlap and trace: a trace shows steps one after the other; leave one of them out")
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            check_int(error, name, getattr(self, name), 1)
        self._refuse_what_is_not_there_yet()

    def _settle_path(self, name: str) -> None:
        """Keep a path as a plain string; the model defaults to the bundled one."""
        value = getattr(self, name)
        if value is None:
            value = BUNDLED_MODEL if name == "model" else None
        elif isinstance(value, str | os.PathLike) and os.fspath(value):
            value = os.fspath(value)
        else:
            raise InvalidConfigError(f"{name} must be a non-empty path or name, got {value!r}")
        object.__setattr__(self, name, value)

    def _refuse_what_is_not_there_yet(self) -> None:
        refused = {
            "overlap": (self.overlap > 2, "one step computes and one waits behind it, no more; set it to 2"),
        }
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            refused[name] = (getattr(self, name) > 1, "one device is all that is supported yet; set it to 1")
        for name, (given, reason) in refused.items():
            if given:
                raise InvalidConfigError(f"{name}={getattr(self, name)!r}: {reason}")

    @property
    def overlaps(self) -> bool:
        """Whether steps overlap: ``overlap`` is True, or a queue of two steps."""
        return self.overlap is True or self.overlap == 2

    @property
    def depth(self) -> int:
        """Most steps under way at once."""
        return 2 if self.overlap is True else max(1, int(self.overlap))

    @property
    def token_budget(self) -> int:
        """``max_num_batched_tokens``, or its default."""
        return self.max_num_batched_tokens or (8192 if self.offline else 2048)
