"""Weights as objects: what a module asks of a checkpoint, and how a matrix may be cut."""

import pytest
import torch

from mini_infer import kernels
from mini_infer.models.linear import DENSE, Linear, Part, TensorSpec, cover
from mini_infer.parallel.slices import Span, fair, whole

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


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_shards_of_a_matrix_make_up_its_product(size: int) -> None:
    outputs, inputs = 12, 6
    specs = {spec.name: spec for spec in DENSE.tensors(outputs, inputs, bias=True)}
    tensors = {name: torch.randn(spec.shape, dtype=torch.float64) for name, spec in specs.items()}
    x = torch.randn(4, inputs, dtype=torch.float64)
    expected = x @ tensors["weight"].T + tensors["bias"]

    by_outputs = []
    for rank in range(size):
        mine = {name: tensors[name][spec.cut(fair(outputs, rank, size), whole(inputs))] for name, spec in specs.items()}
        by_outputs.append(x @ mine["weight"].T + mine["bias"])
    torch.testing.assert_close(torch.cat(by_outputs, dim=1), expected)

    by_inputs = torch.zeros(4, outputs, dtype=torch.float64)
    for rank in range(size):
        span = fair(inputs, rank, size)
        mine = tensors["weight"][specs["weight"].cut(whole(outputs), span)]
        by_inputs += x[:, span.start : span.stop] @ mine.T
        assert specs["bias"].cut(whole(outputs), span) == (slice(0, outputs),), "every rank has all of it"
    torch.testing.assert_close(by_inputs + tensors["bias"], expected)


def test_a_tensor_with_one_row_for_several_outputs_is_read_up_to_where_they_end() -> None:
    """As a scale of 128 outputs is, in a format that has such; the last one may be for fewer."""
    scales = TensorSpec("scale", (3, 6), outputs=0, inputs=1, step=(128, 1))
    for rows, read in (
        (Span(128, 384, 384), slice(1, 3)),
        (Span(100, 130, 384), slice(0, 2)),
        (Span(256, 300, 300), slice(2, 3)),
    ):
        assert scales.cut(rows, whole(6)) == (read, slice(0, 6))
    words = TensorSpec("words", (384, 1), outputs=0, inputs=1, step=(1, 8))
    assert cover([scales, words], Span(100, 129, 300), Span(2, 3, 6)) == (Span(0, 256, 300), whole(6))
