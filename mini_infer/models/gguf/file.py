"""Reading a GGUF file: header, metadata, and where each tensor lies. Version 2 or 3, little endian.

    "GGUF" · version u32 · number of tensors u64 · number of keys u64
    for each key:     name · type u32 · value                    a string is its length u64 and UTF-8
    for each tensor:  name · dimensions u32 · sizes u64, fastest first · type u32 · offset u64 from the data's begin
    padding to a multiple of the alignment, then the data

Nothing in a file is believed: each length is compared with what is left of the file before anything is read or
allocated for it. So a damaged or hostile file is an `InvalidCheckpointError`, in little time and memory. The data is
mapped, not read.
"""

import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mini_infer.exceptions import InvalidCheckpointError, UnsupportedModelError
from mini_infer.models.gguf.blocks import DENSE_TYPES, LAYOUTS, TYPE_NAMES

MAGIC = b"GGUF"
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_NAME = 1 << 16
MAX_ELEMENTS = 1 << 22
"""Of an array; the largest vocabularies have a quarter of a million tokens."""
MAX_METADATA = 1 << 28
"""Bytes before the data."""
MAX_SIZE = 2**31 - 1
MAX_ALIGNMENT = 1 << 20

_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    Attributes:
        name: llama.cpp's.
        type: "F32", "Q4_K" and the like.
        shape: as PyTorch has it, slowest dimension first.
        start, end: its bytes in the file.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    start: int
    end: int


