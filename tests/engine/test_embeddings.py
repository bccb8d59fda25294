"""Vectors of prompts are the mean of transformers' last hidden states, however the prompts are computed."""

import random

import numpy as np
import pytest
import torch
from transformers import AutoModel

from mini_infer import LLM, SamplingParams
from mini_infer.config import BUNDLED_MODEL
from mini_infer.exceptions import InvalidRequestError, NotFiniteError
from mini_infer.models import Decoder

from .executors import Failing, interpose

TEXTS = ["What is a KV cache?", "什么是块？", "one two three four " * 40, "Once"]
TOLERANCE = 2e-5
"""Of a mean of float32 numbers of the order of 1 to 10, which are sums over four layers in other orders."""


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return AutoModel.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()


def expected(reference: torch.nn.Module, token_ids: list[int]) -> np.ndarray:
    with torch.inference_mode():
        hidden = reference(input_ids=torch.tensor([token_ids])).last_hidden_state[0]
    return hidden.double().mean(0).numpy()


def check(reference: torch.nn.Module, token_ids: list[int], vector: list[float]) -> None:
    truth = expected(reference, token_ids)
    assert np.abs(np.array(vector) - truth).max() <= TOLERANCE * max(1.0, np.abs(truth).max())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_num_batched_tokens": 16, "max_num_seqs": 4},
        {"max_num_batched_tokens": 16, "max_num_seqs": 4, "overlap": True},
        {"block_size": 4, "num_gpu_blocks": 60, "max_model_len": 240, "max_num_batched_tokens": 32},
        {"enforce_eager": True, "kernel_backend": "reference"},
    ],
    ids=["plain", "in chunks", "overlapped", "under pressure", "reference kernels"],
)
def test_as_transformers(reference: torch.nn.Module, fields: dict) -> None:
    with LLM(dtype="float32", **({"num_gpu_blocks": 256} | fields)) as llm:
        llm.add_request("Tell me a story.", SamplingParams(max_tokens=60, ignore_eos=True))  # it shares the steps
        outputs = llm.embed([*TEXTS, llm.tokenize(TEXTS[0])])
        for text, output in zip([*TEXTS, TEXTS[0]], outputs, strict=True):
            assert output.prompt_token_ids == llm.tokenize(text)
            check(reference, output.prompt_token_ids, output.embedding)
        assert outputs[0].outputs.embedding == outputs[0].embedding


def test_behind_a_cached_prefix(reference: torch.nn.Module) -> None:
    """What is in the cache has no hidden states any more; and a vector's prompt is cached for others."""
    with LLM(dtype="float32", num_gpu_blocks=256, enable_prefix_caching=True) as llm:
        for _ in range(2):
            (output,) = llm.embed(TEXTS[2])
            check(reference, output.prompt_token_ids, output.embedding)
        (answer,) = llm.generate(TEXTS[2], SamplingParams(max_tokens=1))
        assert answer.num_cached_tokens > 100


def test_beside_an_answer(reference: torch.nn.Module) -> None:
    with LLM(dtype="float32", num_gpu_blocks=256) as llm:
        params = SamplingParams(max_tokens=5, temperature=0, n=2, prompt_embedding=True)
        (output,) = llm.generate(TEXTS[0], params)
        assert output.prompt_embedding is not None
        check(reference, output.prompt_token_ids, output.prompt_embedding)
        (plain,) = llm.generate(TEXTS[0], SamplingParams(max_tokens=5, temperature=0))
        assert output.text == plain.text and plain.prompt_embedding is None


def test_steps_that_fail_are_counted_once(reference: torch.nn.Module) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    with LLM(dtype="float32", num_gpu_blocks=256, max_num_batched_tokens=8, max_num_seqs=2, overlap=True) as llm:
        interpose(llm, lambda inner: Failing(inner, lambda *_: RuntimeError() if rng.random() < 0.3 else None))
        params = SamplingParams(max_tokens=0, prompt_embedding=True)
        request_id = llm.add_request(TEXTS[2], params)
        output = None
        while output is None:
            try:
                output = llm.get_output(request_id)
            except RuntimeError:
                continue
        assert output.prompt_embedding is not None
        check(reference, output.prompt_token_ids, output.prompt_embedding)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(num_gpu_blocks=64, max_model_len=64) as llm:
        with pytest.raises(InvalidRequestError, match="maximum context length"):
            llm.embed("one two three " * 60)
        with pytest.raises(InvalidRequestError, match="prompt_embedding must be True or False"):
            SamplingParams(prompt_embedding=1)
        assert len(llm.embed([[1] * 64])[0].embedding) == llm.model_config.hidden_size, (
            "all of the context may be prompt"
        )
        forward = Decoder.forward
        monkeypatch.setattr(Decoder, "forward", lambda *arguments: forward(*arguments) * float("nan"))
        with pytest.raises(NotFiniteError, match="hidden states"):
            llm.embed(TEXTS[0])
