"""What the launchers share: registration, the device, tensors as rows, rounding when interpreted."""

import math
from collections.abc import Callable
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

        register_launcher(op, launch)
        return launch

    return decorate


def register_launcher(op: str, launch: Callable[..., Any]) -> None:
    """The first choice on GPUs; and where Triton is interpreted, the last on a CPU."""
    register(op, backend="triton", devices=("cuda",), priority=100)(launch)
    if triton.knobs.runtime.interpret:
        register(op, backend="triton", devices=("cpu",), priority=-100)(launch)


class Device(NamedTuple):
    """What of a device decides how a launch is cut into programs."""

    shared_memory: int  # bytes that one program may use
    num_sms: int
    tensor_cores: bool  # whether Triton multiplies 16-bit numbers on them; Turing's it leaves idle
    float8: bool = False  # whether they multiply float8_e4m3fn
    lanes: int = 32  # threads of a warp


# A modest one for the interpreter: few programs, yet it does split contexts.
NO_GPU = Device(shared_memory=99 * 1024, num_sms=4, tensor_cores=True, float8=True)


def device_of(tensor: Tensor) -> Device:
    return _query(tensor.device.index) if tensor.is_cuda else NO_GPU


@cache
def _query(index: int) -> Device:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    turing = torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0)
    float8 = torch.version.hip is None and torch.cuda.get_device_capability(index) >= (8, 9)
    lanes = 32 if torch.version.hip is None else 64
    return Device(properties["max_shared_mem"], properties["multiprocessor_count"], not turing, float8, lanes)


def rows(x: Tensor, width: int = 1) -> Tensor:
    """x with its leading dimensions merged into one and its last `width` kept: `[N, hidden]`, `[N, heads, head_dim]`.

    A view wherever strides allow it. Only where neighbouring features are not neighbours in memory is x copied first:
    the kernels read 16 bytes per thread at once, and one pass over memory costs less than reading single elements.
    """
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.reshape(math.prod(x.shape[:-width]), *x.shape[-width:])


def round_when_interpreted() -> None:
    """Make the interpreter round float32 to the nearest bfloat16 or float8, as GPUs and PyTorch do; it chops."""
    from triton.runtime import interpreter

    chop = interpreter._convert_float

    def convert(x: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(x)).to(torch.bfloat16).view(torch.uint16).numpy()
        if source == tl.float32 and target == tl.float8e4nv:
            return torch.from_numpy(np.ascontiguousarray(x)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return chop(x, source, target, rounding_mode)

    interpreter._convert_float = convert


if triton.knobs.runtime.interpret:
    round_when_interpreted()
