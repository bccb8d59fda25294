"""Whatever is handed in, the engine says what is wrong with it, and goes on serving.

Every refusal here happens while another request is under way; afterwards that request has the same tokens as ever, all
blocks are free, and a new request is served.
"""

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mini_infer import LLM, EngineConfig, LLMEngine, SamplingParams
from mini_infer.exceptions import (
    InvalidConfigError,
    InvalidRequestError,
    KernelError,
    MiniInferError,
    ModelNotFoundError,
    NotFiniteError,
    OutOfMemoryError,
    QueueFullError,
)
from mini_infer.models import Decoder
from tests.engine.checkpoints import VOCAB_SIZE, make_engine_checkpoint

MAX_MODEL_LEN = 256
NAN, INF = math.nan, math.inf
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = "The request that must not be disturbed"
USER = {"role": "user", "content": "Hello"}

Call = Callable[[LLM], Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def shared_llm(checkpoint: Path) -> LLM:
    # A budget below the prompt's length, so that the request under way can also be caught within its prompt.
    return LLM(checkpoint, dtype="float64", block_size=4, num_gpu_blocks=128, max_num_batched_tokens=32)


@pytest.fixture(scope="module")
def expected(shared_llm: LLM) -> list[int]:
    """What the request that must not be disturbed generates when it is alone."""
    return shared_llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].token_ids


def assert_empty(llm: LLMEngine) -> None:
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert llm.is_finished()


def finish(llm: LLM, request_id: str) -> list[int]:
    while not llm.is_finished():
        llm.step()
    output = llm.get_output(request_id)
    assert output is not None
    return output.token_ids


@pytest.fixture
def llm(shared_llm: LLM, expected: list[int], request: pytest.FixtureRequest) -> Iterator[LLM]:
    """An engine with a request under way, some steps old, which checks afterwards that no harm was done."""
    request_id = shared_llm.add_request(PROMPT, GREEDY)
    for _ in range(getattr(request, "param", 4)):
        shared_llm.step()
    yield shared_llm
    assert finish(shared_llm, request_id) == expected
    assert_empty(shared_llm)
    assert shared_llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].token_ids == expected
    assert_empty(shared_llm)


def sampling(**options: Any) -> Call:
    return lambda llm: llm.add_request("Hello", SamplingParams(**options))


PROMPTS: dict[str, tuple[Any, str]] = {
    "empty text": ("", "''"),
    "no ids": ([], "[]"),
    "no ids in a tuple": ((), "()"),
    "id at the end of the vocabulary": ([1, VOCAB_SIZE], f"token 1 of the prompt is {VOCAB_SIZE}"),
    "huge id": ([2**70], str(2**70)),
    "negative id": ([5, 6, -1], "token 2 of the prompt is -1"),
    "bool": ([1, True], "True (bool)"),
    "float": ([1.5, 2], "1.5 (float)"),
    "whole float": ([1, 2.0], "2.0 (float)"),
    "None among ids": ([1, None], "None (NoneType)"),
    "text among ids": ([1, "2"], "'2' (str)"),
    "list among ids": ([1, [2]], "[2] (list)"),
    "number": (5, "5 (int)"),
    "None": (None, "None (NoneType)"),
    "dict": ({"prompt": "Hello"}, "{'prompt': 'Hello'} (dict)"),
    "bytes": (b"Hello", "b'Hello' (bytes)"),
    "set": ({1}, "{1} (set)"),
    "object": (len, "<built-in function len>"),
    "longer than the model": (
        [1] * (MAX_MODEL_LEN + 1),
        f"context length is 256 tokens, but the prompt has {MAX_MODEL_LEN + 1} tokens",
    ),
    "long text": ("x" * 300, "300"),
    "no room to generate": (
        [1] * MAX_MODEL_LEN,
        f"context length is 256 tokens, but the prompt has {MAX_MODEL_LEN} tokens",
    ),
    "10 MB of text": ("lorem ipsum " * 900_000, "10800000 characters"),
    "10 MB of Chinese": ("注意力" * 1_200_000, "3600000 characters"),
    "10 million ids": ([1] * 10_000_000, "10000000 tokens"),
    "lone surrogate": ("ab\ud800", r"'\ud800' at character 2"),
    "reversed surrogates": ("\udc00\ud800", r"'\udc00' at character 0"),
}


