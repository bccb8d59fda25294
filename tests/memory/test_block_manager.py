import random

import pytest

from mini_infer.exceptions import MiniInferError, OutOfMemoryError
from mini_infer.memory import BlockManager


def test_allocates_what_was_asked_and_takes_it_back() -> None:
    manager = BlockManager(block_size=16, num_gpu_blocks=10, num_cpu_blocks=4)
    blocks = manager.allocate(4)
    assert len(set(blocks)) == 4
    assert (manager.num_used_blocks, manager.num_free_blocks) == (4, 6)
    manager.free(blocks)
    assert (manager.num_used_blocks, manager.num_free_blocks, manager.peak_used_blocks) == (0, 10, 4)


@pytest.mark.parametrize("seed", range(20))
def test_no_block_is_lost_or_has_two_owners(seed: int) -> None:
    draw = random.Random(seed)
    manager = BlockManager(draw.randint(1, 32), draw.randint(1, 50))
    owned: list[list[int]] = []
    for _ in range(500):
        if owned and draw.random() < 0.5:
            manager.free(owned.pop(draw.randrange(len(owned))))
        else:
            wanted = draw.randint(0, 8)
            free = manager.num_gpu_blocks - sum(map(len, owned))
            assert manager.can_allocate(wanted) == (wanted <= free)
            if wanted <= free:
                owned.append(manager.allocate(wanted))
            else:
                with pytest.raises(OutOfMemoryError, match=f"asked for {wanted} blocks but {free} of"):
                    manager.allocate(wanted)
        everyone = [block for blocks in owned for block in blocks]
        assert len(set(everyone)) == len(everyone) == manager.num_used_blocks
        assert set(everyone) <= set(range(manager.num_gpu_blocks))


@pytest.mark.parametrize(
    ("blocks", "complaint"),
    [([0, 0], "freed twice"), ([0, 5], "never allocated"), ([0, 10], "got 10"), ([0, -1], "got -1"), ([0, "1"], "'1'")],
)
def test_a_refused_free_frees_nothing(blocks: list[int], complaint: str) -> None:
    manager = BlockManager(16, 10)
    assert 0 in manager.allocate(2) and 5 not in range(2)
    with pytest.raises(MiniInferError, match=complaint):
        manager.free(blocks)
    assert manager.num_used_blocks == 2


def test_double_free_is_an_error() -> None:
    manager = BlockManager(16, 4)
    blocks = manager.allocate(3)
    manager.free(blocks)
    with pytest.raises(MiniInferError, match="freed twice"):
        manager.free(blocks)
    assert manager.num_free_blocks == 4


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None, "16"])
def test_sizes_must_be_positive_integers(bad: object) -> None:
    with pytest.raises(ValueError, match="block_size"):
        BlockManager(bad, 10)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_gpu_blocks"):
        BlockManager(16, bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [-1, 2.0, True])
def test_impossible_numbers_of_blocks(bad: object) -> None:
    with pytest.raises(ValueError, match="num_blocks"):
        BlockManager(16, 10).can_allocate(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (16, 1), (17, 2), (160, 10)])
def test_blocks_for(tokens: int, blocks: int) -> None:
    assert BlockManager(16, 10).blocks_for(tokens) == blocks
