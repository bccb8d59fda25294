"""Damaged and hostile GGUF files: a typed error at once, or a model; never a crash, and little memory."""

import random
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

from mini_infer import kernels
from mini_infer.exceptions import InvalidCheckpointError, MiniInferError, UnsupportedModelError
from mini_infer.models import load_model, read_config
from mini_infer.models.gguf import read_tokenizer

from ..checkpoints import make_checkpoint
from .test_model import SHAPE
from .writing import write_gguf

KERNELS = kernels.resolve("cpu", "reference")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole")
    checkpoint = make_checkpoint(path / "qwen3", "qwen3", 0, **SHAPE, rope_scaling=None, num_hidden_layers=1)
    tokens = [f"t{place}" for place in range(97)]
    keys = {"add_tokenizer_model": "llama", "add_token_list": tokens, "add_token_scores": [0.0] * 97}
    write_gguf(path / "m.gguf", checkpoint, 0, ("Q8_0", "Q4_1", "F16"), **keys)
    return (path / "m.gguf").read_bytes()


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """Flipped bits, mostly in the header; something cut off; or a number that is absurd."""
    data = bytearray(whole)
    header = whole.index(b"output_norm") if b"output_norm" in whole else len(whole) // 2
    match draw.choice(("bits", "bits", "cut", "number", "number", "move")):
        case "bits":
            for _ in range(draw.choice((1, 1, 4, 40))):
                at = draw.randrange(header) if draw.random() < 0.9 else draw.randrange(len(data))
                data[at] ^= 1 << draw.randrange(8)
        case "cut":
            del data[draw.randrange(len(data)) :]
        case "number":
            absurd = (0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, draw.randrange(2**64))
            at = draw.randrange(max(8, header - 8))
            struct.pack_into("<Q", data, at, draw.choice(absurd))
        case "move":
            start, length = draw.randrange(len(data)), draw.randrange(1, 200)
            piece = data[start : start + length]
            at = draw.randrange(header)
            data[at : at + len(piece)] = piece
    return bytes(data)


def attempt(path: Path) -> str:
    """Everything that an engine does with a file; what came of it."""
    try:
        config = read_config(path)
        load_model(path, config, torch.float32, "cpu", KERNELS)
        read_tokenizer(path)
    except MiniInferError as error:
        assert len(str(error)) < 2000
        return type(error).__name__
    return "loaded"


def run(whole: bytes, path: Path, seeds: range) -> dict[str, int]:
    outcomes: dict[str, int] = {}
    for seed in seeds:
        path.write_bytes(damaged(whole, random.Random(seed)))
        tracemalloc.start()
        began = time.perf_counter()
        try:
            outcome = attempt(path)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
        spent, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 200e6, f"seed {seed}: {peak / 1e6:.0f} MB"
        assert spent < 20, (
            f"seed {seed}: {spent:.1f} s"
        )  # a second is what it takes; this is for a machine that is busy
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def test_some_damaged_files(whole: bytes, tmp_path: Path) -> None:
    outcomes = run(whole, tmp_path / "m.gguf", range(60))
    assert outcomes.get("InvalidCheckpointError", 0) > 20, outcomes


@pytest.mark.slow
def test_a_thousand_damaged_files(whole: bytes, tmp_path: Path) -> None:
    print(run(whole, tmp_path / "m.gguf", range(1000, 2000)))


def test_every_length_that_a_file_can_be_cut_to(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    header = whole.index(b"token_embd")
    for length in [*range(0, 64), *range(64, header, 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidCheckpointError, match=r"m\.gguf"):
            read_config(path)


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def file(tensors: int, keys: int, *rest: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(rest)


def tensor(name: str, sizes: list[int], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


HOSTILE = {
    "another format": (b"PK\x03\x04" + bytes(60), InvalidCheckpointError, "not b'GGUF'"),
    "an old version": (file(0, 0, version=1), UnsupportedModelError, "version 1 is not supported"),
    "big endian": (file(0, 0, version=3 << 24), UnsupportedModelError, "big endian is not supported"),
    "more tensors than anybody has": (file(2**63, 0), InvalidCheckpointError, "claims 9223372036854775808 tensors"),
    "more keys": (file(0, 2**40), InvalidCheckpointError, "1099511627776 keys"),
    "a name without end": (file(0, 1, struct.pack("<Q", 2**62)), InvalidCheckpointError, "a string claims"),
    "a list of billions": (
        file(0, 1, string("a"), struct.pack("<IIQ", 9, 4, 2**33)),
        InvalidCheckpointError,
        "an array claims 8589934592 elements",
    ),
    "more texts than bytes": (
        file(0, 1, string("a"), struct.pack("<IIQ", 9, 8, 10**6), bytes(1000)),
        InvalidCheckpointError,
        "claims 1000000 strings, and the file has 1000 bytes left",
    ),
    "a list of lists": (
        file(0, 1, string("a"), struct.pack("<IIQ", 9, 9, 1), bytes(100)),
        InvalidCheckpointError,
        "an array of type 9",
    ),
    "a type that there is not": (file(0, 1, string("a"), struct.pack("<I", 99)), InvalidCheckpointError, "type 99"),
    "a key twice": (file(0, 2, *2 * [string("a") + b"\x00\x00\x00\x00\x01"]), InvalidCheckpointError, "there twice"),
    "no UTF-8": (file(0, 1, struct.pack("<Q", 2) + b"\xff\xfe"), InvalidCheckpointError, "no UTF-8"),
    "a tensor beyond the end": (
        file(1, 0, tensor("a", [64, 64], 0, 0), bytes(100)),
        InvalidCheckpointError,
        "has 16384 bytes at 96, but the file ends",
    ),
    "an offset that wraps around": (
        file(1, 0, tensor("a", [8], 0, 2**64 - 32), bytes(100)),
        InvalidCheckpointError,
        "but the file ends",
    ),
    "sizes whose product wraps around": (
        file(1, 0, tensor("a", [2**31 - 1] * 4, 0, 0), bytes(100)),
        InvalidCheckpointError,
        "but the file ends",
    ),
    "nothing of something": (file(1, 0, tensor("a", [0, 8], 0, 0)), InvalidCheckpointError, r"sizes \[0, 8\]"),
    "seven dimensions": (file(1, 0, tensor("a", [1] * 7, 0, 0)), InvalidCheckpointError, "7 dimensions"),
    "a row of half a block": (file(1, 0, tensor("a", [48], 8, 0)), InvalidCheckpointError, "no multiple of Q8_0's 32"),
    "a tensor twice": (
        file(2, 0, tensor("a", [8], 0, 0), tensor("a", [8], 0, 32), bytes(200)),
        InvalidCheckpointError,
        "'a' is there twice",
    ),
    "tensors that overlap": (
        file(2, 0, tensor("a", [16], 0, 0), tensor("b", [8], 0, 32), bytes(200)),
        InvalidCheckpointError,
        "'a' and 'b' overlap",
    ),
    "a crooked place": (file(1, 0, tensor("a", [8], 0, 4), bytes(200)), InvalidCheckpointError, "multiples of 32"),
    "an alignment of three": (
        file(0, 1, string("general.alignment"), struct.pack("<II", 4, 3)),
        InvalidCheckpointError,
        "power of two",
    ),
    "a type unheard of": (
        file(1, 0, tensor("a", [8], 1000, 0)),
        InvalidCheckpointError,
        "type 1000, which there is not",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file(tmp_path: Path, name: str) -> None:
    data, error, words = HOSTILE[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(error, match=words):
        read_config(path)
