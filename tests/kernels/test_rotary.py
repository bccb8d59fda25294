import re

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mini_infer import kernels
from mini_infer.exceptions import KernelError

from .truth import DTYPES, check, draw, on_backends, rotate, strided


def tables(rotary_dim: int, max_positions: int = 50, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    frequencies = 10000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(max_positions, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [(4, 2, 16, 16), (3, 1, 64, 64), (2, 2, 10, 6), (1, 1, 5, 4), (2, 1, 2, 2), (2, 1, 8, 0)],
)
@on_backends("apply_rotary_emb")
def test_rotation_is_a_complex_product(
    backend: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
    interleaved: bool,
) -> None:
    q, k = draw(1, 6, num_heads, head_dim, dtype=dtype), draw(2, 6, num_kv_heads, head_dim, dtype=dtype)
    cos, sin = tables(max(rotary_dim, 1), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    cos, sin = cos[:, : rotary_dim // 2], sin[:, : rotary_dim // 2]
    positions = torch.tensor([0, 49, 3, 3, 17, 1])
    kept = q.clone(), k.clone()
    out_q, out_k = kernels.apply_rotary_emb(q, k, cos, sin, positions, interleaved=interleaved)
    check(out_q, rotate(q, cos, sin, positions, interleaved), dtype)
    check(out_k, rotate(k, cos, sin, positions, interleaved), dtype)
    assert torch.equal(out_q[..., rotary_dim:], q[..., rotary_dim:])
    assert torch.equal(q, kept[0]) and torch.equal(k, kept[1])


@on_backends("apply_rotary_emb")
def test_half_split_is_what_transformers_llama_does(backend: str) -> None:
    q, k = draw(3, 2, 7, 4, 32, dtype=torch.float32), draw(4, 2, 7, 2, 32, dtype=torch.float32)
    cos, sin = tables(32, dtype=torch.float32)
    positions = torch.stack((torch.arange(7), torch.arange(20, 27)))
    theirs_q, theirs_k = apply_rotary_pos_emb(
        q, k, cos[positions].repeat(1, 1, 2), sin[positions].repeat(1, 1, 2), unsqueeze_dim=2
    )
    for tables_by_hand in ((cos, sin), (cos.repeat(1, 2), sin.repeat(1, 2))):  # theirs have each column twice
        out_q, out_k = kernels.apply_rotary_emb(q, k, *tables_by_hand, positions)
        check(out_q, theirs_q, torch.float32)
        check(out_k, theirs_k, torch.float32)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
def test_tables_with_a_column_for_each_feature(interleaved: bool) -> None:
    q, k, weight = draw(8, 3, 4, 16), draw(9, 3, 2, 16), draw(10, 16)
    cos, sin = tables(16)
    positions = torch.tensor([0, 49, 7])

    def turned(cos: Tensor, sin: Tensor) -> list[Tensor]:
        turns = kernels.apply_rotary_emb(q, k, cos, sin, positions, interleaved=interleaved)
        return [*turns, *kernels.qk_norm_rope(q, k, weight, weight, cos, sin, positions, interleaved=interleaved)]

    def widened(table: Tensor, interleaved: bool) -> Tensor:
        return table.repeat_interleave(2, -1) if interleaved else table.repeat(1, 2)

    wide = widened(cos, interleaved), widened(sin, interleaved)
    assert all(torch.equal(one, two) for one, two in zip(turned(*wide), turned(cos, sin), strict=True))
    other = widened(sin, not interleaved)
    pair = "2i and 2i + 1" if interleaved else "i and i + 8"
    with pytest.raises(KernelError, match=f"columns {re.escape(pair)} of sin must be equal"):
        turned(wide[0], other)
    wrong_elsewhere = wide[1].clone()
    wrong_elsewhere[20] = draw(11, 16)  # where no token stands
    assert torch.equal(turned(wide[0], wrong_elsewhere)[0], turned(cos, sin)[0])


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@on_backends("apply_rotary_emb")
def test_scores_depend_on_distance_only(backend: str, interleaved: bool) -> None:
    q, k = draw(5, 1, 1, 32).expand(20, 1, 32), draw(6, 1, 1, 32).expand(20, 1, 32)
    cos, sin = tables(32)
    early, _ = kernels.apply_rotary_emb(q, k, cos, sin, torch.arange(20), interleaved=interleaved)
    _, late = kernels.apply_rotary_emb(q, k, cos, sin, torch.arange(20) + 9, interleaved=interleaved)
    scores = (early * late).sum(-1)
    assert torch.allclose(scores, scores[:1].expand_as(scores), rtol=1e-10)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@on_backends("apply_rotary_emb")
def test_strides_tables_and_index_dtypes(backend: str, index_dtype: torch.dtype) -> None:
    fused = draw(7, 5, 6, 16, dtype=torch.bfloat16)  # as a fused projection gives them: views into one tensor
    q, k = fused[:, :4], fused[:, 4:]
    cos, sin = tables(16, dtype=torch.bfloat16)
    positions = torch.tensor([4, 0, 9, 2, 30])
    every_second = strided(positions.double()).nan_to_num().to(index_dtype)
    out_q, out_k = kernels.apply_rotary_emb(q, k, strided(cos), strided(sin), every_second)
    check(out_q, rotate(q, cos, sin, positions, False), torch.bfloat16)
    check(out_k, rotate(k, cos, sin, positions, False), torch.bfloat16)


@on_backends("apply_rotary_emb")
def test_zero_tokens(backend: str) -> None:
    cos, sin = tables(8)
    q, k = torch.empty(0, 4, 8), torch.empty(0, 2, 8)
    out_q, out_k = kernels.apply_rotary_emb(q, k, cos, sin, torch.empty(0, dtype=torch.int64))
    assert out_q.shape == q.shape and out_k.shape == k.shape
