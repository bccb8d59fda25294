"""Grades an answer to chapter 6. The truth: who owns which block, and the engine's own scheduler on the same load."""

import random
from collections import Counter, deque

from mini_infer.memory import BlockManager
from mini_infer.scheduler import Scheduler, Sequence
from tutorials import harness

SIZE = 4


def make_running(blocks, name, num_tokens):
    """A sequence that decodes: all of its tokens but the last are computed, and it has no block too many."""
    sequence = Sequence(name, [1] * num_tokens, 1, 1000)
    sequence.num_computed_tokens = num_tokens - 1
    sequence.block_table = blocks.allocate(blocks.blocks_for(num_tokens - 1))
    return sequence


def names(sequences):
    return "".join(sequence.request_id for sequence in sequences)


def check_room(room, wanted):
    assert room is wanted, f"make_room returned {room}, expected {wanted} · make_room 返回 {room}，应为 {wanted}"


def check_queues(running, waiting, *wanted):
    got = names(running), names(waiting)
    assert got == wanted, (
        f"running is {got[0]!r} and waiting {got[1]!r}, expected {wanted[0]!r} and {wanted[1]!r} · "
        f"running 是 {got[0]!r}，waiting 是 {got[1]!r}；应为 {wanted[0]!r} 和 {wanted[1]!r}"
    )


def check_held(blocks, sequences):
    """Every block in use is in one block table."""
    held = Counter(block for sequence in sequences for block in sequence.block_table)
    twice = [block for block, count in held.items() if count > 1]
    assert not twice, f"blocks {twice} are in two block tables, expected one · 块 {twice} 在两张块表里，应当只在一张里"
    assert len(held) == blocks.num_used_blocks, (
        f"{blocks.num_used_blocks} blocks are in use and {len(held)} in block tables, expected as many · "
        f"占用了 {blocks.num_used_blocks} 个块，块表里有 {len(held)} 个，两者应当相等"
    )


def three_in_a_full_pool():
    """A, B and C fill six blocks; A and B have come to the edge of theirs, C has not. D waits."""
    blocks = BlockManager(SIZE, 6)
    running = [make_running(blocks, name, num_tokens) for name, num_tokens in (("A", 9), ("B", 9), ("C", 7))]
    return blocks, running, deque([Sequence("D", [1] * 5, 5, 1000)])


def test_a_slot_is_there_already(answer, explain):
    """The slot is there already · 槽位本来就有"""
    blocks, running, waiting = three_in_a_full_pool()
    explain(
        "C has 6 computed tokens and two blocks of 4 slots: the 7th token has its slot. make_room should return True "
        "and change nothing.",
        "C 已计算 6 个词元，有两个 4 槽位的块：第 7 个词元的槽位本来就有。make_room 应当返回 True，什么也不改动。",
    )
    tables = [list(sequence.block_table) for sequence in running]
    room = answer.make_room(running[2], running, waiting, blocks)
    check_room(room, True)
    check_queues(running, waiting, "ABC", "D")
    after = [sequence.block_table for sequence in running]
    assert after == tables, f"the block tables are {after}, expected {tables} · 块表是 {after}，应当仍是 {tables}"


def test_a_block_at_every_edge_and_only_there(answer, explain):
    """A new block at every edge, and only there · 只在块的边界取新块"""
    blocks = BlockManager(SIZE, 10)
    sequence = make_running(blocks, "A", 2)
    for num_computed in range(1, 4 * SIZE):
        sequence.token_ids = [1] * (num_computed + 1)
        sequence.num_computed_tokens = num_computed
        room = answer.make_room(sequence, [sequence], deque(), blocks)
        wanted, got = num_computed // SIZE + 1, len(sequence.block_table)
        explain(
            f"With {num_computed} computed tokens the next one has place {num_computed}, counted from 0. With blocks "
            f"of {SIZE} the sequence needs {wanted} in all, and yours has {got}. Look at the block's edge: what says "
            "where the token goes, the number of all tokens or that of the computed ones?",
            f"已计算 {num_computed} 个词元，下一个的位置是 {num_computed}（从 0 数起）。"
            f"每块 {SIZE} 个，一共需要 {wanted} 块，你的序列却有 {got} 块。"
            "请看块的边界：词元放在哪里，由词元总数决定，还是由已计算的词元数决定？",
        )
        check_room(room, True)
        assert got == wanted, f"{got} blocks, expected {wanted} · {got} 个块，应为 {wanted} 个"
    check_held(blocks, [sequence])


