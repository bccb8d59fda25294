"""Grades an answer to chapter 5. The truth: what each block really holds, and the engine's own block manager."""

import random

from mini_infer.memory import BlockManager

SIZE = 4


class Blocks:
    """Serves prompts as the engine does with the answer's hashes, and notes what each block really holds."""

    def __init__(self, answer, size):
        self.match_prefix, self.size = answer.match_prefix, size
        self.cached = {}  # hash to block
        self.content = []  # of each block: its own tokens and all before them

    def look_up(self, tokens):
        return self.match_prefix(list(tokens), self.size, dict(self.cached))

    def serve(self, tokens):
        """Look a prompt up, compute the rest, file its full blocks. Returns what the shared blocks hold."""
        hashes, blocks = self.look_up(tokens)
        for place, block_hash in enumerate(hashes):
            if block_hash not in self.cached:
                self.cached[block_hash] = len(self.content)
                self.content.append(list(tokens[: (place + 1) * self.size]))
        return [self.content[block] for block in blocks]


def check_blocks(blocks, wanted):
    assert blocks == wanted, f"the blocks are {blocks}, expected {wanted} · 得到的块是 {blocks}，应为 {wanted}"


def test_it_returns_hashes_and_blocks(answer, explain):
    """returns hashes and blocks · 返回哈希和块."""
    explain(
        "match_prefix([5, 6, 7, 8, 9], 4, {}) should return two lists, hashes and blocks; blocks is empty, "
        "since nothing is cached yet.",
        "match_prefix([5, 6, 7, 8, 9], 4, {}) 应当返回 hashes 和 blocks 两个列表；缓存还是空的，所以 blocks 也是空的。",
    )
    hashes, blocks = answer.match_prefix([5, 6, 7, 8, 9], SIZE, {})
    assert isinstance(hashes, list), f"hashes is {hashes!r}, expected a list · hashes 是 {hashes!r}，应为列表"
    check_blocks(blocks, [])


def test_every_full_block_has_a_hash_and_no_other(answer, explain):
    """a hash for every full block, and for no other · 每个满块都有哈希，没写满的没有."""
    for num_tokens in range(3 * SIZE + 2):
        hashes, _ = answer.match_prefix(list(range(num_tokens)), SIZE, {})
        full = num_tokens // SIZE
        if len(hashes) > full:
            explain(
                f"{num_tokens} tokens, blocks of {SIZE}; full blocks: {full}, your hashes: {len(hashes)}. A block that "
                "is only partly filled still changes with every token, so nobody may find it: it gets no hash.",
                f"{num_tokens} 个词元，每块 {SIZE} 个：满块有 {full} 个，你给出了 {len(hashes)} 个哈希。"
                "没写满的块还会随每个新词元而变，不能让别人找到它，所以它没有哈希。",
            )
        else:
            explain(
                f"{num_tokens} tokens, blocks of {SIZE}; full blocks: {full}, your hashes: {len(hashes)}. Every full "
                "block gets a hash, also the last one of a prompt that ends exactly at a block's edge: this prompt may "
                "not use it, but a longer one may.",
                f"{num_tokens} 个词元，每块 {SIZE} 个：满块有 {full} 个，你给出了 {len(hashes)} 个哈希。"
                "每个满块都有哈希，提示词恰好在块的边界结束时，最后一块也不例外：这条提示词自己用不上它，更长的提示词却用得上。",
            )
        assert len(hashes) == full, f"{len(hashes)} hashes, expected {full} · {len(hashes)} 个哈希，应为 {full} 个"


def test_equal_beginnings_have_equal_hashes(answer, explain):
    """equal beginnings, equal hashes · 开头相同，哈希就相同."""
    explain(
        "Two prompts with the same first 8 tokens, in blocks of 4: their first two hashes must be equal, whatever "
        "comes after, and the same on every call.",
        "两条提示词的前 8 个词元相同，每块 4 个：前两个哈希必须相等，与后面的内容无关，每次调用也都一样。",
    )
    one, _ = answer.match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 9], SIZE, {})
    two, _ = answer.match_prefix([1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13], SIZE, {})
    assert one == two[:2], (
        f"the hashes are {one} and {two[:2]}, expected the same · 哈希分别是 {one} 和 {two[:2]}，应当相同"
    )


def test_a_hash_depends_on_everything_before(answer, explain):
    """a hash depends on everything before the block · 哈希取决于之前的一切."""
    same = [7, 7, 7, 7]
    explain(
        "The same four tokens in the first and in the second block of a prompt gave equal hashes. Their keys and "
        "values differ: they depend on the position and on all tokens before. Is the parent part of the hash?",
        "同样四个词元，一次在第一块，一次在第二块，哈希却相等。它们的键和值并不相同：既取决于位置，也取决于之前的所有词元。"
        "前一块的哈希（parent）算进去了吗？",
    )
    hashes, _ = answer.match_prefix(same + same + [1], SIZE, {})
    assert len(set(hashes)) == 2, (
        f"the hashes are {hashes}, expected two that differ · 哈希是 {hashes}，应当是两个不同的值"
    )
    explain(
        "Two prompts differ in their first block only, and a later block with equal tokens got equal hashes. The "
        "change must reach all the blocks after it: the parent is the hash of the block before, not its tokens.",
        "两条提示词只有第一块不同，后面某个词元相同的块却得到了相等的哈希。前面的不同必须传到之后的每一块："
        "parent 应当是前一块的哈希，而不是前一块的词元。",
    )
    one, _ = answer.match_prefix([1, 1, 1, 1] + same * 3, SIZE, {})
    two, _ = answer.match_prefix([2, 2, 2, 2] + same * 3, SIZE, {})
    assert not set(one) & set(two), (
        f"the hashes are {one} and {two}, expected none in common · 哈希分别是 {one} 和 {two}，不应有相同的"
    )


