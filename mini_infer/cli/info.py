"""``mini-infer info``: what a model is, and what fits beside it, before its weights are loaded."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import mini_infer
from mini_infer import kernels
from mini_infer.config import EngineConfig, ParallelOptions
from mini_infer.exceptions import InvalidCheckpointError
from mini_infer.executor.device import resolve_cache_dtype, resolve_device, resolve_dtype
from mini_infer.executor.ranks import check_layout, lay_out
from mini_infer.memory.cache_spec import block_bytes
from mini_infer.memory.sizing import CPU_KV_CACHE_BYTES, MemoryPlan, plan_memory, step_bytes
from mini_infer.models import Decoder, read_config, resolve_tokenizer
from mini_infer.models.gguf import is_gguf
from mini_infer.models.linear import Linear
from mini_infer.models.matrices import bytes_of
from mini_infer.models.quantization import quantize
from mini_infer.models.weights import weight_files
from mini_infer.parallel.group import Alone
from mini_infer.parallel.mesh import Mesh
from mini_infer.parallel.share import Share

LIBRARIES = ("torch", "transformers", "triton", "numba")


@dataclass(frozen=True)
class Model:
    """What ``config.json`` says, and how large the files beside it are.

    Attributes:
        num_parameters: counted once where the output projection is the embedding.
        num_heads, num_kv_heads, head_dim, intermediate_size: of the first layer.
        max_position_embeddings: the longest context.
        checkpoint_bytes: of the safetensors files; None where they are not on this machine.
    """

    directory: str
    architecture: str
    num_parameters: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    checkpoint_dtype: str | None
    checkpoint_bytes: int | None


@dataclass(frozen=True)
class Memory:
    """The plan; sizes are in bytes.

    Attributes:
        dtype: what is computed in, and of weights that are not quantised.
        kv_cache_dtype: of keys and values.
        device_bytes: the device's memory, all of it; None where this cannot be asked.
        weight_bytes: the parameters; of a quantised checkpoint, about what its files have.
        rotary_bytes: the tables of rotary embedding.
        step_bytes: set aside for the largest step; 0 on a CPU, where nothing is set aside.
        kv_bytes_per_token: keys and values of one token in every layer.
        num_blocks, block_size, num_tokens: the KV memory; ``num_tokens`` is their product.
        kv_bytes: what it takes.
        num_cpu_blocks, cpu_kv_bytes: likewise, for swapped sequences.
        max_model_len: most tokens of one sequence.
        num_longest: sequences of that length that fit at once.
        estimated: the number of blocks follows from an estimate. An engine measures, so it may find a few more or less.
        warning: why ``max_model_len`` is less than wished for.
    """

    dtype: str
    kv_cache_dtype: str
    device_bytes: int | None
    weight_bytes: int
    rotary_bytes: int
    step_bytes: int
    kv_bytes_per_token: int
    block_size: int
    num_blocks: int
    num_tokens: int
    kv_bytes: int
    num_cpu_blocks: int
    cpu_kv_bytes: int
    max_num_seqs: int
    max_model_len: int
    num_longest: int
    estimated: bool
    warning: str | None


@dataclass(frozen=True)
class Rank:
    """What one rank of a replica has.

    Attributes:
        layers, tokens: from and to (not included); of the vocabulary, in the first and the last stage.
        num_heads, num_kv_heads, intermediate_size: of its first layer.
        kv_bytes_per_token: what its layers keep of a token.
    """

    rank: int
    layers: tuple[int, int]
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    tokens: tuple[int, int]
    num_parameters: int
    weight_bytes: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, rank: int, part: Decoder, cache_dtype: torch.dtype, weight_bytes: int) -> "Rank":
        first, share = part.config.layers[part.span.start], part.share
        has_tokens = part.output is not None or part.embedding is not None
        return cls(
            rank=rank,
            layers=(part.span.start, part.span.stop),
            num_heads=len(share.heads(first.attention.num_heads)),
            num_kv_heads=len(share.kv_heads(first.attention.num_kv_heads)),
            intermediate_size=len(share.features(first.feed_forward.intermediate_size)),
            tokens=(part.tokens.start, part.tokens.stop) if has_tokens else (0, 0),
            num_parameters=part.num_parameters,
            weight_bytes=weight_bytes,
            kv_bytes_per_token=block_bytes(part.config.cache_specs(cache_dtype, share), 1),
        )


def show_info(config: EngineConfig, console: Console, as_json: bool) -> None:
    """Print what there is to know.

    Raises:
        ModelNotFoundError, InvalidCheckpointError, UnsupportedModelError: about the checkpoint.
        OutOfMemoryError: not one KV block fits, or not ``config.max_model_len`` tokens.
    """
    config, devices = lay_out(config)
    device = resolve_device(devices[0])
    chosen = kernels.resolve(device, config.kernel_backend)  # refuses an unknown one
    backends = {op: chosen.backend_of(op) for op in kernels.OPS}
    # What a tokenizer needs is all files but the weights: nobody wants to fetch these to learn that they do not fit.
    directory = resolve_tokenizer(str(config.model), config.revision, config.cache_dir)
    shape = read_config(directory)
    dtype = resolve_dtype(config.dtype, shape.dtype, chosen)
    cache_dtype = resolve_cache_dtype(config.kv_cache_dtype, dtype)
    check_layout(config, shape)
    decoder = Decoder(shape, dtype, "meta", chosen)
    shares = _shares(config)
    parts = [Decoder(shape, dtype, "meta", chosen, share) for share in shares]
    in_files = _checkpoint_bytes(directory)
    coded = shape.quantization is not None or is_gguf(directory)

    def weight_bytes(part: Decoder) -> int:
        if coded and in_files is not None:
            return in_files * part.num_parameters // decoder.num_parameters
        return _weight_bytes(part, config.quantization, device.type)

    ranks = [Rank.of(number, part, cache_dtype, weight_bytes(part)) for number, part in enumerate(parts)]
    fullest = max(parts, key=lambda part: block_bytes(shape.cache_specs(cache_dtype, part.share), 1))
    attention, feed_forward = shape.layers[0].attention, shape.layers[0].feed_forward
    model = Model(
        directory=str(directory),
        architecture=shape.architecture,
        num_parameters=decoder.num_parameters,
        num_layers=shape.num_layers,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        hidden_size=shape.hidden_size,
        intermediate_size=feed_forward.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position_embeddings,
        checkpoint_dtype=None if shape.dtype is None else _plain(shape.dtype),
        checkpoint_bytes=in_files,
    )
    plan, memory = _plan(config, fullest, device, weight_bytes(fullest))
    if as_json:
        facts = {
            "versions": _versions(),
            "device": {"name": str(device), "description": _description(device)},
            "kernels": backends,
            "model": asdict(model),
            "memory": asdict(memory),
            "replicas": config.data_parallel_size,
            "ranks": [asdict(rank) for rank in ranks] if len(ranks) > 1 else [],
        }
        console.file.write(json.dumps(facts, ensure_ascii=False, indent=2) + "\n")
    else:
        console.print(_model_table(model))
        if len(ranks) > 1:
            console.print(_ranks_table(ranks))
        console.print(_memory_table(memory, device))
        console.print(_machine_table(device, backends))
    plan.check(str(device))


def _weight_bytes(model: Decoder, scheme: str | None, device: str) -> int:
    """What a model's weights take once they are quantised, which asks for their shapes alone."""
    quantize(model, scheme, device)
    linear = [module for module in model.modules() if isinstance(module, Linear) and module.scheme is not None]
    saved = sum(module.weight.nbytes - bytes_of(module.scheme(module.weight)) for module in linear if module.scheme)
    return model.weight_bytes - saved


