"""How a kernel written in Python becomes machine code that runs on PyTorch's own threads.

Numba compiles a kernel for the machine it runs on, and `cache` keeps the result on disk; no C compiler is involved. A
kernel is a function of one argument, an array of integers: addresses and sizes, no Python objects, so that it runs
without the interpreter. Its work is cut into tasks; every thread takes the next task until none is left, which balances
the load by itself:

    @kernel
    def double(args):                                # [x, y, n]: y[i] = 2 * x[i] for rows of n numbers
        for row in tasks(args):
            x, y = pointer(args[FIRST], np.float32), pointer(args[FIRST + 1], np.float32)
            ...

    double(num_rows, x.data_ptr(), y.data_ptr(), n)

Two thread pools on the same cores would wait for each other, so kernels run on the pool that PyTorch already has: its
OpenMP runtime is asked to call the kernel on every thread. Where there is no such runtime a kernel runs on one thread.

A number in a tensor is a float32 or a bfloat16; `load` and `store` hide which. bfloat16 is the upper half of a float32,
so reading one is a shift.
"""

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from mini_infer.kernels.cpu import cores
from mini_infer.kernels.cpu.cache import compiled
from mini_infer.kernels.registry import register

FIRST = 4
"""Where a kernel's own arguments begin; before them: the next task, the number of tasks, the next thread's number, and
how many tasks a thread takes at a time."""

ELEMENTS = {torch.float32: np.float32, torch.bfloat16: np.uint16}
"""How a kernel sees the numbers of a tensor."""

CACHE_ELEMENTS = {**ELEMENTS, torch.int8: np.int8}
"""How it sees those of a KV cache."""

FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}  # sums in any order; infinities and NaN stay what they are

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_Function = TypeVar("_Function", bound=Callable[..., Any])
_SMALL = 1 << 15
"""Below this many numbers, waking other threads costs more than they save."""

TURNS = 32
"""How often a thread takes tasks, if there are that many: asking costs as much as a small row, and neighbouring tasks
may write to the same cache line."""


# ---- what kernels are written with -----------------------------------------------------------------------------------


@intrinsic
def pointer(typing_context, address, dtype):
    """The numbers of a NumPy type that lie at an address."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.int64, dtype), codegen


@intrinsic
def load(typing_context, numbers, index):
    """A float32, a bfloat16 or an int8 as a float32."""

    def codegen(context, builder, signature, args):
        value = builder.load(builder.gep(args[0], [args[1]]))
        if signature.args[0].dtype == types.int8:
            return builder.sitofp(value, _F32)
        return value if signature.args[0].dtype == types.float32 else _widen(builder, value)

    return types.float32(numbers, types.int64), codegen


@intrinsic
def store(typing_context, numbers, index, value):
    """Write a float32 as a float32, or as the nearest bfloat16."""

    def codegen(context, builder, signature, args):
        numbers, index, value = args
        if signature.args[0].dtype != types.float32:
            value = _narrow(builder, value)
        builder.store(value, builder.gep(numbers, [index]))
        return context.get_dummy_value()

    return types.void(numbers, types.int64, types.float32), codegen


@intrinsic
def rounded(typing_context, numbers, value):
    """What is left of a float32 once it was stored among ``numbers``."""

    def codegen(context, builder, signature, args):
        if signature.args[0].dtype == types.float32:
            return args[1]
        return _widen(builder, _narrow(builder, args[1]))

    return types.float32(numbers, types.float32), codegen


@intrinsic
def nearest(typing_context, x):
    """The nearest integer of a finite float32; of ties the even one."""

    def codegen(context, builder, signature, args):
        return builder.fptosi(builder.call(builder.module.declare_intrinsic("llvm.rint", [_F32]), args), _I32)

    return types.int32(types.float32), codegen


@intrinsic
def as_float(typing_context, bits):
    """The number that `float_bits` turned into an integer."""

    def codegen(context, builder, signature, args):
        return builder.fptrunc(builder.bitcast(args[0], ir.DoubleType()), _F32)

    return types.float32(types.int64), codegen


@intrinsic
def float_of(typing_context, bits):
    """The float32 that these 32 bits are. Positive ones are in the order of their bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(builder.trunc(args[0], _I32), _F32)

    return types.float32(types.int64), codegen


