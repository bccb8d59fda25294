"""From a checkpoint to an executor: device, model, KV memory, recordings of decodes."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mini_infer import kernels
from mini_infer.config import EngineConfig
from mini_infer.exceptions import OutOfMemoryError
from mini_infer.executor.device import expand_devices, on, resolve_cache_dtype, resolve_device, resolve_dtype
from mini_infer.executor.graphs import DecodeGraphs, cuda_capture, graph_sizes
from mini_infer.executor.queue import make_executor
from mini_infer.executor.runner import ModelRunner
from mini_infer.executor.whole import Scratch
from mini_infer.kernels.large_memory import is_out_of_memory
from mini_infer.kernels.registry import broken_backends
from mini_infer.memory.kv_cache import KVCache
from mini_infer.memory.sizing import CPU_KV_CACHE_BYTES, MemoryPlan, plan_memory
from mini_infer.models import Decoder, ModelConfig, load_model
from mini_infer.parallel.group import Link
from mini_infer.parallel.share import Peers
from mini_infer.step import NO_COPIES, NO_INTS, Draws, Executor, LogitEdits, Scores, StepInput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Local:
    """An executor, and what the host must know of it.

    Attributes:
        executor: computes steps.
        device: where the model is; of several ranks, the first one's.
        max_model_len: most tokens of one sequence.
        num_gpu_blocks: KV blocks on the device.
        block_bytes: bytes of one of them.
        num_parameters: of the model.
    """

    executor: Executor
    device: torch.device
    max_model_len: int
    num_gpu_blocks: int
    block_bytes: int
    num_parameters: int


@dataclass(frozen=True)
class Loaded:
    """A model, or a share of one, on its device, before it has memory for keys and values.

    Attributes:
        model: the decoder.
        device: where it is.
        memory: how many blocks there are beside it.
    """

    model: Decoder
    device: torch.device
    memory: MemoryPlan


def build(config: EngineConfig, directory: Path, model_config: ModelConfig) -> Local:
    """Load the checkpoint in a directory, whose config was read, and lay out the KV memory.

    Raises:
        InvalidCheckpointError, UnsupportedModelError: about the checkpoint.
        OutOfMemoryError: weights or KV memory do not fit.
        InvalidConfigError, KernelError: the device or the kernel backend is not there.
    """
    (name,) = expand_devices(str(config.device))
    device = resolve_device(name)
    with on(device):
        loaded = load(config, directory, model_config, device, Peers())
        memory = loaded.memory
        if memory.warning is not None:
            logger.warning(memory.warning)
        runner = make_runner(config, loaded, memory.num_blocks, memory.max_model_len, Link())
    return Local(
        executor=make_executor(runner.run, device, config.depth),
        device=device,
        max_model_len=memory.max_model_len,
        num_gpu_blocks=memory.num_blocks,
        block_bytes=memory.bytes_per_block,
        num_parameters=loaded.model.num_parameters,
    )


def load(
    config: EngineConfig, directory: Path, model_config: ModelConfig, device: torch.device, peers: Peers
) -> Loaded:
    """Load the model, or the share of it that a rank has, and see how many blocks there can be; raises as ``build``.

    Several ranks do so together: what they measure, they compute together.
    """
    resolved = kernels.resolve(device, config.kernel_backend)
    dtype = resolve_dtype(config.dtype, model_config.dtype, resolved)
    _mention_what_means_nothing_here(config, device)
    cache_dtype = resolve_cache_dtype(config.kv_cache_dtype, dtype)
    if cache_dtype is not dtype:
        resolved.check_codes()
    plan = partial(
        plan_memory,
        model_config.cache_specs(cache_dtype, peers.share),
        block_size=config.block_size,
        num_blocks=config.num_gpu_blocks,
        num_cpu_blocks=config.num_cpu_blocks,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        model_limit=model_config.max_position_embeddings,
        keeps_all=not model_config.computes_whole,
    )
    # A GPU's plan is made again once the model is there; until then it is an upper bound, which rotary tables go by.
    on_gpu = device.type != "cpu"
    memory = plan(torch.cuda.mem_get_info(device)[1] if on_gpu else CPU_KV_CACHE_BYTES)
    memory.check(str(device))
    shortened = replace(model_config, max_position_embeddings=memory.max_model_len)
    model = load_model(directory, shortened, dtype, device, resolved, config.quantization, peers.share)
    if on_gpu and config.num_gpu_blocks is None:
        memory = plan(_free_gpu_bytes(config, model, device, peers.link))
        memory.check(str(device))
    return Loaded(model, device, memory)


def make_runner(config: EngineConfig, loaded: Loaded, num_blocks: int, max_model_len: int, link: Link) -> ModelRunner:
    """What runs a model that was loaded, ready to compute: with its KV memory, and recordings of its decodes.

    Raises:
        OutOfMemoryError: the device cannot hold that.
    """
    width = -(-max_model_len // config.block_size)
    runner = _runner(config, loaded.model, num_blocks, config.num_cpu_blocks, width, loaded.device, link)
    if not config.enforce_eager:
        runner = _with_graphs(runner, config.max_num_seqs, width)
    _warm_up(runner, config.block_size, min(num_blocks, width) * config.block_size)
    return runner


def _mention_what_means_nothing_here(config: EngineConfig, device: torch.device) -> None:
    if device.type == "cpu" and "cpu" in broken_backends("cpu"):
        logger.warning("the fast CPU kernels need numba, and it is not here: pip install 'mini-infer[cpu]'")
    if device.type == "cpu" and config.kv_cache_dtype == "fp8":
        logger.warning("kv_cache_dtype='fp8' is slow on a CPU, whose kernels know int8")
    if device.type == "cpu" and config.gpu_memory_utilization != EngineConfig.gpu_memory_utilization:
        logger.info("gpu_memory_utilization means nothing on a CPU: set num_gpu_blocks for more KV memory")


def _runner(
    config: EngineConfig,
    model: Decoder,
    num_blocks: int,
    num_cpu_blocks: int,
    width: int,
    device: torch.device,
    link: Link,
) -> ModelRunner:
    """A runner with a cache of ``num_blocks`` blocks on the device and ``num_cpu_blocks`` in CPU memory, for sequences
    of up to ``width`` blocks.

    Raises:
        OutOfMemoryError: the device cannot hold that many.
    """
    cache_dtype = resolve_cache_dtype(config.kv_cache_dtype, model.dtype)
    try:
        layers = [
            model.kernels.allocate_kv_cache(
                num_blocks, config.block_size, spec.num_kv_heads, spec.head_dim, spec.dtype, device
            )
            for spec in model.config.cache_specs(cache_dtype, model.share)
        ]
        kv_cache = KVCache(layers, num_cpu_blocks)
        scratch = _scratch(config, model, device) if model.config.computes_whole else None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"{num_blocks} KV blocks of {config.block_size} tokens do not fit on {device}, or {num_cpu_blocks} in CPU "
            "memory; lower num_gpu_blocks or num_cpu_blocks"
        ) from error
    tables = torch.zeros((config.max_num_seqs, width), dtype=torch.int32, device=device)
    sampled = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=device)
    return ModelRunner(model, kv_cache, device, tables, sampled, graphs=None, link=link, scratch=scratch)


def _scratch(config: EngineConfig, model: Decoder, device: torch.device) -> Scratch:
    """Room for one layer's keys and values of the largest step; each sequence begins a block of its own."""
    (spec,) = set(model.config.cache_specs(model.dtype, model.share))
    num_blocks = config.token_budget // config.block_size + min(config.max_num_seqs, config.token_budget)
    shape = num_blocks, config.block_size, spec.num_kv_heads, spec.head_dim
    return Scratch(model.kernels.allocate_kv_cache(*shape, spec.dtype, device), config.block_size)


