"""Grades ``prepare_slots``: case by case, then by a memory that is written and read, then beside the engine."""

import random
from itertools import product

from mini_infer.memory import BlockManager
from mini_infer.scheduler import BlockCopy, Scheduler, Sequence
from tutorials import harness


def scattered(block_size):
    """A block manager whose next blocks are 3, 9, 1, ...: a block's id says nothing about its place in a table."""
    manager = BlockManager(block_size, 16)
    manager.allocate(16)
    manager.free([3, 9, 1, 6, 12, 4])
    return manager


def check_slots(slots, wanted, table):
    assert slots == wanted, (
        f"slots {slots}, expected {wanted}; the block table is {table} · 槽位是 {slots}，应为 {wanted}；块表是 {table}"
    )


def check_copies(copies, wanted):
    assert copies == wanted, f"copies {copies}, expected {wanted} · 复制列表是 {copies}，应为 {wanted}"


def check_table(table, wanted):
    assert table == wanted, f"a block table is now {table}, expected {wanted} · 块表变成了 {table}，应为 {wanted}"


def check_length(table, wanted):
    assert len(table) == wanted, (
        f"the block table {table} has {len(table)} blocks, expected {wanted} · "
        f"块表 {table} 里有 {len(table)} 个块，应为 {wanted} 个"
    )


def test_the_first_tokens(answer, explain):
    """the first tokens · 最初的词元"""
    explain(
        "An empty block table, three new tokens, blocks of 4: one block is taken, and the tokens go to its first three "
        "slots. A slot is counted from the block's id, found in the block table, and not from the token's position.",
        "块表为空，来了 3 个词元，块大小为 4：拿一个块，词元依次放进它的前 3 个槽位。"
        "槽位要从块号算起，块号要查块表，不能直接用词元的位置。",
    )
    manager, table = scattered(4), []
    slots, copies = answer.prepare_slots(table, 0, 3, manager)
    check_length(table, 1)
    check_slots(slots, [table[0] * 4 + offset for offset in range(3)], table)
    check_copies(copies, [])


def test_later_tokens(answer, explain):
    """later tokens · 后来的词元"""
    explain(
        "Two more tokens for a sequence that has 5 (blocks of 4). They come after the computed ones, at positions 5 "
        "and 6, in the second block of the table, which has room for them.",
        "序列已有 5 个词元，再来 2 个（块大小为 4）。它们接在已算好的词元后面，位置是 5 和 6，"
        "落在块表的第二个块里，那里还有空位。",
    )
    manager = scattered(4)
    table = manager.allocate(2)
    before = list(table)
    slots, copies = answer.prepare_slots(table, 5, 2, manager)
    check_slots(slots, [before[1] * 4 + 1, before[1] * 4 + 2], table)
    check_table(table, before)
    check_copies(copies, [])


