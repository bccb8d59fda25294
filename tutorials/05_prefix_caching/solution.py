"""Chapter 5: which blocks can a prompt take from the prefix cache?

Fill in the body of ``match_prefix``. The engine asks this question once for every sequence that it admits; then it
shares the blocks found, computes the rest of the prompt, and files the new full blocks under the hashes you gave it.
---
第 5 章：一条提示词能从前缀缓存里拿到哪些块？

请填写 ``match_prefix`` 的函数体。引擎每接纳一个序列，就要问一次这个问题；然后共用找到的块，计算提示词剩下的部分，
再把新写满的块登记在你给出的哈希之下。
"""


def match_prefix(token_ids: list[int], block_size: int, cached: dict[int, int]) -> tuple[list[int], list[int]]:
    """Hash a prompt's full blocks, and find the longest cached beginning of it.

    The hash of a block stands for its own tokens *and* for everything before them. So it is made of the hash of the
    block before (None for the first block) and of the block's tokens: ``hash((parent, tuple(tokens)))``.

    Args:
        token_ids: the prompt; may be shorter than a block.
        block_size: tokens per block.
        cached: hash to the id of the block that holds that content.

    Returns:
        hashes: of each full block of the prompt, in order. A block that is only partly filled has none.
        blocks: ids of the cached blocks that the sequence may share, in order, from the first block on and without a
            gap. At least the prompt's last token must remain to be computed: its logits give the next token.
    ---
    计算提示词各个满块的哈希，并找出最长的、已在缓存中的开头。

    一个块的哈希不仅代表块里的词元，*也*代表它之前的一切。所以它由两样东西算出：前一块的哈希（第一块之前没有块，
    用 None）和本块的词元，即 ``hash((parent, tuple(tokens)))``。

    参数：
        token_ids: 提示词，可能比一个块还短。
        block_size: 每块的词元数。
        cached: 从哈希到块编号，那个块存着相应的内容。

    返回：
        hashes: 提示词每个满块的哈希，依次排列。没写满的块没有哈希。
        blocks: 序列可以共用的缓存块的编号，依次排列，从第一块开始，中间不能有缺口。至少要留下提示词的最后一个词元
            来计算，因为下一个词元要靠它的 logits。
    """
    # hole
    hashes: list[int] = []
    parent = None
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = hash((parent, tuple(token_ids[start : start + block_size])))
        hashes.append(parent)

    blocks: list[int] = []
    for block_hash in hashes[: (len(token_ids) - 1) // block_size]:
        if block_hash not in cached:
            break
        blocks.append(cached[block_hash])
    return hashes, blocks
    # end
