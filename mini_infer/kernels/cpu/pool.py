"""Threads that share the tasks of a kernel, and never wait for one that is not running.

Whoever calls a kernel leads: it publishes the job, takes tasks itself until none is left, and waits for the helpers
that have *joined*. A helper joins when it sees the job, so one that sleeps, or whose core another program has just now,
is not waited for: its share is done by those who are awake. A barrier of all threads, as OpenMP's, would lose a whole
time slice of the operating system there, at every one of the few hundred kernels of a step.

    leader     job, OPEN ──▶ state        takes tasks ...        state &= ~OPEN      waits until nobody is in
    helper     sees OPEN: state + 1       takes tasks ...        state - 1
    sleeper    misses it, or is woken by the leader and joins late

Waiting is spinning for some ten microseconds, since the next kernel is a few microseconds away, and then sleep until
woken (a futex), so that an idle engine takes nothing of anybody, and a leader that waits gives its core to the helper
that it waits for.

One word holds it all, so that joining is one atomic step: ``generation << 16 | OPEN | number of helpers inside``. A
second leader, of another engine in the process, finds the pool taken and computes alone.
"""

import atexit
import ctypes
import functools
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mini_infer.kernels.cpu.cache import compiled

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)

_OPEN, _STOP, _INSIDE = 1 << 15, 1 << 14, (1 << 14) - 1
"""Of the state: a job may be joined; helpers must end; how many of them are inside a job."""

# Where in the pool's memory what is, in bytes. What many write lies in a cache line of its own.
_STATE, _ASLEEP, _LEADER_ASLEEP, _TAKEN, _JOB, _SYSCALL, _FUTEX = 0, 64, 128, 192, 256, 320, 328
_KERNEL, _DATA, _HELPERS = _JOB, _JOB + 8, _JOB + 16
_NUM_BYTES = 384

_SPINS = 1000
"""Glances before sleep, with a pause of the processor in between: 20 to 50 µs."""

_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98}
"""The system call by which Linux lets a thread sleep until a number in memory changes."""


