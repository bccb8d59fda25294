"""The memory plan: how many blocks, and the longest sequence."""

import random

import pytest
import torch

from mini_infer.exceptions import OutOfMemoryError
from mini_infer.memory.cache_spec import PagedKV, block_bytes
from mini_infer.memory.sizing import MemoryPlan, plan_memory

QWEN3_0_6B = [PagedKV(num_kv_heads=8, head_dim=128, dtype=torch.bfloat16)] * 28


def plan(
    asked: int | None = None, limit: int = 1000, num_blocks: int | None = None, memory: int = 0, max_num_seqs: int = 4
) -> MemoryPlan:
    return plan_memory(
        QWEN3_0_6B,
        memory,
        block_size=16,
        num_blocks=num_blocks,
        num_cpu_blocks=3,
        max_num_seqs=max_num_seqs,
        max_model_len=asked,
        model_limit=limit,
    )


def test_block_bytes_of_a_known_model() -> None:
    assert block_bytes(QWEN3_0_6B, 1) == 112 * 1024, "112 KiB per token of context"


def test_layers_may_keep_different_things() -> None:
    specs = [PagedKV(1, 8, torch.float32), PagedKV(4, 16, torch.bfloat16)]
    assert block_bytes(specs, 16) == 16 * (2 * 1 * 8 * 4 + 2 * 4 * 16 * 2)


def test_codes_hold_nearly_twice_the_tokens() -> None:
    for head_dim, times in ((64, 1.93), (128, 1.96)):
        plain, codes = (block_bytes([PagedKV(8, head_dim, dtype)], 16) for dtype in (torch.bfloat16, torch.int8))
        assert codes == 16 * 2 * 8 * (head_dim + 2) and plain / codes > times


@pytest.mark.parametrize(
    ("asked", "limit", "num_blocks", "expected", "warned"),
    [
        (None, 1000, 100, 1000, False),
        (500, 1000, 100, 500, False),
        (2000, 1000, 100, 1000, True),  # the model was not made for more
        (None, 1000, 10, 160, True),  # a default that the memory cannot hold is clipped
        (160, 1000, 10, 160, False),
    ],
)
def test_longest_sequence(asked: int | None, limit: int, num_blocks: int, expected: int, warned: bool) -> None:
    memory = plan(asked, limit, num_blocks)
    assert (memory.num_blocks, memory.num_cpu_blocks, memory.max_model_len) == (num_blocks, 3, expected)
    assert (memory.warning is not None) == warned


def test_a_length_that_can_never_fit_says_what_would() -> None:
    with pytest.raises(OutOfMemoryError, match=r"max_model_len=161 .* holds 160 tokens"):
        plan(161, num_blocks=10)


def test_an_open_number_of_blocks_fills_the_memory_but_not_beyond_use() -> None:
    draw = random.Random(0)
    for _ in range(200):
        asked = draw.choice((None, draw.randint(1, 3000)))
        limit, max_num_seqs = draw.randint(1, 2000), draw.randint(1, 300)
        memory = draw.randint(0, 300) * 16 * 112 * 1024 + draw.randint(0, 1000)
        try:
            made = plan(asked, limit, None, memory, max_num_seqs)
        except OutOfMemoryError:
            assert asked is not None and min(asked, limit) > memory // (16 * 112 * 1024) * 16
            continue
        assert made.kv_bytes <= memory
        all_that_is_useful = max_num_seqs * -(-min(asked or limit, limit) // 16)
        assert made.num_blocks == all_that_is_useful or made.kv_bytes + made.bytes_per_block > memory
        assert made.blocks_per_sequence <= made.num_blocks <= all_that_is_useful


def test_no_block_at_all() -> None:
    made = plan(memory=1000)
    assert (made.num_blocks, made.max_model_len) == (0, 0)
    with pytest.raises(OutOfMemoryError, match=r"no KV block fits on cuda:1 .* 1835008 bytes and 1000 are left"):
        made.check("cuda:1")