class TestPrompts:
    @pytest.mark.parametrize("llm", [0, 1, 4], ids=["waiting", "in its prompt", "decoding"], indirect=True)
    @pytest.mark.parametrize("name", PROMPTS)
    def test_add_request(self, llm: LLM, name: str) -> None:
        prompt, shown = PROMPTS[name]
        with pytest.raises(InvalidRequestError) as caught:
            llm.add_request(prompt, GREEDY)
        assert shown in str(caught.value)
        assert isinstance(caught.value, ValueError) and isinstance(caught.value, MiniInferError)
        assert len(str(caught.value)) < 500  # also for a prompt of 10 MB

    @pytest.mark.parametrize("name", [name for name in PROMPTS if name not in ("no ids", "no ids in a tuple")])
    def test_generate(self, llm: LLM, name: str) -> None:
        prompt, shown = PROMPTS[name]
        with pytest.raises(InvalidRequestError) as caught:
            llm.generate(prompt, GREEDY)
        if name not in (
            "float",
            "whole float",
            "None among ids",
            "text among ids",
            "list among ids",
        ):  # a list of prompts, if of any
            assert shown in str(caught.value)

    @pytest.mark.parametrize("name", PROMPTS)
    def test_one_bad_prompt_among_good_ones(self, llm: LLM, name: str) -> None:
        """It is named by its place, and the good ones have not run."""
        prompt, shown = PROMPTS[name]
        steps = llm.stats().num_steps
        with pytest.raises(InvalidRequestError) as caught:
            llm.generate(["good", prompt, [1, 2]], GREEDY)
        assert shown in str(caught.value) and "prompts[1]" in str(caught.value)
        assert llm.stats().num_steps == steps

    @pytest.mark.parametrize("name", ["empty text", "no ids", "negative id", "None", "10 MB of text", "lone surrogate"])
    def test_stream_refuses_before_it_begins(self, llm: LLM, name: str) -> None:
        prompt, shown = PROMPTS[name]
        with pytest.raises(InvalidRequestError) as caught:
            llm.stream(prompt)
        assert shown in str(caught.value)

    def test_no_prompts_no_outputs(self, llm: LLM) -> None:
        assert llm.generate([], GREEDY) == []

    @pytest.mark.parametrize(
        "prompts",
        [np.array([1.5, 2.0]), np.array(3), torch.tensor([0.5]), [torch.tensor(1.5)], np.array([[1, -1]]), range(0)],
        ids=repr,
    )
    def test_arrays_of_no_ids(self, llm: LLM, prompts: Any) -> None:
        with pytest.raises(InvalidRequestError):
            llm.generate(prompts, GREEDY)

    def test_stream_yields_one_text(self, llm: LLM) -> None:
        with pytest.raises(InvalidRequestError, match="n=2"):
            llm.stream("Hello", SamplingParams(n=2))


