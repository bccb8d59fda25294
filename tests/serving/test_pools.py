"""What is refused is freed at once: the collector of garbage may not come for minutes, and each may hold megabytes."""

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from mini_infer.serving import routes
from mini_infer.serving.admission import Budget
from mini_infer.serving.answers import Answer, Whole
from mini_infer.serving.errors import ApiError
from mini_infer.serving.middleware import BoundBody
from mini_infer.serving.pools import Pool

from .running import Running, wait_until


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Large:
    """What a job reads, or makes."""


def failing(seen: "list[weakref.ref[Large]]") -> Callable[[], None]:
    def fail() -> None:
        held = Large()
        seen.append(weakref.ref(held))
        raise ApiError(400, "no")

    return fail


def test_of_a_job_that_fails() -> None:
    seen: list[weakref.ref[Large]] = []

    async def main() -> None:
        pool = Pool("things", 1)
        for _ in range(3):
            try:
                await pool.run(failing(seen))
            except ApiError as error:
                assert error.message == "no"
        pool.close()

    asyncio.run(main())
    assert len(seen) == 3
    wait_until(lambda: not any(ref() for ref in seen))  # a thread may just be leaving its job


def test_of_a_job_that_takes_too_long() -> None:
    async def main() -> None:
        pool, goes_on = Pool("things", 1, max_waiting=0, timeout=0.01), asyncio.Event()
        loop = asyncio.get_running_loop()

        def job() -> None:
            asyncio.run_coroutine_threadsafe(goes_on.wait(), loop).result()

        with pytest.raises(ApiError, match=r"not done within 0.01 seconds \(things\)"):
            await pool.run(job)
        with pytest.raises(ApiError, match="wait to be done"):  # it goes on, and counts
            await pool.run(job)
        goes_on.set()
        while pool._num_jobs:
            await asyncio.sleep(0)
        assert await pool.run(lambda: 5) == 5
        pool.close()

    asyncio.run(main())


def test_of_an_answer_that_fails() -> None:
    seen: list[weakref.ref[Large]] = []

    async def work() -> Whole:
        failing(seen)()
        raise AssertionError

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        raise AssertionError

    async def main() -> None:
        try:
            await Answer(work, None, None, {})({"type": "http"}, receive, send)
        except ApiError as error:
            assert error.message == "no"

    asyncio.run(main())
    assert [ref() for ref in seen] == [None]


def test_of_a_body_that_is_too_large() -> None:
    num_freed = 0

    class Piece(bytes):
        def __del__(self) -> None:
            nonlocal num_freed
            num_freed += 1

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError

    async def receive() -> Message:
        return {"type": "http.request", "body": Piece(b"x" * 40), "more_body": True}

    statuses: list[int | None] = []

    async def send(message: Message) -> None:
        statuses.append(message.get("status"))

    async def main() -> None:
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        await BoundBody(app, 100, 60.0, Budget("held", 1 << 20))(scope, receive, send)

    asyncio.run(main())
    assert (statuses[0], num_freed) == (413, 3)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 1}, 200),
        ("/v1/completions", {"prompt": "x" * 300_000}, 400),
        ("/v1/completions", {"prompt": "x" * 300_000, "stream": True}, 400),
        ("/v1/completions", {"prompt": "x", "n": 1000, "max_tokens": 900, "logprobs": 20}, 400),
        ("/v1/generate", {"prompt": "x" * 300_000}, 422),
        ("/tokenize", {"prompt": "x" * 1000}, 200),
        ("/tokenize", {"prompt": "x" * 300_000}, 400),
        ("/detokenize", {"tokens": [1 << 40]}, 400),
        ("/detokenize", {"tokens": [5] * 70_000}, 400),
    ],
)
def test_of_a_request(
    server: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str, body: Any, status: int
) -> None:
    """All the way through the frameworks."""
    seen: list[weakref.ref[Any]] = []
    parse = routes.parse_body

    def watched(*arguments: Any) -> Any:
        parsed = parse(*arguments)
        seen.append(weakref.ref(parsed))
        return parsed

    monkeypatch.setattr(routes, "parse_body", watched)
    assert http.post(path, json=body).status_code == status
    assert len(seen) == 1
    wait_until(lambda: seen[0]() is None)