@intrinsic
def _read(typing_context, address):
    """A number that other threads write."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], _I64.as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _write(typing_context, address, value):
    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], builder.inttoptr(args[0], _I64.as_pointer()), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _exchange(operation: str) -> Any:
    @intrinsic
    def exchange(typing_context, address, value):
        """Change a number that all threads share; what it was before."""

        def codegen(context, builder, signature, args):
            return builder.atomic_rmw(operation, builder.inttoptr(args[0], _I64.as_pointer()), args[1], "seq_cst")

        return types.int64(types.int64, types.int64), codegen

    return exchange


_add, _and, _swap = _exchange("add"), _exchange("and"), _exchange("xchg")


@intrinsic
def _replace(typing_context, address, before, after):
    """Write a number if it is what it was believed to be; whether it was."""

    def codegen(context, builder, signature, args):
        place = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.extract_value(builder.cmpxchg(place, args[1], args[2], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


@intrinsic
def _pause(typing_context):
    """Tell the processor that this is a loop that waits."""

    def codegen(context, builder, signature, args):
        name, values = {
            "x86_64": ("llvm.x86.sse2.pause", []),
            "aarch64": ("llvm.aarch64.hint", [ir.Constant(_I32, 1)]),
        }[platform.machine()]
        function = builder.module.declare_intrinsic(
            name, (), ir.FunctionType(ir.VoidType(), [value.type for value in values])
        )
        builder.call(function, values)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _futex(typing_context, syscall, number, address, operation, value):
    """Sleep while the lower half of the number at the address is ``value`` (0), or wake ``value`` sleepers (1)."""

    def codegen(context, builder, signature, args):
        syscall, number, address, operation, value = args
        kind = ir.FunctionType(_I64, [_I64], var_arg=True)
        private = builder.or_(operation, ir.Constant(_I64, 128))
        builder.call(
            builder.inttoptr(syscall, kind.as_pointer()),
            [number, address, private, value, ir.Constant(_I64, 0), ir.Constant(_I64, 0), ir.Constant(_I64, 0)],
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def _call(typing_context, kernel, data):
    """Call a kernel on this thread."""

    def codegen(context, builder, signature, args):
        function = ir.FunctionType(ir.VoidType(), [_I8.as_pointer()]).as_pointer()
        builder.call(builder.inttoptr(args[0], function), [builder.inttoptr(args[1], _I8.as_pointer())])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@numba.njit
def _sleep(pool, state):
    """Until the state is no longer this one."""
    _futex(_read(pool + _SYSCALL), _read(pool + _FUTEX), pool + _STATE, 0, state & 0xFFFFFFFF)


@numba.njit
def _wake(pool):
    _futex(_read(pool + _SYSCALL), _read(pool + _FUTEX), pool + _STATE, 1, 1 << 30)


@numba.njit
def launch(pool, kernel, data, num_threads):
    """Run a kernel on this thread and on up to ``num_threads - 1`` helpers that are awake, until its tasks are done.

    Args:
        pool: address of a pool's memory.
        kernel: address of machine code.
        data: address of its argument.
        num_threads: at most.
    """
    if num_threads <= 1 or _swap(pool + _TAKEN, 1) != 0:
        _call(kernel, data)
        return
    _write(pool + _KERNEL, kernel)
    _write(pool + _DATA, data)
    _write(pool + _HELPERS, num_threads - 1)
    generation = ((_read(pool + _STATE) >> 16) + 1) & 0x7FFF
    _write(pool + _STATE, generation << 16 | _OPEN)
    if _swap(pool + _ASLEEP, 0) != 0:
        _wake(pool)
    _call(kernel, data)
    state = _and(pool + _STATE, ~_OPEN) & ~_OPEN
    spins = 0
    while state & _INSIDE:
        if spins < _SPINS:
            spins += 1
            _pause()
        else:
            _write(pool + _LEADER_ASLEEP, 1)
            state = _read(pool + _STATE)
            if state & _INSIDE:
                _sleep(pool, state)
            _write(pool + _LEADER_ASLEEP, 0)
        state = _read(pool + _STATE)
    _write(pool + _TAKEN, 0)


def _launch_one(pool, kernel, data, num_threads):
    launch(pool, kernel, data, num_threads)


def _help(pool, number):
    """What helper ``number`` does until it is told to stop."""
    last = -1  # the job that it has helped with
    spins = 0
    while True:
        state = _read(pool + _STATE)
        if state & _STOP:
            return
        if state & _OPEN and state >> 16 != last and number < _read(pool + _HELPERS):
            if _replace(pool + _STATE, state, state + 1):  # and so the job is the one whose number of helpers was read
                _call(_read(pool + _KERNEL), _read(pool + _DATA))
                last = state >> 16
                left = _add(pool + _STATE, -1)
                if left & _INSIDE == 1 and _read(pool + _LEADER_ASLEEP) != 0:
                    _wake(pool)
                spins = 0
        elif spins < _SPINS:
            spins += 1
            _pause()
        else:
            _write(pool + _ASLEEP, 1)
            if _read(pool + _STATE) == state:
                _sleep(pool, state)
            spins = 0


def _stop(pool):
    """Tell the helpers to end, unless they have a job."""
    if _read(pool + _STATE) & _STOP == 0:
        if _swap(pool + _TAKEN, 1) != 0:
            return
        _write(pool + _STATE, _STOP)
    _wake(pool)


class Pool:
    """The threads of this process. They are started when they are first needed, and end with it."""

    def __init__(self) -> None:
        self._memory = np.zeros(_NUM_BYTES + 64, dtype=np.uint8)
        self.address = -(-self._memory.ctypes.data // 64) * 64
        self._helpers: list[threading.Thread] = []
        self._starting = threading.Lock()
        number = _FUTEX_NUMBERS.get(platform.machine(), 0)
        self._can_sleep = sys.platform == "linux" and number > 0
        if self._can_sleep:
            self._put(_SYSCALL, ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0)
            self._put(_FUTEX, number)

    def threads(self, wanted: int) -> int:
        """How many threads there are for a job that wants so many; 1 on a system without a way to sleep."""
        if not self._can_sleep:
            return 1
        if len(self._helpers) < wanted - 1:
            self._start(wanted - 1)
        return wanted

    def run(self, kernel: int, data: int, num_threads: int) -> None:
        """`launch` in this pool."""
        _functions()[0](self.address, kernel, data, self.threads(num_threads))

    def stop(self) -> None:
        """End the helpers, unless somebody leads them all the time. Whoever leads later is alone."""
        for _ in range(1000):
            if not any(helper.is_alive() for helper in self._helpers):
                return
            _functions()[2](self.address)
            time.sleep(0.001)

    def _start(self, num_helpers: int) -> None:
        with self._starting:
            for number in range(len(self._helpers), num_helpers):
                name, arguments = f"mini-infer-kernels-{number}", (self.address, number)
                helper = threading.Thread(target=_functions()[1], args=arguments, name=name, daemon=True)
                helper.start()
                self._helpers.append(helper)

    def _put(self, offset: int, value: int) -> None:
        ctypes.c_int64.from_address(self.address + offset).value = value


@functools.cache
def pool() -> Pool:
    """The pool of this process."""
    made = Pool()
    atexit.register(made.stop)  # before the machine code that they run goes
    return made


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # a child has only the thread that forked


@functools.cache
def _functions() -> tuple[Callable[..., None], ...]:
    """`_launch_one`, `_help` and `_stop`, compiled."""
    functions: list[Any] = []
    for function, num_arguments in ((_launch_one, 4), (_help, 2), (_stop, 1)):
        code = compiled(function, types.void(*[types.int64] * num_arguments), {})
        functions.append(ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * num_arguments)(code.address or 0))
        functions[-1].code = code  # which lives as long as the function
    return tuple(functions)
