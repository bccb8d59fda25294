"""Arrays of the host, and how they get to a device that is busy with something else."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]


def send(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array as a tensor on the device, without waiting for what the device is busy with."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)  # pinned memory is reused only once it was copied
