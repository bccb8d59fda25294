"""What one caller can make large, slow or endless has a bound, and a message that names it."""

import contextlib
import json
import random
import select
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from mini_infer import LLM, AsyncLLMEngine
from mini_infer.cli import app
from mini_infer.exceptions import InvalidConfigError
from mini_infer.executor.runner import ModelRunner
from mini_infer.models import Decoder
from mini_infer.serving import events, routes, serve, templates
from mini_infer.serving.admission import Budget
from mini_infer.serving.answers import Whole
from mini_infer.serving.app import check_options
from mini_infer.serving.connections import READ_BYTES, Connection, Pace
from mini_infer.serving.errors import ApiError
from mini_infer.serving.pools import SMALL
from mini_infer.serving.server import Server, _bind
from tests.engine.executors import runner_of

from .running import PATIENCE, Running, running, wait_until
from .test_http import JSON, assert_error

ENDLESS: dict[str, Any] = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True}
HELLO = [{"role": "user", "content": "Hello"}]


def engine(**fields: Any) -> AsyncLLMEngine:
    return AsyncLLMEngine(dtype="float32", num_gpu_blocks=256, **fields)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One of this file's own, whose template and steps may be replaced."""
    with running(engine()) as server:
        yield server
        wait_until(server.is_idle)


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


