"""Every block type against llama.cpp's own Python package: the same numbers, to the last bit."""

import random
import warnings

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize

from mini_infer.models.gguf.blocks import BLOCK_TYPES, LAYOUTS, powers_of_two, read_blocks
from mini_infer.models.matrices import join


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_stand_for_what_the_package_says(name: str) -> None:
    """Blocks are arbitrary bytes, so every code, scale and minimum comes up; so do infinities."""
    layout = LAYOUTS.get(name)
    assert layout is not None
    elements, size = layout
    assert layout == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    draw = random.Random(name)
    for _ in range(5):
        rows, blocks, seed = draw.randint(1, 40), draw.randint(1, 9), draw.randrange(2**32)
        data = np.random.default_rng(seed).integers(0, 256, (rows, blocks * size), dtype=np.uint8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of infinities
            expected = dequantize(data, gguf.GGMLQuantizationType[name])
        matrix = read_blocks(name, torch.from_numpy(data))
        assert matrix.shape == (rows, blocks * elements)
        np.testing.assert_array_equal(matrix.dequantize().numpy(), expected, err_msg=f"{rows=} {blocks=} {seed=}")
        bits = 8 if name in ("Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0") else 4
        assert matrix.codes.nbytes * 8 == rows * blocks * elements * bits


def test_powers_of_two() -> None:
    exponents = torch.arange(256, dtype=torch.uint8)
    expected = torch.tensor([2.0 ** (e - 127) for e in range(255)] + [torch.inf])
    torch.testing.assert_close(powers_of_two(exponents), expected, rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(12))
def test_matrices_of_any_types_join_without_a_change(seed: int) -> None:
    draw = random.Random(seed)
    names = [draw.choice(BLOCK_TYPES) for _ in range(draw.randint(1, 4))]
    matrices = []
    for name in names:
        layout = LAYOUTS.get(name)
        assert layout is not None
        data = gguf_bytes(name, draw.randint(1, 5), 512 // layout[0], draw.randrange(2**32))
        matrices.append(read_blocks(name, data))
    joined = join(matrices, torch.float32)
    assert not isinstance(joined, torch.Tensor)
    expected = torch.cat([matrix.dequantize() for matrix in matrices])
    torch.testing.assert_close(joined.dequantize(torch.float32), expected, rtol=0, atol=0, msg=str(names))


def gguf_bytes(name: str, rows: int, blocks: int, seed: int) -> torch.Tensor:
    """Arbitrary blocks, but for float16 scales, none of which is infinite."""
    layout = LAYOUTS.get(name)
    assert layout is not None
    data = np.random.default_rng(seed).integers(0, 256, (rows, blocks, layout[1]), dtype=np.uint8)
    halves = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q2_K": (80, 82)}
    halves |= {"Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,)}
    for at in halves.get(name, ()):
        data[..., at + 1] &= 0xBF
    if name == "MXFP4":
        data[..., 0] = data[..., 0] % 100 + 78
    return torch.from_numpy(data.reshape(rows, -1))