def test_the_last_to_arrive_gives_way(answer, explain):
    """The last to arrive gives way · 最晚到的让路"""
    blocks, running, waiting = three_in_a_full_pool()
    a, _, c = running
    block_table, last = list(a.block_table), list(c.block_table)
    explain(
        "A needs a block and the pool is empty. The one that arrived last, C, must go, and A and B keep running: "
        "whoever came first finishes first, so that somebody always finishes.",
        "A 要一个块，而池子空了。该让路的是最晚到达的 C，A 和 B 继续运行：先来的先做完，这样总有人能做完。",
    )
    room = answer.make_room(a, running, waiting, blocks)
    assert len(running) < 3, (
        f"running is still {names(running)!r}, expected one of them to give way · "
        f"running 仍是 {names(running)!r}，应当有一个让路"
    )
    explain(
        "A sequence was preempted, but not all of its blocks came back to the pool: they should be free, and its block "
        "table empty. A block that is lost now is lost for ever.",
        "有序列被抢占了，它的块却没有全部还给池子：块都该空闲，块表也该清空。现在丢掉的块，就永远找不回来了。",
    )
    check_held(blocks, [*running, *waiting])
    tables = {sequence.request_id: sequence.block_table for sequence in waiting if sequence.block_table}
    assert not tables, (
        f"the block tables of those who wait: {tables}, expected empty ones · 等待者的块表：{tables}，应当都是空的"
    )
    explain(
        "A needs a block and the pool is empty. The one that arrived last, C, must go, and A and B keep running: "
        "whoever came first finishes first, so that somebody always finishes.",
        "A 要一个块，而池子空了。该让路的是最晚到达的 C，A 和 B 继续运行：先来的先做完，这样总有人能做完。",
    )
    assert names(running) == "AB" and "C" in names(waiting), (
        f"running is {names(running)!r} and waiting {names(waiting)!r}, expected 'AB', and 'C' among those who wait · "
        f"running 是 {names(running)!r}，waiting 是 {names(waiting)!r}；应为 'AB'，而 'C' 在等待"
    )
    explain(
        "C was preempted and waits. It goes before D, who was waiting already but arrived later: the queue stays in "
        "order of arrival.",
        "C 被抢占后去等待。它应当排在 D 之前：D 虽然早就在等，却到得更晚，队列始终按到达的先后排列。",
    )
    check_queues(running, waiting, "AB", "CD")
    explain(
        "C gave its blocks away, so its keys and values are gone, but it still counts tokens as computed. When it "
        "returns it would read what others have written there.",
        "C 交出了块，它的键和值也就没了，却仍把一些词元算作已计算。等它回来，读到的就是别人写的东西。",
    )
    assert c.num_computed_tokens == 0, (
        f"C counts {c.num_computed_tokens} tokens as computed, expected 0 · "
        f"C 有 {c.num_computed_tokens} 个词元算作已计算，应为 0"
    )
    explain(
        "A should have its two blocks as before, and then one of those that C gave back; and make_room returns True.",
        "A 原来的两个块不变，后面再加上 C 归还的一个块；make_room 返回 True。",
    )
    check_room(room, True)
    wanted = [[*block_table, block] for block in last]
    assert a.block_table in wanted, (
        f"A's block table is {a.block_table}, expected one of {wanted} · A 的块表是 {a.block_table}，应为 {wanted} 之一"
    )


def test_it_may_be_itself(answer, explain):
    """The last to arrive may be the one who asks · 最晚到的可能就是自己"""
    blocks, running, waiting = three_in_a_full_pool()
    waiting.appendleft(running.pop())
    b = running[1]
    blocks.free(waiting[0].block_table)
    waiting[0].block_table = []
    blocks.allocate(2)  # somebody else's; the pool is empty again
    explain(
        "B needs a block, the pool is empty, and B itself arrived last of those that run. Then B gives way: A came "
        "before it and must not suffer. make_room returns False, B is first in the queue, and A runs on.",
        "B 要一个块，池子空了，而运行中最晚到达的正是 B 自己。那么让路的就是 B：A 比它先来，不该受牵连。"
        "make_room 返回 False，B 排在队首，A 继续运行。",
    )
    room = answer.make_room(b, running, waiting, blocks)
    check_room(room, False)
    check_queues(running, waiting, "A", "BCD")
    assert b.block_table == [], (
        f"B's block table is {b.block_table}, expected an empty one · B 的块表是 {b.block_table}，应当是空的"
    )


