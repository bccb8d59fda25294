HINT = {"en": "exactly at a block's edge", "zh": "恰好在块的边界结束"}


def match_prefix(token_ids: list[int], block_size: int, cached: dict[int, int]) -> tuple[list[int], list[int]]:
    hashes: list[int] = []
    parent = None
    for start in range(0, len(token_ids) - block_size, block_size):
        parent = hash((parent, tuple(token_ids[start : start + block_size])))
        hashes.append(parent)

    blocks: list[int] = []
    for block_hash in hashes[: (len(token_ids) - 1) // block_size]:
        if block_hash not in cached:
            break
        blocks.append(cached[block_hash])
    return hashes, blocks