def test_block_edges(answer, explain):
    """block edges · 块的边界"""
    cases = [(4, 0, 4), (4, 4, 1), (4, 3, 1), (4, 3, 2), (4, 1, 7), (1, 0, 1), (1, 3, 2)]
    for block_size, num_computed, num_new in cases:
        explain(
            f"Blocks of {block_size}, {num_computed} tokens computed, {num_new} new. At a block's edge, count with "
            "care: a block that is exactly full needs no successor until the next token comes.",
            f"块大小为 {block_size}，已算好 {num_computed} 个词元，新来 {num_new} 个。在块的边界上要仔细数："
            "一个块正好写满时，下一个词元到来之前不需要新块。",
        )
        manager = scattered(block_size)
        table = manager.allocate(manager.blocks_for(num_computed))
        slots, _ = answer.prepare_slots(table, num_computed, num_new, manager)
        end = num_computed + num_new
        check_length(table, -(-end // block_size))
        wanted = [table[p // block_size] * block_size + p % block_size for p in range(num_computed, end)]
        check_slots(slots, wanted, table)


def test_a_table_that_is_long_enough(answer, explain):
    """a table that is long enough · 块表已经够长"""
    explain(
        "A prompt of 10 tokens got its three blocks of 4 when it was admitted, and is computed in two parts of 5. "
        "The blocks are there already: none may be taken.",
        "一个 10 个词元的提示词在被接纳时就拿到了 3 个块（块大小为 4），分两次算完，每次 5 个。块早已够用，不能再拿。",
    )
    manager = scattered(4)
    table = manager.allocate(3)
    before, num_free = list(table), manager.num_free_blocks
    for num_computed in (0, 5):
        answer.prepare_slots(table, num_computed, 5, manager)
        check_table(table, before)
        assert manager.num_free_blocks == num_free, (
            f"{manager.num_free_blocks} blocks are free, expected {num_free} as before · "
            f"有 {manager.num_free_blocks} 个块空闲，应当仍为 {num_free} 个"
        )


def fork(table, manager):
    manager.share(table)
    return list(table)


def test_the_last_block_is_shared(answer, explain):
    """the last block is shared · 最后一块被共享"""
    explain(
        "A sequence of 6 tokens was forked (blocks of 4), and one of the two gets a new token. It would go into a "
        "block that two sequences hold: the writer needs a copy of its own, and the other keeps the old block.",
        "一个有 6 个词元的序列被分叉（块大小为 4），其中一个来了新词元。它要写入的块由两个序列共有："
        "写的一方要换成自己的一份，另一方留着旧块。",
    )
    manager = scattered(4)
    parent = manager.allocate(2)
    child = fork(parent, manager)
    before = list(parent)
    slots, copies = answer.prepare_slots(child, 6, 1, manager)
    assert child[1] not in before, (
        f"the writer's block table is {child}, expected a block of its own in place of {before[1]} · "
        f"写的一方的块表是 {child}，{before[1]} 的位置上应当是它自己的一块"
    )
    check_table(parent, before)
    check_slots(slots, [child[1] * 4 + 2], child)

    explain(
        "A block that no new token goes into stays shared: of a forked sequence's blocks only the last, partial one is "
        "ever copied, and that copy must be in the list.",
        "没有新词元写入的块要继续共享：分叉出的序列，只有最后那个没写满的块才需要复制，而且要记在返回的列表里。",
    )
    assert child[0] == parent[0], (
        f"the writer's block table is {child}, expected block {parent[0]} in the first place, still shared · "
        f"写的一方的块表是 {child}，第一块应当仍是共享的 {parent[0]}"
    )
    check_copies(copies, [BlockCopy(before[1], child[1])])

    explain(
        "After a copy the writer must let go of the old block: it has its own now, and only the other sequence holds "
        "the old one. Otherwise that one is copied as well, and the old block never becomes free again.",
        "复制之后，写的一方必须放开旧块：它有了自己的一份，旧块就只归另一个序列。"
        "否则另一个序列写入时也要复制，旧块也永远回不到空闲状态。",
    )
    assert not manager.is_shared(before[1]), (
        f"block {before[1]} still has two owners, expected one · 块 {before[1]} 仍归两个序列，应当只归一个"
    )
    slots, copies = answer.prepare_slots(parent, 6, 1, manager)
    check_slots(slots, [before[1] * 4 + 2], parent)
    check_copies(copies, [])
    assert manager.is_shared(before[0]), (
        f"block {before[0]} has one owner left, expected two · 块 {before[0]} 只归一个序列，应当仍归两个"
    )


def test_the_last_block_is_shared_and_full(answer, explain):
    """the last block is shared and full · 最后一块被共享且已写满"""
    explain(
        "A sequence of 8 tokens was forked (blocks of 4). The next token starts a block of its own, and nothing is "
        "copied: a block that no new token goes into stays as it is.",
        "一个有 8 个词元的序列被分叉（块大小为 4）。下一个词元要写进新的块，什么都不用复制：没有新词元写入的块不要动。",
    )
    manager = scattered(4)
    parent = manager.allocate(2)
    child = fork(parent, manager)
    _, copies = answer.prepare_slots(child, 8, 1, manager)
    check_copies(copies, [])
    check_length(child, 3)
    check_table(child, [*parent, child[2]])


class Memory:
    """What would lie in the slots: each one holds the token that was written there last."""

    def __init__(self, manager):
        self.size = manager.block_size
        self.slots = {}

    def write(self, slots, copies, tokens):
        for old, new in copies:
            for offset in range(self.size):
                self.slots[new * self.size + offset] = self.slots.get(old * self.size + offset)
        self.slots.update(zip(slots, tokens, strict=True))

    def read(self, table, num_tokens):
        return [self.slots.get(table[p // self.size] * self.size + p % self.size) for p in range(num_tokens)]


def test_every_small_fork(answer, explain):
    """every small fork, read back · 穷举小规模分叉并读回"""
    for block_size, num_prompt, first, second in product(range(1, 5), range(1, 10), range(1, 6), range(1, 6)):
        explain(
            f"Blocks of {block_size}: a prompt of {num_prompt}, forked; then one writes {first} tokens and the other "
            f"{second}. Read back through the block tables, each must find its own tokens, and when both have ended "
            "every block must be free.",
            f"块大小为 {block_size}：提示词有 {num_prompt} 个词元，分叉之后一个写 {first} 个，另一个写 {second} 个。"
            "沿着各自的块表读回来，读到的必须是自己的词元；两个都结束后，所有的块都必须空闲。",
        )
        manager = BlockManager(block_size, 64)
        memory = Memory(manager)
        parent, prompt = [], [("prompt", p) for p in range(num_prompt)]
        memory.write(*answer.prepare_slots(parent, 0, num_prompt, manager), prompt)
        child = fork(parent, manager)
        ends = []
        for name, table, count in (("child", child, first), ("parent", parent, second)):
            tokens = [(name, p) for p in range(count)]
            memory.write(*answer.prepare_slots(table, num_prompt, count, manager), tokens)
            ends.append((name, table, prompt + tokens))
        for name, table, tokens in ends:
            for place, (read, token) in enumerate(zip(memory.read(table, len(tokens)), tokens, strict=True)):
                assert read == token, (
                    f"position {place} of the {name}: read {read}, expected {token} · "
                    f"{name} 的位置 {place}：读到 {read}，应为 {token}"
                )
        for _, table, _ in ends:
            manager.free(table)
        num_free = manager.num_free_blocks
        assert num_free == 64, (
            f"{num_free} blocks are free in the end, expected all 64 · 最后有 {num_free} 个块空闲，应当是全部 64 个"
        )


def test_beside_the_engine(answer, explain):
    """beside the engine's scheduler · 与引擎的调度器并排"""
    from mini_infer.engine.describe import Describer, Wanted
    from mini_infer.scheduler import ScheduledSequence, SchedulerOutputs

    for seed in range(20):
        draw = random.Random(seed)
        block_size = draw.choice([1, 2, 3, 16])
        explain(
            f"Random traffic with forks (seed {seed}, blocks of {block_size}), beside the engine's own scheduler: "
            "after every step as many blocks must be in use as there, with as many copies, and the slots must be those "
            "that the engine computes from the same tables.",
            f"随机负载，含分叉（种子 {seed}，块大小 {block_size}），与引擎自己的调度器并排运行：每一步之后，"
            "占用的块数和复制次数必须与它相同，槽位也必须与引擎按同一块表算出的一致。",
        )
        scheduler = Scheduler(8, 40, block_size)
        manager = BlockManager(block_size, scheduler.block_manager.num_gpu_blocks)
        tables = {}
        for name in range(6):
            num_prompt = draw.randint(1, 20)
            max_length = num_prompt + draw.randint(2, 20)
            scheduler.add(Sequence(str(name), [0] * num_prompt, num_prompt, max_length, decides_late=True))
        while not scheduler.is_finished():
            plan = scheduler.schedule()
            slots, num_copies = [], 0
            for item in plan.scheduled:
                table = tables.setdefault(item.sequence, [])
                new_slots, copies = answer.prepare_slots(table, item.start, item.num_tokens, manager)
                slots += new_slots
                num_copies += len(copies)
            num_used, num_wanted = manager.num_used_blocks, scheduler.block_manager.num_used_blocks
            assert num_used == num_wanted, (
                f"{num_used} blocks are in use, the engine uses {num_wanted} · "
                f"占用了 {num_used} 个块，引擎占用 {num_wanted} 个"
            )
            assert num_copies == len(plan.copy), (
                f"{num_copies} copies, the engine makes {len(plan.copy)} · "
                f"复制了 {num_copies} 次，引擎复制 {len(plan.copy)} 次"
            )
            mine = []
            for item in plan.scheduled:
                with_my_blocks = Sequence("", item.sequence.token_ids, 0, 0, block_table=tables[item.sequence])
                mine.append(ScheduledSequence(with_my_blocks, item.start, item.num_tokens, 0, False))
            longest = max(len(tables[item.sequence]) for item in plan.scheduled)
            step = Describer(len(mine), longest, block_size).describe(
                SchedulerOutputs(scheduled=tuple(mine), num_tokens=plan.num_tokens), Wanted()
            )
            wanted = step.slot_mapping.tolist()
            assert slots == wanted, f"slots {slots}, the engine's are {wanted} · 槽位是 {slots}，引擎的是 {wanted}"
            parents = [item.sequence for item in plan.scheduled if item.num_logits]
            if draw.random() < 0.3 and len(scheduler.running) < scheduler.max_num_seqs:
                parent = draw.choice(parents)
                if len(parent) + 1 < parent.max_length:  # the child has a token of its own from the start
                    lengths = parent.num_prompt_tokens, parent.max_length
                    child = Sequence("fork", [*parent.token_ids, 1], *lengths, decides_late=True)
                    scheduler.fork(parent, child)
                    tables[child] = fork(tables[parent], manager)
            scheduler.commit(harness.outcomes(plan))
            for sequence in parents:
                if sequence.finish_reason:
                    manager.free(tables.pop(sequence))
        num_used = manager.num_used_blocks
        assert num_used == 0, (
            f"{num_used} blocks are in use in the end, expected none · 最后仍占用 {num_used} 个块，应当一个也没有"
        )