def _with_graphs(runner: ModelRunner, max_num_seqs: int, width: int) -> ModelRunner:
    """The runner with graphs for its decodes, where launches can be recorded. Ranks record the same sizes in the same
    order, with their sums."""
    model, device = runner.model, runner.device
    forward = partial(model.forward, kv_cache=runner.kv_cache.layers)
    shape = (2, max_num_seqs, model.config.hidden_size)
    arriving = None if model.share.is_first else torch.zeros(shape, dtype=model.dtype, device=device)
    if device.type == "cuda" and not model.share.group.on_device:
        return runner  # sums go by way of the host
    if device.type == "cuda":
        graphs = DecodeGraphs(forward, graph_sizes(max_num_seqs), width, device, cuda_capture(device), arriving)
        try:
            with torch.inference_mode():
                graphs.record_all()
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"no room is left on {device} for recordings of decode steps; lower gpu_memory_utilization "
                "or max_num_seqs, or set enforce_eager=True"
            ) from error
    elif model.kernels.backend_of("paged_attention") == "cpu":
        from mini_infer.kernels.cpu.recording import cpu_capture

        graphs = DecodeGraphs(forward, range(1, max_num_seqs + 1), width, device, cpu_capture(), arriving)
    else:
        return runner
    return replace(runner, graphs=graphs)


