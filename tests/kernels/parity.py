"""Whether a result is right: tolerances, poisoned memory, and a case of the table beside its truth.

Nothing here needs pytest, so that a machine without it can be checked, too.
"""

import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from mini_infer import kernels

from .cases import Arguments, Case, Draw

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
HEADS = ("apply_rotary_emb", "qk_norm_rope", "paged_attention", "paged_prefill_attention")
"""Operations whose rows are heads of tokens."""


class Mismatch(AssertionError):
    """A result that is not the truth."""


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every tensor that is allocated without a value holds NaN (integers: their maximum), for all backends alike."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that some other operation is not deterministic is of no interest here
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill


def compare(case: Case, device: str, dtype: torch.dtype, call: str) -> float:
    """Run a case on the backend in use and on the reference in float64.

    Returns:
        The worst row's error, as a share of what is tolerated.

    Raises:
        Mismatch: that share is 1 or more, a sum is not exact, or an argument changed that should not have.
    """
    arguments = case.make(Draw(device, dtype, seed=zlib.crc32(str(case).encode())))
    error = _compare(arguments, case, dtype, call)
    if "key_cache" in arguments:  # any layout must do; a backend is at its fastest on the one that it allocates itself
        error = max(error, _compare(in_own_layout(arguments), case, dtype, call + ", its own cache layout"))
    return error


def in_own_layout(arguments: Arguments) -> Arguments:
    """The arguments with the caches as the backend in use allocates them."""
    caches = arguments["key_cache"], arguments["value_cache"]
    shape, dtype, device = caches[0].shape, caches[0].dtype, caches[0].device
    own = kernels.allocate_kv_cache(*shape, dtype, device)
    for mine, given in zip(own[:2], caches, strict=True):
        mine.copy_(given)
    return {**arguments, "key_cache": own[0], "value_cache": own[1]}


def _compare(arguments: Arguments, case: Case, dtype: torch.dtype, call: str) -> float:
    label = f"{case} {_describe(arguments)}"
    # Where float64 would not fit the GPU, the reference's own float32 is the truth.
    expected = _copies(arguments, None if case.size == "huge" else torch.float64)
    out = getattr(kernels, case.op)(**arguments)
    with kernels.use_backend("reference"):
        truth = getattr(kernels, case.op)(**expected)
    for name, x in arguments.items():  # inputs are as before, and what write_kv wrote is exact
        if isinstance(x, Tensor) and not torch.equal(*(y.double().nan_to_num(7.5) for y in (x, expected[name]))):
            raise Mismatch(f"{call}: {name} differs\n  case: {label}")
    if case.op == "add_rmsnorm":  # the norm sees the sum rounded to the model's dtype
        out, total = out
        check_sum(total, truth[1], dtype, call, label)
        truth = rms_norm(total.double(), total.shape[-1:], expected["weight"].double(), 1e-6)
    if out is None:
        return 0.0
    if not isinstance(out, tuple):
        out, truth = (out,), (truth,)
    return max(check(part, wanted, dtype, call, label, case.slack) for part, wanted in zip(out, truth, strict=True))


def _copies(arguments: Arguments, floats: torch.dtype | None) -> Arguments:
    """The arguments again, in memory of their own, floating ones in dtype `floats` (None: their own)."""

    def copied(name: str, x: Tensor) -> Tensor:
        has_codes = x.element_size() == 1 or name == "kv_scales"
        return x.to(None if has_codes or not x.is_floating_point() else floats, copy=True)

    return {name: copied(name, x) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def _describe(arguments: Arguments) -> str:
    return ", ".join(
        f"{name} {list(x.shape)}" if isinstance(x, Tensor) else f"{name}={x}"
        for name, x in arguments.items()
        if x is not None
    )


def check_sum(out: Tensor, truth: Tensor, dtype: torch.dtype, call: str, case: str) -> None:
    """A sum of two numbers has one right answer."""
    if not torch.equal(out, truth.to(dtype)):
        raise Mismatch(f"{call}: the sum is not exact\n  case: {case}")


def check(out: Tensor, truth: Tensor, dtype: torch.dtype, call: str, case: str, slack: float = 1.0) -> float:
    """Hold each row (the last dimension) against its truth; return the worst error as a share of what is tolerated.

    `slack` widens the tolerance where the formula itself amplifies a rounding of its inputs.
    """
    if out.dtype != dtype or out.shape != truth.shape:
        raise Mismatch(f"{call}: {out.dtype} {list(out.shape)}, not {dtype} {list(truth.shape)}\n  case: {case}")
    if out.numel() == 0:
        return 0.0
    errors = row_errors(out, truth)
    error, tolerance = float(errors.max()), slack * TOLERANCE[dtype]
    if error < tolerance:
        return error / tolerance
    place = [int(i) for i in torch.unravel_index(errors.argmax(), errors.shape)]
    *row, head = place if call.startswith(HEADS) else (*place, None)
    where = f"row {row}" + ("" if head is None else f", head {head}")
    raise Mismatch(
        f"{call}: {where} has relative error {error:.2e} in {dtype}, tolerance {tolerance:.0e}; "
        f"{int((errors >= tolerance).sum())} of {errors.numel()} rows are wrong\n"
        f"  case: {case}\n"
        f"  got:    {_begin(out[tuple(place)])}\n"
        f"  wanted: {_begin(truth[tuple(place)])}"
    )


def row_errors(out: Tensor, truth: Tensor) -> Tensor:
    """‖out - truth‖ / ‖truth‖ of each row; rows of zeros must be exact, and NaN is infinitely wrong."""
    difference = (out.double() - truth.double()).norm(dim=-1)
    size = truth.double().norm(dim=-1)
    errors = torch.where(size == 0, difference.sign() * math.inf, difference / size).nan_to_num(0.0, math.inf)
    return torch.where(out.isfinite().all(-1), errors, math.inf)


def _begin(row: Tensor) -> str:
    numbers = ", ".join(f"{x:.6g}" for x in row[:6].tolist())
    return f"[{numbers}{', ...' if row.numel() > 6 else ''}]"