@intrinsic
def _floor(typing_context, x):
    """Unlike the library's function, an instruction."""

    def codegen(context, builder, signature, args):
        return builder.call(builder.module.declare_intrinsic("llvm.floor", [_F32]), args)

    return types.float32(types.float32), codegen


@intrinsic
def _power_of_two(typing_context, n):
    """2^n for an integer n from -126 to 127, by writing n where a float32 keeps its exponent."""

    def codegen(context, builder, signature, args):
        exponent = builder.add(builder.fptosi(args[0], _I32), ir.Constant(_I32, 127))
        return builder.bitcast(builder.shl(exponent, ir.Constant(_I32, 23)), _F32)

    return types.float32(types.float32), codegen


@intrinsic
def _fetch_add(typing_context, address, increment):
    """Add to a number that all threads share; what it was before."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], args[1], "monotonic")

    return types.int64(types.CPointer(types.int64), types.int64), codegen


@intrinsic(prefer_literal=True)
def buffer(typing_context, count):
    """Room for ``count`` float32, a constant, on the thread's stack, with anything in it; its address."""
    if not isinstance(count, types.IntegerLiteral):
        return None

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(_F32, count.literal_value))
        room.align = 64
        return builder.ptrtoint(room, _I64)

    return types.int64(count), codegen


@numba.njit
def tasks(args):
    """The tasks of this thread: each time the next few that nobody has taken yet, until none is left."""
    while True:
        first = _fetch_add(args, args[3])
        if first >= args[1]:
            return
        for task in range(first, min(first + args[3], args[1])):  # noqa: UP028  (Numba has no `yield from`)
            yield task


@intrinsic
def _advance(typing_context, numbers, count):
    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return numbers(numbers, types.int64), codegen


@numba.njit
def thread_number(args):
    """A number of this thread's own, below the number of threads. To be asked for once."""
    return _fetch_add(_advance(args, 2), 1)


@numba.njit(fastmath=FAST_MATH)
def exp(x):
    """e^x of a float32, to within 2e-7 of itself; written so that a loop over it is vectorised.

    e^x = 2^n * 2^f with n an integer and |f| ≤ 1/2: n goes straight into the exponent's bits, and 2^f is a polynomial
    (Taylor's, whose first omitted term is below 1e-8 there).
    """
    y = x * np.float32(1.4426950408889634)
    y = y if y > np.float32(-126.0) else np.float32(-126.0)
    y = y if y < np.float32(127.0) else np.float32(127.0)
    n = _floor(y + np.float32(0.5))
    f = (y - n) * np.float32(0.6931471805599453)
    power = np.float32(1 / 5040)
    power = power * f + np.float32(1 / 720)
    power = power * f + np.float32(1 / 120)
    power = power * f + np.float32(1 / 24)
    power = power * f + np.float32(1 / 6)
    power = power * f + np.float32(1 / 2)
    power = power * f + np.float32(1)
    power = power * f + np.float32(1)
    power *= _power_of_two(n)
    power = np.float32(0.0) if x < np.float32(-87.0) else power
    return x if x != x else power


def _widen(builder: Any, value: Any) -> Any:
    shifted = builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16))
    return builder.bitcast(shifted, _F32)


def _narrow(builder: Any, value: Any) -> Any:
    """Round to nearest, ties to even. The carry of the addition is what rounds up, into the exponent if need be."""
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
    up = builder.add(builder.add(bits, ir.Constant(_I32, 0x7FFF)), odd)
    number = builder.trunc(builder.lshr(up, ir.Constant(_I32, 16)), _I16)
    is_nan = builder.fcmp_unordered("uno", value, value)  # the carry could make a number of it
    return builder.select(is_nan, ir.Constant(_I16, 0x7FC0), number)


# ---- compiling and running -------------------------------------------------------------------------------------------