class TestSizes:
    @pytest.mark.parametrize(
        ("path", "body", "status", "names"),
        [
            (
                "/v1/completions",
                {"prompt": "x", "n": 512, "max_tokens": 150, "logprobs": 20},
                400,
                "answer_size=1048576",
            ),
            ("/v1/completions", {"prompt": ["x"] * 1024, "max_tokens": 2000, "logprobs": 0, "n": 1}, None, ""),
            ("/v1/completions", {"prompt": ["x" * 999] * 60, "echo": True, "logprobs": 20}, 400, "answer_size"),
            ("/v1/chat/completions", {"messages": HELLO, "n": 60, "logprobs": True, "top_logprobs": 20}, 400, "answer"),
            ("/v1/generate_batch", {"prompts": ["x"] * 600, "max_tokens": 3, "n": 2}, 422, "1024"),
            ("/v1/completions", {"prompt": ["x"] * 1025}, 400, "1024 items"),
            ("/v1/completions", {"prompt": [[1]] * 1025}, 400, "1024 items"),
            ("/v1/completions", {"prompt": "x", "logit_bias": {str(i): 1 for i in range(1025)}}, 400, "1024 items"),
            ("/v1/completions", {"prompt": "x", "stop_token_ids": list(range(1025))}, 400, "1024 items"),
            ("/v1/completions", {"prompt": "x", "stop": "a" * 513}, 400, "512 characters"),
            ("/v1/completions", {"prompt": "x", "stop": ["b", "a" * 513]}, 400, "512 characters"),
            ("/v1/completions", {"prompt": "x", "stop": ["b"] * 65}, 400, "64 items"),
            ("/v1/chat/completions", {"messages": HELLO * 2049}, 400, "2048 items"),
            ("/tokenize", {"messages": HELLO * 2049}, 400, "2048 items"),
            ("/tokenize", {"prompt": " " * (2**18 + 1)}, 400, "prompt_characters=262144"),
            ("/detokenize", {"tokens": [5] * (2**16 + 1)}, 400, "detokenize_ids=65536"),
            ("/detokenize", {"tokens": [5] * (2**18 + 1)}, 413, "json_values=262144"),
            ("/v1/completions", {"prompt": [[1]] * 200_000}, 413, "json_values"),
        ],
        ids=lambda value: repr(value)[:40],
    )
    def test_what_is_too_large_is_refused_by_name(
        self, http: httpx.Client, path: str, body: Any, status: int | None, names: str
    ) -> None:
        if status is None:  # just small enough: 1024 x 1 token is what fits the context
            body = body | {"max_tokens": 1}
            assert http.post(path, json=body).status_code == 200
        else:
            assert names in assert_error(http.post(path, json=body), status)["message"]

    def test_commas_in_a_text_are_no_values(self, http: httpx.Client) -> None:
        body = {"prompt": "x", "max_tokens": 1, "user": ',[{"\\' * 200_000}
        assert http.post("/v1/completions", json=body).status_code == 200

    @pytest.mark.parametrize("seed", range(40))
    def test_values_are_counted_without_reading_them(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        """As the parser has them, wherever a piece of the body ends."""
        rng = random.Random(seed)
        monkeypatch.setattr(routes, "_PIECE", rng.choice([1, 2, 3, 7, 1 << 16]))

        def draw(depth: int) -> Any:
            kind = rng.randrange(6 if depth else 3)
            if kind < 2:
                return rng.random() if kind else "".join(rng.choices('"\\,[a{é', k=rng.randrange(8)))
            if kind == 2:
                return None
            values = [draw(depth - 1) for _ in range(rng.randrange(5))]
            return values if kind < 5 else {f'{place},"[\\': value for place, value in enumerate(values)}

        def commas_and_brackets(value: Any) -> int:
            if not isinstance(value, list | dict):
                return 0
            items = value if isinstance(value, list) else list(value.values())
            return 1 + max(0, len(items) - 1) + sum(map(commas_and_brackets, items))

        value = draw(6)
        raw = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode()
        number = commas_and_brackets(value)
        assert not routes.has_more_values(raw, number)
        assert number == 0 or routes.has_more_values(raw, number - 1)

    def test_the_largest_that_are_not(self, http: httpx.Client) -> None:
        assert http.post("/tokenize", json={"prompt": " a" * 2**17}).json()["count"] > 1000
        assert http.post("/detokenize", json={"tokens": [5] * 2**16}).status_code == 200
        body = {
            "prompt": "x",
            "max_tokens": 1,
            "logit_bias": {str(i): 1 for i in range(1024)},
            "stop": ["a" * 512] * 64,
        }
        assert http.post("/v1/completions", json=body | {"stop_token_ids": list(range(1024))}).status_code == 200

    def test_the_limits_are_told(self, http: httpx.Client) -> None:
        limits = http.get("/v1/models").json()["data"][0]["limits"]
        assert limits["body_bytes"] == 4 << 20 and limits["waiting_requests"] == 1024 and limits["choices"] == 1024

    def test_log_probabilities_of_all_together(self, http: httpx.Client, server: Running) -> None:
        """Each of these could hold half of what all may; of three, one is refused, and later is not."""
        body = ENDLESS | {"n": 24, "logprobs": 20, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as first:
            first_lines = first.iter_lines()
            next(first_lines)
            with (
                httpx.Client(base_url=server.url, timeout=60) as other,
                other.stream("POST", "/v1/completions", json=body) as second,
            ):
                second_lines = second.iter_lines()
                next(second_lines)
                third = http.post("/v1/completions", json=body)
                assert assert_error(third, 503)["code"] == "busy" and "held_logprobs" in third.text
                assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        wait_until(server.is_idle)
        assert (
            http.post("/v1/completions", json=ENDLESS | {"max_tokens": 2, "n": 24, "logprobs": 20}).status_code == 200
        )

    def test_bodies_of_all_together(self, server: Running, http: httpx.Client) -> None:
        """Twelve that hold back their last bytes: those beyond 32 MiB are refused, and a small one never is."""
        size = 4 << 20
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {size}\r\n\r\n"
        connections = []
        try:
            for _ in range(12):
                connection = socket.create_connection(server.address, timeout=60)
                connections.append(connection)
                connection.sendall(head.encode())
                try:
                    connection.sendall(b" " * (size - 100))
                except OSError:  # refused, and closed
                    continue
            assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
            wait_until(lambda: len(select.select(connections, [], [], 0)[0]) >= 4)  # more than eight never fit
            num_refused = 0
            for connection in connections:
                connection.settimeout(0.2)
                with contextlib.suppress(OSError):
                    num_refused += connection.recv(1000).startswith(b"HTTP/1.1 503")
            assert 1 <= num_refused <= 5
        finally:
            for connection in connections:
                connection.close()

    def test_a_body_that_is_thrown_away_comes_no_faster(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is refused by what it says of its length, and then paid for nevertheless; meanwhile nothing is read."""
        paid: list[float] = []
        while_slowed: list[Any] = []
        wait, take = Pace.wait, Connection.data_received

        def watched_wait(pace: Pace, amount: float, now: float) -> float:
            paid.append(amount)
            return wait(pace, amount, now)

        def watched_take(connection: Connection, data: bytes) -> None:
            while_slowed.append(connection._slowed)
            take(connection, data)

        monkeypatch.setattr(Pace, "wait", watched_wait)
        monkeypatch.setattr(Connection, "data_received", watched_take)
        size = 6 << 20
        head = f"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
        with socket.create_connection(server.address, timeout=60) as connection:
            connection.sendall(head.encode() + b" " * size)
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answers = b""
            while b"200 OK" not in answers and (more := connection.recv(4096)):
                answers += more
        assert answers.startswith(b"HTTP/1.1 413") and b"200 OK" in answers
        assert size - SMALL - READ_BYTES <= sum(paid) <= size + len(head) + 100
        assert set(while_slowed) == {None}

    @pytest.mark.parametrize("seed", range(10))
    def test_a_pace(self, seed: int) -> None:
        """However many bring however much: in any time no more than is paid for, and what each has in hand."""
        rng = random.Random(seed)
        pace = Pace(100.0, 30.0)
        free_at = [0.0] * rng.randint(1, 20)
        brought: list[tuple[float, float]] = []
        while len(brought) < 500:
            who = min(range(len(free_at)), key=free_at.__getitem__)
            now, amount = free_at[who], rng.uniform(0, 10)
            brought.append((now, amount))
            free_at[who] = now + pace.wait(amount, now) + rng.choice([0, 0, rng.random()])
        for _ in range(200):
            start, end = sorted(rng.choices(brought, k=2))
            total = sum(amount for now, amount in brought if start[0] <= now <= end[0])
            assert total <= 30 + 100 * (end[0] - start[0]) + 10 * len(free_at) + 1e-6
        assert Pace(100.0, 30.0).wait(30.0, now=5.0) == pytest.approx(0)
        assert Pace(100.0, 30.0).wait(40.0, now=5.0) == pytest.approx(0.1)

    def test_a_budget(self) -> None:
        budget = Budget("things", 10)
        budget.take(7)
        with pytest.raises(ApiError, match="things=10"):
            budget.take(4)
        budget.give_back(7)
        budget.take(10)


class TestTemplates:
    @pytest.fixture
    def use_template(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> Any:
        return lambda text: monkeypatch.setattr(server.engine.engine._tokenizer.hf, "chat_template", text)

    @pytest.mark.parametrize(
        "template",
        [
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "{{ (10 ** 10) ** (10 ** 9) }}",  # one operation, during which no other thread of its process runs
        ],
        ids=["loop", "power"],
    )
    def test_one_without_end_ends(
        self, server: Running, http: httpx.Client, use_template: Any, monkeypatch: pytest.MonkeyPatch, template: str
    ) -> None:
        monkeypatch.setattr(templates, "SECONDS", 0.5)
        use_template(template)
        for path in ("/v1/chat/completions", "/tokenize"):
            assert "did not end" in assert_error(http.post(path, json={"messages": HELLO}), 400)["message"]
        monkeypatch.undo()
        assert http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1}).status_code == 200

    @pytest.mark.parametrize("template", ["{{ 'x' * 300000 }}", "{{ ('x' * 5000000000)|length }}"])
    def test_one_that_makes_too_much(self, http: httpx.Client, use_template: Any, template: str) -> None:
        use_template(template)
        assert_error(http.post("/v1/chat/completions", json={"messages": HELLO}), 400)

    @pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False, "名": ["值", 1.5, None]}])
    def test_the_same_text_as_without_a_child(self, http: httpx.Client, offline: LLM, kwargs: dict[str, Any]) -> None:
        messages = [*HELLO, {"role": "assistant", "content": "什么？<|im_end|>"}, {"role": "user", "content": "\n🙂"}]
        body = {"messages": messages, "chat_template_kwargs": kwargs}
        expected = offline.tokenize(offline.render_chat(messages, **kwargs))
        assert http.post("/tokenize", json=body).json()["tokens"] == expected


class TestLargeAnswers:
    @pytest.mark.parametrize("seed", range(3))
    def test_pieces_are_the_whole(self, seed: int) -> None:
        draw = random.Random(seed)

        def value(depth: int) -> Any:
            kind = draw.randrange(6 if depth else 4)
            if kind == 4:
                return {str(i): value(depth - 1) for i in range(draw.choice([0, 1, 5]))}
            if kind == 5:
                return [value(depth - 1) for _ in range(draw.choice([0, 1, 64, 65, 200]))]
            return [None, draw.random(), '块\n"\\', draw.randrange(10**9)][kind]

        choices = [value(3) for _ in range(draw.choice([0, 1, 7]))]
        whole = Whole({"a": value(2), "choices": iter(choices), "b": {}}, 0)
        blocks = list(whole.blocks())
        text = b"".join(blocks)
        assert json.loads(text)["choices"] == choices
        assert len(blocks) == 1 or len(text) > 1 << 16

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    def test_one_comes_in_pieces(self, http: httpx.Client, offline: LLM, path: str) -> None:
        body: dict[str, Any] = {"max_tokens": 60, "temperature": 0, "ignore_eos": True, "n": 8}
        prompt, logprobs = (
            ({"prompt": "Once"}, {"logprobs": 20})
            if path == "/v1/completions"
            else ({"messages": HELLO}, {"logprobs": True, "top_logprobs": 20})
        )
        plain = http.post(path, json=body | prompt)
        answer = http.post(path, json=body | prompt | logprobs)
        assert "content-length" in plain.headers and answer.headers["transfer-encoding"] == "chunked"
        for choice, without in zip(answer.json()["choices"], plain.json()["choices"], strict=True):
            shape = choice.pop("logprobs")
            without.pop("logprobs")
            assert choice == without
            assert len(shape["tokens"] if "tokens" in shape else shape["content"]) == 60


class TestTurns:
    def test_one_callers_queue_stands_before_nobody_else(self) -> None:
        """Sixty of one connection's wait; another's single request is answered before most of them."""
        with running(engine(max_num_seqs=1)) as server, httpx.Client(base_url=server.url, timeout=60) as many:
            body = {"prompts": ["Once"] * 60, "max_tokens": 40, "ignore_eos": True}
            numbers = many.post("/v1/generate_batch", json=body).json()["request_ids"]
            with httpx.Client(base_url=server.url, timeout=60) as one:
                assert one.post("/v1/completions", json={"prompt": "Twice", "max_tokens": 1}).status_code == 200
            metrics = many.get("/metrics").text  # before anything else, while they are there
            states = [many.get(f"/v1/result/{number}").json()["status"] for number in numbers]
            assert states.count("running") > 20
            metric = "mini_infer:num_requests_queued"
            (line,) = [line for line in metrics.splitlines() if line.startswith(metric)]
            assert float(line.split()[-1]) > 10
            for number in numbers:
                many.delete(f"/v1/result/{number}")
            wait_until(server.is_idle)
            assert many.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200

    def test_a_seat_is_kept_for_who_has_none(self) -> None:
        """Eight seats, and one caller with forty requests that take long: another's need not wait for one to end."""
        with running(engine(max_num_seqs=8)) as server, httpx.Client(base_url=server.url, timeout=60) as many:
            with server.held() as gate:
                body = {"prompts": ["Once"] * 40, "max_tokens": 900, "ignore_eos": True}
                numbers = many.post("/v1/generate_batch", json=body).json()["request_ids"]
                assert gate.was_reached.wait(PATIENCE)
                with httpx.Client(base_url=server.url, timeout=60) as one:
                    short = one.post("/v1/generate", json={"prompt": "Twice", "max_tokens": 1}).json()["request_ids"][0]
                gate.is_open.set()
                wait_until(lambda: many.get(f"/v1/result/{short}").json()["status"] == "finished")
                gate.is_open.clear()
                states = [many.get(f"/v1/result/{number}").json()["status"] for number in numbers]
                assert states == ["running"] * 40
            for number in numbers:
                many.delete(f"/v1/result/{number}")
            wait_until(server.is_idle)

    def test_in_a_full_queue_the_longest_line_shrinks(self) -> None:
        with (
            running(engine(max_num_seqs=1, max_waiting=12)) as server,
            httpx.Client(base_url=server.url, timeout=60) as many,
            httpx.Client(base_url=server.url, timeout=60) as one,
        ):

            def post(client: httpx.Client) -> httpx.Response:
                return client.post("/v1/generate", json=ENDLESS)

            with server.held() as gate:
                numbers = [post(many).json()["request_ids"][0]]
                assert gate.was_reached.wait(PATIENCE)  # without a token it still counts as one that waits
                numbers += [post(many).json()["request_ids"][0] for _ in range(11)]
                error = assert_error(post(many), 429)
                assert "max_waiting is 12" in error["message"]
                answer = post(one)
                assert answer.status_code == 200
                results = [many.get(f"/v1/result/{number}").json() for number in numbers]
            (failed,) = [result for result in results if result["status"] == "failed"]
            assert failed["request_id"] == numbers[-1] and "max_waiting is 12" in failed["error"]
            for number in numbers + answer.json()["request_ids"]:
                many.delete(f"/v1/result/{number}")

    def test_who_leaves_while_waiting_is_forgotten(self) -> None:
        with running(engine(max_num_seqs=1)) as server, httpx.Client(base_url=server.url, timeout=60) as http:
            number = http.post("/v1/generate", json=ENDLESS).json()["request_ids"][0]
            body = ENDLESS | {"prompt": ["Once"] * 40, "stream": True}
            with http.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
            http.delete(f"/v1/result/{number}")
            wait_until(server.is_idle)
            assert server.stats().num_generated_tokens < 40 * 900


class TestEnds:
    @pytest.fixture
    def broken_logits(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        compute, model = Decoder.compute_logits, runner_of(server.engine.engine).model

        def nan(self: Decoder, hidden: Any) -> Any:
            logits = compute(self, hidden)
            return logits * float("nan") if self is model else logits

        monkeypatch.setattr(Decoder, "compute_logits", nan)

    def test_tokens_that_cannot_be_made_text_are_an_error(
        self, http: httpx.Client, server: Running, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreadable(token_ids: Any, skip_special_tokens: bool) -> str:
            raise UnicodeError("unreadable")

        prompt = server.engine.tokenize("Once")
        decode = server.engine.tokenizer.decode
        monkeypatch.setattr(
            server.engine.tokenizer,
            "decode",
            lambda ids, **how: (decode if list(ids) == prompt else unreadable)(ids, **how),
        )
        body = {"prompt": "Once", "max_tokens": 5, "n": 2}
        assert assert_error(http.post("/v1/completions", json=body), 500)["code"] == "request_failed"
        monkeypatch.undo()
        assert http.post("/v1/completions", json=body).status_code == 200

    def test_logits_that_are_no_numbers_are_an_error(self, http: httpx.Client, broken_logits: None) -> None:
        body = {"prompt": "Once", "max_tokens": 5}
        assert assert_error(http.post("/v1/completions", json=body), 500)["code"] == "not_finite"
        lines = [line for line in http.post("/v1/completions", json=body | {"stream": True}).text.split("\n\n") if line]
        assert json.loads(lines[-1][6:])["error"]["code"] == "not_finite"
        (number,) = http.post("/v1/generate", json=body).json()["request_ids"]
        result: dict[str, Any] = {}

        def ended() -> bool:
            result.update(http.get(f"/v1/result/{number}").json())
            return bool(result["status"] != "running")

        wait_until(ended)
        assert result["status"] == "failed" and result["text"] is None and "not finite" in result["error"]

    def test_a_tokenizer_that_panics(
        self, server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Panic(BaseException):
            """As PyO3's: none of Python's ordinary exceptions."""

        def panic(*_: Any, **__: Any) -> None:
            raise Panic("index out of bounds")

        monkeypatch.setattr(server.engine.engine._tokenizer, "encode", panic)
        assert "index out of bounds" in assert_error(http.post("/v1/completions", json={"prompt": "x"}), 400)["message"]
        assert_error(http.post("/v1/generate", json={"prompt": "x"}), 422)
        assert_error(http.post("/tokenize", json={"prompt": "x"}), 500)
        monkeypatch.undo()
        assert http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200

    def test_a_step_that_does_not_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Health says so; then the server tells those who wait, and ends by itself."""
        gate, forward = threading.Event(), ModelRunner._forward
        stuck_engine = engine()
        runner = runner_of(stuck_engine.engine)

        def stuck(self: ModelRunner, batch: Any) -> Any:
            if self is runner:
                gate.wait(PATIENCE)
            return forward(self, batch)

        with running(stuck_engine, step_timeout=1.0) as server, httpx.Client(base_url=server.url, timeout=60) as http:
            with http.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}) as answer:
                lines = answer.iter_lines()
                next(lines)
                monkeypatch.setattr(ModelRunner, "_forward", stuck)
                with httpx.Client(base_url=server.url, timeout=60) as other:
                    wait_until(lambda: other.get("/health").status_code == 503)
                assert json.loads([line for line in lines if line][-1][6:])["error"]["type"] == "server_error"
            server.thread.join(PATIENCE)
            assert not server.thread.is_alive() and not server.engine.shutdown(0)
            gate.set()

    def test_signals(self, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
        """One before the server runs ends the program; the third ends the process at once."""
        fresh = Server(server.server.config.app, server.engine, 1.0)  # type: ignore[arg-type]
        with pytest.raises(SystemExit):
            fresh.handle_exit(15, None)
        codes: list[int] = []
        monkeypatch.setattr("os._exit", codes.append)
        monkeypatch.setattr(server.server, "_num_signals", 2)
        monkeypatch.setattr(server.server, "stop", lambda: None)
        server.server.handle_exit(2, None)
        assert codes == [1]

    def test_two_servers_on_one_port(self) -> None:
        with _bind("127.0.0.1", 0) as first:
            port = first.getsockname()[1]
            with pytest.raises(InvalidConfigError, match=f"port {port}"):
                _bind("127.0.0.1", port)


class TestSettings:
    @pytest.mark.parametrize("key", ["", " ", "with space", "new\nline", "tab\t", "schlüssel", ["good", ""]])
    def test_keys(self, key: Any) -> None:
        with pytest.raises(InvalidConfigError, match="API key"):
            serve(api_key=key, port=0, config=None)  # type: ignore[arg-type]

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["request_timeout", "step_timeout"])
    def test_times(self, name: str, seconds: float) -> None:
        options: dict[str, Any] = {"request_timeout": None, "step_timeout": 1.0} | {name: seconds}
        with pytest.raises(InvalidConfigError, match=name):
            check_options(None, False, **options)

    def test_the_rest(self) -> None:
        with pytest.raises(InvalidConfigError, match="drain_timeout"):
            serve(None, drain_timeout=float("nan"))  # type: ignore[arg-type]
        with pytest.raises(InvalidConfigError, match="host is empty"):
            serve(None, host=" ")  # type: ignore[arg-type]
        with pytest.raises(InvalidConfigError, match="salt_by_key"):
            check_options(None, True, None, 1.0)

    @pytest.mark.parametrize(
        ("arguments", "variable"), [([], ""), (["--api-key", ""], None), (["--request-timeout", "nan"], None)], ids=str
    )
    def test_of_the_command(self, arguments: list[str], variable: str | None) -> None:
        done = CliRunner().invoke(app, ["serve", *arguments], env={"MINI_INFER_API_KEY": variable})
        assert done.exit_code == 2 and ("API key" in done.stderr or "request_timeout" in done.stderr)


class TestKeys:
    def test_callers_with_different_keys_share_nothing(self) -> None:
        prompt = "The same long beginning, which takes more than one block of the cache. " * 3
        with running(engine(enable_prefix_caching=True), api_key=["one", "two"], salt_by_key=True) as server:

            def hits(key: str) -> int:
                before = server.stats().num_prefix_hits
                body = {"prompt": prompt, "max_tokens": 1}
                headers = {"authorization": f"Bearer {key}"}
                answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)
                assert answer.status_code == 200
                return server.stats().num_prefix_hits - before

            assert hits("one") == 0 and hits("one") > 0
            assert hits("two") == 0 and hits("two") > 0
            assert httpx.get(f"{server.url}/metrics", timeout=60).status_code == 401


class TestBrowsers:
    @pytest.mark.parametrize(
        "host", ["evil.example:8000", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example"]
    )
    def test_a_name_that_is_not_ours(self, http: httpx.Client, host: str) -> None:
        for method, path in (("GET", "/v1/result/0"), ("GET", "/engine/events"), ("GET", "/"), ("POST", "/tokenize")):
            assert assert_error(http.request(method, path, headers={"host": host}), 403)["code"] == "host_not_allowed"

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8000", "a.localhost", "10.1.2.3"])
    def test_names_that_are(self, http: httpx.Client, host: str) -> None:
        assert http.get("/health", headers={"host": host}).status_code == 200

    @pytest.mark.parametrize(
        "origin", ["https://evil.example", "null", "http://localhost:1", "http://evil.example:8000"]
    )
    def test_a_foreign_page(self, http: httpx.Client, origin: str) -> None:
        headers = {"origin": origin}
        answer = http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
        assert assert_error(answer, 403)["code"] == "origin_not_allowed"
        assert_error(http.delete("/v1/result/1", headers=headers), 403)
        assert http.get("/health", headers=headers).status_code == 200

    def test_our_own_page_and_those_that_are_allowed(self, server: Running, http: httpx.Client) -> None:
        body = {"prompt": "x", "max_tokens": 1}
        assert http.post("/v1/completions", json=body, headers={"origin": server.url}).status_code == 200
        with running(engine(), allowed_hosts=["gpu.example"], cors=["https://app.example"]) as other:
            for headers, status in (
                ({"host": "gpu.example", "origin": "https://gpu.example"}, 200),
                ({"host": "GPU.example:8000"}, 200),
                ({"origin": "https://app.example"}, 200),
                ({"origin": "https://evil.example"}, 403),
                ({"host": "evil.example"}, 403),
            ):
                answer = httpx.post(f"{other.url}/v1/completions", json=body, headers=headers, timeout=60)
                assert answer.status_code == status, headers

    @pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
    @pytest.mark.parametrize(("path", "status"), [("/v1/completions", 400), ("/v1/generate", 422)])
    def test_what_a_form_can_send(self, http: httpx.Client, kind: str | None, path: str, status: int) -> None:
        headers = {} if kind is None else {"content-type": kind}
        answer = http.post(path, content=b'{"prompt": "x"}', headers=headers)
        assert "application/json" in assert_error(answer, status)["message"]

    def test_what_a_program_may(self, http: httpx.Client) -> None:
        for kind in ("application/json; charset=utf-8", "APPLICATION/JSON", "application/vnd.x+json"):
            answer = http.post("/tokenize", content=b'{"prompt": "x"}', headers=JSON | {"content-type": kind})
            assert answer.status_code == 200


def test_an_event_lists_no_more_than_some(server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_WAITING", 2)
    body = ENDLESS | {"n": 300, "max_tokens": 200, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        with httpx.Client(base_url=server.url, timeout=60) as other, other.stream("GET", "/engine/events") as watched:
            for line in watched.iter_lines():
                if line and (event := json.loads(line[6:]))["stats"]["num_waiting"] > 2:
                    assert len(event["waiting"]) == 2
                    break
    wait_until(server.is_idle)
