"""Each backend against the reference in float64, over the table in `cases.py`, on each device of this machine."""

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from mini_infer import kernels

from .cases import CASES, FLOATS, Arguments, Case, Draw
from .truth import check, check_sum, on_backends


def copies(arguments: Arguments, floats: torch.dtype | None) -> Arguments:
    """The arguments again, in memory of their own, floating ones in dtype `floats` (None: their own)."""
    return {
        name: x.to(floats if x.is_floating_point() else None, copy=True) if isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }


def compare(case: Case, device: str, dtype: torch.dtype) -> None:
    arguments = case.make(Draw(device, dtype, seed=zlib.crc32(str(case).encode())))
    label = f"{case} {describe(arguments)}"
    # Where float64 would not fit the GPU, the reference's own float32 is the truth.
    expected = copies(arguments, None if case.size == "huge" else torch.float64)
    out = getattr(kernels, case.op)(**arguments)
    with kernels.use_backend("reference"):
        truth = getattr(kernels, case.op)(**expected)
    for name, x in arguments.items():  # inputs are as before, and what write_kv wrote is exact: it only copies
        if isinstance(x, Tensor):
            assert torch.equal(x.nan_to_num(7.5), expected[name].to(x.dtype).nan_to_num(7.5)), f"{case}: {name} differs"
    if case.op == "add_rmsnorm":  # the norm sees the sum rounded to the model's dtype
        out, total = out
        check_sum(total, truth[1], dtype, case=label)
        truth = rms_norm(total.double(), total.shape[-1:], expected["weight"].double(), 1e-6)
    for part, wanted in zip(out, truth, strict=True) if isinstance(out, tuple) else [(out, truth)]:
        if part is not None:
            check(part, wanted, dtype, case.slack, case=label)


def describe(arguments: Arguments) -> str:
    return ", ".join(
        f"{name} {list(x.shape)}" if isinstance(x, Tensor) else f"{name}={x}"
        for name, x in arguments.items()
        if x is not None
    )


def parity_of(op: str) -> Callable[..., Any]:
    cases = [case for case in CASES if case.op == op]

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
    @on_backends(op)
    def test(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
        compare(case, device, dtype)

    return test


test_rmsnorm = parity_of("rmsnorm")
test_add_rmsnorm = parity_of("add_rmsnorm")
test_silu_and_mul = parity_of("silu_and_mul")
test_apply_rotary_emb = parity_of("apply_rotary_emb")
test_qk_norm_rope = parity_of("qk_norm_rope")
test_write_kv = parity_of("write_kv")
test_paged_attention = parity_of("paged_attention")
test_paged_prefill_attention = parity_of("paged_prefill_attention")