OPTIONS: list[tuple[dict[str, Any], str]] = [
    *[({"max_tokens": value}, repr(value)) for value in (0, -1, -(10**30), 1.5, "16", True, INF)],
    *[({"min_tokens": value}, repr(value)) for value in (-1, 17, 0.5, None)],
    *[({"temperature": value}, repr(value)) for value in (-0.1, NAN, INF, -INF, "1", None, True, 1j, -(10**400))],
    *[({"top_p": value}, repr(value)) for value in (-0.1, 1.0001, 2, NAN, "0.9", None)],
    *[({"top_k": value}, repr(value)) for value in (-2, 1.5, "5", True, NAN)],
    *[({"min_p": value}, repr(value)) for value in (-0.01, 1.01, NAN, [0.1])],
    *[({"repetition_penalty": value}, repr(value)) for value in (0, -1.5, NAN, INF)],
    *[({name: value}, repr(value)) for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 3, NAN)],
    *[({"n": value}, repr(value)) for value in (0, -3, 1.0, "2")],
    *[({"seed": value}, repr(value)) for value in (1.5, "7", 2**64, -(2**63) - 1)],
    *[({"stop": value}, repr(value)) for value in ("", ["a", ""], 5, ["a", 5], {"a": 1}, b"a", 0, False)],
    *[({"stop_strings": value}, repr(value)) for value in ("", [None])],
    *[({"stop_token_ids": value}, repr(value)) for value in (5, "ab", 0)],
    *[({"stop_token_ids": [1, value]}, repr(value)) for value in (-1, 1.5, True, VOCAB_SIZE, 2**70)],
    *[({"logit_bias": value}, "bias") for value in ([1, 2], {"a": 1}, {-1: 1.0}, {1: 101}, {1: NAN}, {1: "x"}, 0)],
    *[({"logit_bias": {VOCAB_SIZE: 1.0}}, str(VOCAB_SIZE))],
    *[({name: value}, repr(value)) for name in ("logprobs", "prompt_logprobs") for value in (-1, 1.5, VOCAB_SIZE + 1)],
    *[({name: value}, repr(value)) for name in ("ignore_eos", "skip_special_tokens") for value in (1, "yes", None)],
    *[({name: 64}, f"{name}=64 steers a diffusion") for name in ("gen_length", "steps", "cfg_scale", "block_length")],
    ({"remasking": "low_confidence"}, "remasking='low_confidence' steers a diffusion"),
    *[({name: v}, repr(v)) for name in ("gen_length", "steps", "block_length") for v in (0, -1, 1.5, True, "8")],
    *[({name: 10_000}, "10000") for name in ("gen_length", "steps")],
    *[({"cfg_scale": value}, repr(value)) for value in (-0.1, NAN, INF, "1")],
    *[({"remasking": value}, repr(value)) for value in ("x", "", 0, ["random"])],
    ({"temprature": 0.5}, "'temprature' (given: 0.5); did you mean 'temperature'?"),
    ({"stop_string": "x"}, "did you mean 'stop_strings'?"),
    ({"best_of_all": 3}, "'best_of_all' (given: 3)"),
    ({"stop": "x", "stop_strings": "y"}, "'stop' is given twice: 'x' and 'y'"),
]