def _plan(config: EngineConfig, model: Decoder, device: torch.device, weight_bytes: int) -> tuple[MemoryPlan, Memory]:
    """What an engine of this configuration would lay out.

    Raises:
        OutOfMemoryError: ``config.max_model_len`` tokens do not fit.
    """
    shape, on_cpu = model.config, device.type == "cpu"
    longest = min(config.max_model_len or shape.max_position_embeddings, shape.max_position_embeddings)
    step, free = 0, CPU_KV_CACHE_BYTES
    if not on_cpu:
        num_sequences = min(config.max_num_seqs, config.token_budget)
        widest = max(layer.feed_forward.intermediate_size for layer in shape.layers)
        step = step_bytes(
            config.token_budget, num_sequences, shape.hidden_size, widest, shape.vocab_size, model.dtype.itemsize
        )
        unused, total = torch.cuda.mem_get_info(device)
        taken = weight_bytes + _rotary_bytes(model, longest) + step
        free = int(total * config.gpu_memory_utilization) - (total - unused) - taken
    cache_dtype = resolve_cache_dtype(config.kv_cache_dtype, model.dtype)
    plan = plan_memory(
        shape.cache_specs(cache_dtype, model.share),
        free,
        block_size=config.block_size,
        num_blocks=config.num_gpu_blocks,
        num_cpu_blocks=config.num_cpu_blocks,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        model_limit=shape.max_position_embeddings,
        keeps_all=not shape.computes_whole,
    )
    return plan, Memory(
        dtype=_plain(model.dtype),
        kv_cache_dtype=_plain(cache_dtype),
        device_bytes=_device_bytes(device),
        weight_bytes=weight_bytes,
        rotary_bytes=_rotary_bytes(model, plan.max_model_len),
        step_bytes=step,
        kv_bytes_per_token=plan.bytes_per_block // plan.block_size,
        block_size=plan.block_size,
        num_blocks=plan.num_blocks,
        num_tokens=plan.num_blocks * plan.block_size,
        kv_bytes=plan.kv_bytes,
        num_cpu_blocks=plan.num_cpu_blocks,
        cpu_kv_bytes=plan.num_cpu_blocks * plan.bytes_per_block,
        max_num_seqs=config.max_num_seqs,
        max_model_len=plan.max_model_len,
        num_longest=plan.num_blocks // plan.blocks_per_sequence if plan.num_blocks else 0,
        estimated=not on_cpu and config.num_gpu_blocks is None,
        warning=plan.warning,
    )


