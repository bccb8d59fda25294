"""Which implementation of an operation runs: a table filled by `@register`, and the rules for reading it.

A *backend* is a name under which implementations of some operations are registered. Reading order:

1. the innermost `use_backend(name)` of this thread or task,
2. the environment variable `MINI_INFER_KERNELS`,
3. the highest priority among the implementations that serve the tensor's device.

A named backend that has no implementation of an operation for that device leaves it to the reference, which has them
all. Backends other than the reference are imported when an implementation is first looked up: ours as far as what they
need is installed, and those that packages add through the entry-point group `mini_infer.kernels` (the entry point's
name is the backend's name, its value the module whose import registers it).
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import torch

from mini_infer.exceptions import KernelError

OPS = (
    "rmsnorm",
    "add_rmsnorm",
    "apply_rotary_emb",
    "qk_norm_rope",
    "silu_and_mul",
    "allocate_kv_cache",
    "write_kv",
    "paged_attention",
    "paged_prefill_attention",
    "pack_linear",
    "argmax_logprob",
)
REFERENCE = "reference"
ENTRY_POINT_GROUP = "mini_infer.kernels"
ENVIRONMENT_VARIABLE = "MINI_INFER_KERNELS"

_OPTIONAL = (
    EntryPoint("triton", "mini_infer.kernels.triton", ENTRY_POINT_GROUP),
    EntryPoint("cpu", "mini_infer.kernels.cpu", ENTRY_POINT_GROUP),
)

_ANY_DEVICE = "any"
_Function = TypeVar("_Function", bound=Callable[..., Any])

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Implementation:
    """One row of the table: `function` performs `op` on tensors of one kind of device."""

    op: str
    backend: str
    device: str
    priority: int
    function: Callable[..., Any]


_table: dict[tuple[str, str, str], Implementation] = {}
_requested: ContextVar[str | None] = ContextVar("mini_infer_kernel_backend", default=None)
_BEST = ""  # requested where the environment was looked at and names no backend


def register(
    op: str, *, backend: str, devices: Iterable[str] | None = None, priority: int = 0
) -> Callable[[_Function], _Function]:
    """Make the decorated function known as `backend`'s implementation of `op`.

    The function takes every argument of the public operation by position, already checked and with defaults filled in.

    `devices` are the kinds it serves (`"cpu"`, `"cuda"`, ...); None means all. Among the implementations for a device
    the highest `priority` is chosen when nobody asks for a backend by name; a tie goes to the one registered first. The
    reference has priority 0, so a new backend at the default is used on request only. Stack the decorator to give
    each device its own priority: a Triton kernel is the best choice on "cuda", and interpreted on "cpu" the last one.

    Registering again from the same module replaces (a notebook cell may be run twice); from another module it is an
    error.
    """
    _check_op(op)
    kinds = [_ANY_DEVICE] if devices is None else [_kind(device) for device in devices]

    def decorate(function: _Function) -> _Function:
        for device in kinds:
            key = (op, backend, device)
            known = _table.get(key)
            if known is not None and known.function.__module__ != function.__module__:
                raise KernelError(
                    f"kernel backend {backend!r} already has {op!r}, from module {known.function.__module__!r}; "
                    f"module {function.__module__!r} must choose another backend name"
                )
            _table[key] = Implementation(op, backend, device, priority, function)
        _resolve.cache_clear()
        return function

    return decorate


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the `with` block, run operations on backend `name`; None lifts an outer `use_backend`.

    The choice belongs to the current thread or asyncio task, and threads do not inherit it. The environment variable is
    looked at once, here.
    """
    if name is not None:
        _check_backend(name)
    token = _requested.set(name or os.environ.get(ENVIRONMENT_VARIABLE, _BEST))
    try:
        yield
    finally:
        _requested.reset(token)


def available_backends(op: str | None = None, device: str | torch.device | None = None) -> list[str]:
    """The backends that implement `op` (any operation if None) on `device` (any device if None), best first."""
    if op is not None:
        _check_op(op)
    return list(dict.fromkeys(row.backend for row in _best_first(op, None if device is None else _kind(device))))


def backend_of(op: str, device: str | torch.device = "cpu") -> str:
    """The backend on which `op` would run now for tensors on `device`."""
    _check_op(op)
    return _resolve(op, _kind(device), _wanted()).backend


def implementation(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that performs `op` on `device` now. Called once per operation and layer, so it only looks up."""
    return _resolve(op, device.type, _wanted()).function


def _wanted() -> str:
    requested = _requested.get()
    return os.environ.get(ENVIRONMENT_VARIABLE, _BEST) if requested is None else requested


@cache
def _resolve(op: str, device: str, wanted: str) -> Implementation:
    rows = _best_first(op, device)
    if wanted == _BEST:
        return rows[0]
    _check_backend(wanted)
    by_backend = {row.backend: row for row in reversed(rows)}
    return by_backend.get(wanted, by_backend[REFERENCE])


def _best_first(op: str | None, device: str | None) -> list[Implementation]:
    broken_backends()
    rows = [
        row
        for row in _table.values()
        if op in (None, row.op) and (device is None or row.device in (device, _ANY_DEVICE))
    ]
    return sorted(rows, key=lambda row: -row.priority)  # stable: a tie keeps the order of registration


@cache
def broken_backends() -> dict[str, str]:
    """Import our optional backends and the installed packages', once; return why those that gave no backend did not.

    A broken package is reported and left out rather than raised: it must not stop who never asked for it.
    """
    broken = {}
    for entry_point in (*_OPTIONAL, *entry_points(group=ENTRY_POINT_GROUP)):
        try:
            entry_point.load()
        except Exception as error:
            broken[entry_point.name] = f"{entry_point.value} failed to load: {type(error).__name__}: {error}"
            if entry_point in _OPTIONAL and isinstance(error, ModuleNotFoundError):
                continue  # not installed, which is nobody's mistake
            logger.exception("kernel backend %r (%s) failed to load", entry_point.name, entry_point.value)
            continue
        if all(row.backend != entry_point.name for row in _table.values()):
            broken[entry_point.name] = f"{entry_point.value} registered nothing under this name"
            logger.error("kernel backend %r: %s", entry_point.name, broken[entry_point.name])
    return broken


def _check_op(op: str) -> None:
    if op not in OPS:
        raise KernelError(f"unknown kernel operation {op!r}; the operations are {', '.join(OPS)}")


def _check_backend(name: str) -> None:
    known = available_backends()
    if name not in known:
        reason = broken_backends().get(name)
        raise KernelError(
            f"unknown kernel backend {name!r}" + (f" ({reason})" if reason else "") + f"; available: {', '.join(known)}"
        )


def _kind(device: str | torch.device) -> str:
    return torch.device(device).type
