"""Weights as objects: what a module asks of a checkpoint, and how a matrix may be cut."""

import pytest
import torch

from mini_infer import kernels
from mini_infer.models.linear import DENSE, Linear, Part, TensorSpec

KERNELS = kernels.resolve("cpu")


def filled(linear: Linear, tensors: dict[str, torch.Tensor], names: list[str]) -> Linear:
    for name, parameter in list(linear.named_parameters()):
        setattr(linear, name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False))
    for part in linear.parts(names):
        assert tensors[part.name].shape == part.shape
        getattr(linear, part.parameter).narrow(part.dim, part.start, part.shape[part.dim]).copy_(tensors[part.name])
    linear.finish()
    return linear


def test_several_matrices_are_one_product() -> None:
    linear = Linear(5, [3, 1, 4], True, torch.float64, KERNELS)
    assert linear.parts(["q", "k", "v"]) == [
        Part("q.weight", (3, 5), "weight", 0, 0),
        Part("q.bias", (3,), "bias", 0, 0),
        Part("k.weight", (1, 5), "weight", 0, 3),
        Part("k.bias", (1,), "bias", 0, 3),
        Part("v.weight", (4, 5), "weight", 0, 4),
        Part("v.bias", (4,), "bias", 0, 4),
    ]
    tensors = {part.name: torch.randn(part.shape, dtype=torch.float64) for part in linear.parts(["q", "k", "v"])}
    filled(linear, tensors, ["q", "k", "v"])
    x = torch.randn(7, 5, dtype=torch.float64)
    alone = [x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"] for name in "qkv"]
    torch.testing.assert_close(linear(x), torch.cat(alone, dim=1))
    torch.testing.assert_close(
        linear.rows(torch.tensor([4, 0])), torch.cat((tensors["v.weight"][:1], tensors["q.weight"][:1]))
    )
    assert not list(linear.parameters()), "what is packed is let go of"


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_shards_of_a_matrix_make_up_its_product(size: int) -> None:
    outputs, inputs = 12, 6
    specs = {spec.name: spec for spec in DENSE.tensors(outputs, inputs, bias=True)}
    whole = {name: torch.randn(spec.shape, dtype=torch.float64) for name, spec in specs.items()}
    x = torch.randn(4, inputs, dtype=torch.float64)
    expected = x @ whole["weight"].T + whole["bias"]

    by_outputs = []
    for rank in range(size):
        mine = {name: whole[name][spec.shard("outputs", rank, size)] for name, spec in specs.items()}
        by_outputs.append(x @ mine["weight"].T + mine["bias"])
    torch.testing.assert_close(torch.cat(by_outputs, dim=1), expected)

    by_inputs = torch.zeros(4, outputs, dtype=torch.float64)
    for rank in range(size):
        mine = whole["weight"][specs["weight"].shard("inputs", rank, size)]
        by_inputs += x.chunk(size, dim=1)[rank] @ mine.T
        assert specs["bias"].shard("inputs", rank, size) == (slice(0, outputs),), "every rank has all of it"
    torch.testing.assert_close(by_inputs + whole["bias"], expected)


def test_a_matrix_that_cannot_be_cut_evenly() -> None:
    with pytest.raises(ValueError, match=r"weight \(10, 6\): 10 outputs cannot be cut into 4"):
        TensorSpec("weight", (10, 6), outputs=0, inputs=1).shard("outputs", 0, 4)
