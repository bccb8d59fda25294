"""SamplingParams: its defaults, what it accepts, and what it refuses."""

import copy
import dataclasses
import math
import pickle
from typing import Any

import pytest

from mini_infer.exceptions import InvalidRequestError, MiniInferError
from mini_infer.sampling import SamplingParams

DEFAULTS = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "max_tokens": 16,
    "ignore_eos": False,
    "n": 1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": None,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "skip_special_tokens": True,
}

ACCEPTED: list[dict[str, Any]] = [
    *[{"temperature": value} for value in (0, 0.0, 1, 2.5, 1e300)],
    *[{"top_p": value} for value in (0, 0.0, 1e-300, 0.5, 1)],
    *[{"top_k": value} for value in (-1, 0, 1, 10**30)],
    *[{"min_p": value} for value in (0, 0.5, 1)],
    *[{"repetition_penalty": value} for value in (0.1, 1, 5)],
    *[{name: value} for name in ("presence_penalty", "frequency_penalty") for value in (-2, 0, 2.0)],
    *[{"seed": value} for value in (None, 0, -1, -(2**63), 2**64 - 1)],
    *[{"max_tokens": value} for value in (None, 1, 10**30)],
    {"max_tokens": 0, "prompt_logprobs": 0},
    {"min_tokens": 16},
    {"min_tokens": 10**6, "max_tokens": None},
    *[{"logprobs": value} for value in (None, 0, 20)],
    {"n": 8},
]

REFUSED: list[tuple[str, Any]] = [
    *[("temperature", value) for value in (-1, -1e-9, math.nan, math.inf, -math.inf, "1", None, True, 1j, 10**400)],
    *[("top_p", value) for value in (-0.5, -1e-9, 1.0001, 2, math.nan, None, "1", True)],
    *[("top_k", value) for value in (-2, 1.5, 1.0, None, "3", True, math.nan)],
    *[("min_p", value) for value in (-0.1, 1.1, math.nan, None)],
    *[("repetition_penalty", value) for value in (0, -1, math.nan, math.inf, None)],
    *[(n, value) for n in ("presence_penalty", "frequency_penalty") for value in (-2.01, 2.01, math.nan, None)],
    *[("n", value) for value in (0, -1, 1.0, None, True)],
    *[("seed", value) for value in (0.5, "1", True, 2**64, -(2**63) - 1, math.nan)],
    *[("max_tokens", value) for value in (0, -1, -(10**30), 1.0, "16", True, math.inf)],
    *[("min_tokens", value) for value in (-1, 17, 0.5, None, True)],
    *[(name, value) for name in ("logprobs", "prompt_logprobs") for value in (-1, 0.5, True, "all")],
    *[(name, value) for name in ("ignore_eos", "skip_special_tokens") for value in (0, 1, None, "no")],
    *[("stop", value) for value in ("", [""], ["a", ""], 5, 0, False, [5], ["a", None], {"a": 1}, b"a")],
    *[("stop_token_ids", value) for value in (5, 0, "ab", {"a": 1}, 1.5)],
    *[("logit_bias", value) for value in (5, 0, [1], "ab")],
]


@pytest.mark.parametrize(("name", "default"), DEFAULTS.items(), ids=DEFAULTS)
def test_defaults(name: str, default: Any) -> None:
    assert getattr(SamplingParams(), name) == default


@pytest.mark.parametrize("options", ACCEPTED, ids=str)
def test_accepted(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    for name, value in options.items():
        assert getattr(params, name) == value


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{name}={value!r}"[:50] for name, value in REFUSED])
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{name: value})
    assert name in str(caught.value) and repr(value) in str(caught.value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, MiniInferError)


@pytest.mark.parametrize("value", [-1, 1.5, True, "7", None], ids=repr)
def test_each_stop_token_is_checked(value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(stop_token_ids=[1, value])
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(("token_id", "value"), [(-1, 0), ("a", 0), (True, 0), (1, 101), (1, math.nan), (1, "x")])
def test_each_bias_is_checked(token_id: Any, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match="logit_bias"):
        SamplingParams(logit_bias={2: 1.0, token_id: value})


@pytest.mark.parametrize(
    ("stop", "strings"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b")), (("你",), ("你",)), ([], ())]
)
def test_stop_strings(stop: Any, strings: tuple[str, ...]) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings
    assert SamplingParams(stop_strings=stop) == SamplingParams(stop=stop)


def test_a_typo_is_an_error_that_helps() -> None:
    with pytest.raises(InvalidRequestError, match=r"'temprature' \(given: 0\.5\); did you mean 'temperature'"):
        SamplingParams(temprature=0.5)


def test_both_spellings_are_one_too_many() -> None:
    with pytest.raises(InvalidRequestError, match="'stop' is given twice: 'a' and 'b'"):
        SamplingParams(stop="a", stop_strings="b")


def test_frozen_and_a_copy() -> None:
    """What the caller does with their lists later changes nothing."""
    stop, ids, bias = ["a"], [1], {1: 2.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)
    stop.append("b")
    ids.append(2)
    bias[2] = 1.0
    assert params == SamplingParams(stop="a", stop_token_ids=(1,), logit_bias={1: 2.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.0  # type: ignore[misc]


def test_hashable() -> None:
    """A frozen value can be a key."""
    assert len({SamplingParams(), SamplingParams(max_tokens=16), SamplingParams(logit_bias={1: 1.0})}) == 2


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(stop=["a"], logit_bias={1: 2.0}, seed=3)])
def test_copies_are_equal(params: SamplingParams) -> None:
    assert copy.deepcopy(params) == params == pickle.loads(pickle.dumps(params)) == dataclasses.replace(params)


def test_replace_checks_again() -> None:
    params = SamplingParams(min_tokens=5)
    assert dataclasses.replace(params, max_tokens=5).min_tokens == 5
    with pytest.raises(InvalidRequestError, match="min_tokens"):
        dataclasses.replace(params, max_tokens=4)


def test_greedy() -> None:
    assert SamplingParams(temperature=0).greedy and not SamplingParams(temperature=0.01).greedy


def test_every_option_has_a_line_of_help() -> None:
    for field in dataclasses.fields(SamplingParams):
        assert field.metadata["help"] and "\n" not in field.metadata["help"]
