"""Grades ``allowed``: by hand, then against all texts of random automata."""

import itertools
import random


def same(got, wanted, vocabulary):
    assert got is not None, "allowed returned None · allowed 返回了 None"
    shown = [text or "(special)" for text, may in zip(vocabulary, got, strict=False) if may]
    right = [text or "(special)" for text, may in zip(vocabulary, wanted, strict=True) if may]
    assert list(got) == list(wanted), f"allowed: {shown}, expected: {right} · 允许的是 {shown}，应为 {right}"


def digits(answer):
    """Two digits, a dash, one digit: ``[0-9]{2}-[0-9]``."""
    ten = "0123456789"
    arrows = {0: dict.fromkeys(ten, 1), 1: dict.fromkeys(ten, 2), 2: {"-": 3}, 3: dict.fromkeys(ten, 4)}
    return answer.Automaton(arrows, frozenset({4}))


WORDS = ["1", "12", "2-", "-", "-3", "a", "123"]


def test_characters(answer, explain):
    """one character · 一个字符"""
    explain(
        "The automaton of [0-9]{2}-[0-9], in state 0: '1' may come, '-' and 'a' may not, for there is no arrow.",
        "自动机 [0-9]{2}-[0-9] 在状态 0：“1”可以出现，“-”和“a”不行，因为没有箭头。",
    )
    vocabulary = ["1", "-", "a"]
    same(answer.allowed(digits(answer), 0, vocabulary, -1), [True, False, False], vocabulary)


def test_all_characters_of_a_token(answer, explain):
    """a token of several characters · 多个字符的词元"""
    explain(
        "In state 0 '12' may come, but '123' may not: a token is walked along to its last character, and the third "
        "one has no arrow. In state 1 '2-' may come, since each character goes on from where the one before led.",
        "在状态 0，“12”可以出现，“123”不行：要一直走到词元的最后一个字符，而第三个字符没有箭头。"
        "在状态 1，“2-”可以出现，因为每个字符都从前一个字符到达的状态继续走。",
    )
    wanted = [True, True, False, False, False, False, False]
    same(answer.allowed(digits(answer), 0, WORDS, -1), wanted, WORDS)
    wanted = [True, False, True, False, False, False, False]
    same(answer.allowed(digits(answer), 1, WORDS, -1), wanted, WORDS)


def test_the_end(answer, explain):
    """special tokens · 特殊词元"""
    explain(
        "Only in state 4, which is accepting, may the text end. There token 0 is all that may come: the other special "
        "token is no end, and walks nowhere, and it must never come.",
        "只有在接受状态 4，文本才可以结束。这时只能出现词元 0：另一个特殊词元不是结束词元，一步也不走，永远不能出现。",
    )
    vocabulary = ["", *WORDS, ""]
    for state in range(5):
        got = answer.allowed(digits(answer), state, vocabulary, 0)
        assert got is not None and (got[0], got[8]) == (state == 4, False), (
            f"state {state}: special tokens are {got and [got[0], got[8]]}, expected {[state == 4, False]} · "
            f"状态 {state}：两个特殊词元的结果是 {got and [got[0], got[8]]}，应为 {[state == 4, False]}"
        )
    same(answer.allowed(digits(answer), 4, vocabulary, 0), [True] + [False] * 8, vocabulary)


def test_random_automata(answer, explain):
    """random automata, every text · 随机的自动机，所有的文本"""
    explain(
        "A token may come exactly if some text that the automaton can walk along goes on with it. For 40 random "
        "automata over 'ab', all texts of up to three characters are tried.",
        "一个词元可以出现，当且仅当自动机能走通的某个文本接着它。对 40 个字母表为“ab”的随机自动机，"
        "试遍不超过三个字符的所有文本。",
    )
    draw = random.Random(15)
    vocabulary = ["", *("".join(text) for n in (1, 2, 3) for text in itertools.product("ab", repeat=n))]
    for _ in range(40):
        arrows = {s: {c: draw.randrange(4) for c in "ab" if draw.random() < 0.6} for s in range(4)}
        automaton = answer.Automaton(arrows, frozenset(s for s in range(4) if draw.random() < 0.5))
        for state in range(4):
            walkable, frontier = {""}, {"": state}
            for _ in range(3):
                frontier = {t + c: to for t, s in frontier.items() for c, to in arrows.get(s, {}).items()}
                walkable |= frontier.keys()
            wanted = [state in automaton.accepting, *(text in walkable for text in vocabulary[1:])]
            same(answer.allowed(automaton, state, vocabulary, 0), wanted, vocabulary)
