"""Prompts as token ids: those of transformers, chats as their template has them, and none that the model lacks."""

import itertools
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mini_infer import LLM, EngineConfig, SamplingParams
from mini_infer.engine import tokenizer as module
from mini_infer.engine.tokenizer import RenderedChat, Tokenizer
from mini_infer.exceptions import InvalidCheckpointError, InvalidRequestError
from tests.engine.checkpoints import VOCAB_SIZE, make_engine_checkpoint, save_tokenizer
from tests.engine.test_detokenizer import load, sentencepiece_like

QUICK = SamplingParams(temperature=0, max_tokens=2)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "no BOS": CHATML,
    "BOS first": "{{ bos_token }}" + CHATML,
    "BOS after a line break": "\n{{ bos_token }}[INST] {{ messages[-1].content }} [/INST]",
    "BOS twice": "{{ bos_token }}{{ bos_token }}" + CHATML,
    "EOS last": CHATML + "{{ eos_token }}",
}
ADDED = {"nothing": "$A", "BOS": "<s> $A", "EOS": "$A </s>", "both": "<s> $A </s>"}


def save_chat_tokenizer(directory: Path, template: str, added: str) -> PreTrainedTokenizerFast:
    """SentencePiece-like, with a chat template, and special tokens that it puts around a text."""
    backend = tokenizers.Tokenizer.from_str(sentencepiece_like(directory).backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single=ADDED[added], special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names).save_pretrained(directory)
    fast: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(directory)
    return fast


class TestChats:
    @pytest.mark.parametrize("added", ADDED)
    @pytest.mark.parametrize("template", TEMPLATES)
    def test_the_ids_are_those_of_apply_chat_template(self, tmp_path: Path, template: str, added: str) -> None:
        seed = random.randrange(10**9)
        print("seed", seed)
        draw = random.Random(seed)
        hf = save_chat_tokenizer(tmp_path, TEMPLATES[template], added)
        ours = load(tmp_path)
        for _ in range(20):
            texts = [
                "".join(draw.choices(["the cat", " ", "<s>", "</s>", "块", "😀", "\n", "a"], k=6)) for _ in range(3)
            ]
            roles = draw.choices(["system", "user", "assistant"], k=3)
            messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
            expected = hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
            assert ours.encode(ours.render_chat(messages), 10**6) == list(expected)
            # As a plain text it is encoded as any other, but for a second BOS.
            text = str(ours.render_chat(messages))
            has_two = text.startswith("<s>") and ADDED[added].startswith("<s>")
            assert ours.encode(text, 10**6) == hf.encode(text)[has_two:]

    def test_every_way_to_chat_goes_there(self, tmp_path: Path) -> None:
        make_engine_checkpoint(tmp_path, num_hidden_layers=1, vocab_size=300)
        hf = save_chat_tokenizer(tmp_path, CHATML, "both")
        llm, messages = LLM(tmp_path, num_gpu_blocks=32), [{"role": "user", "content": "the cat"}]
        expected = list(hf.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
        rendered = llm.render_chat(messages)
        assert rendered == hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for output in (llm.chat(messages, QUICK)[0], llm.generate(rendered, QUICK)[0]):
            assert output.prompt_token_ids == expected
            assert output.prompt == rendered and type(output.prompt) is str
        assert llm.tokenize(rendered) == expected
        assert llm.generate(str(rendered), QUICK)[0].prompt_token_ids == [1, *expected, 2]

    def test_content_in_parts(self, tmp_path: Path) -> None:
        save_tokenizer(tmp_path)
        ours = load(tmp_path)
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        whole = ours.render_chat([{"role": "user", "content": "one\ntwo"}])
        assert ours.render_chat([{"role": "user", "content": parts}]) == whole
        assert isinstance(whole, RenderedChat)

    @pytest.mark.parametrize(
        ("content", "shown"),
        [
            (
                [{"type": "image_url", "image_url": {}}],
                '{"type": "text", "text": ...}, are supported, got type \'image_url\'',
            ),
            ([{"type": "text"}], "got type 'text'"),
            (["one"], "got type None"),
            ([], "no parts"),
            (None, "'content': None"),
        ],
        ids=str,
    )
    def test_other_content_is_refused(self, tmp_path: Path, content: Any, shown: str) -> None:
        save_tokenizer(tmp_path)
        with pytest.raises(InvalidRequestError) as caught:
            load(tmp_path).render_chat([{"role": "user", "content": content}])
        assert shown in str(caught.value)


class TestTexts:
    @pytest.mark.parametrize("added", ADDED)
    def test_an_empty_text_is_what_the_tokenizer_adds(self, tmp_path: Path, added: str) -> None:
        hf = save_chat_tokenizer(tmp_path, CHATML, added)
        if expected := hf.encode(""):
            assert load(tmp_path).encode("", 100) == expected
        else:
            with pytest.raises(InvalidRequestError, match="no tokens"):
                load(tmp_path).encode("", 100)

    @pytest.mark.parametrize("added", ADDED)
    def test_a_text_that_begins_with_bos_gets_no_second_one(self, tmp_path: Path, added: str) -> None:
        hf = save_chat_tokenizer(tmp_path, CHATML, added)
        ours, end = load(tmp_path), [2] if "</s>" in ADDED[added] else []
        for text in ("<s>the", "<s><s>the"):
            assert ours.encode(text, 100) == [*hf.encode(text, add_special_tokens=False), *end]


class TestLongTexts:
    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize("skips", [False, True])
    def test_many_ids_have_the_text_that_transformers_gives(self, tmp_path: Path, seed: int, skips: bool) -> None:
        rng = random.Random(seed)
        save_tokenizer(tmp_path)
        tokenizer = Tokenizer(tmp_path, EngineConfig(model=str(tmp_path)), VOCAB_SIZE)
        ids = rng.choices(range(VOCAB_SIZE), k=module._MANY + rng.randint(1, 3000))
        expected = tokenizer.hf.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids, skip_special_tokens=skips) == expected
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(tokenizer.hf), "decode", None)  # which would keep the interpreter all the while
            assert tokenizer.decode(tuple(ids), skip_special_tokens=skips) == expected


