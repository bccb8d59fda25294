"""Which implementation of an operation runs: a table filled by `@register`, and the rules for reading it.

A *backend* is a name under which implementations of some operations are registered. `resolve` reads the table once and
gives an engine its `Kernels`:

1. the implementations of the backend that it is asked for,
2. or of the one that the environment variable `MINI_INFER_KERNELS` names,
3. or those of the highest priority that serve the device.

For a call by hand the table is read at each call, and the innermost `use_backend(name)` of this thread or task is what
is asked for. A named backend that has no implementation of an operation for that device leaves it to the reference,
which has them all. `attention` is composed of the chosen `write_kv`, `paged_attention` and `paged_prefill_attention`,
unless a backend is chosen that registers it as a whole.

Backends other than the reference are imported when an implementation is first looked up: ours as far as what they need
is installed, and those that packages add through the entry-point group `mini_infer.kernels` (the entry point's name is
the backend's name, its value the module whose import registers it). Wherever a backend's name is accepted, so is
`FILE:NAME`, for one that a Python file of one's own registers; the file is run when it is named, and again once it has
changed.
"""

import importlib.util
import linecache
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from hashlib import sha256
from importlib.metadata import EntryPoint, entry_points
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import torch

from mini_infer.exceptions import KernelError, NotRecordableError
from mini_infer.kernels.attention import PARTS, compose
from mini_infer.kernels.checks import CHECKS
from mini_infer.kernels.contract import Operations

OPS = tuple(CHECKS)
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


@dataclass(frozen=True, eq=False)
class Kernels(Operations):
    """The operations of one device, each with the implementation that was chosen for it, once: see `resolve`.

    An engine hands it to its model, cache and sampler. The operations have the arguments and defaults that
    `mini_infer.kernels` documents, but check nothing and look nothing up.

    Attributes:
        device: whose tensors they take.
        backends: for each operation the backend that it runs on.
    """

    device: torch.device
    backends: Mapping[str, str]

    def backend_of(self, op: str) -> str:
        """The backend that `op` runs on; several, joined by "+", for an `attention` that is composed of theirs.

        Raises:
            KernelError: there is no such operation.
        """
        _check_op(op)
        return self.backends[op]

    def check_codes(self) -> None:
        """Refuse a KV cache of codes where an implementation does not know them.

        Raises:
            KernelError: one has no argument `kv_scales`.
        """
        for op in (*PARTS, "attention"):
            if "kv_scales" not in signature(self.functions[op]).parameters:
                raise KernelError(
                    f"kernel backend {self.backends[op]!r} performs {op!r} without kv_scales, so it cannot read a KV "
                    "cache of 8 bits; give it that argument, or leave kv_cache_dtype at 'auto'"
                )


recording: ContextVar[bool] = ContextVar("mini_infer_cpu_recording", default=False)
"""Set while a recording is made that sees only PyTorch's operations and the launches of `kernels.cpu`."""

_RECORDABLE = ("mini_infer.kernels.reference.", "mini_infer.kernels.cpu.")
"""Modules whose implementations consist of what a recording sees."""

_table: dict[tuple[str, str, str], Implementation] = {}
_requested: ContextVar[str | None] = ContextVar("mini_infer_kernel_backend", default=None)
_BEST = ""  # requested where the environment was looked at and names no backend


