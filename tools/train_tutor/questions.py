"""How people ask: templates to train on, templates held out, and the noise around a question.

`{term}` stands for the bare name and `{a_term}` for the name with its article. A held-out template
is never used for training, so the scores on it tell whether the model has learnt to find the term
in a sentence that it has never seen, or has merely memorised sentences.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import groupby

from .glossary import Entry, Glossary, Language

TRAIN: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is {a_term}?",
        "What's {a_term}?",
        "What exactly is {a_term}?",
        "What does {term} mean?",
        "What does {a_term} do?",
        "What is {a_term} for?",
        "What is {a_term} used for?",
        "What is {a_term}, in plain English?",
        "What is meant by {term}?",
        "What is the meaning of {term}?",
        "What is the definition of {term}?",
        "What is the idea behind {a_term}?",
        "What role does {a_term} play?",
        "What should I know about {a_term}?",
        "What about {a_term}?",
        "And {a_term}?",
        "So what is {a_term} really?",
        "How does {a_term} work?",
        "How would you define {term}?",
        "How would you explain {a_term}?",
        "How can I picture {a_term}?",
        "Why do we need {a_term}?",
        "Why does {a_term} matter?",
        "Why do people use {a_term}?",
        "Can you explain {a_term}?",
        "Can you explain to me how {a_term} works?",
        "Can you tell me what {a_term} is?",
        "Could you describe {a_term}?",
        "Could you tell me more about {term}?",
        "Would you mind explaining {a_term}?",
        "Do you know what {a_term} is?",
        "Who can tell me what {term} means?",
        "Is there a simple way to understand {a_term}?",
        "When people say {term}, what do they mean?",
        "Explain {a_term}.",
        "Explain {a_term} to me like I am five.",
        "Explain in simple words what {a_term} is.",
        "Explain the concept of {term}.",
        "Define {term}.",
        "Define the term {term} for me.",
        "Describe {a_term}.",
        "Describe briefly what {a_term} does.",
        "Tell me about {a_term}.",
        "Tell me what {a_term} is.",
        "Give me a definition of {term}.",
        "Give me a short explanation of {a_term}.",
        "Give a one-line summary of {term}.",
        "Sum up {term} for me.",
        "Could you sum up what {a_term} is?",
        "Summarise {term} in a few words.",
        "Teach me about {a_term}.",
        "Introduce {a_term} to a beginner.",
        "Help me understand {a_term}.",
        "Remind me what {a_term} is.",
        "Write a glossary entry for {term}.",
        "I want to know what {a_term} is.",
        "I would like to learn about {a_term}.",
        "I do not understand {a_term}.",
        "I am confused about {a_term}.",
        "I keep hearing about {a_term}. What is it?",
        "I read about {term} in a paper. What is it?",
        "I forgot what {term} means.",
        "My colleague mentioned {term}. What did she mean?",
        "The word {term} is new to me.",
        "In LLM serving, what is {a_term}?",
        "In this engine, what does {term} mean?",
        "In a nutshell, what is {a_term}?",
        "Which problem does {a_term} solve?",
        "What makes {a_term} useful?",
        "What would you say {a_term} is?",
        "What comes to mind when you hear {term}?",
        "Where does {a_term} come in?",
        "How is {term} defined?",
        "Please elaborate on {a_term}.",
        "Break {a_term} down for me.",
        "Say something about {a_term}.",
        "Put {a_term} into your own words.",
        "Let us talk about {a_term}.",
        "Let me hear your explanation of {a_term}.",
        "Could I get a quick overview of {a_term}?",
        "Any idea what {a_term} is?",
        "Is {a_term} hard to understand?",
        "I wonder what {a_term} is about.",
        "I would love a short introduction to {a_term}.",
        "I was asked about {a_term} and had no answer.",
        "I have trouble with {a_term}, can you help?",
        "The lecture mentioned {term}, and there I got lost.",
        "The logs say something about {term}. What is it?",
        "Everyone talks about {term}. Why?",
        "Before we go on, what is {a_term}?",
        "The next topic is {a_term}: go ahead.",
        "Quick question: what is {a_term}?",
        "For my exam: define {term}.",
        "{term}: what is it?",
        "{term}, what does that mean?",
        "definition of {term}",
        "meaning of {term}",
        "{term}?",
        "{term}",
    ),
    "zh": (
        "什么是{term}？",
        "什么叫{term}？",
        "啥是{term}？",
        "啥叫{term}？",
        "{term}是什么？",
        "{term}是啥？",
        "{term}是什么意思？",
        "{term}是指什么？",
        "{term}指的是什么？",
        "{term}到底是什么？",
        "{term}究竟是什么？",
        "{term}是做什么的？",
        "{term}是干什么用的？",
        "{term}是怎么工作的？",
        "{term}是怎么回事？",
        "{term}有什么用？",
        "{term}有什么好处？",
        "{term}起什么作用？",
        "{term}的作用是什么？",
        "{term}的定义是什么？",
        "{term}的含义是什么？",
        "{term}的原理是什么？",
        "{term}为什么重要？",
        "{term}这个词怎么解释？",
        "{term}，这是什么意思？",
        "为什么需要{term}？",
        "为什么要用{term}？",
        "怎么理解{term}？",
        "如何理解{term}？",
        "怎样向别人解释{term}？",
        "能讲讲{term}吗？",
        "能不能解释一下{term}？",
        "你知道{term}吗？",
        "你能告诉我{term}是什么吗？",
        "你会怎么解释{term}？",
        "解释{term}。",
        "解释一下{term}。",
        "请解释{term}的意思。",
        "请描述{term}。",
        "请给{term}下个定义。",
        "请简要说明{term}。",
        "介绍一下{term}。",
        "简单介绍{term}。",
        "告诉我{term}是什么。",
        "给我讲讲{term}。",
        "给初学者讲讲{term}。",
        "像对小孩子那样讲讲{term}。",
        "用一句话解释{term}。",
        "用简单的话说说{term}。",
        "一句话概括{term}。",
        "说说{term}。",
        "说一下{term}的概念。",
        "帮我理解{term}。",
        "教教我{term}。",
        "写一条{term}的词条。",
        "我想了解{term}。",
        "我想知道什么是{term}。",
        "我不懂{term}，能解释吗？",
        "我不明白{term}是什么意思。",
        "我忘了{term}是什么。",
        "我第一次听说{term}，它是什么？",
        "总听人说{term}，到底是什么？",
        "论文里提到{term}，是什么意思？",
        "同事提到了{term}，那是什么？",
        "大模型里的{term}是什么？",
        "在推理引擎里，{term}是什么？",
        "关于{term}，我该知道什么？",
        "关于{term}，你能说点什么？",
        "考试要考{term}，怎么回答？",
        "想请教一下{term}。",
        "{term}可以用来干嘛？",
        "{term}能带来什么？",
        "{term}想达到什么目的？",
        "{term}的意义在哪里？",
        "{term}属于什么概念？",
        "{term}该怎么说明？",
        "{term}用大白话怎么讲？",
        "{term}听起来很难，能讲明白吗？",
        "{term}的意思我还不清楚。",
        "{term}在大模型里扮演什么角色？",
        "没有{term}会怎样？",
        "听说过{term}吗？",
        "可以说一下{term}吗？",
        "谁来讲讲{term}？",
        "跟我说说什么是{term}吧。",
        "把{term}讲得简单点。",
        "帮我查一下{term}。",
        "给{term}写个简短的说明。",
        "对{term}不太熟，想听听你的解释。",
        "我对{term}很感兴趣。",
        "我想弄清楚{term}。",
        "刚看到{term}这个词，求解释。",
        "书里写到{term}，没看懂。",
        "今天学到{term}，还是没弄明白。",
        "网上都在讲{term}，那是什么？",
        "为什么人们都在谈{term}？",
        "人们口中的{term}指什么？",
        "别人问我{term}，我该怎么回答？",
        "下一个话题是{term}，请讲。",
        "作为工程师，应该怎样看待{term}？",
        "那{term}呢？",
        "{term}？",
        "{term}",
    ),
}

HELDOUT: dict[Language, tuple[str, ...]] = {
    "en": (
        "Please walk me through {a_term}.",
        "Could somebody clarify the notion of {term}?",
        "If a student asked you about {a_term}, what would you answer?",
        "I came across {term} in the documentation; what does it refer to?",
        "How should one think of {a_term}?",
        "What do engineers have in mind when they talk about {a_term}?",
        "Give me the gist of {a_term}.",
        "Shed some light on {a_term} for me.",
        "What purpose does {a_term} serve?",
        "Sum up {a_term} in a sentence or two.",
        "What's the deal with {a_term}?",
        "As a newcomer, how do I make sense of {term}?",
    ),
    "zh": (
        "麻烦科普一下{term}。",
        "新手该如何认识{term}？",
        "{term}这个概念该怎么把握？",
        "在文档里看到了{term}，它代表什么？",
        "面试官要是问起{term}，应当怎么说？",
        "大家常说的{term}是个什么东西？",
        "可否谈谈{term}？",
        "{term}主要解决哪方面的问题？",
        "请用通俗的语言阐述{term}。",
        "对{term}一窍不通，求指点。",
        "有人能把{term}说清楚吗？",
        "{term}背后的思路是怎样的？",
    ),
}

COMPARE_TRAIN: dict[Language, tuple[str, ...]] = {
    "en": (
        "What is the difference between {first} and {second}?",
        "What's the difference between {first} and {second}?",
        "How does {first} differ from {second}?",
        "How is {first} different from {second}?",
        "Compare {first} and {second}.",
        "Compare {first} with {second}.",
        "{first} vs {second}",
        "{first} versus {second}?",
        "{first} or {second}: what is the difference?",
        "Is {first} the same as {second}?",
        "Are {first} and {second} the same thing?",
        "I always confuse {first} and {second}.",
        "I mix up {first} with {second}. Can you help?",
        "Explain the difference between {first} and {second}.",
        "Tell me how {first} and {second} differ.",
        "What sets {first} apart from {second}?",
        "Where is the line between {first} and {second}?",
        "How do {first} and {second} compare?",
        "I thought {first} and {second} were the same. Are they?",
        "Should I say {first} or {second}?",
        "Why are {first} and {second} not the same?",
    ),
    "zh": (
        "{first}和{second}有什么区别？",
        "{first}与{second}有什么不同？",
        "{first}和{second}的区别是什么？",
        "{first}跟{second}有什么差别？",
        "{first}和{second}一样吗？",
        "{first}和{second}是一回事吗？",
        "{first}和{second}有何不同？",
        "比较{first}和{second}。",
        "对比一下{first}与{second}。",
        "请说明{first}和{second}的差异。",
        "解释一下{first}和{second}的区别。",
        "我总是分不清{first}和{second}。",
        "我老把{first}和{second}弄混，能帮帮我吗？",
        "怎么区分{first}和{second}？",
        "{first}还是{second}，差别在哪？",
        "{first}和{second}哪里不同？",
        "{first}与{second}的界线在哪里？",
        "我以为{first}就是{second}，对吗？",
        "请把{first}和{second}放在一起讲讲。",
        "{first}和{second}如何区别开来？",
        "{first}、{second}，有什么两样？",
    ),
}

COMPARE_HELDOUT: dict[Language, tuple[str, ...]] = {
    "en": (
        "In what way do {first} and {second} diverge?",
        "How would I tell {first} from {second}?",
        "Contrast {first} with {second} for me.",
    ),
    "zh": (
        "{first}同{second}相比，不一样的地方在哪儿？",
        "该如何辨别{first}与{second}？",
        "谈谈{first}和{second}的异同。",
    ),
}

OPENINGS: dict[Language, tuple[str, ...]] = {
    "en": (
        "Hi!",
        "Hello,",
        "Hey,",
        "Please:",
        "Excuse me,",
        "Good morning!",
        "OK,",
        "Sorry,",
        "One more thing:",
        "Thanks!",
        "I see.",
        "I am new here.",
        "I have a question.",
        "I am preparing a talk.",
        "I am reading the source code.",
        "We had a lecture about language models today.",
        "Short answer please:",
        "Dear tutor,",
    ),
    "zh": (
        "你好，",
        "您好！",
        "请问，",
        "请问一下，",
        "打扰一下，",
        "老师，",
        "早上好！",
        "好的，",
        "对了，",
        "谢谢！",
        "明白了。",
        "我是新手。",
        "我有个问题：",
        "不好意思，",
        "我在准备报告。",
        "我在读源代码。",
        "今天上课讲了语言模型。",
        "简短回答：",
    ),
}

CLOSINGS: dict[Language, tuple[str, ...]] = {
    "en": (
        "Thanks!",
        "Thank you.",
        "Please be brief.",
        "Please keep it short.",
        "One sentence is enough.",
        "I am a beginner.",
        "No formulas, please.",
        "It is for my homework.",
        "I could not find it in the book.",
    ),
    "zh": (
        "谢谢！",
        "谢谢你。",
        "请简单一点。",
        "一句话就够了。",
        "我是初学者。",
        "不要公式。",
        "这是作业题。",
        "书上没有找到。",
        "麻烦了。",
    ),
}

_HAN = r"[\u4e00-\u9fff]"
_LATIN = r"[A-Za-z0-9]"
_MIXED = re.compile(rf"(?<={_HAN}) ?(?={_LATIN})|(?<={_LATIN}) ?(?={_HAN})")
_PIECES = {"en": re.compile(r"\S*\{\w+\}\S*|\S+"), "zh": re.compile(r"\{\w+\}|.")}
_SYLLABLES = [c + v for c in "bcdfghjklmnprstvwyz" for v in "aeiou"]


def fill(template: str, language: Language, **names: str) -> str:
    """The template with its names; Chinese gets a space around Latin words, as it is typeset."""
    text = template.format(**names)
    return _MIXED.sub(" ", text) if language == "zh" else text


def ask(template: str, language: Language, entry: Entry, name: str) -> str:
    return fill(template, language, term=name, a_term=entry.with_article(name))


def compare(template: str, language: Language, first: Entry, second: Entry) -> str:
    return fill(template, language, first=first.term, second=second.term)


def ordinary_phrases(glossary: Glossary, language: Language) -> tuple[str, ...]:
    """Stretches of the answers with no word in them that belongs to the name of a term."""
    words, gap = (r"[a-z0-9'-]+", " ") if language == "en" else (_HAN, "")
    entries = [term.entry(language) for term in glossary.terms]
    names = " ".join(name.lower() for entry in entries for name in entry.names)
    naming = set(re.findall(words, names))
    return tuple(
        gap.join(run)
        for entry in entries
        for ordinary, run in groupby(re.findall(words, entry.answer.lower()), key=lambda word: word not in naming)
        if ordinary
    )


@dataclass(frozen=True)
class Asker:
    """Asks for terms with the aliases, manners and carelessness of real questions."""

    language: Language
    phrases: tuple[str, ...]
    """What it may babble: see `ordinary_phrases`."""

    def question(self, rng: random.Random, entry: Entry) -> str:
        name = entry.term if rng.random() < 0.4 else rng.choice(entry.names)
        template = self._distracted(rng, rng.choice(TRAIN[self.language]))
        question = as_typed(rng, ask(template, self.language, entry, name), self.language)
        if self.language == "zh" and not re.search(_HAN, question):
            # A bare Latin name does not say which language it wants; English gets it.
            return self.question(rng, entry)
        return question

    def comparison(self, rng: random.Random, first: Entry, second: Entry) -> str:
        template = self._distracted(rng, rng.choice(COMPARE_TRAIN[self.language]))
        pair = rng.sample((first, second), 2)
        return as_typed(rng, compare(template, self.language, *pair), self.language)

    def _distracted(self, rng: random.Random, template: str) -> str:
        """Now and then, put words into a template that have no place there.

        The model thereby learns to look past what it does not know, as a new wording asks of it.
        """
        if rng.random() > 0.4:
            return template
        pieces = _PIECES[self.language].findall(template)
        for _ in range(rng.randint(1, 4)):
            position = rng.randrange(len(pieces) + 1)
            replaced = position < len(pieces) and "{" not in pieces[position] and rng.random() < 0.5
            word = rng.choice(self.phrases) if rng.random() < 0.5 else unknown_word(rng, self.language)
            pieces[position : position + replaced] = [word]
        return (" " if self.language == "en" else "").join(pieces)


def unknown_word(rng: random.Random, language: Language) -> str:
    if language == "zh":
        return chr(rng.randrange(0x4E00, 0x9FA6))
    word = "".join(rng.choices(_SYLLABLES, k=rng.randint(1, 4)))
    return word + rng.choice(["", "", "n", "s", "r", "t"])


def as_typed(rng: random.Random, question: str, language: Language) -> str:
    """The same question with an opening, a closing, other capitals, less punctuation."""
    gap = " " if language == "en" else ""
    if rng.random() < 0.2:
        question = rng.choice(OPENINGS[language]) + gap + question
    if rng.random() < 0.12:
        question = question + gap + rng.choice(CLOSINGS[language])
    if rng.random() < 0.25:
        question = question.rstrip("?？.。")
    if language == "zh" and rng.random() < 0.4:
        question = _MIXED.sub("", question).replace("？", "?")
    case = rng.random()
    if case < 0.2:
        return question.lower()
    return question.upper() if case < 0.22 else question


@dataclass(frozen=True)
class HeldOut:
    """One question of the exam, and the only answer that counts."""

    lang: Language
    term: str
    question: str
    answer: str


def heldout_questions(glossary: Glossary, language: Language) -> list[HeldOut]:
    """Every held-out template for every term, whose names take turns so that all are tested."""
    questions = []
    for t, template in enumerate(HELDOUT[language]):
        for i, term in enumerate(glossary.terms):
            entry = term.entry(language)
            name = entry.names[(t + i) % len(entry.names)]
            question = ask(template, language, entry, name)
            questions.append(HeldOut(language, term.id, question, entry.answer))
    return questions


def heldout_comparisons(glossary: Glossary, language: Language) -> list[HeldOut]:
    return [
        HeldOut(
            language,
            f"{first.id}/{second.id}",
            compare(template, language, first.entry(language), second.entry(language)),
            comparison.answer(language),
        )
        for template in COMPARE_HELDOUT[language]
        for comparison in glossary.comparisons
        for first, second in [comparison.terms]
    ]
