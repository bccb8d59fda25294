"""Which device, and which dtype on it."""

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mini_infer.exceptions import InvalidConfigError
from mini_infer.kernels import Kernels

logger = logging.getLogger(__name__)

_ALIGNMENT = 16
"""Bytes; Triton reads so many at once."""

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def resolve_device(name: str) -> torch.device:
    """The device that ``EngineConfig.device`` means here.

    Raises:
        InvalidConfigError: there is no such device, or none of that kind.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidConfigError(f"device={name!r} is not a device; use 'auto', 'cpu', 'cuda' or 'cuda:0'") from error
    if device.type not in ("cpu", "cuda"):
        raise InvalidConfigError(f"device={name!r}: Mini-Infer runs on 'cpu' and 'cuda' (NVIDIA or AMD) devices")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidConfigError(f"device={name!r} but torch sees {torch.cuda.device_count()} GPUs; use 'auto'")
    return device


def expand_devices(names: str) -> list[str]:
    """Each device that ``EngineConfig.device`` names: ``cuda:*`` is all GPUs, ``cuda:0-3`` four, ``cpu:2`` two ranks on
    this machine's processor."""
    devices: list[str] = []
    for name in names.split(","):
        kind, _, which = name.strip().partition(":")
        first, _, last = which.partition("-")
        if kind == "cuda" and which == "*":
            devices += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        elif kind == "cuda" and first.isdecimal() and last.isdecimal():
            devices += [f"cuda:{number}" for number in range(int(first), int(last) + 1)]
        elif kind == "cpu" and which.isdecimal():
            devices += ["cpu"] * int(which)
        else:
            devices.append(name.strip())
    return devices


def on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which the device is the current one: streams, events and recordings are those of that device."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def wait_for(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def send_arrays(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays as tensors on the device: to a GPU all of them in one copy, which nobody waits for."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed, places = pack(arrays, pinned=True)
    return unpack(packed.to(device, non_blocking=True), places)


class Place(NamedTuple):
    """Where an array is in a buffer of bytes."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def pack(arrays: Sequence[np.ndarray], pinned: bool) -> tuple[Tensor, list[Place]]:
    """Copy arrays into one buffer, each where any dtype may begin."""
    places, size = [], 0
    for array in arrays:
        places.append(Place(size, torch.from_numpy(array).dtype, array.shape))
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
    for array, view in zip(arrays, unpack(buffer, places), strict=True):
        view.copy_(torch.from_numpy(array))
    return buffer, places


def unpack(buffer: Tensor, places: Sequence[Place]) -> list[Tensor]:
    """The arrays that ``pack`` put into a buffer, as views of it."""
    return [
        buffer[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for offset, dtype, shape in places
    ]


def resolve_dtype(name: str, checkpoint_dtype: torch.dtype | None, kernels: Kernels) -> torch.dtype:
    """The dtype that ``EngineConfig.dtype`` means: its own name, or for "auto" the checkpoint's where the device can.

    A CPU computes float16 slowly, and PyTorch bfloat16 too if the CPU lacks the instructions; our own kernels do well
    without. A GPU older than Ampere has no bfloat16. There "auto" takes the next best and logs it.
    """
    if name != "auto":
        return _DTYPES[name]
    wanted = checkpoint_dtype if checkpoint_dtype in _DTYPES.values() else torch.float32
    assert wanted is not None
    device = kernels.device
    if device.type == "cpu":
        widens = kernels.backend_of("pack_linear") == "cpu"
        half = torch.bfloat16 if widens or _cpu_has_bfloat16() else torch.float32
        chosen = half if wanted in (torch.float16, torch.bfloat16) else wanted
    elif wanted is torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        chosen = torch.float16
    else:
        chosen = wanted
    if chosen is not wanted:
        logger.warning("dtype 'auto': the checkpoint is %s, at which this %s is poor; using %s", wanted, device, chosen)
    return chosen


def resolve_cache_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What ``EngineConfig.kv_cache_dtype`` means for a model that computes in ``dtype``."""
    return {"auto": dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[name]


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX-512 BF16, AMX, or Arm's BF16 extension)."""
    try:
        capabilities = torch.cpu.get_capabilities()
    except (AttributeError, RuntimeError):  # torch before 2.10
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16"))
