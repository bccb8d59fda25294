"""Each backend against the reference in float64, over the table in `cases.py`, on each device of this machine."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .cases import CASES, FLOATS, Case
from .parity import compare
from .truth import failing_plainly, on_backends


def parity_of(op: str) -> Callable[..., Any]:
    cases = [case for case in CASES if case.op == op]

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("case", cases, ids=lambda case: case.name)
    @on_backends(op)
    def test(backend: str, device: str, case: Case, dtype: torch.dtype) -> None:
        with failing_plainly():
            compare(case, device, dtype, f"{op} on backend {backend!r} ({device})")

    return test


test_rmsnorm = parity_of("rmsnorm")
test_add_rmsnorm = parity_of("add_rmsnorm")
test_silu_and_mul = parity_of("silu_and_mul")
test_apply_rotary_emb = parity_of("apply_rotary_emb")
test_qk_norm_rope = parity_of("qk_norm_rope")
test_write_kv = parity_of("write_kv")
test_paged_attention = parity_of("paged_attention")
test_paged_prefill_attention = parity_of("paged_prefill_attention")
