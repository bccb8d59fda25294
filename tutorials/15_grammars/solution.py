"""Chapter 15: which tokens may follow. Fill in the body of allowed; the class is done.
---
第 15 章：哪些词元可以跟在后面。填写 allowed 的函数体；类已经写好。
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Automaton:
    """States are numbers; it begins in state 0.
    ---
    状态用编号表示，从状态 0 开始。
    """

    arrows: dict[int, dict[str, int]]  # from a state, along a character, to a state · 从一个状态沿一个字符到另一个状态
    accepting: frozenset[int]  # where a text may end · 文本可以在这些状态结束


def allowed(automaton: Automaton, state: int, vocabulary: list[str], end: int) -> list[bool]:
    """For each token of the vocabulary: may it come next?

    automaton:  what the text must keep to
    state:      where the text so far has led
    vocabulary: the text of each token; special tokens have none: ""
    end:        the id of the token that ends the text

    A token may come if the automaton can walk along all its characters, one after the other. Where there is no arrow
    for a character, it cannot. The end token may come in accepting states only, and other special tokens never.
    ---
    对词表里的每个词元：它可以跟在后面吗？

    automaton：  文本必须遵守的自动机
    state：      到目前为止的文本走到了哪个状态
    vocabulary： 每个词元的文本；特殊词元没有文本：""
    end：        结束文本的词元的编号

    如果自动机能沿着一个词元的全部字符逐个走下去，这个词元就可以出现；某个字符没有箭头，就走不下去。
    结束词元只能出现在接受状态，其他特殊词元永远不能出现。
    """
    # hole
    result = []
    for token_id, text in enumerate(vocabulary):
        place = state if text else None
        for character in text:
            place = automaton.arrows.get(place, {}).get(character)
        result.append(state in automaton.accepting if token_id == end else place is not None)
    return result
    # end
