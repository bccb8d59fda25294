"""What the launchers share: registration, tensors as rows, rounding when interpreted, and what is compile-checked."""

import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels.registry import register

_Result = TypeVar("_Result")


def launches(op: str, reference: Callable[..., _Result]) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Register the decorated launcher as Triton's `op`: the first choice on GPUs (PyTorch calls AMD's "cuda", too).

    float64 stays with the `reference`: these kernels compute in float32, and nobody needs float64 to be fast.
    """

    def decorate(launcher: Callable[..., _Result]) -> Callable[..., _Result]:
        @wraps(launcher)
        def launch(first: Tensor, *others: Any) -> _Result:
            if first.dtype == torch.float64:
                return reference(first, *others)
            with torch.cuda.device_of(first):  # Triton launches on the current device, which may be another
                return launcher(first, *others)

        register(op, backend="triton", devices=("cuda",), priority=100)(launch)
        if triton.knobs.runtime.interpret:
            register(op, backend="triton", devices=("cpu",), priority=-100)(launch)
        return launch

    return decorate


def rows(x: Tensor, width: int = 1) -> Tensor:
    """x with its leading dimensions merged into one and its last `width` kept: `[N, hidden]`, `[N, heads, head_dim]`.

    A view wherever strides allow it. Only where neighbouring features are not neighbours in memory is x copied first:
    the kernels read 16 bytes per thread at once, and one pass over memory costs less than reading single elements.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(math.prod(x.shape[:-width]), *x.shape[-width:])


def round_when_interpreted() -> None:
    """Make the interpreter round float32 to the nearest bfloat16, as GPUs and PyTorch do; on its own it chops."""
    from triton.runtime import interpreter

    chop = interpreter._convert_float

    def convert(x: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.uint16).numpy()
        return chop(x, source, target, rounding_mode)

    interpreter._convert_float = convert


if triton.knobs.runtime.interpret:
    round_when_interpreted()


class CompileCase(NamedTuple):
    """A kernel as some model's launch compiles it, for the check that compiles without a GPU.

    Triton compiles apart what is divisible by 16. Every pointer is, and so is taken to be every integer that the kernel
    does not exempt with `do_not_specialize`: sizes and strides of models are.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    label: str


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


def compile_case(
    kernel: Any, types: dict[str, str], constexprs: dict[str, Any], num_warps: int, label: str
) -> CompileCase:
    """`types` names the kernel's runtime arguments; "*" as a type means a pointer of the dtype at the label's end."""
    dtype = label.rsplit(maxsplit=1)[-1]
    signature = {}
    for name in kernel.arg_names:
        kind = "constexpr" if name in constexprs else types[name]
        signature[name] = "*" + dtype if kind == "*" else kind
    return CompileCase(kernel, signature, constexprs, num_warps, label)


def models_and_dtypes() -> Iterator[tuple[str, Shapes]]:
    """Labels that end in a dtype, each with a model's shapes."""
    for model, shapes in MODELS.items():
        for dtype in ("bf16", "fp16", "fp32"):
            yield f"{model} {dtype}", shapes
