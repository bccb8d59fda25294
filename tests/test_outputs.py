"""Outputs by themselves: attributes, mapping, text, JSON."""

import dataclasses
import json
from typing import Any

import pytest

from mini_infer.outputs import CompletionOutput, GenerateOutput, Increment, Logprob, RequestMetrics


def completion(index: int = 0, **options: Any) -> CompletionOutput:
    values: dict[str, Any] = {
        "text": f"text {index}",
        "token_ids": [index, 7],
        "finish_reason": "stop",
        "stop_reason": "\n",
        "cumulative_logprob": -1.5 - index,
        "logprobs": [{index: Logprob(-0.5, 1, "x")}, {7: Logprob(-1.0, 2, "你")}],
    }
    return CompletionOutput(index=index, **(values | options))


@pytest.fixture
def output() -> GenerateOutput:
    return GenerateOutput(
        request_id="request-1",
        prompt="你好",
        prompt_token_ids=[1, 2],
        outputs=[completion(0), completion(1)],
        prompt_logprobs=[None, {2: Logprob(-2.0, 3, "好")}],
        metrics=RequestMetrics(1.0, 1.5, 2.0, 4.0, 0),
    )


KEYS = [
    "text",
    "token_ids",
    "finish_reason",
    "cumulative_logprob",
    "logprobs",
    "request_id",
    "prompt",
    "prompt_token_ids",
    "prompt_logprobs",
    "outputs",
    "metrics",
]


@pytest.mark.parametrize("name", KEYS)
def test_every_key_is_an_attribute(output: GenerateOutput, name: str) -> None:
    assert output[name] == getattr(output, name) == dict(output)[name]


def test_the_keys(output: GenerateOutput) -> None:
    assert list(output) == list(output.keys()) == list(dict(output)) == list(output.to_dict()) == KEYS
    assert "text" in output and "txt" not in output


@pytest.mark.parametrize("name", ["text", "token_ids", "finish_reason", "cumulative_logprob", "logprobs"])
def test_plain_attributes_are_the_first_completions(output: GenerateOutput, name: str) -> None:
    assert getattr(output, name) == getattr(output.outputs[0], name) == output.to_dict()[name] or name == "logprobs"


@pytest.mark.parametrize("name", ["txt", "keys", "to_dict", "", 0])
def test_other_keys_are_errors_that_help(output: GenerateOutput, name: Any) -> None:
    with pytest.raises(KeyError) as caught:
        output[name]
    assert repr(name) in str(caught.value) and "finish_reason" in str(caught.value)


def test_text_and_truth(output: GenerateOutput) -> None:
    assert str(output) == f"{output}" == "text 0"
    empty = dataclasses.replace(output, outputs=[completion(text="", token_ids=[])])
    assert empty and str(empty) == ""


def test_json(output: GenerateOutput) -> None:
    plain = json.loads(json.dumps(output.to_dict(), ensure_ascii=False))
    assert plain["prompt"] == "你好"
    assert plain["outputs"][1]["text"] == "text 1"
    assert plain["logprobs"][1]["7"] == {"logprob": -1.0, "rank": 2, "decoded_token": "你"}
    assert plain["prompt_logprobs"][0] is None
    assert plain["metrics"]["finished_time"] == 4.0


def test_to_dict_is_a_copy(output: GenerateOutput) -> None:
    output.to_dict()["outputs"][0]["token_ids"].append(5)
    assert output.token_ids == [0, 7]


def test_metrics() -> None:
    metrics = RequestMetrics(1.0, 1.5, 2.0, 4.0, 0)
    assert (metrics.time_to_first_token, metrics.latency) == (1.0, 3.0)
    assert RequestMetrics(1.0, None, None, 4.0, 0).time_to_first_token is None


def test_frozen(output: GenerateOutput) -> None:
    step = Increment("request-1", 0, "a", [1], None, None, None, None)
    for thing, name in (
        (output, "request_id"),
        (output.outputs[0], "text"),
        (output.metrics, "latency"),
        (step, "text"),
    ):
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
            setattr(thing, name, "x")
