"""What the launchers share: registration, the device, tensors as rows, rounding when interpreted, compile cases."""

import math
from collections.abc import Callable, Iterator
from functools import cache, wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from mini_infer.kernels.registry import register

_Result = TypeVar("_Result")


def launches(
    op: str, reference: Callable[..., _Result], fits: Callable[..., bool] = lambda *_: True
) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Register the decorated launcher as Triton's `op`: the first choice on GPUs (PyTorch calls AMD's "cuda", too).

    The `reference` takes what no kernel is made for: arguments for which `fits` is false, whose tiles would outgrow
    registers and shared memory, and float64: the kernels compute in float32, and nobody needs float64 to be fast.
    """

    def decorate(launcher: Callable[..., _Result]) -> Callable[..., _Result]:
        @wraps(launcher)
        def launch(first: Tensor, *others: Any) -> _Result:
            if first.dtype == torch.float64 or not fits(first, *others):
                return reference(first, *others)
            with torch.cuda.device_of(first):  # Triton launches on the current device, which may be another
                return launcher(first, *others)

        register(op, backend="triton", devices=("cuda",), priority=100)(launch)
        if triton.knobs.runtime.interpret:
            register(op, backend="triton", devices=("cpu",), priority=-100)(launch)
        return launch

    return decorate


class Device(NamedTuple):
    """What of a device decides how a launch is cut into programs."""

    shared_memory: int  # bytes that one program may use
    num_sms: int
    tensor_cores: bool  # whether Triton multiplies 16-bit numbers on them; Turing's it leaves idle


# A modest one for the interpreter: few programs, yet it does split contexts.
NO_GPU = Device(shared_memory=99 * 1024, num_sms=4, tensor_cores=True)


def device_of(tensor: Tensor) -> Device:
    return _query(tensor.device.index) if tensor.is_cuda else NO_GPU


@cache
def _query(index: int) -> Device:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    turing = torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0)
    return Device(properties["max_shared_mem"], properties["multiprocessor_count"], tensor_cores=not turing)


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


def compile_case(
    label: str, kernel: Any, types: dict[str, str], constexprs: dict[str, Any], **options: int
) -> CompileCase:
    """`types` are those of the arguments that are no plain sizes; "*" is a pointer to the dtype at the label's end."""
    dtype = label.rsplit(maxsplit=1)[-1]
    signature = {}
    for name in kernel.arg_names:
        kind = "constexpr" if name in constexprs else types.get(name, "i32")
        signature[name] = "*" + dtype if kind == "*" else kind
    return CompileCase(label, kernel, signature, constexprs, options)


def models_and_dtypes() -> Iterator[tuple[str, Shapes]]:
    """Labels that end in a dtype, each with a model's shapes."""
    for model, shapes in MODELS.items():
        for dtype in DTYPES:
            yield f"{model} {dtype}", shapes
