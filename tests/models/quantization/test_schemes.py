"""int8 and int4 from plain numbers: as near as the bits allow, whatever the numbers are."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mini_infer import kernels
from mini_infer.kernels import QuantizedMatrix
from mini_infer.models import load_model, read_config
from mini_infer.models.quantization.schemes import int4, int8, rotated_int8

from ..checkpoints import make_checkpoint
from ..test_decoder import PagedRun

KERNELS = kernels.resolve("cpu")


def weights(seed: int) -> Tensor:
    """Rows of very different size, some of zeros, some with one large weight."""
    draw = random.Random(seed)
    outputs, inputs = draw.randint(1, 60), 2 * draw.randint(1, 90)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-6, 3, outputs)[:, None]
    weight[draw.randrange(outputs)] = 0
    weight[draw.randrange(outputs), draw.randrange(inputs)] *= 30
    return weight.to(draw.choice((torch.bfloat16, torch.float32)))


@pytest.mark.parametrize("seed", range(10))
def test_int8_is_within_half_a_step(seed: int) -> None:
    weight = weights(seed)
    matrix = int8(weight)
    assert matrix.codes.dtype is torch.int8 and matrix.scales.shape == (len(weight), 1)
    step = weight.double().abs().amax(1, keepdim=True) / 127
    assert ((matrix.dequantize(torch.float64) - weight.double()).abs() <= 0.5 * step * (1 + 1e-5)).all()


@pytest.mark.parametrize("seed", range(3))
def test_rotated_int8_is_within_half_a_step_of_its_group(seed: int) -> None:
    """An error is the same length whether rotated or not."""
    weight = torch.cat([weights(3 * seed + place)[:1].double().repeat(1, 32)[:, :64] for place in range(3)])
    groups = weight.unflatten(1, (-1, 32)) - rotated_int8(weight.float()).dequantize(torch.float64).unflatten(
        1, (-1, 32)
    )
    step = weight.unflatten(1, (-1, 32)).norm(dim=2) / 127  # no rotated number is larger than the length of all
    assert (groups.norm(dim=2) <= 0.5 * 32**0.5 * step * (1 + 2**-6)).all()


@pytest.mark.parametrize("seed", range(10))
def test_int4_is_no_worse_than_rounding(seed: int) -> None:
    """For each group, the squared error is at most that of the scale that its largest weight asks for."""
    weight = weights(seed)
    matrix = int4(weight)
    assert isinstance(matrix, QuantizedMatrix) and matrix.codes.dtype is torch.uint8
    error = (matrix.dequantize(torch.float64) - weight.double()).square()
    for start in range(0, weight.shape[1], 32):
        group = weight[:, start : start + 32].double()
        at = group.abs().argmax(1, keepdim=True)
        scale = (group.gather(1, at).float() / -8).bfloat16().double()
        rounded = (group / scale.where(scale != 0, torch.ones(()).double())).round().clamp(-8, 7) * scale
        ours = error[:, start : start + 32].sum(1)
        assert (ours <= (rounded - group).square().sum(1) * (1 + 1e-4) + 1e-12 * group.square().sum(1)).all()


def test_an_odd_number_of_inputs_becomes_int8() -> None:
    assert int4(torch.randn(3, 33)).codes.dtype is torch.int8


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_quantised_while_it_loads(tmp_path: Path, scheme: str, tied: bool) -> None:
    """It computes what the same model does whose matrices were replaced beforehand."""
    path = make_checkpoint(
        tmp_path, "qwen2", 1, hidden_size=64, intermediate_size=96, tie_word_embeddings=tied, rope_scaling=None
    )
    config = read_config(path)
    model = load_model(path, config, torch.float32, "cpu", KERNELS, scheme)
    plain = load_model(path, config, torch.float32, "cpu", KERNELS)
    x = torch.randn(5, 64)
    identity = torch.eye(64)
    (layer, other) = (m.layers[0].feed_forward.gate_up_proj for m in (model, plain))
    weight = other(identity).T
    expected = (rotated_int8 if scheme == "int8" else int4)(weight).dequantize()
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-4, atol=1e-4)
    output = rotated_int8(plain.compute_logits(identity).T).dequantize()
    torch.testing.assert_close(model.compute_logits(x), x @ output.T, rtol=1e-4, atol=1e-4)
    tokens = [1, 5, 7, 3]
    (result,) = PagedRun(model, [tokens], 4, torch.float32).finish(0)
    assert result.isfinite().all()
