"""A backend of kernels, one of which raises, stops or kills its process when the environment says so: for one rank of
one engine, at its n-th call, once or for ever."""

import os
import signal
from pathlib import Path

from torch import Tensor, distributed

from mini_infer.kernels import register
from mini_infer.kernels.reference import activation

ORDER = Path(os.environ.get("RANK_FAILURE", "/nonexistent"))
"""A file with what is to happen, and to which rank, or to whoever comes first; who carries it out takes it away."""


@register("silu_and_mul", backend="failing")
def silu_and_mul(x: Tensor) -> Tensor:
    if order := _mine():
        if order == "raise":
            raise ArithmeticError("as ordered")
        os.kill(os.getpid(), getattr(signal, order))
    return activation.silu_and_mul(x)


def _mine() -> str:
    try:
        order, _, victim = ORDER.read_text().partition(" ")
        if victim and int(victim) != distributed.get_rank():
            return ""
        ORDER.unlink()
    except OSError:
        return ""
    return order
