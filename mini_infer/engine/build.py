"""From a configuration to the parts of an engine: model, tokenizer, KV cache, scheduler."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from mini_infer import kernels
from mini_infer.config import EngineConfig
from mini_infer.engine.block_tables import BlockTables
from mini_infer.engine.decode_graphs import DecodeGraphs, cuda_capture, graph_sizes
from mini_infer.engine.device import on, resolve_device, resolve_dtype
from mini_infer.engine.generation_config import GenerationDefaults
from mini_infer.engine.model_runner import ModelRunner
from mini_infer.engine.tokenizer import Tokenizer
from mini_infer.engine.trace import StepTrace, TracedRunner, TracedScheduler, TraceFile
from mini_infer.exceptions import OutOfMemoryError
from mini_infer.kernels.registry import broken_backends
from mini_infer.memory import BlockManager
from mini_infer.memory.kv_cache import KVCache
from mini_infer.memory.sizing import CPU_KV_CACHE_BYTES, block_bytes, fit_max_model_len, open_num_blocks
from mini_infer.models import Decoder, ModelConfig, load_model, resolve_model, resolve_tokenizer
from mini_infer.scheduler import POLICIES, PreemptionCosts, Scheduler, Sequence

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What an engine is made of.

    Attributes:
        model_config: what the checkpoint says of itself.
        tokenizer: text to tokens and back.
        defaults: how the model wants to be sampled, and stopped.
        scheduler: decides who runs.
        runner: runs them.
        max_model_len: most tokens of one sequence.
        trace: what the scheduler and the runner report to, if asked for.
    """

    model_config: ModelConfig
    tokenizer: Tokenizer
    defaults: GenerationDefaults
    scheduler: Scheduler
    runner: ModelRunner
    max_model_len: int
    trace: StepTrace | None


def build(config: EngineConfig) -> Parts:
    """Load the checkpoint and lay out the KV memory.

    Raises:
        ModelNotFoundError, InvalidCheckpointError, UnsupportedModelError: about the checkpoint.
        OutOfMemoryError: weights or KV memory do not fit.
        InvalidConfigError, KernelError: the device or the kernel backend is not there, or the trace cannot be written.
    """
    with kernels.use_backend(config.kernel_backend):  # an unknown backend fails here, before anything is loaded
        device = resolve_device(config.device)
    with on(device):
        return _build(config, device)