def _shares(config: ParallelOptions) -> list[Share]:
    """Of each rank of a replica, who need not be there for it."""
    mesh = replace(Mesh.of(config), replicas=1)
    places = [mesh.place(rank) for rank in range(mesh.size)]
    return [Share(Alone(place.shard, mesh.shards), place.stage, mesh.stages) for place in places]


def _rotary_bytes(model: Decoder, max_model_len: int) -> int:
    """What the model's rotary tables take in an engine, which makes them no longer than its longest sequence."""
    return model.rotary_bytes // model.config.max_position_embeddings * max_model_len


# ---- tables ------------------------------------------------------------------------------------------------------


def _table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _model_table(model: Model) -> Table:
    size = "not on this machine yet" if model.checkpoint_bytes is None else _size(model.checkpoint_bytes)
    rows = {
        "directory · 目录": model.directory,
        "architecture · 架构": model.architecture,
        "parameters · 参数量": f"{model.num_parameters:,}",
        "layers · 层数": str(model.num_layers),
        "heads · 注意力头": f"{model.num_heads} query, {model.num_kv_heads} KV, {model.head_dim} wide",
        "hidden, intermediate · 隐藏与中间维度": f"{model.hidden_size}, {model.intermediate_size}",
        "vocabulary · 词表": f"{model.vocab_size:,}",
        "context · 上下文长度": f"{model.max_position_embeddings:,} tokens",
        "checkpoint · 检查点": f"{size}, {model.checkpoint_dtype or 'dtype not stated'}",
    }
    return _table("Model · 模型", rows)


def _ranks_table(ranks: Sequence[Rank]) -> Table:
    table = Table(title="Each rank · 各个 rank", title_justify="left")
    for column in (
        "rank",
        "layers · 层",
        "heads · 头",
        "features · 特征",
        "vocabulary · 词表",
        "weights · 权重",
        "KV / token",
    ):
        table.add_column(column)
    for rank in ranks:
        table.add_row(
            str(rank.rank),
            f"{rank.layers[0]}-{rank.layers[1] - 1}",
            f"{rank.num_heads}, {rank.num_kv_heads} KV",
            str(rank.intermediate_size),
            f"{rank.tokens[0]}-{rank.tokens[1] - 1}" if rank.tokens[1] else "",
            _size(rank.weight_bytes),
            _size(rank.kv_bytes_per_token),
        )
    return table


def _memory_table(memory: Memory, device: torch.device) -> Table:
    about = "about " if memory.estimated else ""
    rows = {
        "weights · 权重": f"{_size(memory.weight_bytes)} as {memory.dtype}",
        "rotary tables · 旋转位置表": _size(memory.rotary_bytes),
    }
    if memory.step_bytes:
        rows["largest step · 最大一步"] = f"about {_size(memory.step_bytes)}"
    rows |= {
        "KV per token · 每词元的 KV": f"{_size(memory.kv_bytes_per_token)} as {memory.kv_cache_dtype}",
        "KV blocks · KV 块": f"{about}{memory.num_blocks:,} of {memory.block_size} tokens, {_size(memory.kv_bytes)}",
        "tokens that fit · 可容纳词元": f"{about}{memory.num_tokens:,}",
        "longest sequence · 最长序列": f"{memory.max_model_len:,} tokens",
        "such sequences at once · 同时容纳": f"{about}{memory.num_longest:,} (max_num_seqs is {memory.max_num_seqs})",
    }
    if memory.num_cpu_blocks:
        rows["swap blocks · 换出块"] = f"{memory.num_cpu_blocks:,} in CPU memory, {_size(memory.cpu_kv_bytes)}"
    if memory.device_bytes is not None:
        rows[f"memory of {device} · 设备内存"] = _size(memory.device_bytes)
    if memory.warning is not None:
        rows["warning · 警告"] = memory.warning
    return _table("Memory plan · 内存规划", rows)


def _machine_table(device: torch.device, backends: dict[str, str]) -> Table:
    used = sorted(set(backends.values()), key=list(backends.values()).count, reverse=True)
    ran_by = {backend: [op for op in backends if backends[op] == backend] for backend in used}
    rows = {
        "device · 设备": f"{device}: {_description(device)}",
        "kernels · 算子": "\n".join(f"{backend}: {', '.join(ops)}" for backend, ops in ran_by.items()),
        "versions · 版本": ", ".join(f"{name} {number}" for name, number in _versions().items() if number),
    }
    return _table("Machine · 机器", rows)


# ---- facts -------------------------------------------------------------------------------------------------------


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:,.0f} {unit}" if num_bytes == int(num_bytes) else f"{num_bytes:,.1f} {unit}"


def _checkpoint_bytes(directory: Path) -> int | None:
    try:
        return sum(path.stat().st_size for path in weight_files(directory))
    except InvalidCheckpointError:  # not fetched, or not completely
        return None


def _versions() -> dict[str, Any]:
    versions = {"mini-infer": mini_infer.__version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _description(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} logical cores"


def _device_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
