"""On the wire: what plain clients send and see, and what becomes of everything that is wrong with a request."""

import json
import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from mini_infer import LLM, AsyncLLMEngine, SamplingParams

from .running import Running, running, wait_until

MAX_BODY = 4 << 20
JSON = {"content-type": "application/json"}


def assert_error(answer: httpx.Response, status: int) -> dict[str, Any]:
    """That an answer is an error in OpenAI's shape; the error."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["message"] and body["error"]["type"]
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
class TestCurl:
    def curl(self, *arguments: str) -> str:
        done = subprocess.run(["curl", "-sS", "--max-time", "60", *arguments], capture_output=True, check=True)
        return done.stdout.decode()

    def test_chat(self, server: Running, offline: LLM) -> None:
        body = {"messages": [{"role": "user", "content": "什么是块？"}], "max_tokens": 8}
        text = self.curl(f"{server.url}/v1/chat/completions", "--json", json.dumps(body))
        (expected,) = offline.chat(body["messages"], SamplingParams(temperature=0, max_tokens=8))  # type: ignore[arg-type]
        assert json.loads(text)["choices"][0]["message"]["content"] == expected.text
        assert expected.text in text, "Chinese is sent as it is, not as escapes"

    def test_a_stream(self, server: Running, offline: LLM) -> None:
        body = {"prompt": "Once", "max_tokens": 5, "temperature": 0, "stream": True}
        text = self.curl("-N", f"{server.url}/v1/completions", "--json", json.dumps(body))
        *events, end = text.split("\n\n")
        assert end == "" and events[-1] == "data: [DONE]" and all(event.startswith("data: ") for event in events)
        chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
        pieces = [chunk["choices"][0]["text"] for chunk in chunks]
        assert "".join(pieces) == offline.generate("Once", SamplingParams(temperature=0, max_tokens=5))[0].text

    def test_an_upload_that_is_refused_before_it_is_sent(self, server: Running) -> None:
        """Curl asks first (``Expect: 100-continue``), and then need not send 20 MB."""
        process = subprocess.run(
            ["curl", "-sS", "-w", "%{http_code} %{size_upload}", "--json", "@-", f"{server.url}/v1/completions"],
            input=json.dumps({"prompt": "x" * 20_000_000}).encode(),
            capture_output=True,
            check=True,
        )
        assert b"body_too_large" in process.stdout and b"413" in process.stdout


class TestTokens:
    @pytest.mark.parametrize("text", ["What is a KV cache?", "什么是块？🙂", " \n\t", "<|im_end|>"])
    def test_there_and_back(self, http: httpx.Client, offline: LLM, text: str) -> None:
        answer = http.post("/tokenize", json={"prompt": text}).json()
        expected = {"count": len(answer["tokens"]), "max_model_len": 1024, "tokens": offline.tokenize(text)}
        assert answer == expected | {"token_strs": None}
        assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}

    def test_a_conversation(self, http: httpx.Client, offline: LLM) -> None:
        messages = [{"role": "user", "content": "Hello"}]
        answer = http.post("/tokenize", json={"messages": messages, "model": "tutor"}).json()
        assert answer["tokens"] == offline.chat(messages, SamplingParams(max_tokens=1))[0].prompt_token_ids

    def test_a_text_beyond_the_context(self, http: httpx.Client) -> None:
        assert http.post("/tokenize", json={"prompt": "a b " * 5000}).json()["count"] > 5000


class TestPages:
    def test_the_page(self, http: httpx.Client) -> None:
        answer = http.get("/")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in answer.headers["content-security-policy"]

    @pytest.mark.parametrize("path", ["/", "/docs"])
    def test_no_other_host(self, http: httpx.Client, path: str) -> None:
        text = http.get(path).text.replace("http://www.w3.org/", "")
        assert "http://" not in text and "https://" not in text and 'src="//' not in text

    def test_the_reference_names_everything(self, http: httpx.Client) -> None:
        page, schema = http.get("/docs").text, http.get("/openapi.json").json()
        for path in schema["paths"]:
            assert path in page
        for name, field in schema["components"]["schemas"]["ChatBody"]["properties"].items():
            assert f"<code>{name}</code>" in page and field.get("description", name != "x")

    def test_files_outside_the_page_are_not_served(self, http: httpx.Client) -> None:
        for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page//etc/passwd", "/page/"):
            assert http.get(path).status_code in (404, 405)


BAD_BODIES: list[Any] = [
    pytest.param(b"", id="empty"),
    pytest.param(b'{"prompt": "x"', id="half"),
    pytest.param(b'{"prompt": "\xff\xfe"}', id="not UTF-8"),
    pytest.param(b"\x00" * 100, id="zeros"),
    pytest.param(b"[" * 100_000, id="deep"),
    pytest.param(b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", id="a number of 5000 digits"),
    pytest.param(b'{"prompt": "\\ud800"}', id="half a surrogate pair"),
    pytest.param(b"[]", id="list"),
    pytest.param(b"null", id="null"),
    pytest.param(b'"prompt"', id="string"),
    pytest.param(b"{}", id="no prompt"),
]

BAD_FIELDS: list[Any] = [
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", ["x", ""]),
    ("prompt", ["x", 1]),
    ("prompt", 7),
    ("prompt", {"text": "x"}),
    ("prompt", [-1]),
    ("prompt", [10**9]),
    ("prompt", [1.5]),
    ("prompt", [True]),
    ("prompt", ["x"] * 1025),
    ("prompt", "word " * 2000),
    ("prompt", "a" * 1_000_000),
    ("n", -1),
    ("n", 0),
    ("n", 10**6),
    ("n", "2"),
    ("n", 1.5),
    ("n", True),
    ("max_tokens", -1),
    ("max_tokens", 0),
    ("max_tokens", 1e3),
    ("max_tokens", "many"),
    ("temperature", -0.1),
    ("temperature", "hot"),
    ("temperature", [1]),
    ("top_p", -0.1),
    ("top_p", 1.1),
    ("top_k", -2),
    ("min_p", 2),
    ("repetition_penalty", 0),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "much"}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"99999999": 1}),
    ("logit_bias", [1]),
    ("logprobs", -1),
    ("logprobs", 21),
    ("logprobs", True),
    ("seed", 2**65),
    ("seed", 0.5),
    ("stop", [""]),
    ("stop", ["x"] * 65),
    ("stop", 5),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [10**9]),
    ("stop_token_ids", ["1"]),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("ignore_eos", "yes"),
    ("priority", 2**40),
    ("stream", "true"),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("cache_salt", 5),
    ("best_of", 2),
    ("suffix", "end"),
    ("model", 5),
    ("temprature", 0.5),
]


class TestBadRequests:
    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    def test_a_canvas_where_there_is_none(self, http: httpx.Client, path: str) -> None:
        asked = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
        response = http.post(path, json={**asked, "stream": True, "stream_options": {"include_canvas": True}})
        assert assert_error(response, 400)["param"] == "stream_options.include_canvas"

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
    @pytest.mark.parametrize("body", BAD_BODIES)
    def test_bodies(self, http: httpx.Client, path: str, body: bytes) -> None:
        assert_error(http.post(path, content=body, headers=JSON), 400)

    @pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=lambda value: repr(value)[:30])
    def test_fields(self, http: httpx.Client, name: str, value: Any) -> None:
        error = assert_error(http.post("/v1/completions", json={"prompt": "x", name: value}), 400)
        assert name in error["message"] or error["param"] == name, error

    @pytest.mark.parametrize("text", ["1e400", "NaN", "-Infinity", "1" + "0" * 400])
    @pytest.mark.parametrize("name", ["temperature", "top_p", "presence_penalty"])
    def test_numbers_that_are_none(self, http: httpx.Client, name: str, text: str) -> None:
        body = f'{{"prompt": "x", "{name}": {text}}}'
        assert_error(http.post("/v1/completions", content=body, headers=JSON), 400)

    @pytest.mark.parametrize(
        "messages",
        [
            [],
            {},
            "Hello",
            [{}],
            [{"role": "user"}],
            [{"role": "user", "content": None}],
            [{"role": "user", "content": 5}],
            [{"role": "user", "content": "\ud800"}],
            [{"role": "tool"}],
            [{"role": "king", "content": "x"}],
            [{"role": "user", "content": "x", "tool_calls": [{}]}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/x.png"}}]}],
            [{"role": "user", "content": [{"type": "text"}]}],
            [{"role": "user", "content": ["x"]}],
            [{"role": "user", "content": "word " * 2000}],
            ["x"],
        ],
        ids=lambda value: repr(value)[:60],
    )
    def test_messages(self, http: httpx.Client, messages: Any) -> None:
        content = json.dumps({"messages": messages}).encode()
        assert_error(http.post("/v1/chat/completions", content=content, headers=JSON), 400)

    @pytest.mark.parametrize(
        "option",
        [
            {"top_logprobs": 2},
            {"logprobs": True, "top_logprobs": 21},
            {"max_tokens": 0},
            {"max_tokens": 3, "max_completion_tokens": 4},
            {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
            {"chat_template_kwargs": {"messages": []}},
            {"chat_template_kwargs": []},
        ],
        ids=str,
    )
    def test_chat_options(self, http: httpx.Client, option: Any) -> None:
        messages = [{"role": "user", "content": "Hello"}]
        assert_error(http.post("/v1/chat/completions", json={"messages": messages, **option}), 400)

    def test_the_wrong_type_of_content(self, http: httpx.Client) -> None:
        """Which also keeps pages of other sites from having a browser send requests here."""
        answer = http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
        assert "application/json" in assert_error(answer, 400)["message"]

    def test_paths_and_methods(self, http: httpx.Client) -> None:
        assert_error(http.get("/nope"), 404)
        assert_error(http.get("/v1/completions"), 405)
        assert_error(http.delete("/v1/models"), 405)
        assert_error(http.request("BREW", "/v1/completions"), 405)
        assert_error(http.post("/v1/completions", json={"prompt": "x", "model": "gpt-4"}), 404)
        assert_error(http.get("/v1/models/" + "x" * 2000), 404)

    def test_many_complaints_are_not_collected(self, http: httpx.Client) -> None:
        """A million wrong items cost no more than one."""
        for body, status in (
            ({"prompt": [[0]] * 100_000 + ["x"]}, 400),
            ({"prompt": [None] * 250_000}, 400),
            ({"prompt": "x", "stop": [1] * 250_000}, 400),
            ({"prompt": [None] * 500_000}, 413),
        ):
            error = assert_error(http.post("/v1/completions", json=body), status)
            assert len(error["message"]) < 500

    def test_afterwards_it_serves(self, http: httpx.Client) -> None:
        answer = http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 1})
        assert answer.status_code == 200 and answer.json()["choices"][0]["text"]


class TestBodySize:
    def test_the_largest(self, http: httpx.Client) -> None:
        body = b'{"prompt": "x", "user": "' + b"u" * (MAX_BODY - 27) + b'"}'
        assert len(body) == MAX_BODY
        assert http.post("/v1/completions", content=body, headers=JSON).status_code == 200
        assert_error(http.post("/v1/completions", content=body + b" ", headers=JSON), 413)

    def test_twenty_megabytes(self, http: httpx.Client) -> None:
        answer = http.post("/v1/completions", json={"prompt": "x" * 20_000_000})
        assert assert_error(answer, 413)["code"] == "body_too_large"

    def test_without_saying_so_first(self, http: httpx.Client) -> None:
        """In chunks, so that there is no Content-Length to judge by."""
        chunks = (b" " * 100_000 for _ in range(200))
        assert_error(http.post("/v1/completions", content=chunks, headers=JSON), 413)

    def test_a_path_that_does_not_exist(self, http: httpx.Client) -> None:
        assert_error(http.post("/nope", content=b"x" * 20_000_000), 413)

    @pytest.mark.parametrize("length", ["-1", "x", "99999999999999999999", "1e3", "٣"])
    def test_strange_announcements(self, server: Running, length: str) -> None:
        request = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()
        with socket.create_connection(server.address, timeout=60) as connection:
            connection.sendall(request)
            assert connection.recv(100).startswith((b"HTTP/1.1 4", b""))

    def test_headers_without_end(self, server: Running) -> None:
        with socket.create_connection(server.address, timeout=60) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n")
            sent = 0
            try:
                while sent < 10_000_000:
                    connection.sendall(b"x-filler: " + b"y" * 10_000 + b"\r\n")
                    sent += 10_000
            except OSError:
                pass
            assert sent < 10_000_000, "ten megabytes of headers were taken in"


@pytest.fixture(scope="module")
def strict() -> Iterator[Running]:
    """A server with narrow limits, on an engine with a short queue."""
    engine = AsyncLLMEngine(dtype="float32", num_gpu_blocks=128, max_num_seqs=1, max_waiting=1)
    options: Any = {"body_timeout": 0.2, "request_timeout": 3.0, "cors": ["https://example.org"], "api_key": "secret"}
    with running(engine, **options, served_model_name="my/model") as server:
        yield server


@pytest.fixture
def authorized(strict: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=strict.url, headers={"authorization": "Bearer secret"}, timeout=60) as client:
        yield client


ENDLESS: dict[str, Any] = {"prompt": "Once", "max_tokens": 1000, "ignore_eos": True}


class TestLimits:
    def test_a_body_that_does_not_come(self, strict: Running) -> None:
        with socket.create_connection(strict.address, timeout=60) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
                b'Content-Length: 100\r\nContent-Type: application/json\r\n\r\n{"prompt"'
            )
            answer = b""
            while piece := connection.recv(1000):  # until the server closes the connection
                answer += piece
            assert answer.startswith(b"HTTP/1.1 408") and b"slow_body" in answer

    def test_a_request_that_takes_too_long(self, strict: Running, authorized: httpx.Client) -> None:
        slow = ENDLESS | {"n": 64}
        assert "3 seconds" in assert_error(authorized.post("/v1/completions", json=slow), 408)["message"]
        wait_until(strict.is_idle)

    def test_a_stream_that_takes_too_long(self, strict: Running, authorized: httpx.Client) -> None:
        answer = authorized.post("/v1/completions", json=ENDLESS | {"n": 64, "stream": True})
        assert answer.status_code == 200
        *events, last = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line]
        assert events and last["error"]["type"] == "timeout_error"
        wait_until(strict.is_idle)

    def test_a_full_queue(self, strict: Running, authorized: httpx.Client) -> None:
        before = strict.stats().num_generated_tokens
        with authorized.stream("POST", "/v1/completions", json=ENDLESS | {"n": 64, "stream": True}) as running:
            lines = running.iter_lines()  # closes the connection when it is forgotten
            next(lines)
            with authorized.stream(
                "POST", "/v1/completions", json=ENDLESS | {"stream": True}
            ):  # it waits, headers sent
                answer = authorized.post("/v1/completions", json=ENDLESS)
        error = assert_error(answer, 429)
        assert error["type"] == "rate_limit_error" and "max_waiting is 1" in error["message"]
        assert answer.headers["retry-after"]
        wait_until(strict.is_idle)
        assert strict.stats().num_generated_tokens > before

    @pytest.mark.parametrize("header", [None, "secret", "Bearer", "Bearer wrong", "Basic secret", "Bearer sécret"])
    def test_keys_that_are_wrong(self, strict: Running, header: str | None) -> None:
        headers = {} if header is None else {"authorization": header.encode()}
        with httpx.Client(base_url=strict.url, headers=headers, timeout=60) as client:
            for path in ("/v1/models", "/engine/events", "/metrics", "/nope"):
                assert assert_error(client.get(path), 401)["code"] == "invalid_api_key"
            for path in ("/v1/completions", "/v1/generate", "/tokenize"):
                assert_error(client.post(path, json={}), 401)
            for path in ("/health", "/v1/health", "/docs", "/openapi.json"):
                assert client.get(path).status_code == 200

    def test_the_key(self, authorized: httpx.Client) -> None:
        assert authorized.get("/v1/models/my/model").json()["id"] == "my/model"
        answer = authorized.post("/v1/completions", json={"prompt": "Once", "model": "my/model", "max_tokens": 1})
        assert answer.json()["model"] == "my/model"
        assert_error(authorized.post("/v1/completions", json={"prompt": "Once", "model": "tutor"}), 404)

    def test_cors(self, strict: Running) -> None:
        with httpx.Client(base_url=strict.url, timeout=60) as client:
            asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
            for origin, allowed in (("https://example.org", "https://example.org"), ("https://example.com", None)):
                answer = client.options("/v1/completions", headers={"origin": origin, **asks})
                assert answer.headers.get("access-control-allow-origin") == allowed
                refused = client.post("/v1/completions", headers={"origin": origin})
                assert refused.status_code == 401, "a page must be able to read why"
                assert refused.headers.get("access-control-allow-origin") == allowed

    def test_no_cors_unless_asked_for(self, http: httpx.Client) -> None:
        answer = http.get("/v1/models", headers={"origin": "https://example.org"})
        assert "access-control-allow-origin" not in answer.headers


class TestLeaving:
    @pytest.mark.parametrize("when", ["at once", "while it waits", "while it runs", "half a body"])
    @pytest.mark.parametrize("stream", [False, True])
    def test_what_is_left_is_freed(self, server: Running, when: str, stream: bool) -> None:
        body = json.dumps(ENDLESS | {"n": 8, "stream": stream}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        before = server.stats()
        with socket.create_connection(server.address, timeout=60) as connection:
            connection.sendall(
                f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + (body[:20] if when == "half a body" else body)
            )
            if when == "while it waits":
                wait_until(lambda: not server.is_idle())
            elif when == "while it runs":
                wait_until(lambda: server.stats().num_generated_tokens > before.num_generated_tokens)
        wait_until(server.is_idle)
        assert server.stats().num_generated_tokens - before.num_generated_tokens < 8 * 900

    def test_within_one_step(self, server: Running) -> None:
        """Once the server has noticed, the next step is without the request: two steps see the end of it."""
        with httpx.Client(base_url=server.url, timeout=60) as client:
            with client.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}) as answer:
                next(answer.iter_lines())
            wait_until(server.is_idle)
            steps = server.stats().num_steps
            client.get("/health")
            assert server.stats().num_steps == steps

    def test_half_closed_is_gone(self, server: Running) -> None:
        body = json.dumps(ENDLESS).encode()
        with socket.create_connection(server.address, timeout=60) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                + f"Content-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            connection.shutdown(socket.SHUT_WR)
            wait_until(server.is_idle)


class TestRandomBytes:
    @pytest.mark.parametrize("seed", range(3))
    def test_the_server_survives(self, server: Running, seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(30):
            lines = [b"POST /v1/completions HTTP/1.1", b"Host: localhost", b"Content-Length: 5", b"", b"hello"]
            data = bytearray(b"\r\n".join(lines))
            for _ in range(draw.randrange(1, 20)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            with socket.create_connection(server.address, timeout=60) as connection:
                connection.sendall(bytes(data))
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(100)
            assert not answer or answer.split()[1][:1] != b"5", (seed, bytes(data), answer)
        assert httpx.get(f"{server.url}/health", timeout=60).status_code == 200
