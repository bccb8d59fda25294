"""How launches of real models compile each Triton kernel: what of a model and a device the compiler gets to know."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from mini_infer.kernels.triton import (
    add_rmsnorm,
    kv_write,
    paged_attention,
    prefill_attention,
    qk_norm_rope,
    quantized_linear,
    rmsnorm,
    rope,
    silu_and_mul,
    w8a8_linear,
)
from mini_infer.kernels.triton.launch import Device


class CompileCase(NamedTuple):
    """A kernel as some model's launch compiles it.

    Triton compiles apart what is divisible by 16. Every pointer is, and so is taken to be every integer that the kernel
    does not exempt with `do_not_specialize`: sizes and strides of models are.
    """

    label: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]


class Shapes(NamedTuple):
    """What of a model decides how the kernels are compiled for it."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int


MODELS = {
    "Llama-3-8B": Shapes(4096, 32, 8, 128, 14336),
    "Qwen3-0.6B": Shapes(1024, 16, 8, 128, 3072),
    "tutor": Shapes(256, 8, 4, 32, 768),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""By the compiler's names."""


def compile_cases(device: Device) -> Iterator[CompileCase]:
    """All of them, for one kind of device."""
    yield from _norms()
    yield from _gates()
    yield from _rotations(rope.rope_kernel, "rope")
    yield from _rotations(qk_norm_rope.qk_norm_rope_kernel, "qk_norm_rope", q_weight="*", k_weight="*", eps="fp32")
    yield from _writes()
    yield from _decodes(device)
    yield from _prefills(device)
    yield from _quantized(device)
    yield from _in_8_bits(device)


def _case(label: str, kernel: Any, types: dict[str, str], constexprs: dict[str, Any], **options: int) -> CompileCase:
    """`types` are those of the arguments that are no plain sizes; "*" is a pointer to the dtype at the label's end."""
    dtype = label.rsplit(maxsplit=1)[-1]
    signature = {}
    for name in kernel.arg_names:
        kind = "constexpr" if name in constexprs else types.get(name, "i32")
        signature[name] = "*" + dtype if kind == "*" else kind
    return CompileCase(label, kernel, signature, constexprs, options)


def _models_and_dtypes() -> Iterator[tuple[str, Shapes]]:
    """Labels that end in a dtype, each with a model's shapes."""
    for model, shapes in MODELS.items():
        for dtype in DTYPES:
            yield f"{model} {dtype}", shapes


def _norms() -> Iterator[CompileCase]:
    for name, kernel in (("rmsnorm", rmsnorm.rmsnorm_kernel), ("add_rmsnorm", add_rmsnorm.add_rmsnorm_kernel)):
        types = dict.fromkeys(("x", "residual", "weight", "y", "total"), "*") | {"eps": "fp32"}
        for label, shapes in _models_and_dtypes():
            tile = rmsnorm.config(shapes.hidden_size)
            constexprs = {"ROWS": tile.rows, "BLOCK": tile.block}
            yield _case(f"{name} {label}", kernel, types, constexprs, num_warps=tile.num_warps)


def _gates() -> Iterator[CompileCase]:
    kernel, types = silu_and_mul.silu_and_mul_kernel, {"x": "*", "y": "*"}
    for label, shapes in _models_and_dtypes():
        tile = silu_and_mul.config(shapes.intermediate_size)
        constexprs = {"ROWS": tile.rows, "BLOCK": tile.block}
        yield _case(f"silu_and_mul {label}", kernel, types, constexprs, num_warps=tile.num_warps)


def _rotations(kernel: Any, name: str, **norm: str) -> Iterator[CompileCase]:
    types = dict.fromkeys(("q", "k", "q_out", "k_out"), "*") | {"cos": "*fp32", "sin": "*fp32", "positions": "*i64"}
    for label, shapes in _models_and_dtypes():
        half = shapes.head_dim // 2
        tile = rope.config(shapes.num_heads, shapes.num_kv_heads, shapes.head_dim, half)
        for order, interleaved in (("half-split", False), ("interleaved", True)):
            constexprs = rope.constexprs(shapes.head_dim, half, interleaved, tile)
            yield _case(f"{name} {order} {label}", kernel, types | norm, constexprs, num_warps=tile.num_warps)


def _writes() -> Iterator[CompileCase]:
    unit_strides = dict.fromkeys(("k_dim_stride", "v_dim_stride", "kc_dim_stride", "vc_dim_stride"), 1)
    types = dict.fromkeys(("key", "value", "key_cache", "value_cache"), "*") | {"slots": "*i64", "kv_scales": "*bf16"}
    for label, shapes in _models_and_dtypes():
        tile = kv_write.config(shapes.num_kv_heads, shapes.head_dim)
        constexprs = {"head_dim": shapes.head_dim, "HEADS": tile.heads, "DIM": tile.dim, **unit_strides}
        for kind, cache in CACHES.items():
            yield _case(
                f"kv_write {kind} {label}",
                kv_write.kv_write_kernel,
                types | dict.fromkeys(("key_cache", "value_cache"), cache),
                constexprs | {"KIND": kind, "LIMIT": 127.0},
                num_warps=tile.num_warps,
            )


ATTENTION_TYPES = {
    **dict.fromkeys(("query", "key_cache", "value_cache", "out"), "*"),
    **dict.fromkeys(("block_tables", "context_lens", "query_start"), "*i32"),
    **dict.fromkeys(("partial", "log_sums"), "*fp32"),
    "scale": "fp32",
    "kv_scales": "*bf16",
}
CACHES = {"": "*", "int8": "*i8", "fp8": "*u8"}
"""What a cache holds, by the kind of its codes; "" is the label's dtype."""
UNIT_STRIDES = {"key_stride_dim": 1, "value_stride_dim": 1}


def _decodes(device: Device) -> Iterator[CompileCase]:
    for model, shapes in MODELS.items():
        for name, dtype in DTYPES.items():
            for block_size in (16, 256):
                for split, kind in ((False, "int8"), (True, "fp8"), (False, ""), (True, "")):
                    plan = paged_attention.config(shapes.head_dim, dtype.itemsize, device, kind != "")
                    sizes = paged_attention.tile_sizes(
                        shapes.num_heads // shapes.num_kv_heads, shapes.head_dim, block_size, plan
                    )
                    caches = dict.fromkeys(("key_cache", "value_cache"), CACHES[kind])
                    yield _case(
                        f"paged_attention {kind} block_size={block_size} split={split} {model} {name}",
                        paged_attention.paged_attention_kernel,
                        ATTENTION_TYPES | caches | ({"out": "*fp32"} if split else {}),
                        {**UNIT_STRIDES, **sizes, "SPLIT": split, "KIND": kind},
                        num_warps=plan.num_warps,
                        num_stages=plan.num_stages,
                    )
            yield _case(
                f"combine {model} {name}",
                paged_attention.combine_kernel,
                ATTENTION_TYPES,
                {size: sizes[size] for size in ("HEAD_DIM", "COLS", "TILE")},
                num_warps=plan.num_warps,
            )


def _prefills(device: Device) -> Iterator[CompileCase]:
    for model, shapes in MODELS.items():
        group = shapes.num_heads // shapes.num_kv_heads
        for name, dtype in DTYPES.items():
            for block_size, seen, kind in (
                (16, "causal", ""),
                (256, "causal", ""),
                (16, "in spans", ""),
                (16, "causal", "int8"),
                (16, "causal", "fp8"),
            ):
                plan = prefill_attention.config(
                    group, shapes.head_dim, dtype.itemsize, device, seen == "causal", kind != ""
                )
                sizes = prefill_attention.tile_sizes(shapes.num_kv_heads, group, shapes.head_dim, block_size, plan)
                yield _case(
                    f"paged_prefill_attention {kind} block_size={block_size} {seen} {model} {name}",
                    prefill_attention.paged_prefill_attention_kernel,
                    ATTENTION_TYPES | dict.fromkeys(("key_cache", "value_cache"), CACHES[kind]),
                    {**UNIT_STRIDES, **sizes, "CAUSAL": seen == "causal", "KIND": kind},
                    num_warps=plan.num_warps,
                    num_stages=plan.num_stages,
                )


def _quantized(device: Device) -> Iterator[CompileCase]:
    """Formats that differ for the compiler, for a few tokens and for many; the models' sizes do not.

    Two of them stand for the largest model's, which are always compiled.
    """
    formats = {  # the codes' type, a group, whether there are offsets
        "int8": ("*i8", 4096, False),
        "fp8": ("*u8", 128, False),
        "int4": ("*u8", 32, True),
        "table": ("*u8", 32, False),
    }
    chosen = [(kind, name, many) for kind in formats for name in ("fp16", "bf16") for many in (False, True)]
    for kind, name, many in [*chosen, ("int8", "fp32", True), ("table", "fp32", True)]:
        codes, group, offsets = formats[kind]
        types = dict.fromkeys(("x", "bias", "out"), "*") | dict.fromkeys(("scales", "offsets"), "*fp16")
        types |= {"table": "*fp32", "codes": codes} | ({} if many else {"out": "*fp32"})
        tile = quantized_linear.config(512 if many else 1, 8 if group > 32 else 4, DTYPES[name].itemsize, device)
        model = "Llama-3-8B" if (kind, many, name) in (("int4", False, "fp16"), ("table", True, "fp16")) else "other"
        yield _case(
            f"quantized_linear {model} {kind} {'many' if many else 'few'} {name}",
            quantized_linear.quantized_linear_kernel,
            types,
            quantized_linear.constexprs(tile, kind, group, not many) | {"HAS_OFFSETS": offsets, "HAS_BIAS": True},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    yield _case(
        "add_splits Llama-3-8B fp16",
        quantized_linear.add_splits_kernel,
        {"partial": "*fp32", "bias": "*", "out": "*"},
        {"HAS_BIAS": True, "BLOCK": quantized_linear.ADDED},
    )


def _in_8_bits(device: Device) -> Iterator[CompileCase]:
    tile = w8a8_linear.config(device)
    for kind, limit in (("i8", 127.0), ("fp8e4nv", 448.0)):
        if not (device.tensor_cores if kind == "i8" else device.float8):
            continue
        codes, sides = {"codes": f"*{kind}"}, {"x_scales": "*fp32", "scales": "*fp16", "bias": "*", "out": "*"}
        yield _case(
            f"round_tokens Llama-3-8B {kind} fp16",
            w8a8_linear.round_tokens_kernel,
            {"x": "*", "scales": "*fp32"} | codes,
            {"LIMIT": limit, "BLOCK": w8a8_linear.BLOCK},
            num_warps=1,
        )
        yield _case(
            f"w8a8_linear Llama-3-8B {kind} fp16",
            w8a8_linear.w8a8_linear_kernel,
            {"x": f"*{kind}"} | codes | sides,
            {"HAS_BIAS": True, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK": w8a8_linear.BLOCK},
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
