"""What the tutor is to learn about calling tools: right, as its template shows it, and readable."""

import itertools
import math
import random

from transformers import AutoTokenizer

from mini_infer.config import BUNDLED_MODEL
from mini_infer.engine.calls import Arguments, CallBegins, CallScanner
from mini_infer.engine.tools import HERMES, find_format
from tools.train_tutor.calls import HELDOUT, TRAIN, UNKNOWN_ANSWERS, draw_call, heldout_calls, offer, tools
from tools.train_tutor.corpus import CHAT_TEMPLATE, END_OF_TEXT, Corpus, Exchange, call_chat
from tools.train_tutor.glossary import LANGUAGES

CORPUS = Corpus.load()


def test_results_are_right() -> None:
    draw = random.Random(1)
    for language in LANGUAGES:
        for _ in range(200):
            call = draw_call(draw, language, CORPUS.glossary)
            given = call.arguments
            if call.name == "count_blocks":
                assert int(call.result) == math.ceil(given["tokens"] / given["block_size"])
            elif call.name == "kv_cache_size":
                assert int(call.result) == 4 * math.prod(given.values())
            elif call.result == "unknown term":
                assert call.answer == UNKNOWN_ANSWERS[language]
                continue
            assert call.result in call.answer
            if call.name == "lookup_term":  # under whatever name it was asked for
                (entry,) = (e for e in (t.entry(language) for t in CORPUS.glossary.terms) if e.term == given["term"])
                named = [name.lower().replace(" ", "") for name in entry.names]
            else:
                named = []
                assert all(str(value) in call.question for value in given.values())
            asked = call.question.lower().replace(" ", "")
            assert not named or any(name in asked for name in named)


def test_the_text_is_what_the_template_makes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    draw = random.Random(2)
    for plain in (None, Exchange("What is a block?", "A block is …")):
        call = draw_call(draw, "en", CORPUS.glossary)
        made = {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        before = (
            [{"role": "user", "content": plain.question}, {"role": "assistant", "content": plain.answer}]
            if plain
            else []
        )
        messages = [
            *before,
            {"role": "user", "content": call.question},
            {"role": "assistant", "content": "", "tool_calls": [made]},
            {"role": "tool", "content": call.result},
            {"role": "assistant", "content": call.answer},
        ]
        text = tokenizer.apply_chat_template(messages, tools=tools(), chat_template=CHAT_TEMPLATE, tokenize=False)
        turns = [call] if plain is None else [plain, call]
        assert text + END_OF_TEXT == "".join(segment.text for segment in call_chat(turns, offer()))
        assert offer() in text


def test_without_tools_the_template_is_what_it_was() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    texts = {
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
        for template in (CHAT_TEMPLATE, tokenizer.chat_template)
    }
    assert len(texts) == 1


def test_calls_are_read_as_any_other() -> None:
    assert find_format(CHAT_TEMPLATE) is HERMES
    draw = random.Random(3)
    for _ in range(50):
        call = draw_call(draw, "zh", CORPUS.glossary)
        scanner = CallScanner(HERMES)
        begins, arguments = scanner.feed(call.written)
        assert begins == CallBegins(0, call.name) and isinstance(arguments, Arguments)


def test_they_are_among_the_documents() -> None:
    documents = itertools.islice(CORPUS.documents(seed=0), 500)
    calling = [document for document in documents if any("<tool_call>" in segment.text for segment in document)]
    assert 30 <= len(calling) <= 100
    assert all(segment.learn for document in calling for segment in document if "<tool_call>" in segment.text)


def test_the_exam_was_kept_out() -> None:
    for language in LANGUAGES:
        for name, templates in HELDOUT[language].items():
            assert not set(templates) & set(TRAIN[language][name])
        exam = heldout_calls(CORPUS.glossary, language)
        assert len(exam) >= 200 and exam == heldout_calls(CORPUS.glossary, language)
