"""The GPU kernels, one file per family, each to be read as a lesson: its docstring explains, its kernel is the proof.

Importing this package needs triton and registers the backend; `mini_infer.kernels` does so when a kernel is first
looked up, and does without where triton is not installed. Start with `rmsnorm`; `launch` holds what launchers share.

With TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors, one program after the other in NumPy: slow,
but print() and a debugger work inside them.
"""

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

__all__ = [
    "add_rmsnorm",
    "kv_write",
    "paged_attention",
    "prefill_attention",
    "qk_norm_rope",
    "quantized_linear",
    "rmsnorm",
    "rope",
    "silu_and_mul",
    "w8a8_linear",
]