def test_it_finds_what_was_computed_before(answer, explain):
    """finds what was computed before · 找得到之前算好的块."""
    tokens = list(range(100, 111))
    blocks = Blocks(answer, SIZE)
    blocks.serve(tokens)
    explain(
        "A prompt of 11 tokens in blocks of 4 was computed. A second one begins with the same 8 tokens: it should "
        "share blocks 0 and 1, in this order.",
        "先计算了一条 11 个词元的提示词，每块 4 个。第二条以同样的 8 个词元开头：它应当依次共用 0 号块和 1 号块。",
    )
    check_blocks(blocks.look_up([*tokens[:8], 1, 2, 3, 4, 5])[1], [0, 1])
    explain(
        "A prompt whose first token differs from the cached one should share nothing.",
        "第一个词元就与缓存不同的提示词，不应共用任何块。",
    )
    check_blocks(blocks.look_up([1, *tokens[1:]])[1], [])


def test_it_stops_at_the_first_gap(answer, explain):
    """stops at the first gap · 遇到缺口就停."""
    tokens = list(range(100, 117))
    hashes, _ = answer.match_prefix(tokens, SIZE, {})
    cached = {hashes[0]: 30, hashes[2]: 32, hashes[3]: 33}
    explain(
        "Of four blocks the second has been evicted. Only the first may be shared: stop at the first gap. A sequence "
        "knows one number, how many tokens from the start are computed; what lies behind a gap does not count.",
        "四个块当中，第二块已被淘汰。能共用的只有第一块：遇到第一个缺口就要停下。"
        "序列只记一个数，即从头算起有多少词元已经算好，缺口之后的块不能算数。",
    )
    check_blocks(answer.match_prefix(tokens, SIZE, cached)[1], [30])


def test_the_last_token_is_left_to_compute(answer, explain):
    """the last token is left to compute · 最后一个词元留下来计算."""
    blocks = Blocks(answer, SIZE)
    tokens = list(range(100, 112))
    blocks.serve(tokens)
    explain(
        "The very same prompt came twice, 12 tokens in blocks of 4, and all of it was taken from the cache. Then "
        "nothing is left to compute, and there are no logits to sample the next token from: keep the last token out.",
        "同一条提示词来了两次，共 12 个词元，每块 4 个，第二次全部取自缓存。这样就没有东西可算，"
        "也没有 logits 可供采样下一个词元：最后一个词元必须留下来计算。",
    )
    check_blocks(blocks.look_up(tokens)[1], [0, 1])
    explain(
        "One token more and all three cached blocks may be shared: the 13th token is left to compute.",
        "只要多一个词元，三个缓存块就都可以共用：第 13 个词元留下来计算。",
    )
    check_blocks(blocks.look_up([*tokens, 1])[1], [0, 1, 2])


def test_it_agrees_with_the_engine(answer, explain):
    """agrees with the engine on random prompts · 随机提示词上与引擎一致."""
    seed = 5
    print("seed", seed)
    random_source = random.Random(seed)
    for size in (1, 2, 3, 16):
        blocks, manager = Blocks(answer, size), BlockManager(size, 4000)
        for _ in range(150):
            # Two kinds of token only, so that prompts begin alike by chance and come again.
            tokens = [random_source.randrange(2) for _ in range(random_source.randrange(1, 4 * size + 3))]
            match = manager.match_prefix(tokens, None, (len(tokens) - 1) // size)
            content_ids = list(match.content_ids)
            for place in range(len(content_ids), len(tokens) // size):
                parent = content_ids[-1] if content_ids else None
                (block,) = manager.allocate(1)
                content_id, _ = manager.remember(block, parent, tokens[place * size : (place + 1) * size])
                content_ids.append(content_id)
            explain(
                f"Block size {size}: for the prompt {tokens} the engine shares {len(match.blocks)} blocks. Yours must "
                "be as many, and hold exactly this prompt's beginning.",
                f"每块 {size} 个词元：提示词为 {tokens} 时，引擎共用 {len(match.blocks)} 个块。"
                "你找到的块数必须相同，内容也必须正是这条提示词的开头。",
            )
            expected = [tokens[: (place + 1) * size] for place in range(len(match.blocks))]
            held = blocks.serve(tokens)
            assert held == expected, (
                f"your blocks hold {held}, expected {expected} · 你找到的块里是 {held}，应为 {expected}"
            )
