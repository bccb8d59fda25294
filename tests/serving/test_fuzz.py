"""Requests made from the server's own OpenAPI schema, valid and not: none of them may break it."""

from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from .running import Running
from .test_http import assert_error

EXAMPLES = 12
"""For each endpoint and each kind of request; enough to try every field, few enough for a minute."""

OPERATIONS = [
    ("post", "/v1/completions"),
    ("post", "/v1/chat/completions"),
    ("post", "/v1/responses"),
    ("post", "/v1/embeddings"),
    ("post", "/tokenize"),
    ("post", "/detokenize"),
    ("post", "/v1/generate"),
    ("post", "/v1/generate_batch"),
    ("get", "/v1/result/{request_id}"),
    ("delete", "/v1/result/{request_id}"),
    ("get", "/v1/models/{model_name}"),
    ("get", "/v1/responses/{response_id}"),
    ("delete", "/v1/responses/{response_id}"),
]
NAMES = OPERATIONS[-3:]
"""Those that take any text as a name, so that none is malformed."""


@pytest.mark.parametrize(
    ("mode", "method", "path"),
    [(GenerationMode.POSITIVE, *operation) for operation in OPERATIONS]
    + [(GenerationMode.NEGATIVE, *operation) for operation in OPERATIONS if operation not in NAMES],
)
def test_it_never_fails(server: Running, http: httpx.Client, mode: GenerationMode, method: str, path: str) -> None:
    schema = schemathesis.openapi.from_dict(http.get("/openapi.json").json())
    operation = schema[path][method]
    strategy = operation.as_strategy(generation_mode=mode)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def check(case: Any) -> None:
        _bound(case.body)
        answer = case.call(base_url=server.url, timeout=60)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert answer.json()["error"].keys() == {"message", "type", "param", "code"}

    check()
    assert http.get("/health").status_code == 200


def _bound(body: Any) -> None:
    """How much a valid request may ask for is not what this is about."""
    if isinstance(body, dict):
        names = ["max_tokens", "max_completion_tokens", "gen_length"]
        if "input" in body:  # of embeddings it is refused, which is as good
            names = ["max_output_tokens"]
        for name, most in (*((name, 3) for name in names), ("n", 2)):
            value = body.get(name)
            if isinstance(value, int) and value > most:
                body[name] = most
        if not set(names) & body.keys() or body.get(names[0], 0) is None:
            body[names[0]] = 3


@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(body=st.binary(max_size=200))
def test_bytes(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert_error(answer, 400)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["model", "stream_options", "stop", "logit_bias", "n", "temperature", "tools", "response_format", "priority"]


@settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(fields=st.dictionaries(st.sampled_from([*FIELDS, "chat_template_kwargs", "messages"]), JSON, max_size=3))
def test_any_json_in_any_field(http: httpx.Client, fields: dict[str, Any]) -> None:
    if isinstance(fields.get("n"), int) and fields["n"] > 3:
        fields["n"] = 3
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1} | fields
    answer = http.post("/v1/chat/completions", json=body)
    if answer.status_code != 200:
        assert_error(answer, 404 if answer.status_code == 404 else 400)
