"""From a configuration to the parts of an engine: tokenizer, scheduler, executor, loop."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mini_infer.config import CacheOptions, EngineConfig
from mini_infer.engine.describe import Describer
from mini_infer.engine.generation_config import GenerationDefaults
from mini_infer.engine.intake import Intake
from mini_infer.engine.loop import EngineLoop
from mini_infer.engine.no_tokenizer import NoTokenizer
from mini_infer.engine.replicas import Replicas
from mini_infer.engine.router import Router
from mini_infer.engine.trace import StepTrace
from mini_infer.exceptions import InvalidConfigError
from mini_infer.memory import BlockManager
from mini_infer.scheduler import PreemptionCosts, Scheduler, make_policy
from mini_infer.step import Executor

if TYPE_CHECKING:
    import torch

    from mini_infer.engine.tokenizer import Tokenizer
    from mini_infer.executor.build import Local
    from mini_infer.models import ModelConfig


@dataclass(frozen=True)
class Parts:
    """What an engine is made of.

    Attributes:
        tokenizer: text to tokens and back.
        defaults: how the model wants to be sampled, and stopped.
        intake: makes requests.
        loop: runs them.
        executor: what the loop has steps computed by; of several replicas, the first one's.
        max_model_len: most tokens of one sequence.
        model_config: what the checkpoint says of itself; None where there is no checkpoint.
        device: where the model is; None where there is none.
    """

    tokenizer: "Tokenizer | NoTokenizer"
    defaults: GenerationDefaults
    intake: Intake
    loop: EngineLoop | Replicas
    executor: Executor
    max_model_len: int
    model_config: "ModelConfig | None" = None
    device: "torch.device | None" = None


@contextmanager
def _collecting_nothing() -> Iterator[None]:
    """Imports and compilers make hundreds of thousands of objects that stay. Looking for garbage among them again and
    again takes a sixth of a start."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_collecting_nothing()
def build(config: EngineConfig) -> Parts:
    """Load the checkpoint and lay out the KV memory.

    Raises:
        ModelNotFoundError, InvalidCheckpointError, UnsupportedModelError: about the checkpoint.
        OutOfMemoryError: weights or KV memory do not fit.
        InvalidConfigError, KernelError: the device or the kernel backend is not there, or the trace cannot be written.
    """
    # Only here does an engine need torch; with an executor of another kind it does without.
    from mini_infer.engine.tokenizer import Tokenizer
    from mini_infer.executor.build import build as build_local
    from mini_infer.executor.ranks import build_ranks, lay_out
    from mini_infer.models import read_config, resolve_model, resolve_tokenizer

    directory = resolve_model(str(config.model), config.revision, config.cache_dir)
    tokenizer_directory = (
        directory if config.tokenizer is None else resolve_tokenizer(str(config.tokenizer), None, config.cache_dir)
    )
    model_config = read_config(directory)
    config = _for_diffusion(config, model_config)
    tokenizer = Tokenizer(tokenizer_directory, config, model_config.vocab_size)
    config, devices = lay_out(config)
    if len(devices) == 1 and config.launch == "processes":
        replicas = [build_local(config, directory, model_config)]
    else:
        replicas = build_ranks(config, directory, model_config, devices)
    max_model_len = min(local.max_model_len for local in replicas)
    defaults = GenerationDefaults.from_directory(
        directory, tokenizer.end_token_ids, model_config.vocab_size, model_config.diffusion is not None
    )
    loops = []
    for number, local in enumerate(replicas):
        scheduler = make_scheduler(
            config, max_model_len, local.num_gpu_blocks, _preemption_costs(local), _fair_size(local)
        )
        mine = config if len(replicas) == 1 else _with_trace_of_its_own(config, number)
        loops.append(make_loop(mine, scheduler, local.executor, tokenizer))
    return Parts(
        tokenizer=tokenizer,
        defaults=defaults,
        intake=Intake(
            tokenizer,
            defaults,
            model_config.vocab_size,
            max_model_len,
            config,
            model_config.diffusion,
            min(local.num_gpu_blocks for local in replicas) * config.block_size,
        ),
        loop=loops[0] if len(loops) == 1 else Replicas(loops, make_router(config, replicas)),
        executor=replicas[0].executor,
        max_model_len=max_model_len,
        model_config=model_config,
        device=replicas[0].device,
    )