class Kernel:
    """A compiled kernel, to be called with integers.

    Compiled when it is first called: seconds the first time on a machine, then read from disk in milliseconds.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        functools.update_wrapper(self, function)

    @functools.cached_property
    def _address(self) -> int:
        options = {"fastmath": FAST_MATH, "error_model": "numpy"}
        self._code = compiled(self._function, types.void(types.CPointer(types.int64)), options)
        address: int = self._code.address  # type: ignore[assignment]  # None before it is compiled
        return address

    @functools.cached_property
    def _here(self) -> Callable[[int], None]:
        return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self._address)

    def __call__(self, num_tasks: int, *args: int, work: int = _SMALL) -> None:
        """Run all tasks and wait for them.

        Args:
            num_tasks: how many there are.
            args: what the kernel reads from ``args[FIRST]`` on. Addresses must stay valid until the call returns.
            work: about how many numbers are read or written in all; a small job stays on this thread.
        """
        if num_tasks == 0:
            return
        num_threads = 1 if work < _SMALL else min(torch.get_num_threads(), num_tasks)
        at_a_time = max(1, num_tasks // (TURNS * num_threads))
        data = (ctypes.c_int64 * (FIRST + len(args)))(0, num_tasks, 0, at_a_time, *args)
        launch = Launch(self._address, data, num_threads)
        running = cores.here().threads(num_threads)
        if running == 1:
            self._here(ctypes.addressof(data))
        else:
            parallel()(launch.kernel, ctypes.addressof(data), running, 0)
        observe = observer.get()
        if observe is not None:
            observe(launch)

    def alone(self, num_tasks: int, *args: int) -> None:
        """Call the kernel once, on this thread."""
        data = (ctypes.c_int64 * (FIRST + len(args)))(0, num_tasks, 0, 1, *args)
        self._here(ctypes.addressof(data))


class Launch(NamedTuple):
    """What there is to know of a kernel's call.

    Attributes:
        kernel: address of the machine code.
        data: the kernel's argument.
        num_threads: how many threads share the tasks, if other programs leave them cores.
    """

    kernel: int
    data: "ctypes.Array[ctypes.c_int64]"
    num_threads: int


observer: ContextVar[Callable[[Launch], None] | None] = ContextVar("observer", default=None)
"""Told of every launch in this context, while one is set."""


def kernel(function: Callable[..., None]) -> Kernel:
    """Make a `Kernel` of a function; see the module's docstring for how to write one."""
    return Kernel(function)


@functools.cache
def float_bits(value: float) -> int:
    """A float as an integer argument; the kernel gets it back with `as_float`."""
    bits: int = struct.unpack("=q", struct.pack("=d", value))[0]
    return bits


@functools.cache
def parallel() -> Callable[[int, int, int, int], None]:
    """OpenMP's "call this function with this argument on that many threads", from the runtime that PyTorch loaded."""
    try:
        # By this name the loader finds the library that is in memory already: PyTorch's own.
        library = ctypes.CDLL("libgomp.so.1", mode=getattr(os, "RTLD_NOLOAD", 0) | ctypes.DEFAULT_MODE)
        gomp_parallel = library.GOMP_parallel
    except (OSError, AttributeError):
        return _alone
    gomp_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    gomp_parallel.restype = None
    return gomp_parallel


def parallel_address() -> int:
    """Where that function is; 0 where there is none."""
    function: Any = parallel()
    return 0 if function is _alone else ctypes.cast(function, ctypes.c_void_p).value or 0


def _alone(address: int, data: int, num_threads: int, flags: int) -> None:
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)(data)


def has_feature(name: str) -> bool:
    """Whether the code that Numba makes may use a feature of the processor, under LLVM's name for it.

    Honours NUMBA_CPU_FEATURES, so that another processor can be played.
    """
    asked_for = numba.config.CPU_FEATURES
    if asked_for is not None:
        return f"+{name}" in asked_for.split(",")
    return bool(llvm.get_host_cpu_features().get(name, False))


def register_fast(op: str, reference: Callable[..., Any]) -> Callable[[_Function], Callable[..., Any]]:
    """Register an implementation for the dtypes that kernels know; ``reference`` gets all others."""

    def decorate(function: _Function) -> Callable[..., Any]:
        @functools.wraps(function)
        def choose(x: Tensor, *args: Any) -> Any:
            return (function if x.dtype in ELEMENTS else reference)(x, *args)

        return register(op, backend="cpu", devices=["cpu"], priority=10)(choose)

    return decorate
