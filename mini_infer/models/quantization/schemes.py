"""Few bits from many: int8 with a scale for each output or each 32 inputs of one, and int4 with one for 32 inputs.

All are symmetric, so that a code of 0 is 0 and a product needs no correction. 8 bits are enough for the largest weight
to be the unit. Of 4 bits that would waste half: for each group some smaller units are tried, and that with which the
squared error is least is kept.

On a CPU, x is rounded to 8 bits as well, which costs more than rounding the weights does where a few of its numbers are
much larger than their neighbours. There int8 is rotated, which spreads them.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from mini_infer.kernels import QuantizedMatrix
from mini_infer.kernels.quantized import ROTATED, rotated
from mini_infer.models.linear import Linear
from mini_infer.models.matrices import packed
from mini_infer.parallel.group import ALONE, Group

INT4_GROUP = 32
SIGNED = torch.arange(-8.0, 8.0)
"""What four-bit codes stand for that are stored with 8 added."""

_ROWS_AT_ONCE = 1024
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def int8(weight: Tensor, group: Group = ALONE) -> QuantizedMatrix:
    """A scale for each output, float32: its largest weight is 127, on whichever rank of a group with other inputs."""
    largest = weight.abs().amax(dim=1, keepdim=True).float()
    if group.size > 1:
        of_each = largest.new_zeros(len(weight), group.size)
        of_each[:, group.rank] = largest.squeeze(1)
        largest = group.sum(of_each).amax(dim=1, keepdim=True)
    scales = largest / 127
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        codes[rows] = _divided(weight[rows].float(), scales[rows]).round_().clamp_(-127, 127)
    return QuantizedMatrix(codes, scales, weight.shape[1])


def rotated_int8(weight: Tensor) -> QuantizedMatrix:
    """Rotated, and then a scale for each `ROTATED` inputs of an output, bfloat16."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = weight.new_empty((len(weight), weight.shape[1] // ROTATED), dtype=torch.bfloat16)
    for start in range(0, len(weight), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        turned = rotated(weight[rows].double())  # whose last bits may depend on what else is there: codes shall not
        groups = turned.float().unflatten(1, (-1, ROTATED))
        scales[rows] = groups.abs().amax(dim=2) / 127
        coded = _divided(groups, scales[rows].float()[..., None])
        codes[rows] = coded.round_().clamp_(-127, 127).flatten(1)
    return QuantizedMatrix(codes, scales, ROTATED, rotated=True)


def int4(weight: Tensor, group: int = INT4_GROUP) -> QuantizedMatrix:
    """A scale for each ``group`` inputs of an output, bfloat16. A matrix with odd inputs becomes `int8`."""
    outputs, inputs = weight.shape
    if inputs % 2:
        return int8(weight)
    parts = [_int4_rows(weight[start : start + _ROWS_AT_ONCE], group) for start in range(0, outputs, _ROWS_AT_ONCE)]
    codes, scales = (torch.cat(some) for some in zip(*parts, strict=True))
    return QuantizedMatrix(packed(codes[:, :inputs]), scales, group, table=SIGNED.to(weight.device))


def _int4_rows(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes from 0 to 15, one per byte and with those of a padded last group, and scales."""
    groups = pad(weight.float(), (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
    at = groups.abs().argmax(dim=-1, keepdim=True)
    largest = groups.gather(-1, at)  # gets the code -8, of which there is no positive one
    best_error = torch.full_like(largest, torch.inf)
    best_scale, best_codes = torch.zeros_like(largest), torch.zeros_like(groups)
    for shrink in _SHRINKS:
        scale = (largest * (shrink / -8)).bfloat16().float()
        codes = _divided(groups, scale).round_().clamp_(-8, 7)
        error = (codes * scale - groups).square_().sum(dim=-1, keepdim=True)
        better = error < best_error
        best_error, best_scale = torch.where(better, error, best_error), torch.where(better, scale, best_scale)
        best_codes = torch.where(better, codes, best_codes)
    return (best_codes + 8).to(torch.uint8).flatten(1), best_scale.squeeze(-1).bfloat16()


def _divided(weight: Tensor, scales: Tensor) -> Tensor:
    """``weight / scales``, where nothing divided by nothing is nothing."""
    return weight / torch.where(scales == 0, 1, scales)


SCHEMES: Mapping[str, Callable[[Tensor], QuantizedMatrix]] = {"int8": int8, "int4": int4}


def quantize(model: nn.Module, scheme: str | None, device: str, group: Group = ALONE) -> None:
    """Have every projection of a model that is not filled yet be quantised as soon as it is.

    The output projection, which may be the embedding, too, becomes int8 with either scheme: it is where four bits cost
    most. Norms, biases and an embedding of its own stay as they are. On the ``device`` type "cpu" int8 is rotated;
    GPUs round x for long prompts only, and want a scale for each output then. Ranks of a group have the codes of the
    whole.
    """
    if scheme is None:
        return
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            if scheme == "int4" and path != "output" and module.inputs.total % 2 == 0:
                module.scheme, module.scheme_step = int4, INT4_GROUP
            elif device == "cpu" and module.inputs.total % ROTATED == 0:
                module.scheme, module.scheme_step = rotated_int8, ROTATED
            else:
                module.scheme = int8 if module.inputs.is_whole else partial(int8, group=group)
