import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from mini_infer import kernels

from .truth import DTYPES, check, draw, on_backends, rotate, strided

EPS = 1e-5


def tables(rotary_dim: int, max_positions: int = 50, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    angles = 3 * draw(90, max_positions, rotary_dim // 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def norm_and_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, pairs: bool) -> Tensor:
    return rotate(rms_norm(x.double(), (x.shape[-1],), weight.double(), EPS), cos, sin, positions, pairs)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [(4, 2, 16, 16), (3, 1, 80, 80), (2, 2, 10, 6), (1, 1, 5, 4), (2, 1, 256, 64), (2, 3, 8, 0)],
)
@on_backends("qk_norm_rope")
def test_heads_are_normalised_then_turned(
    backend: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    dtype: torch.dtype,
    interleaved: bool,
) -> None:
    q, k = draw(1, 4, num_heads, head_dim, dtype=dtype), draw(2, 4, num_kv_heads, head_dim, dtype=dtype)
    q_weight, k_weight = draw(3, head_dim, dtype=dtype), draw(4, head_dim, dtype=dtype)
    cos, sin = tables(rotary_dim, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    positions = torch.tensor([0, 49, 3, 3])
    kept = q.clone(), k.clone()
    out_q, out_k = kernels.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, positions, EPS, interleaved=interleaved)
    check(out_q, norm_and_rotate(q, q_weight, cos, sin, positions, interleaved), dtype)
    check(out_k, norm_and_rotate(k, k_weight, cos, sin, positions, interleaved), dtype)
    assert torch.equal(q, kept[0]) and torch.equal(k, kept[1])


@pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_backends("qk_norm_rope")
def test_it_is_the_two_operations_after_each_other(backend: str, dtype: torch.dtype, interleaved: bool) -> None:
    q, k = draw(5, 2, 3, 4, 32, dtype=dtype), draw(6, 2, 3, 2, 32, dtype=dtype)
    q_weight, k_weight = draw(7, 32, dtype=dtype), draw(8, 32, dtype=dtype)
    cos, sin = tables(24, dtype=torch.float32)
    positions = torch.tensor([[4, 5, 6], [20, 21, 22]])
    fused = kernels.qk_norm_rope(q, k, q_weight, k_weight, cos, sin, positions, EPS, interleaved=interleaved)
    normed = kernels.rmsnorm(q, q_weight, EPS), kernels.rmsnorm(k, k_weight, EPS)
    apart = kernels.apply_rotary_emb(*normed, cos, sin, positions, interleaved=interleaved)
    for out, expected in zip(fused, apart, strict=True):
        check(out, expected.double(), dtype)


@on_backends("qk_norm_rope")
def test_it_is_what_transformers_qwen3_does(backend: str) -> None:
    q, k = draw(9, 7, 4, 32, dtype=torch.float32), draw(10, 7, 2, 32, dtype=torch.float32)
    norms = Qwen3RMSNorm(32, eps=EPS), Qwen3RMSNorm(32, eps=EPS)
    for seed, norm in enumerate(norms):
        norm.weight.data.copy_(draw(11 + seed, 32))
    cos, sin = tables(32, dtype=torch.float32)
    positions = torch.arange(20, 27)
    theirs = apply_rotary_pos_emb(
        norms[0](q), norms[1](k), cos[positions].repeat(1, 2), sin[positions].repeat(1, 2), unsqueeze_dim=1
    )
    ours = kernels.qk_norm_rope(q, k, norms[0].weight.data, norms[1].weight.data, cos, sin, positions, EPS)
    for out, expected in zip(ours, theirs, strict=True):
        check(out, expected.detach().double(), torch.float32)


@pytest.mark.parametrize("magnitude", [1e-4, 200.0, 30000.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends("qk_norm_rope")
def test_large_and_small_heads(backend: str, dtype: torch.dtype, magnitude: float) -> None:
    q, k = ((draw(seed, 3, 2, 48).clamp(-2, 2) * magnitude).to(dtype) for seed in (13, 14))
    weight = draw(15, 48, dtype=dtype)
    cos, sin = tables(48)
    positions = torch.tensor([7, 0, 30])
    out_q, out_k = kernels.qk_norm_rope(q, k, weight, weight, cos, sin, positions, EPS)
    check(out_q, norm_and_rotate(q, weight, cos, sin, positions, False), dtype)
    check(out_k, norm_and_rotate(k, weight, cos, sin, positions, False), dtype)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@on_backends("qk_norm_rope")
def test_strides_tables_and_index_dtypes(backend: str, index_dtype: torch.dtype) -> None:
    fused = draw(16, 5, 6, 16, dtype=torch.bfloat16)  # as a fused projection gives them: views into one tensor
    q, k = fused[:, :4], fused[:, 4:]
    q_weight, k_weight = draw(17, 16, dtype=torch.bfloat16), draw(18, 16, dtype=torch.bfloat16)
    cos, sin = tables(16, dtype=torch.bfloat16)
    positions = torch.tensor([4, 0, 9, 2, 30])
    every_second = strided(positions.double()).nan_to_num().to(index_dtype)
    truth_q = norm_and_rotate(q, q_weight, cos, sin, positions, False)
    truth_k = norm_and_rotate(k, k_weight, cos, sin, positions, False)
    for q_view, k_view in ((q, k), (strided(q), strided(k)), (heads_first(q), heads_first(k))):
        out_q, out_k = kernels.qk_norm_rope(
            q_view, k_view, strided(q_weight), k_weight, strided(cos), strided(sin), every_second, EPS
        )
        check(out_q, truth_q, torch.bfloat16)
        check(out_k, truth_k, torch.bfloat16)


def heads_first(x: Tensor) -> Tensor:
    """The same numbers, all tokens of a head next to each other in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@pytest.mark.parametrize("rotary_dim", [256, 80])
@on_backends("qk_norm_rope")
def test_more_heads_than_one_program_takes(backend: str, rotary_dim: int) -> None:
    q, k = draw(19, 1, 37, 256, dtype=torch.float32), draw(20, 1, 1, 256, dtype=torch.float32)
    weight, (cos, sin), positions = draw(21, 256, dtype=torch.float32), tables(rotary_dim), torch.tensor([9])
    out_q, out_k = kernels.qk_norm_rope(q, k, weight, weight, cos, sin, positions, EPS)
    check(out_q, norm_and_rotate(q, weight, cos, sin, positions, False), torch.float32)
    check(out_k, norm_and_rotate(k, weight, cos, sin, positions, False), torch.float32)


@on_backends("qk_norm_rope")
def test_zeros_and_zero_tokens(backend: str) -> None:
    cos, sin = tables(8)
    weight = torch.ones(8)
    zeros = torch.zeros(2, 1, 8)
    out_q, out_k = kernels.qk_norm_rope(zeros, zeros, weight, weight, cos, sin, torch.tensor([3, 4]))
    assert torch.equal(out_q, zeros) and torch.equal(out_k, zeros)
    q, k = torch.empty(0, 4, 8), torch.empty(0, 2, 8)
    out_q, out_k = kernels.qk_norm_rope(q, k, weight, weight, cos, sin, torch.empty(0, dtype=torch.int64))
    assert out_q.shape == q.shape and out_k.shape == k.shape