def _step(
    num_seqs: int, start: int, num_tokens: int, blocks: list[int], block_size: int, is_whole: bool = False
) -> StepInput:
    """A step that nobody asked for: each sequence computes some tokens, and draws one, or where it is computed whole
    as many. All share the same blocks."""
    positions = np.tile(np.arange(start, start + num_tokens), num_seqs)
    table = np.array(blocks, dtype=np.int32)
    slots = table[positions // block_size].astype(np.int64) * block_size + positions % block_size
    ends = np.arange(1, num_seqs + 1) * num_tokens
    drawn = np.arange(ends[-1]) if is_whole else ends - 1
    ones, zeros = np.ones(len(drawn)), np.zeros(len(drawn), dtype=np.int64)
    owners = drawn // num_tokens
    return StepInput(
        swap_out=NO_COPIES,
        copy=NO_COPIES,
        swap_in=NO_COPIES,
        token_ids=np.zeros(len(positions), dtype=np.int64),
        sampled_at=NO_INTS,
        sampled_from=NO_INTS,
        positions=positions,
        slot_mapping=slots,
        query_start_loc=np.append(0, ends).astype(np.int32),
        context_lens=np.full(num_seqs, start + num_tokens, dtype=np.int32),
        table_rows=np.zeros(num_seqs, dtype=np.int64),
        changed=np.arange(len(table)),
        changed_blocks=table,
        width=len(table),
        num_decodes=num_seqs if num_tokens == 1 else 0,
        draws=Draws(
            rows=drawn,
            table_rows=owners,
            seeds=owners.astype(np.uint64),
            indices=owners,
            positions=zeros,
            temperature=ones,
            top_k=zeros,
            top_p=0.9 * ones,
            min_p=0 * ones,
            num_logprobs=zeros - 1,
            edits=LogitEdits(),
        ),
        scores=Scores(NO_INTS, NO_INTS, NO_INTS),
        num_whole=num_seqs if is_whole else 0,
    )


def _warm_up(runner: ModelRunner, block_size: int, num_slots: int) -> None:
    """Run a prompt and a decode, so that no request waits for the kernels to be compiled and loaded; the decode twice,
    since the first time it may be recorded and the second time replayed.

    Their keys and values go to blocks that nobody owns yet.
    """
    num_tokens = min(2, num_slots, runner.model.config.max_position_embeddings)
    blocks = list(range(-(-num_tokens // block_size)))
    if runner.scratch is not None:
        runner.run(_step(1, 0, num_tokens, blocks, block_size, is_whole=True))
    for num_computed in (0, num_tokens - 1, num_tokens - 1):  # all tokens at once, then the last one
        runner.run(_step(1, num_computed, num_tokens - num_computed, blocks, block_size))


def _free_gpu_bytes(config: EngineConfig, model: Decoder, device: torch.device, link: Link) -> int:
    """Bytes left for KV blocks on a GPU, measured: run the largest step there can be and see what it takes."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    blocks_per_sequence = -(-model.config.max_position_embeddings // config.block_size)
    num_sequences = min(config.max_num_seqs, config.token_budget)
    each = min(config.token_budget // num_sequences, model.config.max_position_embeddings)
    blocks_each = min(-(-each // config.block_size), blocks_per_sequence)
    try:
        runner = _runner(config, model, blocks_each, 0, blocks_each, device, link)
        # All share the same blocks: only the size of the step matters. What is drawn with top_p takes most.
        is_whole = runner.scratch is not None
        computed = runner.run(_step(num_sequences, 0, each, list(range(blocks_each)), config.block_size, is_whole))
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"a step of {config.token_budget} tokens does not fit on {device} beside the model; lower "
            "max_num_batched_tokens or max_num_seqs"
        ) from error
    step_bytes = torch.cuda.max_memory_allocated(device) - before
    del runner, computed
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(total * config.gpu_memory_utilization) - (total - free) - step_bytes
