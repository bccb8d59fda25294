"""第 4 章：决定下一步由谁运行。

请补全 ``schedule`` 的函数体，然后用 ``mini-infer learn check 4`` 批改。
"""

from collections import deque

from mini_infer.scheduler import ScheduledSequence, Sequence


def schedule(
    running: list[Sequence], waiting: deque[Sequence], token_budget: int, max_num_seqs: int
) -> list[ScheduledSequence]:
    """安排一步：哪些序列各算几个词元。

    ``sequence.num_uncomputed_tokens`` 是一个序列里还没有键和值的词元数：正在解码的序列是 1，刚到的序列是整个提示词，
    提示词算到一半的序列是余下的部分。词元预算按下面的顺序分：

    1. 正在运行、只剩一个词元要算的序列，也就是解码；
    2. 正在运行、剩下不止一个词元的序列，也就是算到一半的提示词，预算允许算多少就算多少；
    3. 只要预算和座位都还有：取 ``waiting`` 里的第一个序列，移到 ``running`` 末尾，
       预算允许算多少提示词就算多少。``running`` 里的序列数不得超过 ``max_num_seqs``。

    每一组里，先到的在前。一个词元也分不到的序列不进入计划，也不离开 ``waiting``。
    序列本身不要修改：那是这一步算完之后的事。

    参数：
        running: 占着座位的序列，按到达顺序排列；就地修改。
        waiting: 还没有座位的序列，按到达顺序排列；就地修改（``waiting.popleft()``）。
        token_budget: 这一步最多算多少个词元；至少为 1。
        max_num_seqs: 座位数。

    返回：
        这一步的每个序列对应一项 ``ScheduledSequence(序列, 新词元数)``。
    """
    ...
