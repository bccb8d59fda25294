"""A backend of kernels, one of which raises, stops or kills its process when the environment says so: for one rank of
one engine, at its n-th call, once or for ever."""

import os
import signal
from pathlib import Path

from torch import Tensor

from mini_infer.kernels import register
from mini_infer.kernels.reference import activation

ORDER = Path(os.environ.get("RANK_FAILURE", "/nonexistent"))
"""A file with what is to happen; whoever carries it out takes it away."""


@register("silu_and_mul", backend="failing")
def silu_and_mul(x: Tensor) -> Tensor:
    try:
        order = ORDER.read_text()
        ORDER.unlink()
    except OSError:
        order = ""
    if order == "raise":
        raise ArithmeticError("as ordered")
    if order:
        os.kill(os.getpid(), getattr(signal, order))
    return activation.silu_and_mul(x)
