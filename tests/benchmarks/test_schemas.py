"""The report on JSON schemas tells what is followed from what is refused, and valid answers from others."""

from benchmarks.schemas import FEATURES, keywords, summary, try_all
from mini_infer import LLM


def test_followed_and_refused() -> None:
    with LLM(dtype="float32", num_gpu_blocks=200) as llm:
        followed = summary(try_all(llm, FEATURES["multipleOf"], answers=2))
        refused = summary(try_all(llm, FEATURES["uniqueItems"], answers=2))
    assert (followed["compiled"], followed["refused"], followed["finished"]) == (2, 0, 4)
    assert followed["invalid"] == []
    assert (refused["compiled"], refused["refused"], refused["finished"]) == (0, 1, 0)
    assert "uniqueItems" in refused["reasons"][0]


def test_names_of_properties_are_no_keywords() -> None:
    schema = {"properties": {"not": {"type": "null"}}, "anyOf": [{"const": 1}]}
    assert keywords(schema) == {"properties", "type", "anyOf", "const"}
