"""Damaged and hostile safetensors files: a typed error at once, or a model; never a crash, and little memory."""

import json
import random
import resource
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_infer import kernels
from mini_infer.exceptions import InvalidCheckpointError, MiniInferError
from mini_infer.models import load_model, read_config

from .checkpoints import make_checkpoint

KERNELS = kernels.resolve("cpu", "reference")
ABSURD = (-1, 0, 1, 7, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1, 10**30, 1.5, "8", None, True, [])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    return make_checkpoint(path, "qwen3", 0, torch.bfloat16, num_hidden_layers=1, rope_scaling=None)


def parts_of(whole: bytes) -> tuple[dict[str, Any], bytes]:
    """The header, and the numbers."""
    (length,) = struct.unpack_from("<Q", whole)
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def with_header(header: object, numbers: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """Flipped bits, mostly in the header; something cut off; absurd lengths; tensors that overlap or are not there."""
    data, (header, numbers) = bytearray(whole), parts_of(whole)
    size = len(whole) - len(numbers)
    name, other = draw.sample([name for name in header if name != "__metadata__"], 2)
    match draw.choice(("bits", "bits", "cut", "length", "offset", "shape", "overlap", "dtype", "name", "move")):
        case "bits":
            for _ in range(draw.choice((1, 1, 4, 40))):
                at = draw.randrange(size) if draw.random() < 0.9 else draw.randrange(len(data))
                data[at] ^= 1 << draw.randrange(8)
            return bytes(data)
        case "cut":
            return whole[: draw.choice((draw.randrange(len(whole)), draw.randrange(size)))]
        case "length":
            struct.pack_into("<Q", data, 0, draw.choice((0, 1, size, 2**31, 2**40, 2**63, 2**64 - 1)))
            return bytes(data)
        case "move":
            start, at = draw.randrange(len(data)), draw.randrange(size)
            piece = data[start : start + draw.randrange(1, 200)]
            data[at : at + len(piece)] = piece
            return bytes(data)
        case "offset":
            header[name]["data_offsets"][draw.randrange(2)] = draw.choice(ABSURD)
        case "shape":
            header[name]["shape"] = draw.choice(([draw.choice(ABSURD)], header[name]["shape"] * 40, [2**32, 2**32], []))
        case "overlap":
            header[name]["data_offsets"] = list(header[other]["data_offsets"])
        case "dtype":
            header[name]["dtype"] = draw.choice(("F64", "I8", "F8_E4M3", "F4", "", None, "x" * 10**5))
        case "name":
            header[draw.choice((other, "", "a" * 10**5))] = header.pop(name)
    return with_header(header, numbers)


def attempt(path: Path) -> str:
    """What came of loading it."""
    try:
        load_model(path, read_config(path), torch.float32, "cpu", KERNELS)
    except MiniInferError as error:
        assert len(str(error)) < 3000 and str(path) in str(error)
        return type(error).__name__
    return "loaded"


def run(checkpoint: Path, seeds: range) -> Counter[str]:
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    outcomes = Counter[str]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for seed in seeds:
            file.write_bytes(damaged(whole, random.Random(seed)))
            began = time.process_time()
            try:
                outcome = attempt(checkpoint)
            except Exception as error:
                raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
            assert time.process_time() - began < 1, f"seed {seed}"
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200e3, f"seed {seed}: in KiB"
            outcomes[outcome] += 1
    finally:
        file.write_bytes(whole)
    return outcomes


def test_some_damaged_files(checkpoint: Path) -> None:
    outcomes = run(checkpoint, range(100))
    assert outcomes["InvalidCheckpointError"] > 70 and set(outcomes) <= {"InvalidCheckpointError", "loaded"}, outcomes


@pytest.mark.slow
def test_a_thousand_damaged_files(checkpoint: Path) -> None:
    print(run(checkpoint, range(1000, 2000)))


def test_tensors_that_share_bytes_are_refused(checkpoint: Path) -> None:
    """Two norms of one size: everything else about such a file is in order."""
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    header, numbers = parts_of(whole)
    norms = [f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")]
    header[norms[0]]["data_offsets"] = header[norms[1]]["data_offsets"]
    file.write_bytes(with_header(header, numbers))
    try:
        with pytest.raises(InvalidCheckpointError, match="cannot be read as safetensors"):
            load_model(checkpoint, read_config(checkpoint), torch.float32, "cpu", KERNELS)
    finally:
        file.write_bytes(whole)
