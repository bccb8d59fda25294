"""Very short stories from a grammar, so that the tutor can also continue plain text."""

from __future__ import annotations

import random
from dataclasses import dataclass

from .glossary import Language


@dataclass(frozen=True)
class Grammar:
    """A plot in sentences; each sentence has variants, and a chosen word stays chosen."""

    sentences: tuple[tuple[str, ...], ...]
    words: dict[str, tuple[str, ...]]
    requests: tuple[str, ...]
    gap: str


GRAMMARS: dict[Language, Grammar] = {
    "en": Grammar(
        sentences=(
            (
                "Once upon a time, a {nature} {hero} lived {home}.",
                "There once was a {nature} {hero} who lived {home}.",
                "Long ago, {home}, there lived a {nature} {hero}.",
            ),
            (
                "One {time}, the {hero} found a {thing} under a tree.",
                "One {time}, the {hero} went out and came upon a {thing}.",
                "One {time}, the wind blew a {thing} to the door of the {hero}.",
            ),
            (
                '"What can I do with a {thing}?" the {hero} wondered.',
                "The {hero} had never seen a {thing} before.",
                "The {hero} wanted to keep the {thing} a secret.",
            ),
            (
                "Then a {friend} came along and asked for help.",
                "Just then a {friend} came by, cold and hungry.",
                "Soon a {friend} knocked, and looked very sad.",
            ),
            (
                "The {hero} thought for a while and made tea for the {friend}.",
                'The {hero} smiled and said: "Take my {thing}, you need it more than I do."',
                "Together they carried the {thing} to the village and gave it to the children.",
            ),
            (
                "From that day on they were the best of friends.",
                "That night they danced until the stars went to sleep.",
                "And the {hero} slept well, for a kind heart is a soft pillow.",
            ),
        ),
        words={
            "nature": ("small", "brave", "quiet", "curious", "clumsy", "clever", "cheerful", "shy"),
            "hero": ("fox", "rabbit", "robot", "bear", "mouse", "dragon", "sailor", "girl", "cat"),
            "home": (
                "by the river",
                "at the edge of a forest",
                "on a green hill",
                "in a house of snow",
                "beside an old mill",
                "on an island in the sea",
            ),
            "time": ("morning", "evening", "winter day", "rainy afternoon", "spring day", "night"),
            "thing": (
                "silver key",
                "red umbrella",
                "basket of apples",
                "worn map",
                "singing stone",
                "jar of honey",
                "paper boat",
            ),
            "friend": ("wolf", "barn owl", "little boy", "turtle", "squirrel", "tired traveller"),
        },
        requests=(
            "Tell me a story about a {hero}.",
            "Tell me a short story about a {hero}.",
            "Write a story about a {hero}.",
            "I would like to hear a story about a {hero}.",
            "Can you tell a story with a {hero} in it?",
        ),
        gap=" ",
    ),
    "zh": Grammar(
        sentences=(
            (
                "从前，{home}住着一只{nature}的{hero}。",
                "很久以前，{home}有一只{nature}的{hero}。",
                "有一只{nature}的{hero}，住在{home}。",
            ),
            (
                "{time}，{hero}在树下捡到了一{thing}。",
                "{time}，{hero}出门散步，发现了一{thing}。",
                "{time}，大风把一{thing}吹到了{hero}的门前。",
            ),
            (
                "“一{thing}能做什么呢？”{hero}想。",
                "{hero}从来没有见过这样一{thing}。",
                "{hero}想把这{thing}悄悄藏起来。",
            ),
            (
                "这时，一{friend}走过来，请它帮忙。",
                "正巧有一{friend}路过，又冷又饿。",
                "不一会儿，一{friend}来敲门，看上去很难过。",
            ),
            (
                "{hero}想了想，给这{friend}泡了一壶热茶。",
                "{hero}笑着说：“这{thing}送给你吧，你比我更需要。”",
                "它们一起带着这{thing}来到村里，送给了孩子们。",
            ),
            (
                "从那天起，它们成了最好的朋友。",
                "那天晚上，它们一直跳舞，跳到星星都睡着了。",
                "{hero}睡得很香，因为善良的心是最软的枕头。",
            ),
        ),
        words={
            "nature": ("小小", "勇敢", "安静", "好奇", "笨拙", "聪明", "快乐", "害羞"),
            "hero": ("狐狸", "兔子", "小熊", "老鼠", "小猫", "刺猬", "猴子", "小狗", "小象"),
            "home": ("小河边", "森林边上", "青山上", "雪屋里", "老磨坊旁边", "海中的小岛上"),
            "time": ("一天早上", "一天傍晚", "一个冬日", "一个雨天", "一个春日", "一天夜里"),
            "thing": (
                "把银钥匙",
                "把红伞",
                "篮苹果",
                "张旧地图",
                "块会唱歌的石头",
                "罐蜂蜜",
                "只纸船",
            ),
            "friend": ("只大灰狼", "只猫头鹰", "个小男孩", "只乌龟", "只松鼠", "位老爷爷"),
        },
        requests=(
            "讲一个{hero}的故事。",
            "给我讲个关于{hero}的小故事。",
            "写一个{hero}的故事。",
            "我想听{hero}的故事。",
            "能讲个{hero}的故事吗？",
        ),
        gap="",
    ),
}


def story(rng: random.Random, language: Language) -> tuple[str, str]:
    """A request for a story, and the story."""
    grammar = GRAMMARS[language]
    words = {slot: rng.choice(choices) for slot, choices in grammar.words.items()}
    text = grammar.gap.join(rng.choice(variants) for variants in grammar.sentences)
    return rng.choice(grammar.requests).format(**words), text.format(**words)
