"""``/v1/generate`` and its kin: ask now, fetch the result later."""

import asyncio
import secrets
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import Any

from fastapi import APIRouter, Request

from mini_infer.engine.async_engine import Increments
from mini_infer.engine.intake import Prompt
from mini_infer.serving.errors import ApiError, as_api_error
from mini_infer.serving.kept import Kept
from mini_infer.serving.limits import MAX_CHOICES
from mini_infer.serving.protocol import GenerateBatchBody, GenerateBody, GenerateOptions
from mini_infer.serving.routes import body_router
from mini_infer.serving.service import Service

KEPT_SECONDS = 600
"""How long a result is kept once it is there."""

KEPT_RESULTS = 4096
"""How many results are kept at most; those that finished first go first."""

KEPT_CHARACTERS = 64 << 20
"""What their texts may come to."""

_BITS = 53
"""Of a result's number: as many as every language's numbers hold exactly."""


def results_router(service: Service) -> APIRouter:
    router = body_router(service.limits, service.pools.bodies, status=422)
    results = Results(service)

    @router.post("/v1/generate", summary="Queue a prompt; fetch the result later")
    async def generate(request: Request, body: GenerateBody) -> dict[str, Any]:
        return {"request_ids": await results.submit(request, [body.prompt], body), "status": "submitted"}

    @router.post("/v1/generate_batch", summary="Queue several prompts; fetch their results later")
    async def generate_batch(request: Request, body: GenerateBatchBody) -> dict[str, Any]:
        return {"request_ids": await results.submit(request, body.prompts, body), "status": "submitted"}

    @router.get("/v1/result/{request_id}", summary="Fetch the result of a queued prompt")
    async def result(request_id: int) -> dict[str, Any]:
        return results.get(request_id)

    @router.delete("/v1/result/{request_id}", summary="Cancel a queued prompt, or forget its result")
    async def cancel(request_id: int) -> dict[str, Any]:
        results.delete(request_id)
        return {"request_id": request_id, "status": "deleted"}

    return router


class Results:
    """Prompts that nobody waits for on the line, and their results for a while."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[int, Increments] = {}
        self._finished: Kept[int, dict[str, Any]] = Kept(KEPT_RESULTS, KEPT_SECONDS, KEPT_CHARACTERS)

    async def submit(self, request: Request, prompts: Seq[Prompt], options: GenerateOptions) -> list[int]:
        """Queue prompts, all or none of them; their numbers, which nobody guesses.

        Args:
            request: says who the caller is.

        Raises:
            InvalidRequestError: a prompt or an option is unusable.
            QueueFullError: too many requests wait already.
        """
        max_tokens = options.gen_length if options.max_tokens is None else options.max_tokens
        settled: dict[str, int | None] = {} if max_tokens is None else {"max_tokens": max_tokens}
        defaults = self._service.defaults
        if not defaults.diffusion_options:
            settled["gen_length"] = None
        params = options.sampling_params(defaults, **settled)
        if len(prompts) * params.n > MAX_CHOICES:
            raise ApiError(422, f"{len(prompts)} prompts with n={params.n}: {MAX_CHOICES} choices at most", param="n")
        with self._service.admission.admit():
            numbers = [secrets.randbits(_BITS) for _ in prompts]
            increments = await self._service.submit(
                request, prompts, params, request_ids=[_name(number) for number in numbers], priority=options.priority
            )
            for number in numbers:
                self._running[number] = increments
            task = asyncio.create_task(self._follow(increments, numbers))
            self._tasks.add(task)  # the event loop itself would not keep it alive
            task.add_done_callback(self._tasks.discard)
        return numbers

    def get(self, number: int) -> dict[str, Any]:
        """The answer to whoever asks for a result.

        Raises:
            ApiError: there is none, or no longer; 404.
        """
        if number in self._running:
            return {"request_id": number, "status": "running", "text": None}
        finished = self._finished.get(number)
        if finished is None:
            raise ApiError(
                404,
                f"no result {number}, or no longer: the last {KEPT_RESULTS} are kept for {KEPT_SECONDS} seconds",
                param="request_id",
                code="result_not_found",
            )
        return finished

    def delete(self, number: int) -> None:
        """Forget a result; what still runs for it is given up.

        Raises:
            ApiError: there is none, or no longer; 404.
        """
        self.get(number)
        increments = self._running.pop(number, None)
        if increments is not None:
            self._service.turns.cancel(increments, _name(number))
        self._finished.pop(number)

    async def _follow(self, increments: Increments, numbers: Seq[int]) -> None:
        """Take in what the engine sends until the last result is there."""
        running = {_name(number): number for number in numbers}

        async def take_in() -> None:
            async for increment in increments:
                if increment.output is not None:
                    self._finish(running.pop(increment.request_id), "finished", increment.output.text)

        with self._service.admission.admit(), increments:
            try:
                await asyncio.wait_for(take_in(), self._service.request_timeout)
            except asyncio.TimeoutError:
                reason = f"not finished within {self._service.request_timeout:g} seconds"
                self._fail(running.values(), reason)
            except Exception as error:
                self._fail(running.values(), as_api_error(error).message)

    def _fail(self, numbers: Iterable[int], reason: str) -> None:
        for number in numbers:
            self._finish(number, "failed", None, reason)

    def _finish(self, number: int, status: str, text: str | None, error: str | None = None) -> None:
        if self._running.pop(number, None) is None:
            return  # it was deleted
        answer = {"request_id": number, "status": status, "text": text} | ({} if error is None else {"error": error})
        self._finished.put(number, answer, len(text or ""))


def _name(number: int) -> str:
    """The engine's id of a request."""
    return f"generate-{number}"
