import math

import pytest
import torch

from mini_infer import kernels

from .truth import DTYPES, draw, on_backends, strided


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16])
@on_backends("write_kv")
def test_tokens_land_in_their_slots_and_nowhere_else(
    backend: str, block_size: int, dtype: torch.dtype, index_dtype: torch.dtype
) -> None:
    slots = [0, -1, 11, 5, -1, 47, 6]
    key, value = draw(1, len(slots), 2, 5, dtype=dtype), draw(2, len(slots), 2, 5, dtype=dtype)
    key[1], value[4] = math.nan, math.inf
    key_cache = torch.full((48 // block_size, block_size, 2, 5), 7.0, dtype=dtype)
    value_cache = key_cache + 1
    kernels.write_kv(key, value, key_cache, value_cache, torch.tensor(slots, dtype=index_dtype))
    for slot in range(48):
        place = slot // block_size, slot % block_size
        if slot in slots:
            assert torch.equal(key_cache[place], key[slots.index(slot)])
            assert torch.equal(value_cache[place], value[slots.index(slot)])
        else:
            assert bool((key_cache[place] == 7).all() and (value_cache[place] == 8).all())


@on_backends("write_kv")
def test_strided_inputs_and_caches(backend: str) -> None:
    key, value, slots = draw(3, 4, 2, 6), draw(4, 4, 2, 6), torch.tensor([7, 2, 0, 5])
    key_cache = torch.zeros(2, 2, 4, 6, dtype=torch.float64).transpose(1, 2)  # heads before offsets in memory
    value_cache = strided(torch.zeros(2, 4, 2, 6, dtype=torch.float64))
    kernels.write_kv(strided(key), value.transpose(1, 2).contiguous().transpose(1, 2), key_cache, value_cache, slots)
    for t, slot in enumerate(slots.tolist()):
        assert torch.equal(key_cache[slot // 4, slot % 4], key[t])
        assert torch.equal(value_cache[slot // 4, slot % 4], value[t])


@pytest.mark.parametrize("slots", [[], [-1], [-1, -1, -1]], ids=str)
@on_backends("write_kv")
def test_writing_nothing(backend: str, slots: list[int]) -> None:
    cache = torch.zeros(2, 4, 1, 3)
    key = torch.ones(len(slots), 1, 3)
    kernels.write_kv(key, key, cache, cache.clone(), torch.tensor(slots, dtype=torch.int64))
    assert not cache.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_backends("allocate_kv_cache")
def test_an_allocated_cache_keeps_what_is_written(backend: str, dtype: torch.dtype) -> None:
    key_cache, value_cache = kernels.allocate_kv_cache(3, 4, 2, 5, dtype, "cpu")
    for cache in (key_cache, value_cache):
        assert cache.shape == (3, 4, 2, 5) and cache.dtype == dtype and cache.device.type == "cpu"
    key, value = draw(5, 12, 2, 5, dtype=dtype), draw(6, 12, 2, 5, dtype=dtype)
    kernels.write_kv(key, value, key_cache, value_cache, torch.arange(12))
    assert torch.equal(key_cache.reshape(12, 2, 5), key)
    assert torch.equal(value_cache.reshape(12, 2, 5), value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
@on_backends("write_kv")
def test_each_number_gets_the_nearest_code(backend: str, codes: torch.dtype, dtype: torch.dtype) -> None:
    every = torch.arange(-128, 128).to(torch.int8) if codes is torch.int8 else torch.arange(256).to(torch.uint8)
    numbers = every.view(codes).double()
    numbers = numbers[numbers.isfinite()]
    slots = [0, -1, 11, 5, -1, 7, 6]
    new = [draw(seed, len(slots), 2, 33, dtype=dtype) for seed in (7, 8)]
    new[0][0] *= 1e4
    new[1][2, 1] *= 1e-4
    new[0][3, 0] = 0
    key_cache, value_cache, kv_scales = kernels.allocate_kv_cache(3, 4, 2, 33, codes, "cpu")
    for cache in (key_cache, value_cache, kv_scales):
        cache.copy_(torch.full(cache.shape, 3.0))
    kernels.write_kv(*new, key_cache, value_cache, torch.tensor(slots), kv_scales=kv_scales)
    for which, cache in enumerate((key_cache, value_cache)):
        for slot in range(12):
            place = slot // 4, slot % 4
            if slot not in slots:
                assert bool((cache[place].float() == 3).all() and (kv_scales[place[0], :, which, place[1]] == 3).all())
                continue
            for head in range(2):
                wanted = new[which][slots.index(slot), head].double()
                scale = kv_scales[place[0], head, which, place[1]].double()
                assert scale == pytest.approx(float(wanted.abs().max() / numbers.max()), rel=2**-8)
                distances = (wanted[:, None] - scale * numbers).abs()
                own = (wanted - scale * cache[place[0], place[1], head].double()).abs()
                assert bool((own <= distances.min(dim=1).values + 1e-6 * wanted.abs().max()).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn], ids=str)
@on_backends("write_kv")
def test_what_is_not_finite_stays_so(backend: str, codes: torch.dtype, bad: float) -> None:
    key = draw(9, 2, 2, 64, dtype=torch.float32)
    key[0, 1, 5] = bad
    key_cache, value_cache, kv_scales = kernels.allocate_kv_cache(1, 4, 2, 64, codes, "cpu")
    kernels.write_kv(key, key, key_cache, value_cache, torch.tensor([2, 0]), kv_scales=kv_scales)
    for which, cache in enumerate((key_cache, value_cache)):
        read = cache[0].float() * kv_scales[0, :, which].T[..., None].float()
        assert bool(read[2, 1].isnan().all() and read[2, 0].isfinite().all() and read[0].isfinite().all())


@on_backends("allocate_kv_cache")
def test_a_cache_may_have_no_blocks(backend: str) -> None:
    assert kernels.allocate_kv_cache(0, 4, 2, 5, torch.float32, torch.device("cpu"))[0].shape == (0, 4, 2, 5)
