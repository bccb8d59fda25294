import random

import pytest

from mini_infer.exceptions import OutOfMemoryError
from mini_infer.memory import BlockManager


class Colliding(int):
    """A token whose hash says nothing: every lookup among such tokens is a collision."""

    def __hash__(self) -> int:
        return 0


def fill(manager: BlockManager, token_ids: list[int], salt: str | None = None) -> list[int]:
    """Allocate and remember the full blocks of a prompt."""
    blocks = manager.allocate(len(token_ids) // manager.block_size)
    parent: str | int | None = salt
    for place, block in enumerate(blocks):
        parent, _ = manager.remember(block, parent, token_ids[place * manager.block_size :][: manager.block_size])
    return blocks


def match(manager: BlockManager, token_ids: list[int], salt: str | None = None) -> list[int]:
    return manager.match_prefix(token_ids, salt, len(token_ids) // manager.block_size).blocks


def test_the_longest_common_beginning_is_found() -> None:
    manager = BlockManager(4, 10)
    blocks = fill(manager, list(range(12)))
    assert match(manager, list(range(12))) == blocks
    assert match(manager, [*range(8), 99, 99, 99, 99]) == blocks[:2]
    assert match(manager, [99, *range(1, 12)]) == []
    assert match(manager, list(range(4, 12))) == []  # the same tokens after another beginning are other keys
    assert match(manager, list(range(7))) == blocks[:1]  # full blocks only


@pytest.mark.parametrize("seed", range(5))
def test_a_hash_collision_never_returns_another_prompts_blocks(seed: int) -> None:
    draw = random.Random(seed)
    manager = BlockManager(2, 400)
    prompts = [[Colliding(draw.randrange(3)) for _ in range(draw.randint(2, 9))] for _ in range(60)]
    holder = {}
    for prompt in prompts:
        for place, block in enumerate(fill(manager, prompt)):  # type: ignore[arg-type]
            holder.setdefault(tuple(prompt[: 2 * (place + 1)]), block)
    for prompt in prompts:
        expected = [holder[tuple(prompt[:end])] for end in range(2, len(prompt) + 1, 2)]
        assert match(manager, prompt) == expected  # type: ignore[arg-type]


def test_salts_never_meet() -> None:
    manager = BlockManager(4, 10)
    blocks = fill(manager, list(range(8)), salt="mine")
    assert match(manager, list(range(8)), salt="mine") == blocks
    assert match(manager, list(range(8)), salt="yours") == []
    assert match(manager, list(range(8))) == []
    unsalted = fill(manager, list(range(8)))
    assert match(manager, list(range(8))) == unsalted
    assert match(manager, list(range(8)), salt="mine") == blocks


def test_the_same_content_computed_twice_keeps_its_first_block() -> None:
    manager = BlockManager(4, 10)
    first = fill(manager, list(range(8)))
    second = fill(manager, list(range(8)))
    assert match(manager, list(range(8))) == first
    manager.free(second)
    assert manager.num_cached_blocks == 0 and manager.num_free_blocks == 8  # nothing knows the copies


def test_cached_blocks_are_given_away_last_and_the_least_recently_used_first() -> None:
    manager = BlockManager(2, 6)
    old, new = fill(manager, [1, 1, 2, 2]), fill(manager, [3, 3, 4, 4])
    manager.free(old)
    manager.free(new)
    assert (manager.num_free_blocks, manager.num_cached_blocks, manager.num_available_blocks) == (2, 4, 6)
    manager.share(match(manager, [1, 1, 2, 2]))
    manager.free(old)  # used again, so now `new` is the oldest
    manager.allocate(3)
    assert match(manager, [3, 3, 4, 4]) == new[:1]  # its end went first
    assert match(manager, [1, 1, 2, 2]) == old
    manager.allocate(3)
    assert match(manager, [3, 3, 4, 4]) == match(manager, [1, 1, 2, 2]) == []
    with pytest.raises(OutOfMemoryError, match="asked for 1 blocks but 0 of 6"):
        manager.allocate(1)


def test_shared_blocks_are_free_only_when_the_last_holder_lets_go() -> None:
    manager = BlockManager(2, 4)
    blocks = fill(manager, [1, 1, 2, 2])
    manager.share(blocks)
    assert manager.is_shared(blocks[0])
    manager.free(blocks)
    assert not manager.is_shared(blocks[0]) and manager.num_used_blocks == 2
    manager.free(blocks)
    assert manager.num_used_blocks == 0
    with pytest.raises(ValueError, match="freed twice"):
        manager.free(blocks)


def test_forget_takes_remember_back() -> None:
    manager = BlockManager(2, 4)
    held, let_go = fill(manager, [1, 1]), fill(manager, [2, 2])
    manager.free(let_go)
    for block in held + let_go:
        manager.forget(block)
    assert match(manager, [1, 1]) == match(manager, [2, 2]) == []
    assert (manager.num_free_blocks, manager.num_cached_blocks, manager.num_used_blocks) == (3, 0, 1)


def test_cpu_blocks_come_and_go() -> None:
    manager = BlockManager(4, 4, num_cpu_blocks=3)
    assert manager.allocate_cpu(4) is None
    blocks = manager.allocate_cpu(2)
    assert blocks is not None and manager.num_free_cpu_blocks == 1
    for bad in ([blocks[0], blocks[0]], [3], [-1], [*blocks, 2]):
        with pytest.raises(ValueError, match="CPU block"):
            manager.free_cpu(bad)
    manager.free_cpu(blocks)
    assert manager.num_free_cpu_blocks == 3
