HINT = {"en": "Is the parent part of the hash", "zh": "算进去了吗"}


def match_prefix(token_ids: list[int], block_size: int, cached: dict[int, int]) -> tuple[list[int], list[int]]:
    hashes: list[int] = []
    parent = None
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = hash(tuple(token_ids[start : start + block_size]))
        hashes.append(parent)

    blocks: list[int] = []
    for block_hash in hashes[: (len(token_ids) - 1) // block_size]:
        if block_hash not in cached:
            break
        blocks.append(cached[block_hash])
    return hashes, blocks
