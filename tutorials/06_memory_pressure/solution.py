"""Chapter 6: a sequence needs one more block. Make room for it.

Fill in the body of ``make_room``. The scheduler calls it once in every step for each sequence that decodes, in order
of arrival, before anything is computed.
---
第 6 章：一个序列还要一个块，请给它腾地方。

请填写 ``make_room`` 的函数体。每一步开始计算之前，调度器按到达的先后，对每个正在解码的序列调用它一次。
"""

from collections import deque

from mini_infer.memory import BlockManager
from mini_infer.scheduler import Sequence


def make_room(sequence: Sequence, running: list[Sequence], waiting: deque[Sequence], blocks: BlockManager) -> bool:
    """See to it that a decoding sequence has a slot for the token that it computes in this step.

    That token is the first whose keys and values are not computed yet: its place in the sequence is
    ``sequence.num_computed_tokens``. If ``sequence.block_table`` reaches that far, there is nothing to do. Otherwise
    append one new block to it (``blocks.can_allocate``, ``blocks.allocate``).

    As long as there is no block to be had, preempt the running sequence that arrived last, which may be ``sequence``
    itself. A preempted sequence leaves ``running`` and gives its blocks back (``blocks.free``); its block table is
    empty and none of its tokens counts as computed; it waits, before everybody who waits already. Blocks may be
    shared: giving one back does not always make it free, so one victim may not be enough.

    Args:
        sequence: one of ``running``; all its tokens but the last are computed.
        running: in order of arrival.
        waiting: in order of arrival; all of them arrived after those that run.
        blocks: the pool.

    Returns:
        Whether the sequence has its slot; False if it was preempted itself.
    ---
    让一个正在解码的序列，有槽位存放这一步要计算的词元。

    这个词元就是第一个还没有键和值的词元，它在序列中的位置是 ``sequence.num_computed_tokens``。如果
    ``sequence.block_table`` 已经够到那里，什么都不用做；否则给块表追加一个新块（``blocks.can_allocate``、
    ``blocks.allocate``）。

    只要还拿不到块，就抢占运行中最晚到达的序列，它也可能就是 ``sequence`` 自己。被抢占的序列离开 ``running``，归还它的块
    （``blocks.free``）；块表清空，已计算的词元数归零；然后去等待，排在所有等待者之前。块可能是共用的，还回去未必就空闲，
    所以抢占一个也许不够。

    参数：
        sequence: ``running`` 之一；除了最后一个词元，其余都已计算。
        running: 运行中的序列，按到达的先后排列。
        waiting: 等待中的序列，按到达的先后排列；它们都比运行中的到得晚。
        blocks: 内存池。

    返回：
        序列是否有了槽位；如果被抢占的是它自己，返回 False。
    """
    # hole
    if sequence.num_computed_tokens // blocks.block_size < len(sequence.block_table):
        return True
    while not blocks.can_allocate(1):
        victim = running.pop()
        blocks.free(victim.block_table)
        victim.block_table = []
        victim.num_computed_tokens = 0
        waiting.appendleft(victim)
        if victim is sequence:
            return False
    sequence.block_table += blocks.allocate(1)
    return True
    # end
