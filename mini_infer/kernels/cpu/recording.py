"""Recording what a function computes on the CPU, to replay it without Python: a CUDA graph, for a processor.

A decode step of a model is a few hundred kernels, and each call from Python takes longer than a small kernel runs:
arguments are checked, results allocated, integers packed. Nothing of that changes from one step to the next, if inputs
are read from the same memory each time and every intermediate result lies where it lay before. So

- each launch of one of our kernels is noted, with the very argument that it got, and a loop in machine code launches
  them again;
- a new tensor gets its memory from an arena that outlives it. It is given to another tensor as soon as nothing refers
  to the first one, as in any allocator, and all recordings share it: only one of them runs at a time;
- PyTorch's own operations, of which a step has a handful, are called again, and what they give is copied to where it
  was. Views cost nothing: they are made once. So is a sum over ranks, which changes its tensor where it is, and is
  waited for in each replay.

A function that looks at the value of a tensor cannot be recorded, since it might have done something else for another.
Nor can a kernel that is not ours: what it does by way of a pointer or a NumPy array, nobody would see, and a replay
would leave it out. So whatever `kernels` is asked for during a recording has to be of this package or the reference.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mini_infer.exceptions import NotRecordableError
from mini_infer.kernels.cpu import cores
from mini_infer.kernels.cpu.jit import FIRST, Launch, kernel, observer, parallel_address, pointer
from mini_infer.kernels.registry import recording

_Item: TypeAlias = Launch | Callable[[], object]

_ALLOCATIONS = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default}
_LOOKING = {Tensor.tolist, Tensor.numpy}
"""Ways to see values that are not operations."""


def cpu_capture() -> Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]:
    """A function that calls another, and gives how to replay it and the tensor that its result is in.

    Inputs of the recorded function are tensors that it finds where they were, with other values in them. Nothing else
    may change between replays; the result is overwritten by each, and intermediate results by any recording.

    Raises:
        NotRecordableError: by what it returns, if the recorded function looks at values or calls a foreign kernel.
    """
    arena = _Arena()

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        items: list[_Item] = []
        tokens = observer.set(items.append), recording.set(True)
        try:
            with _NoLooking(), _Recorder(items, arena):
                result = run()
        finally:
            observer.reset(tokens[0])
            recording.reset(tokens[1])
        calls: list[Callable[[], object]] = []
        for kind, group in groupby(items, key=type):
            some: list[Any] = list(group)
            calls += [_Launches.of(some)] if kind is Launch else some
        return _Recording(calls, arena), result

    return capture


class _Arena:
    """Memory for tensors, each piece used by one after the other."""

    def __init__(self) -> None:
        self._pieces: list[tuple[np.ndarray, StorageWeakRef]] = []

    def tensor(self, like: Tensor) -> Tensor:
        """A contiguous tensor of the same shape and dtype."""
        if like.nbytes == 0:
            return like
        fitting = [i for i, (piece, user) in enumerate(self._pieces) if piece.nbytes >= like.nbytes and user.expired()]
        if fitting:
            piece, _ = self._pieces.pop(min(fitting, key=lambda i: self._pieces[i][0].nbytes))
        else:
            piece = torch.empty(like.nbytes, dtype=torch.uint8).numpy()
        tensor = torch.frombuffer(piece, dtype=like.dtype, count=like.numel()).view(like.shape)
        self._pieces.append((piece, StorageWeakRef(tensor.untyped_storage())))
        return tensor


class _Recorder(TorchDispatchMode):
    """Notes PyTorch's operations, and has new tensors made in the arena."""

    def __init__(self, items: list[_Item], arena: _Arena) -> None:
        super().__init__()
        self._items, self._arena = items, arena

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Unless told that this has nothing to do with its compiler, PyTorch loads that, which takes two seconds."""
        return False

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        if operation in _ALLOCATIONS:
            return self._arena.tensor(result)
        if operation.namespace == "c10d":  # its schema does not say that it writes
            self._items.append(lambda: operation(*args, **kwargs)[-1].wait())
            return result
        if operation._schema.is_mutable:
            self._items.append(lambda: operation(*args, **kwargs))
            return result
        results = tree_leaves(result)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not all(isinstance(tensor, Tensor) for tensor in results):
            if not tensors:
                return result  # as that of promote_types, which is the same each time
            raise NotRecordableError(f"{operation} makes the step depend on what a tensor holds")
        inputs = {_address(tensor) for tensor in tensors if tensor.layout is torch.strided}  # oneDNN's are opaque
        if not all(_address(tensor) in inputs for tensor in results):  # else it is a view
            self._items.append(lambda: _copy_leaves(operation(*args, **kwargs), results))
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _copy_leaves(values: Any, targets: Sequence[Tensor]) -> None:
    for value, target in zip(tree_leaves(values), targets, strict=True):
        target.copy_(value)


class _NoLooking(TorchFunctionMode):
    """Refuses what reads values without being an operation."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _LOOKING:
            raise NotRecordableError(f"{function.__name__} makes the step depend on what a tensor holds")
        return function(*args, **(kwargs or {}))


# ---- replaying -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Recording:
    """What there is to call again.

    Attributes:
        calls: in their order.
        arena: whose memory they read and write; it lives as long as they do.
    """

    calls: list[Callable[[], object]]
    arena: _Arena

    def __call__(self) -> None:
        for call in self.calls:
            call()


@dataclass(frozen=True)
class _Launches:
    """Launches one after the other, by way of one call.

    Attributes:
        launches: what they are; they own the arguments that the table points to.
        table: int64 ``[N, 3]``, addresses of kernel and argument, and the number of threads.
        openmp: address of what starts threads; 0 where there is none.
    """

    launches: list[Launch]
    table: np.ndarray
    openmp: int

    @classmethod
    def of(cls, launches: list[Launch]) -> "_Launches":
        rows = [(launch.kernel, ctypes.addressof(launch.data), launch.num_threads) for launch in launches]
        return cls(launches, np.array(rows, dtype=np.int64), parallel_address())

    def __call__(self) -> None:
        most_threads = cores.here().threads(torch.get_num_threads())
        _launch_all.alone(len(self.table), self.table.ctypes.data, self.openmp, most_threads)


@intrinsic
def _launch(typing_context, openmp, address, data, num_threads):
    """Call a kernel on some threads, or on this one where there is no OpenMP."""

    def codegen(context, builder, signature, args):
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        openmp, address, data, num_threads = args
        data = builder.inttoptr(data, byte)
        with builder.if_else(builder.icmp_unsigned("!=", openmp, ir.Constant(openmp.type, 0))) as (there, missing):
            with there:
                function = ir.FunctionType(ir.VoidType(), [byte, byte, number, number]).as_pointer()
                builder.call(
                    builder.inttoptr(openmp, function),
                    [builder.inttoptr(address, byte), data, builder.trunc(num_threads, number), ir.Constant(number, 0)],
                )
            with missing:
                function = ir.FunctionType(ir.VoidType(), [byte]).as_pointer()
                builder.call(builder.inttoptr(address, function), [data])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@kernel
def _launch_all(args):
    table, openmp, most_threads = pointer(args[FIRST], np.int64), args[FIRST + 1], args[FIRST + 2]
    for i in range(args[1]):
        data = pointer(table[3 * i + 1], np.int64)
        data[0] = 0  # the next task
        data[2] = 0  # the next thread's number
        _launch(openmp, table[3 * i], table[3 * i + 1], min(table[3 * i + 2], most_threads))