def _build(config: EngineConfig, device: torch.device) -> Parts:
    trace_file = None if config.trace is None else TraceFile(config.trace)
    cache_dir = None if config.cache_dir is None else Path(config.cache_dir)
    directory = resolve_model(str(config.model), config.revision, cache_dir)
    tokenizer_directory = (
        directory if config.tokenizer is None else resolve_tokenizer(str(config.tokenizer), None, cache_dir)
    )
    model_config = ModelConfig.from_directory(directory)
    tokenizer = Tokenizer(tokenizer_directory, config, model_config.vocab_size)
    dtype = resolve_dtype(config.dtype, model_config.dtype, device)
    _mention_what_means_nothing_here(config, device)
    with kernels.use_backend(config.kernel_backend):
        model = load_model(directory, model_config, dtype, device)

    bytes_per_block = block_bytes(
        config.block_size, model_config.num_layers, model_config.num_kv_heads, model_config.head_dim, dtype.itemsize
    )
    num_blocks = config.num_gpu_blocks or _num_blocks(config, model, bytes_per_block, device)
    max_model_len, warning = fit_max_model_len(
        config.max_model_len, model_config.max_position_embeddings, num_blocks, config.block_size
    )
    if warning is not None:
        logger.warning(warning)

    width = -(-max_model_len // config.block_size)
    runner = _runner(config, model, num_blocks, config.num_cpu_blocks, width, device)
    if not config.enforce_eager:
        runner = _with_graphs(runner, config.max_num_seqs, width)
    _warm_up(runner, min(num_blocks, width) * config.block_size)
    block_manager = BlockManager(config.block_size, num_blocks, config.num_cpu_blocks)
    make_scheduler: Callable[..., Scheduler] = Scheduler
    trace = None
    if trace_file is not None:
        trace = StepTrace(trace_file, block_manager)
        runner = TracedRunner(**vars(runner), trace=trace)
        make_scheduler = partial(TracedScheduler, trace)
    return Parts(
        model_config=model_config,
        tokenizer=tokenizer,
        defaults=GenerationDefaults.from_directory(directory, tokenizer.hf.eos_token_id, model_config.vocab_size),
        scheduler=make_scheduler(
            config.max_num_seqs,
            max_model_len,
            config.block_size,
            max_num_batched_tokens=config.token_budget,
            block_manager=block_manager,
            watermark=config.watermark,
            policy=POLICIES[config.scheduling_policy](),
            prefix_caching=config.enable_prefix_caching,
            preemption_mode=config.preemption_mode,
            costs=_preemption_costs(model, bytes_per_block, device),
        ),
        runner=runner,
        max_model_len=max_model_len,
        trace=trace,
    )


def _preemption_costs(model: Decoder, bytes_per_block: int, device: torch.device) -> PreemptionCosts:
    """What swapping and recomputing cost, from round figures: a GPU behind 16 lanes of PCIe 4 that reaches half of an
    A100's peak, or a CPU that copies within its own memory."""
    copy_bytes_per_second, flops_per_second = (5e9, 2e11) if device.type == "cpu" else (2.5e10, 1.5e14)
    return PreemptionCosts.estimate(bytes_per_block, copy_bytes_per_second, model.num_parameters, flops_per_second)


def _mention_what_means_nothing_here(config: EngineConfig, device: torch.device) -> None:
    if device.type == "cpu" and "cpu" in broken_backends():
        logger.warning("the fast CPU kernels need numba, and it is not here: pip install 'mini-infer[cpu]'")
    if device.type == "cpu" and config.gpu_memory_utilization != EngineConfig.gpu_memory_utilization:
        logger.info("gpu_memory_utilization means nothing on a CPU: set num_gpu_blocks for more KV memory")


def _runner(
    config: EngineConfig, model: Decoder, num_blocks: int, num_cpu_blocks: int, width: int, device: torch.device
) -> ModelRunner:
    """A runner with a cache of ``num_blocks`` blocks on the device and ``num_cpu_blocks`` in CPU memory, for sequences
    of up to ``width`` blocks.

    Raises:
        OutOfMemoryError: the device cannot hold that many.
    """
    shape = model.config
    dtype = model.dtype
    try:
        with kernels.use_backend(config.kernel_backend):
            layers = [
                kernels.allocate_kv_cache(
                    num_blocks, config.block_size, shape.num_kv_heads, shape.head_dim, dtype, device
                )
                for _ in range(shape.num_layers)
            ]
        kv_cache = KVCache(layers, num_cpu_blocks)
    except (torch.OutOfMemoryError, RuntimeError) as error:  # the CPU's allocator raises a plain RuntimeError
        raise OutOfMemoryError(
            f"{num_blocks} KV blocks of {config.block_size} tokens do not fit on {device}, or {num_cpu_blocks} in CPU "
            "memory; lower num_gpu_blocks or num_cpu_blocks"
        ) from error
    tables = BlockTables(config.max_num_seqs, width, device)
    return ModelRunner(model, kv_cache, config.block_size, device, config.kernel_backend, tables, graphs=None)


def _with_graphs(runner: ModelRunner, max_num_seqs: int, width: int) -> ModelRunner:
    """The runner with graphs for its decodes, where launches can be recorded."""
    forward = partial(runner.model.forward, kv_cache=runner.kv_cache.layers)
    with torch.inference_mode(), kernels.use_backend(runner.kernel_backend):
        if runner.device.type == "cuda":
            graphs = DecodeGraphs(forward, graph_sizes(max_num_seqs), width, runner.device, cuda_capture(runner.device))
            try:
                graphs.record_all()
            except torch.OutOfMemoryError as error:
                raise OutOfMemoryError(
                    f"no room is left on {runner.device} for recordings of decode steps; lower gpu_memory_utilization "
                    "or max_num_seqs, or set enforce_eager=True"
                ) from error
        elif kernels.backend_of("paged_attention") == "cpu":
            from mini_infer.kernels.cpu.recording import cpu_capture

            graphs = DecodeGraphs(forward, range(1, max_num_seqs + 1), width, runner.device, cpu_capture())
        else:
            return runner
    return replace(runner, graphs=graphs)


def _warm_up(runner: ModelRunner, num_slots: int) -> None:
    """Run a prompt and a decode, so that no request waits for the kernels to be compiled and loaded; the decode twice,
    since the first time it may be recorded and the second time replayed.

    Their keys and values go to blocks that nobody owns yet.
    """
    num_tokens = min(2, num_slots, runner.model.config.max_position_embeddings)
    table = list(range(-(-num_tokens // runner.block_size)))
    for num_computed in (0, num_tokens - 1, num_tokens - 1):  # all tokens at once, then the last one
        sequence = Sequence("warm-up", [0] * num_tokens, num_tokens, num_tokens, block_table=table)
        sequence.num_computed_tokens = num_computed
        hidden = runner.forward([(sequence, num_tokens - num_computed)])
        kernels.argmax_logprob(runner.compute_logits(hidden[-1:]))


def _num_blocks(config: EngineConfig, model: Decoder, bytes_per_block: int, device: torch.device) -> int:
    """KV blocks when the configuration leaves the number open.

    Never more than ``max_num_seqs`` sequences of the longest length could fill.
    """
    longest = min(config.max_model_len or model.config.max_position_embeddings, model.config.max_position_embeddings)
    memory = CPU_KV_CACHE_BYTES if device.type == "cpu" else _free_gpu_bytes(config, model, device)
    num_blocks = open_num_blocks(memory, bytes_per_block, config.max_num_seqs, longest, config.block_size)
    if num_blocks < 1:
        raise OutOfMemoryError(
            f"no KV block fits on {device}: one takes {bytes_per_block} bytes and {max(memory, 0)} are left beside "
            "the model; raise gpu_memory_utilization, lower block_size or max_num_batched_tokens, or take a smaller "
            "model"
        )
    return num_blocks


def _free_gpu_bytes(config: EngineConfig, model: Decoder, device: torch.device) -> int:
    """Bytes left for KV blocks on a GPU, measured: run the largest step there can be and see what it takes."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    blocks_per_sequence = -(-model.config.max_position_embeddings // config.block_size)
    num_sequences = min(config.max_num_seqs, config.token_budget)
    each = min(config.token_budget // num_sequences, model.config.max_position_embeddings)
    blocks_each = min(-(-each // config.block_size), blocks_per_sequence)
    try:
        runner = _runner(config, model, blocks_each, 0, blocks_each, device)
        table = list(range(blocks_each))  # all share these blocks: only the size of the step matters
        step = [(Sequence("profile", [0] * each, each, each, block_table=table), each) for _ in range(num_sequences)]
        hidden = runner.forward(step)
        logits = runner.compute_logits(hidden[:num_sequences]).float()
        logits.softmax(dim=-1).sort(dim=-1)  # what sampling with top_p takes at its widest
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"a step of {config.token_budget} tokens does not fit on {device} beside the model; lower "
            "max_num_batched_tokens or max_num_seqs"
        ) from error
    step_bytes = torch.cuda.max_memory_allocated(device) - before
    del runner, hidden, logits
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(total * config.gpu_memory_utilization) - (total - free) - step_bytes