class TestTokensThatTheModelLacks:
    """A tokenizer may have more of them than the embedding has rows."""

    @pytest.fixture(scope="class", params=[0, 20])
    @staticmethod
    def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
        """The embedding's rows are packed in panels, which the vocabulary fills or does not."""
        directory = tmp_path_factory.mktemp("model")
        vocab_size = 320 + request.param
        make_engine_checkpoint(directory, num_hidden_layers=1, vocab_size=vocab_size, tie_word_embeddings=True)
        hf = save_tokenizer(directory)
        special = [f"<tool{place}>" for place in range(vocab_size - len(hf) + 2)]
        hf.add_tokens(special[:-1], special_tokens=True)
        hf.add_tokens(special[-1:])
        hf.save_pretrained(directory)
        return LLM(directory, num_gpu_blocks=64, dtype="float32")

    def test_every_way_in_refuses_them_and_disturbs_nobody(self, llm: LLM) -> None:
        vocab = llm.tokenizer.hf.get_vocab()
        beyond = [name for name, token_id in vocab.items() if token_id >= llm.model_config.vocab_size]
        assert len(beyond) == 2
        alone = llm.generate("Hello", QUICK)[0].token_ids
        waiting = llm.add_request("Hello", QUICK)
        for name in beyond:
            text, token_id = f"Hello {name}!", vocab[name]
            chat = [{"role": "user", "content": text}]
            attempts = [
                lambda text=text: llm.generate(text, QUICK),
                lambda token_id=token_id: llm.generate([[1, token_id]], QUICK),
                lambda token_id=token_id: llm.generate(np.array([1, token_id]), QUICK),
                lambda text=text: llm.generate(["Hi", text], QUICK),
                lambda chat=chat: llm.chat(chat, QUICK),
                lambda text=text: llm.beam_search(text, 2, 2),
                lambda text=text: llm.add_request(text),
                lambda text=text: llm.stream(text),
                lambda text=text: llm.tokenize(text),
                lambda token_id=token_id: llm.detokenize([token_id]),
                lambda token_id=token_id: llm.generate("a", SamplingParams(logit_bias={token_id: 1})),
                lambda token_id=token_id: llm.generate("a", SamplingParams(stop_token_ids=[token_id])),
            ]
            for attempt in attempts:
                with pytest.raises(InvalidRequestError, match=str(token_id)):
                    attempt()
            with pytest.raises(InvalidRequestError, match=name):
                llm.generate(text, QUICK)
        while (output := llm.get_output(waiting)) is None:
            pass
        assert output.token_ids == alone

    def test_a_warning_when_it_is_loaded(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        largest = max(save_tokenizer(tmp_path).get_vocab().values())
        for vocab_size, warns in ((largest, True), (largest + 1, False), (largest + 100, False)):
            with caplog.at_level(logging.WARNING, "mini_infer"):
                Tokenizer(tmp_path, EngineConfig(), vocab_size)
            assert bool(caplog.records) is warns
            caplog.clear()

    def test_another_tokenizer(self, tmp_path: Path) -> None:
        """Whichever text is given, the ids are the model's or the text is refused."""
        make_engine_checkpoint(tmp_path / "model", num_hidden_layers=1)
        sentencepiece_like(tmp_path).save_pretrained(tmp_path / "tokenizer")
        llm = LLM(tmp_path / "model", tokenizer=tmp_path / "tokenizer", num_gpu_blocks=32)
        hf = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
        outcomes = set()
        for letters in itertools.product(["the", "a", "块", "z", "😀"], repeat=2):
            text = " ".join(letters)
            fits = max(hf.encode(text)) < VOCAB_SIZE
            outcomes.add(fits)
            if fits:
                assert llm.generate(text, QUICK)[0].prompt_token_ids == hf.encode(text)
            else:
                with pytest.raises(InvalidRequestError, match="vocabulary"):
                    llm.generate(text, QUICK)
        assert outcomes == {True, False}


class TestNumbersOfOtherLibraries:
    """Whatever has ``__index__`` or ``__float__`` is a number."""

    @pytest.fixture(scope="class")
    @staticmethod
    def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
        directory = make_engine_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1)
        return LLM(directory, num_gpu_blocks=np.int64(32), max_num_seqs=np.uint8(4), watermark=np.float32(0))

    @pytest.mark.parametrize(
        "integer", [np.int64, np.int32, np.uint16, np.array, torch.tensor], ids=lambda i: i.__name__
    )
    def test_everywhere(self, llm: LLM, integer: Any) -> None:
        expected = llm.generate([[1, 2, 3]], SamplingParams(temperature=0.5, max_tokens=4, seed=3), use_tqdm=False)
        params = SamplingParams(
            temperature=np.float32(0.5), max_tokens=integer(4), seed=integer(3), ignore_eos=np.bool_(False)
        )
        prompt = [integer(1), integer(2), integer(3)]
        for prompts in (prompt, [prompt], np.array([1, 2, 3]), [np.array([1, 2, 3])], torch.tensor([[1, 2, 3]])):
            assert [o.token_ids for o in llm.generate(prompts, params)] == [o.token_ids for o in expected]
        (output,) = llm.generate(prompts, temperature=np.float64(0), max_tokens=integer(4), top_k=integer(2))
        (greedy,) = llm.generate([[1, 2, 3]], temperature=0.0, max_tokens=4)
        assert output.token_ids == greedy.token_ids
        assert len(llm.beam_search([prompt], integer(2), integer(3), length_penalty=np.float32(1))[0].outputs) == 2
        assert llm.detokenize(prompt) == llm.detokenize(np.array([1, 2, 3])) == llm.detokenize([1, 2, 3])


class TestDamaged:
    def test_a_sentencepiece_file_names_what_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        installed = {"sentencepiece": False, "google.protobuf": True}
        monkeypatch.setattr(module, "_is_installed", installed.__getitem__)
        with pytest.raises(InvalidCheckpointError) as caught:
            load_anything(tmp_path)
        message = str(caught.value)
        assert "tokenizer.model" in message and message.endswith("pip install sentencepiece")
        installed["google.protobuf"] = False
        with pytest.raises(InvalidCheckpointError, match="pip install sentencepiece protobuf"):
            load_anything(tmp_path)
        installed.update({"sentencepiece": True, "google.protobuf": True})
        with pytest.raises(InvalidCheckpointError, match="no usable tokenizer"):
            load_anything(tmp_path)

    def test_a_tiktoken_file_is_not_taken_for_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
        monkeypatch.setattr(module, "_is_installed", lambda name: False)
        with pytest.raises(InvalidCheckpointError) as caught:
            load_anything(tmp_path)
        assert "SentencePiece" not in str(caught.value)


def load_anything(directory: Path) -> Tokenizer:
    return Tokenizer(directory, EngineConfig(), 100)