class TestSamplingOptions:
    @pytest.mark.parametrize(("options", "shown"), OPTIONS, ids=[str(options)[:60] for options, _ in OPTIONS])
    def test_refused(self, llm: LLM, options: dict[str, Any], shown: str) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            llm.add_request("Hello", SamplingParams(**options))
        message = str(caught.value)
        assert shown in message
        assert next(iter(options)).removesuffix("_strings") in message
        assert isinstance(caught.value, ValueError)

    @pytest.mark.parametrize(
        "options",
        [{"max_tokens": 0}, {"max_tokens": -5}, {"temperature": NAN}, {"top_p": 2.0}, {"top_k": -2}, {"top_p": -0.5}],
        ids=str,
    )
    @pytest.mark.parametrize("method", ["generate", "chat", "stream"])
    def test_keywords_are_checked_alike(self, llm: LLM, method: str, options: dict[str, Any]) -> None:
        ((name, value),) = options.items()
        with pytest.raises(InvalidRequestError) as caught:
            getattr(llm, method)([USER] if method == "chat" else "Hello", **options)
        assert name in str(caught.value) and repr(value) in str(caught.value)

    def test_max_tokens_of_add_request(self, llm: LLM) -> None:
        with pytest.raises(InvalidRequestError, match=r"max_tokens.*-1"):
            llm.add_request("Hello", max_tokens=-1)

    @pytest.mark.parametrize("value", [5, "greedy", {"temperature": 0}, SamplingParams], ids=repr)
    def test_no_sampling_params(self, llm: LLM, value: Any) -> None:
        for call in (llm.add_request, llm.generate, llm.stream):
            with pytest.raises(InvalidRequestError) as caught:
                call("Hello", value)
            assert repr(value) in str(caught.value) and "SamplingParams" in str(caught.value)

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_lists_of_different_length(self, llm: LLM, count: int) -> None:
        with pytest.raises(InvalidRequestError, match=f"2 prompts but {count} sampling_params"):
            llm.generate(["one", "two"], [GREEDY] * count)

    def test_a_list_with_something_else_in_it(self, llm: LLM) -> None:
        with pytest.raises(InvalidRequestError, match=r"prompts\[1\].*'greedy'"):
            llm.generate(["one", "two"], [GREEDY, "greedy"])  # type: ignore[list-item]

    @pytest.mark.parametrize(
        "options",
        [
            {"max_tokens": 10**30},
            {"top_k": 10**30},
            {"temperature": 1e300},
            {"temperature": 1e-300},
            {"temperature": 5e-324},
            {"repetition_penalty": 0.01},
            {"repetition_penalty": 1e300},
            {"min_p": 1e-300},
            {"top_p": 1e-300},
            {"min_tokens": 10**6, "max_tokens": None},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_extreme_but_allowed(self, checkpoint: Path, dtype: str, options: dict[str, Any]) -> None:
        """Numbers that vanish or overflow in the model's dtype still mean something."""
        llm = LLM(checkpoint, dtype=dtype, block_size=4)
        output = llm.generate(PROMPT, SamplingParams(ignore_eos=True, **({"max_tokens": 8} | options)))[0]
        assert output.finish_reason == "length"
        assert_empty(llm)

    @pytest.mark.parametrize("temperature", [1e-20, 1e-40, 1e-300, 5e-324])
    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_a_tiny_temperature_is_greedy(self, checkpoint: Path, dtype: str, temperature: float) -> None:
        llm = LLM(checkpoint, dtype=dtype, block_size=4)
        cold, greedy = llm.generate([PROMPT] * 2, [SamplingParams(temperature=t) for t in (temperature, 0)])
        assert cold.token_ids == greedy.token_ids

    def test_a_number_too_large_for_a_float(self, llm: LLM) -> None:
        with pytest.raises(InvalidRequestError, match="temperature"):
            llm.add_request("Hello", SamplingParams(temperature=10**400))


class TestRequestIds:
    @pytest.mark.parametrize("request_id", ["nobody", "", 5, None, ["x"]], ids=repr)
    def test_unknown(self, llm: LLM, request_id: Any) -> None:
        for call in (llm.get_output, llm.abort):
            with pytest.raises(InvalidRequestError) as caught:
                call(request_id)
            assert repr(request_id) in str(caught.value)

    def test_handed_over_already(self, llm: LLM) -> None:
        request_id = llm.add_request("Hello", SamplingParams(max_tokens=1))
        output = llm.get_output(request_id)
        while output is None:
            output = llm.get_output(request_id)
        with pytest.raises(InvalidRequestError, match=request_id):
            llm.get_output(request_id)

    def test_taken(self, llm: LLM) -> None:
        llm.add_request("Hello", SamplingParams(max_tokens=2), request_id="mine")
        for _ in range(2):  # while it waits, and while it runs
            with pytest.raises(InvalidRequestError, match="'mine' is taken"):
                llm.add_request("Hello", request_id="mine")
            llm.step()
        while not llm.is_finished():
            llm.step()
        llm.add_request("Hello", SamplingParams(max_tokens=1), request_id="mine")  # `step` handed its output over
        other = llm.add_request("Hello", SamplingParams(max_tokens=3))
        while llm.get_output(other) is None:
            pass
        with pytest.raises(InvalidRequestError, match="'mine' is taken"):  # its output waits
            llm.add_request("Hello", request_id="mine")
        assert llm.get_output("mine") is not None
        llm.add_request("Hello", SamplingParams(max_tokens=1), request_id="mine")
        while llm.get_output("mine") is None:
            pass

    @pytest.mark.parametrize("request_id", ["", 5, b"x", ["x"]], ids=repr)
    def test_no_name(self, llm: LLM, request_id: Any) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            llm.add_request("Hello", request_id=request_id)
        assert repr(request_id) in str(caught.value)

    def test_a_name_like_one_of_the_engines_own(self, checkpoint: Path) -> None:
        """Whatever names users choose, requests without one still get one that is free."""
        llm = LLM(checkpoint, block_size=4)
        first = llm.add_request("Hello", SamplingParams(max_tokens=1))
        word, number, ending = first.split("-")
        for ahead in (2, 3, 4):
            taken = f"{word}-{int(number) + ahead}-{ending}"
            llm.add_request("Hello", SamplingParams(max_tokens=1), request_id=taken)
        for _ in range(4):
            llm.add_request("Hello", SamplingParams(max_tokens=1))
        assert len(llm.generate(["one", "two"], max_tokens=1)) == 2

    def test_priority(self, llm: LLM) -> None:
        for priority in ("high", 1.5, None, True):
            with pytest.raises(InvalidRequestError, match=f"priority .* got {priority!r}"):
                llm.add_request("Hello", priority=priority)  # type: ignore[arg-type]


class TestChat:
    @pytest.mark.parametrize(
        "messages",
        [
            [],
            None,
            "Hello",
            5,
            USER,
            [{"role": "user"}],
            [{"content": "Hello"}],
            [{"role": 1, "content": "Hello"}],
            [{"role": "user", "content": None}],
            [USER, "Hello"],
            [[USER], []],
            [[USER], "Hello"],
            [[USER], [{"role": "user", "content": 7}]],
            [5],
        ],
        ids=repr,
    )
    def test_malformed_messages(self, llm: LLM, messages: Any) -> None:
        with pytest.raises(InvalidRequestError):
            llm.chat(messages, GREEDY)

    @pytest.mark.parametrize(
        ("content", "shown"), [("x" * 10_000_000, "10000"), ("\ud83d", r"\ud83d")], ids=["10 MB", "surrogate"]
    )
    def test_bad_content(self, llm: LLM, content: str, shown: str) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            llm.chat([{"role": "user", "content": content}], GREEDY)
        assert shown in str(caught.value) and len(str(caught.value)) < 500

    def test_the_message_is_shown(self, llm: LLM) -> None:
        with pytest.raises(InvalidRequestError, match=r"\{'role': 'user', 'text': 'Hello'\}"):
            llm.render_chat([{"role": "user", "text": "Hello"}])

    def test_an_argument_that_the_template_cannot_take(self, llm: LLM) -> None:
        with pytest.raises(InvalidRequestError):
            llm.chat([USER], GREEDY, chat_template_kwargs={"tokenize": True})


CONFIGS: list[tuple[dict[str, Any], str]] = [
    *[({f"{kind}_parallel_size": 0}, f"{kind}_parallel_size must") for kind in ("tensor", "pipeline", "data")],
    ({"launch": "mpi"}, "'mpi'"),
    ({"rank_timeout": 0}, "rank_timeout"),
    ({"num_cpu_blocks": -4}, "got -4"),
    ({"enable_prefix_caching": "yes"}, "'yes'"),
    ({"scheduling_policy": "lottery"}, "'lottery'"),
    ({"preemption_mode": "swap"}, "preemption_mode='swap'"),
    ({"preemption_mode": "never"}, "'never'"),
    ({"npu_queue_limit": 5}, "overlap=5"),
    ({"overlap": "yes"}, "'yes'"),
    ({"overlap": None}, "None"),
    ({"quantization": "awq"}, "'awq'"),
    ({"dtype": "int8"}, "'int8'"),
    ({"dtype": torch.float32}, "torch.float32"),
    ({"device": 0}, "got 0"),
    ({"devices": ["cpu", 1]}, "['cpu', 1]"),
    ({"tokenizer_mode": "mistral"}, "'mistral'"),
    *[({"max_num_seqs": value}, repr(value)) for value in (0, -1, 1.5, "8", True, None)],
    *[({"block_size": value}, repr(value)) for value in (0, -16, 2.0)],
    *[({"max_model_len": value}, repr(value)) for value in (0, -1, 1e3)],
    *[({"num_gpu_blocks": value}, repr(value)) for value in (0, -2, "all")],
    *[({"max_num_batched_tokens": value}, repr(value)) for value in (0, 0.5)],
    *[({"gpu_memory_utilization": value}, repr(value)) for value in (0, 1.1, NAN, "90%")],
    *[({"watermark": value}, repr(value)) for value in (-0.1, 0.6, INF)],
    *[({"max_waiting": value}, repr(value)) for value in (0, -1)],
    *[({"seed": value}, repr(value)) for value in (-1, 1.5, 2**63)],
    *[({name: 1}, "got 1") for name in ("trust_remote_code", "offline", "enforce_eager")],
    *[({name: ""}, "''") for name in ("tokenizer", "cache_dir")],
    ({"tokenizer": 5}, "5"),
    ({"max_model_length": 10}, "'max_model_length' (given: 10); did you mean 'max_model_len'?"),
    ({"gpu_memory_utilisation": 0.5}, "did you mean 'gpu_memory_utilization'?"),
    ({"colour": "red"}, "'colour' (given: 'red')"),
    ({"block_size": 16, "kvcache_block_size": 32}, "given twice: 16 and 32"),
    ({"num_kvcache_blocks": 5, "paged_attention_num_blocks": 6}, "given twice: 5 and 6"),
]


class TestConfig:
    @pytest.mark.parametrize(("fields", "shown"), CONFIGS, ids=[str(fields)[:60] for fields, _ in CONFIGS])
    def test_refused_before_anything_is_loaded(self, checkpoint: Path, fields: dict[str, Any], shown: str) -> None:
        for make in (EngineConfig, LLMEngine, LLM):
            with pytest.raises(InvalidConfigError) as caught:
                make(model=checkpoint, **fields)
            assert shown in str(caught.value)
            assert isinstance(caught.value, ValueError)

    @pytest.mark.parametrize("device", ["npu:0", "gpu", "cuda:99", "meta", "", "cpu:x"])
    def test_no_such_device(self, checkpoint: Path, device: str) -> None:
        with pytest.raises(InvalidConfigError) as caught:
            LLM(checkpoint, device=device)
        assert repr(device) in str(caught.value)

    def test_no_such_backend(self, checkpoint: Path) -> None:
        with pytest.raises(KernelError, match="'cutlass'") as caught:
            LLM(checkpoint, kernel_backend="cutlass")
        assert isinstance(caught.value, ValueError)

    @pytest.mark.parametrize("model", ["./nowhere", "/no/such/directory", "~/no-such-directory-here"])
    @pytest.mark.parametrize("field", ["model", "tokenizer"])
    def test_no_such_directory(self, checkpoint: Path, field: str, model: str) -> None:
        with pytest.raises(ModelNotFoundError) as caught:
            LLM(**({"model": checkpoint} | {field: model}))
        assert Path(model).name in str(caught.value)
        assert isinstance(caught.value, FileNotFoundError)

    def test_a_file_is_no_model(self, checkpoint: Path) -> None:
        with pytest.raises(ModelNotFoundError, match=r"config\.json is not a directory"):
            LLM(checkpoint / "config.json")

    @pytest.mark.parametrize("model", [5, "", ["a"], b"model"], ids=repr)
    def test_no_path(self, model: Any) -> None:
        with pytest.raises(InvalidConfigError) as caught:
            LLM(model)
        assert repr(model) in str(caught.value)

    @pytest.mark.parametrize("config", ["path/to/model", {"model": "x"}, 5], ids=repr)
    def test_no_config(self, config: Any) -> None:
        with pytest.raises(InvalidConfigError) as caught:
            LLMEngine(config)
        assert repr(config) in str(caught.value)

    def test_config_and_fields(self, checkpoint: Path) -> None:
        with pytest.raises(InvalidConfigError, match="max_num_seqs"):
            LLMEngine(EngineConfig(model=checkpoint), max_num_seqs=3)


class TestMemory:
    def test_an_explicit_max_model_len_that_cannot_fit(self, checkpoint: Path) -> None:
        with pytest.raises(OutOfMemoryError, match=r"max_model_len=200 .* holds 40 tokens") as caught:
            LLM(checkpoint, max_model_len=200, block_size=4, num_gpu_blocks=10)
        assert isinstance(caught.value, MemoryError)

    def test_one_that_just_fits(self, checkpoint: Path) -> None:
        llm = LLM(checkpoint, max_model_len=40, block_size=4, num_gpu_blocks=10)
        output = llm.generate([[1] * 30], SamplingParams(max_tokens=None, ignore_eos=True))[0]
        assert len(output.token_ids) == 10

    def test_a_default_that_does_not_fit_is_clipped(self, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            llm = LLM(checkpoint, block_size=4, num_gpu_blocks=10)
        assert llm.max_model_len == 40
        assert "max_model_len=40" in caplog.text and "256" in caplog.text
        with pytest.raises(InvalidRequestError, match="context length is 40 tokens, but the prompt has 41 tokens"):
            llm.add_request([1] * 41)

    def test_more_than_the_models_own_is_clipped(self, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING):
            llm = LLM(checkpoint, max_model_len=100_000, block_size=4)
        assert llm.max_model_len == MAX_MODEL_LEN
        assert "max_model_len=100000" in caplog.text and "256" in caplog.text

    @pytest.mark.parametrize("num_gpu_blocks", [2**50, 2**60])
    def test_more_blocks_than_any_memory_has(self, checkpoint: Path, num_gpu_blocks: int) -> None:
        with pytest.raises(OutOfMemoryError, match=str(num_gpu_blocks)):
            LLM(checkpoint, num_gpu_blocks=num_gpu_blocks)

    def test_a_block_that_does_not_fit(self, checkpoint: Path) -> None:
        with pytest.raises(OutOfMemoryError, match="block"):
            LLM(checkpoint, block_size=2**40)


class TestQueue:
    @pytest.fixture
    def narrow(self, checkpoint: Path) -> LLM:
        return LLM(checkpoint, dtype="float64", block_size=4, max_num_seqs=1, max_waiting=2)

    def test_full(self, narrow: LLM) -> None:
        for _ in range(2):
            narrow.add_request("Hello", GREEDY)
        with pytest.raises(QueueFullError, match=r"2 requests wait .* max_waiting is 2") as caught:
            narrow.add_request("Hello", GREEDY)
        assert isinstance(caught.value, RuntimeError)
        narrow.step()  # one of them runs now
        narrow.add_request("Hello", GREEDY)
        with pytest.raises(QueueFullError):
            next(narrow.stream("Hello", GREEDY))
        while not narrow.is_finished():
            narrow.step()
        assert_empty(narrow)
        narrow.add_request("Hello", GREEDY)

    def test_generate_brings_as_many_as_it_likes(self, narrow: LLM) -> None:
        """It waits for them itself: the limit is for requests that pile up while nobody looks."""
        assert len(narrow.generate(["Hello"] * 5, max_tokens=2)) == 5

    def test_completions_of_a_request_count_as_one(self, narrow: LLM) -> None:
        narrow.add_request("Hello", SamplingParams(n=3, max_tokens=2))
        narrow.add_request("Hello", GREEDY)


class TestFailingSteps:
    @pytest.fixture
    def own(self, checkpoint: Path) -> LLM:
        return LLM(checkpoint, dtype="float64", block_size=4, num_gpu_blocks=128)

    @pytest.mark.parametrize("where", ["forward", "compute_logits"])
    @pytest.mark.parametrize("call", ["generate", "stream", "step", "get_output"])
    def test_the_engine_survives_a_step_that_raises(
        self, own: LLM, expected: list[int], monkeypatch: pytest.MonkeyPatch, call: str, where: str
    ) -> None:
        under_way = own.add_request(PROMPT, GREEDY)
        for _ in range(4):
            own.step()
        fail_once(monkeypatch, where)
        calls: dict[str, Callable[[], Any]] = {
            "generate": lambda: own.generate(["one", "two"], GREEDY),
            "stream": lambda: list(own.stream("one", GREEDY)),
            "step": own.step,
            "get_output": lambda: own.get_output(under_way),
        }
        with pytest.raises(RuntimeError, match="cosmic ray"):
            calls[call]()
        assert own.stats().num_running + own.stats().num_waiting == 1  # just the one under way
        assert finish(own, under_way) == expected
        assert_empty(own)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
    @pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}], ids=["plain", "filtered"])
    def test_logits_that_are_no_numbers_end_only_their_request(
        self,
        own: LLM,
        expected: list[int],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        temperature: float,
        value: float,
        filters: dict[str, Any],
    ) -> None:
        under_way = own.add_request(PROMPT, GREEDY)
        while own.stats().num_generated_tokens % 7 != 3:  # anywhere in its decoding
            own.step()
        sick = own.add_request("sick", SamplingParams(temperature=temperature, max_tokens=9, **filters))
        compute_logits = Decoder.compute_logits

        def corrupt(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
            logits = compute_logits(self, hidden).clone()
            if len(logits) == 2:
                logits[1] = value  # requests come in the order of their arrival
            return logits

        monkeypatch.setattr(Decoder, "compute_logits", corrupt)
        with caplog.at_level(logging.ERROR):
            while not own.is_finished():
                own.step()
        output = own.get_output(sick)
        assert output is not None and output.finish_reason == "error"
        assert isinstance(output.error, NotFiniteError) and sick in str(output.error)
        assert [record.levelname for record in caplog.records] == ["ERROR"] and sick in caplog.text
        assert finish(own, under_way) == expected
        monkeypatch.undo()
        assert_empty(own)
        assert own.generate("sick", GREEDY)[0].finish_reason == "length"


def fail_once(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """The next call of the model's method raises, and only that one."""
    method = getattr(Decoder, where)

    def raise_once(self: Decoder, *args: Any) -> Any:
        monkeypatch.setattr(Decoder, where, method)
        raise RuntimeError("cosmic ray")

    monkeypatch.setattr(Decoder, where, raise_once)
