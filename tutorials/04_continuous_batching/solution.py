"""Chapter 4: decide who runs in the next step.

Fill in the body of ``schedule``. ``mini-infer learn check 4`` grades it.
---
第 4 章：决定下一步由谁运行。

请补全 ``schedule`` 的函数体，然后用 ``mini-infer learn check 4`` 批改。
"""

from collections import deque

from mini_infer.scheduler import Sequence


def schedule(
    running: list[Sequence], waiting: deque[Sequence], token_budget: int, max_num_seqs: int
) -> list[tuple[Sequence, int]]:
    """Plan one step: which sequences compute how many tokens.

    ``sequence.num_uncomputed_tokens`` says how many tokens of a sequence have no keys and values yet: 1 for a sequence
    that decodes, all of the prompt for one that has just arrived, the rest for a prompt that is under way. The budget
    goes to the sequences in this order:

    1. running sequences with one token left to compute: the decodes;
    2. running sequences with more than one: prompts under way, as many of their tokens as the budget allows;
    3. while budget and seats are left: the first sequence in ``waiting``. It moves to the end of ``running``, and
       computes as much of its prompt as the budget allows. ``running`` never holds more than ``max_num_seqs``.

    Within each group, earlier comes first. A sequence that gets no token is not in the plan, and does not leave
    ``waiting``. The sequences themselves are not changed: that happens when the step has been computed.

    Args:
        running: sequences that hold a seat, in order of arrival; changed in place.
        waiting: sequences that do not, in order of arrival; changed in place (``waiting.popleft()``).
        token_budget: the most tokens that the step may compute; at least 1.
        max_num_seqs: seats.

    Returns:
        ``(sequence, num_new_tokens)`` for each sequence of the step.
    ---
    安排一步：哪些序列各算几个词元。

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
        这一步的每个序列对应一项 ``(序列, 新词元数)``。
    """
    # hole
    plan = []
    decodes = [s for s in running if s.num_uncomputed_tokens == 1]
    prompts = [s for s in running if s.num_uncomputed_tokens > 1]
    for sequence in decodes + prompts:
        if token_budget == 0:
            break
        num_new_tokens = min(sequence.num_uncomputed_tokens, token_budget)
        plan.append((sequence, num_new_tokens))
        token_budget -= num_new_tokens
    while waiting and token_budget > 0 and len(running) < max_num_seqs:
        sequence = waiting.popleft()
        running.append(sequence)
        num_new_tokens = min(sequence.num_uncomputed_tokens, token_budget)
        plan.append((sequence, num_new_tokens))
        token_budget -= num_new_tokens
    return plan
    # end