def _for_diffusion(config: EngineConfig, model: "ModelConfig") -> EngineConfig:
    """A diffusion model whose tokens all see each other computes a sequence at once, so that a step has room for the
    longest unless that is said.

    Raises:
        InvalidConfigError: an option that it cannot have.
    """
    if model.diffusion is None:
        return config
    span = model.diffusion.span
    if config.enable_prefix_caching and span is None:
        raise InvalidConfigError(
            "enable_prefix_caching=True: in a diffusion model a prompt's keys depend on the answer, so that no other "
            "request can share them; leave it out"
        )
    if config.enable_prefix_caching and span is not None and config.block_size % span:
        raise InvalidConfigError(
            f"enable_prefix_caching=True: this model sees in blocks of {span} tokens, and a KV block of "
            f"block_size={config.block_size} ends within one; give a multiple of {span}"
        )
    if config.pipeline_parallel_size > 1:
        raise InvalidConfigError(
            "pipeline_parallel_size: stages are not implemented for diffusion models; leave it out"
        )
    if config.max_num_batched_tokens is not None or span is not None:
        return config
    longest = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
    return replace(config, max_num_batched_tokens=max(config.token_budget, longest))


def make_scheduler(
    config: EngineConfig, max_model_len: int, num_gpu_blocks: int, costs: PreemptionCosts, fair_size: int = 32
) -> Scheduler:
    """The scheduler that a configuration asks for."""
    return Scheduler(
        config.max_num_seqs,
        max_model_len,
        config.block_size,
        max_num_batched_tokens=config.token_budget,
        block_manager=BlockManager(config.block_size, num_gpu_blocks, config.num_cpu_blocks),
        watermark=config.watermark,
        policy=make_policy(config.scheduling_policy),
        prefix_caching=config.enable_prefix_caching,
        preemption_mode=config.preemption_mode,
        costs=costs,
        fair_size=fair_size,
        num_stages=config.pipeline_parallel_size,
    )


def make_loop(
    config: EngineConfig, scheduler: Scheduler, executor: Executor, tokenizer: "Tokenizer | NoTokenizer"
) -> EngineLoop:
    """A loop around a scheduler and an executor, and a trace that observes it, if one is asked for.

    Raises:
        InvalidConfigError: the trace cannot be written.
    """
    observers = () if config.trace is None else (StepTrace(config.trace, scheduler, tokenizer.token_bytes),)
    width = -(-scheduler.max_model_len // config.block_size)
    describer = Describer(config.max_num_seqs, width, config.block_size)
    return EngineLoop(scheduler, executor, describer, max(config.depth, config.pipeline_parallel_size), observers)


def _with_trace_of_its_own(config: EngineConfig, replica: int) -> EngineConfig:
    """The configuration of a replica, which has steps and blocks of its own: of run.json, it writes run.0.json."""
    if config.trace is None:
        return config
    path = Path(config.trace)
    return replace(config, trace=path.with_name(f"{path.stem}.{replica}{path.suffix}"))


def make_router(config: CacheOptions, replicas: "Sequence[Local]") -> Router:
    """What shares requests out among replicas."""
    num_blocks = min(local.num_gpu_blocks for local in replicas) if config.enable_prefix_caching else 0
    return Router(len(replicas), config.block_size, num_blocks)


def _preemption_costs(local: "Local") -> PreemptionCosts:
    """What swapping and recomputing cost, from round figures: a GPU behind 16 lanes of PCIe 4 that reaches half of an
    A100's peak, or a CPU that copies within its own memory."""
    copy_bytes_per_second, flops_per_second = (5e9, 2e11) if local.device.type == "cpu" else (2.5e10, 1.5e14)
    return PreemptionCosts.estimate(local.block_bytes, copy_bytes_per_second, local.num_parameters, flops_per_second)


def _fair_size(local: "Local") -> int:
    """On a CPU a step takes about twice as long with 16 sequences as with one, on a GPU with some hundreds: there the
    weights' way through memory hides so many products."""
    return 16 if local.device.type == "cpu" else 256
