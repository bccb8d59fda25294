"""Chapter 5: which blocks can a prompt take from the prefix cache?

Fill in the body of ``match_prefix``. The engine asks this question once for every sequence that it admits; then it
shares the blocks found, computes the rest of the prompt, and files the new full blocks under the hashes you gave it.
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
    """
    ...
