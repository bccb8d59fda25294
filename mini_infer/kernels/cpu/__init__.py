"""The kernels that make a CPU fast, written in Python and compiled by Numba on the machine that runs them.

Importing this package needs numba (the extra `cpu`) and registers the backend; `mini_infer.kernels` does so when a
kernel is first looked up, and does without where numba is not installed. Start with `norm`; `jit` explains how a kernel
is written and run, `tile` is the one inner loop under all matrix products.

bfloat16 and float32 only: other dtypes go to the reference.
"""

from mini_infer.kernels.cpu import (
    activation,
    kv_cache,
    linear,
    norm,
    paged_attention,
    prefill_attention,
    quantized,
    rotary,
    sampling,
)

__all__ = [
    "activation",
    "kv_cache",
    "linear",
    "norm",
    "paged_attention",
    "prefill_attention",
    "quantized",
    "rotary",
    "sampling",
]