def register(
    op: str, *, backend: str, devices: Iterable[str] | None = None, priority: int = 0
) -> Callable[[_Function], _Function]:
    """Make the decorated function known as `backend`'s implementation of `op`.

    The function takes every argument of the public operation by position, with defaults filled in. They are right:
    checked when a call is by hand, and an engine's are known to be.

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
            if known is not None and _origin(known.function) != _origin(function):
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
    """Within the `with` block, run calls by hand on backend `name`; None lifts an outer `use_backend`.

    The choice belongs to the current thread or asyncio task, and threads do not inherit it. The environment variable is
    looked at once, here.
    """
    token = _requested.set(load_backend(name) if name else _from_environment())
    try:
        yield
    finally:
        _requested.reset(token)


def available_backends(op: str | None = None, device: str | torch.device | None = None) -> list[str]:
    """The backends that implement `op`, or a part of it (any operation if None), on `device` (any if None), best first.

    Raises:
        KernelError: there is no such operation.
    """
    if op is not None:
        _check_op(op)
    ops = OPS if op is None else (op, *PARTS) if op == "attention" else (op,)
    return list(dict.fromkeys(row.backend for row in _best_first(ops, None if device is None else _kind(device))))


def backend_of(op: str, device: str | torch.device = "cpu") -> str:
    """The backend that a call of `op` by hand would run on now for tensors on `device`; as `Kernels.backend_of`."""
    return ambient(torch.device(device)).backend_of(op)


def resolve(device: str | torch.device, backend: str | None = None) -> Kernels:
    """Choose an implementation of every operation, once and for all.

    Args:
        device: where the tensors will be.
        backend: whose implementations to take where it has them. None takes those of the backend that the environment
            variable `MINI_INFER_KERNELS` names now, or of the highest priority. (`use_backend` is for calls by hand.)
            A name, or `FILE:NAME`.

    Raises:
        KernelError: there is no such backend.
    """
    wanted = _from_environment() if backend is None else backend
    return _resolve(torch.device(device), load_backend(wanted) if wanted else _BEST)


def ambient(device: torch.device) -> Kernels:
    """What a call by hand for tensors on `device` runs on, here and now."""
    requested = _requested.get()
    return _resolve(device, _from_environment() if requested is None else requested)


def _from_environment() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE, _BEST)


@cache
def _resolve(device: torch.device, wanted: str) -> Kernels:
    if wanted != _BEST:
        wanted = load_backend(wanted)
    rows = {op: _choose(op, device.type, wanted) for op in OPS}
    functions = {op: _recordable(row) for op, row in rows.items()}
    backends = {op: row.backend for op, row in rows.items()}
    if backends["attention"] == REFERENCE:
        functions["attention"] = compose(*(functions[part] for part in PARTS))
        backends["attention"] = "+".join(dict.fromkeys(backends[part] for part in PARTS))
    return Kernels(functions, device, backends)


def _recordable(row: Implementation) -> Callable[..., Any]:
    """The row's function, which refuses to be recorded unless a recording would see all that it does."""
    if row.function.__module__.startswith(_RECORDABLE):
        return row.function

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any) -> Any:
            if recording.get():
                raise NotRecordableError(
                    f"kernel backend {row.backend!r} performs {row.op!r}, and what it does with memory is not seen"
                )
            return function(*args)

        return call

    if row.op not in ("pack_linear", "pack_quantized"):
        return guarded(row.function)

    @wraps(row.function)
    def pack(*args: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        multiply, rows = row.function(*args)
        return guarded(multiply), guarded(rows)

    return pack


def _choose(op: str, device: str, wanted: str) -> Implementation:
    rows = _best_first((op,), device)
    if wanted == _BEST:
        return rows[0]
    by_backend = {row.backend: row for row in reversed(rows)}
    return by_backend.get(wanted, by_backend[REFERENCE])


def _best_first(ops: Iterable[str], device: str | None) -> list[Implementation]:
    broken_backends(device)
    rows = [row for row in _table.values() if row.op in ops and (device is None or row.device in (device, _ANY_DEVICE))]
    return sorted(rows, key=lambda row: -row.priority)  # stable: a tie keeps the order of registration


@cache
def broken_backends(device: str | None = None) -> dict[str, str]:
    """Import our optional backends and the installed packages', once; return why those that gave no backend did not.

    A broken package is reported and left out rather than raised: it must not stop who never asked for it.

    Args:
        device: leave out those of ours that cannot serve it, as Triton serves no CPU unless it is interpreted.
    """
    broken = {}
    for entry_point in (*_OPTIONAL, *entry_points(group=ENTRY_POINT_GROUP)):
        if (entry_point.name, device) == ("triton", "cpu") and "TRITON_INTERPRET" not in os.environ:
            continue
        reason = _why_broken(entry_point)
        if reason is not None:
            broken[entry_point.name] = reason
    return broken


@cache
def _why_broken(entry_point: EntryPoint) -> str | None:
    """Import a backend; why it gave none."""
    try:
        entry_point.load()
    except Exception as error:
        # What is not installed is nobody's mistake.
        if entry_point not in _OPTIONAL or not isinstance(error, ModuleNotFoundError):
            logger.exception("kernel backend %r (%s) failed to load", entry_point.name, entry_point.value)
        return f"{entry_point.value} failed to load: {type(error).__name__}: {error}"
    if all(row.backend != entry_point.name for row in _table.values()):
        reason = f"{entry_point.value} registered nothing under this name"
        logger.error("kernel backend %r: %s", entry_point.name, reason)
        return reason
    return None


def _check_op(op: str) -> None:
    if op not in OPS:
        raise KernelError(f"unknown kernel operation {op!r}; the operations are {', '.join(OPS)}")


def load_backend(name: str) -> str:
    """The bare name of a backend, of which `FILE:NAME` runs the file that registers it.

    Raises:
        KernelError: there is no such file, it fails, or no backend of that name.
    """
    file, _, bare = name.rpartition(":")
    if file:
        registered = _run(file)
        if bare not in registered:
            raise KernelError(
                f"kernel backend {name!r}: the file registers no backend {bare!r}; "
                f"those that it does: {', '.join(sorted(registered)) or 'none'}"
            )
        return bare
    known = available_backends()
    if name not in known:
        reason = broken_backends().get(name)
        raise KernelError(
            f"unknown kernel backend {name!r}"
            + (f" ({reason})" if reason else "")
            + f"; available: {', '.join(known)}, or FILE:NAME of a Python file that registers one"
        )
    return name


def _run(file: str) -> frozenset[str]:
    """Run a Python file for what it registers; the names of its backends."""
    path = Path(file).expanduser()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise KernelError(f"kernel backend file {file!r} cannot be read: {error}") from error
    return _run_once(path.resolve(), source)


@cache
def _run_once(path: Path, source: bytes) -> frozenset[str]:
    """Once for each content of the file; it is a module of its own, whatever other modules are called."""
    broken_backends()  # registered before, and so not taken for the file's
    name = f"mini_infer_kernel_file_{sha256(str(path).encode()).hexdigest()[:8]}_{path.stem}"
    linecache.checkcache(str(path))  # Triton reads a kernel's source there
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None:
        raise KernelError(f"kernel backend file {str(path)!r} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    before = dict(_table)
    sys.modules[name] = module
    try:
        exec(compile(source, path, "exec"), vars(module))
    except Exception as error:
        raise KernelError(f"kernel backend file {str(path)!r} failed: {type(error).__name__}: {error}") from error
    return frozenset(row.backend for key, row in _table.items() if before.get(key) is not row)


def _origin(function: Callable[..., Any]) -> str:
    """The file that a function stands in, or else its module; of one file there may be several modules."""
    module = function.__module__
    return getattr(sys.modules.get(module), "__file__", None) or module


def _kind(device: str | torch.device) -> str:
    return torch.device(device).type
