"""The engine's hot operations: one public function each, several interchangeable implementations behind it."""

from mini_infer.kernels import reference  # noqa: F401  (registers the implementations that every device falls back on)
from mini_infer.kernels.attention import AttentionMetadata
from mini_infer.kernels.by_hand import (
    add_rmsnorm,
    allocate_kv_cache,
    apply_rotary_emb,
    argmax_logprob,
    attention,
    draw_tokens,
    pack_linear,
    pack_quantized,
    paged_attention,
    paged_prefill_attention,
    qk_norm_rope,
    rmsnorm,
    silu_and_mul,
    write_kv,
)
from mini_infer.kernels.packed_linear import PackedLinear
from mini_infer.kernels.quantized import QuantizedMatrix
from mini_infer.kernels.registry import OPS, Kernels, available_backends, backend_of, register, resolve, use_backend

__all__ = [
    "OPS",
    "AttentionMetadata",
    "Kernels",
    "PackedLinear",
    "QuantizedMatrix",
    "add_rmsnorm",
    "allocate_kv_cache",
    "apply_rotary_emb",
    "argmax_logprob",
    "attention",
    "available_backends",
    "backend_of",
    "draw_tokens",
    "pack_linear",
    "pack_quantized",
    "paged_attention",
    "paged_prefill_attention",
    "qk_norm_rope",
    "register",
    "resolve",
    "rmsnorm",
    "silu_and_mul",
    "use_backend",
    "write_kv",
]