def test_one_victim_may_not_be_enough(answer, explain):
    """One victim may not be enough · 抢占一个也许不够"""
    blocks, running, waiting = three_in_a_full_pool()
    a, b, c = running
    blocks.free(c.block_table)
    blocks.share(b.block_table)
    c.block_table = list(b.block_table)
    blocks.allocate(2)  # somebody else's
    explain(
        "B and C share all of their blocks. Preempting C frees none of them, for B still holds them, so the next to "
        "arrive last must go as well: preempt for as long as there is no block, and only then allocate.",
        "B 和 C 的块全是共用的。抢占了 C，B 还拿着，一个块也没有空出来，于是接下来最晚到的也要让路："
        "只要还没有块，就一直抢占下去，然后才分配。",
    )
    room = answer.make_room(a, running, waiting, blocks)
    check_room(room, True)
    check_queues(running, waiting, "A", "BCD")
    assert len(a.block_table) == 3, (
        f"A has {len(a.block_table)} blocks, expected 3 · A 有 {len(a.block_table)} 个块，应为 3 个"
    )


class Loop:
    """The smallest scheduler that can use an answer: no budget, no watermark, first come first served."""

    def __init__(self, answer, blocks):
        self.make_room, self.blocks = answer.make_room, blocks
        self.running, self.waiting = [], deque()

    def schedule(self):
        """Who computes how many tokens."""
        plan, before = [], len(self.running)
        for sequence in list(self.running):
            if sequence in self.running and self.make_room(sequence, self.running, self.waiting, self.blocks):
                plan.append((sequence, 1))
        while self.waiting and not (plan and len(self.running) < before):
            first = self.waiting[0]
            num_blocks = self.blocks.blocks_for(len(first))
            if not self.blocks.can_allocate(num_blocks):
                break
            first.block_table = self.blocks.allocate(num_blocks)
            self.running.append(self.waiting.popleft())
            plan.append((first, len(first)))
            before += 1
        return plan

    def update(self, plan):
        for sequence, num_new_tokens in plan:
            sequence.num_computed_tokens += num_new_tokens
            sequence.token_ids.append(1)
            if len(sequence) == sequence.max_length:
                self.running.remove(sequence)
                self.blocks.free(sequence.block_table)


def test_it_agrees_with_the_engine(answer, explain):
    """Agrees with the engine on random loads · 随机负载下与引擎一致"""
    seed = 6
    print("seed", seed)
    source = random.Random(seed)
    for _ in range(40):
        size, num_blocks = source.choice([1, 2, 4]), source.randint(6, 20)
        longest = size * num_blocks
        engine = Scheduler(
            100,
            longest,
            size,
            block_manager=BlockManager(size, num_blocks),
            max_num_batched_tokens=10**6,
            watermark=0,
        )
        loop = Loop(answer, BlockManager(size, num_blocks))
        for place in range(source.randint(2, 8)):
            num_prompt = source.randint(1, longest // 2)
            max_length = source.randint(num_prompt + 1, longest)
            engine.add(Sequence(chr(ord("A") + place), [1] * num_prompt, num_prompt, max_length))
            loop.waiting.append(Sequence(chr(ord("A") + place), [1] * num_prompt, num_prompt, max_length))
        for step in range(1, 2000):
            if engine.is_finished():
                break
            expected, plan = engine.schedule(), loop.schedule()
            should = harness.computed(expected)
            does = {sequence.request_id: n for sequence, n in plan}
            explain(
                f"A pool of {num_blocks} blocks of {size}, step {step}. The engine computes {should} (so many tokens "
                f"of each sequence), a loop with your make_room {does}.",
                f"池子有 {num_blocks} 块，每块 {size} 个词元，第 {step} 步。引擎计算 {should}（哪个序列、几个词元），"
                f"用你的 make_room 的循环却计算 {does}。",
            )
            assert does == should, f"the plan is {does}, expected {should} · 计划是 {does}，应为 {should}"
            explain(
                f"A pool of {num_blocks} blocks of {size}, step {step}: a block is lost or has two owners. Each must "
                "be free or in exactly one block table.",
                f"池子有 {num_blocks} 块，每块 {size} 个词元，第 {step} 步：有块丢失了，或者有了两个主人。"
                "每个块要么空闲，要么恰好在一张块表里。",
            )
            check_held(loop.blocks, loop.running)
            short = names(s for s in loop.running if len(s.block_table) * size <= s.num_computed_tokens)
            assert not short, (
                f"{short!r} have no slot for the next token, expected one each · "
                f"{short!r} 没有下一个词元的槽位，每个序列都应当有"
            )
            engine.commit(harness.outcomes(expected, token_id=1))
            loop.update(plan)
        explain(
            f"A pool of {num_blocks} blocks of {size}: not every sequence came to its end.",
            f"池子有 {num_blocks} 块，每块 {size} 个词元：有序列没能做完。",
        )
        check_queues(loop.running, loop.waiting, "", "")