class GgufFile:
    """One file, read as far as the data.

    Attributes:
        path: where it is.
        metadata: each key's value; arrays of numbers are NumPy's, those of strings are lists.
        tensors: by name.

    Raises:
        InvalidCheckpointError: it cannot be read, or contradicts itself.
        UnsupportedModelError: a version or a type of tensor that is not implemented.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                # Private pages: PyTorch wants memory that could be written to, and the file must never be.
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise InvalidCheckpointError(f"{path} cannot be read: {error}; fetch the file again") from error
        try:
            self.metadata, self.tensors = _Header(self._data).read()
        except _Damaged as error:
            raise InvalidCheckpointError(
                f"{path} is no usable GGUF file: {error}; it is truncated, corrupt or a Git LFS pointer: fetch it again"
            ) from error
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{path}: {error}") from None

    def bytes_of(self, name: str) -> Tensor:
        """A tensor's data, uint8 ``[..., bytes of a row]``: a view of the file."""
        tensor = self.tensors[name]
        rows = math.prod(tensor.shape[:-1])
        data = torch.frombuffer(self._data, dtype=torch.uint8, count=tensor.end - tensor.start, offset=tensor.start)
        return data.view(*tensor.shape[:-1], (tensor.end - tensor.start) // rows)

    def floats(self, name: str) -> Tensor:
        """A tensor that is not quantised, as it is: a view of the file."""
        return self.bytes_of(name).view(DENSE_TYPES[self.tensors[name].type])


class _Damaged(Exception):
    """What is wrong with a file."""


class _Header:
    """Reads a file from its begin to its data."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self._size, self._at = data, len(data), 0

    def read(self) -> tuple[Mapping[str, Any], Mapping[str, GgufTensor]]:
        if self._take(4) != MAGIC:
            raise _Damaged(f"it begins with {bytes(self._data[:4])!r}, not {MAGIC!r}")
        version = self._number("<I")
        if version not in (2, 3):
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, 3)
            what = "big endian" if big_endian else f"version {version}"
            raise UnsupportedModelError(f"GGUF {what} is not supported; convert it to version 3, little endian")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        if num_tensors > MAX_TENSORS or num_keys > MAX_KEYS:
            raise _Damaged(f"it claims {num_tensors} tensors and {num_keys} keys")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string(MAX_NAME)
            if key in metadata:
                raise _Damaged(f"key {_short(key)} is there twice")
            metadata[key] = self._value(self._number("<I"))
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise _Damaged(f"general.alignment must be a power of two from 8; got {_short(alignment)}")
        described = [self._tensor() for _ in range(num_tensors)]
        begin = -(-self._at // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, type_name, shape, offset, length in described:
            if name in tensors:
                raise _Damaged(f"tensor {_short(name)} is there twice")
            start = begin + offset
            if offset % alignment or start + length > self._size:
                raise _Damaged(
                    f"tensor {_short(name)} has {length} bytes at {start}, but the file ends at {self._size} and "
                    f"tensors begin at multiples of {alignment}"
                )
            tensors[name] = GgufTensor(name, type_name, shape, start, start + length)
        in_order = sorted(tensors.values(), key=lambda tensor: tensor.start)
        for one, other in pairwise(in_order):
            if other.start < one.end:
                raise _Damaged(f"tensors {_short(one.name)} and {_short(other.name)} overlap")
        return metadata, tensors

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """Name, type, shape, offset and length in bytes."""
        name = self._string(MAX_NAME)
        dimensions = self._number("<I")
        if not 1 <= dimensions <= 4:
            raise _Damaged(f"tensor {_short(name)} has {dimensions} dimensions")
        sizes = [self._number("<Q") for _ in range(dimensions)]
        if not all(1 <= size <= MAX_SIZE for size in sizes):
            raise _Damaged(f"tensor {_short(name)} has sizes {sizes}")
        number, offset = self._number("<I"), self._number("<Q")
        type_name = TYPE_NAMES.get(number)
        if type_name is None:
            raise _Damaged(f"tensor {_short(name)} has the type {number}, which there is not")
        layout = LAYOUTS.get(type_name)
        if layout is None:
            raise UnsupportedModelError(f"tensor {_short(name)} is {type_name}, which is not supported")
        elements, size = layout
        blocks, rest = divmod(sizes[0], elements)
        if rest:
            raise _Damaged(f"tensor {_short(name)} has rows of {sizes[0]}, no multiple of {type_name}'s {elements}")
        return name, type_name, tuple(reversed(sizes)), offset, blocks * size * math.prod(sizes[1:])

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string(self._size)
        if kind in _NUMBERS:
            return self._numbers(kind, 1)[0].item()
        if kind != _ARRAY:
            raise _Damaged(f"type {kind} of a value, which there is not")
        kind, count = self._number("<I"), self._number("<Q")
        if count > MAX_ELEMENTS:
            raise _Damaged(f"an array claims {count} elements")
        if kind in _NUMBERS:
            return self._numbers(kind, count)
        if kind != _STRING:
            raise _Damaged(f"an array of type {kind}")
        if 8 * count > self._size - self._at:
            raise _Damaged(f"an array claims {count} strings, and the file has {self._size - self._at} bytes left")
        return [self._string(MAX_NAME) for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> "np.ndarray[Any, Any]":
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(dtype.itemsize * count), dtype)

    def _string(self, longest: int) -> str:
        length = self._number("<Q")
        if length > longest:
            raise _Damaged(f"a string claims {length} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:
            raise _Damaged(f"a string is no UTF-8: {error.reason}") from None

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _take(self, count: int) -> bytes:
        end = self._at + count
        if end > self._size:
            raise _Damaged(f"it ends at byte {self._size}, in the middle of what should go on to {end}")
        if end > MAX_METADATA:
            raise _Damaged(f"its metadata is longer than {MAX_METADATA} bytes")
        taken = self._data[self._at : end]
        self._at = end
        return taken


def is_gguf(path: Path) -> bool:
    """Whether this is a checkpoint in GGUF, and not a directory or something else."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def split_files(path: Path) -> list[Path]:
    """The files of a checkpoint that is cut into several, ``NAME-00001-of-00003.gguf``, given any of them; or the one.

    Raises:
        InvalidCheckpointError: one is missing.
    """
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})", path.stem)
    if match is None:
        return [path]
    files = [
        path.with_name(f"{match[1]}-{number + 1:05}-of-{match[3]}{path.suffix}") for number in range(int(match[3]))
    ]
    missing = [file.name for file in files if not file.is_file()]
    if missing or not files:
        raise InvalidCheckpointError(
            f"{path} is one of {match[3]} files, and {', '.join(missing[:3]) or 'none'} of them is not there; fetch it"
        )
    return files


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
