"""What all endpoints that generate have in common: the engine, the model's name, and how an answer is run."""

import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_infer.config import EngineConfig
from mini_infer.engine import AsyncLLMEngine
from mini_infer.engine.intake import Prompt
from mini_infer.outputs import GenerateOutput
from mini_infer.sampling import SamplingParams
from mini_infer.serving.admission import Admission
from mini_infer.serving.answers import Answer
from mini_infer.serving.errors import ApiError


@dataclass(frozen=True)
class Service:
    """One engine, as it is served.

    Attributes:
        model_name: what requests call the model.
        admission: counts the requests under way.
        request_timeout: seconds a request may take; None for any time.
        started: when the server was made, in Unix seconds.
    """

    engine: AsyncLLMEngine
    model_name: str
    admission: Admission
    request_timeout: float | None
    started: int

    @property
    def defaults(self) -> SamplingParams:
        """What the model's authors recommend, for requests that do not say."""
        return self.engine.engine.default_sampling_params

    def check_ready(self) -> None:
        """Raise ``ApiError`` if requests are not taken, or no longer."""
        self.admission.check()
        if not self.engine.is_running:
            raise ApiError(503, "the engine has stopped; start the server again", code="unavailable")

    def check_model(self, name: str | None) -> None:
        """Raise ``ApiError`` unless a request means the model that is here."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; this is {self.model_name!r}",
                param="model",
                code="model_not_found",
            )

    def answer(
        self, work: Callable[[], Coroutine[Any, Any, Any] | AsyncGenerator[bytes, None]], request_id: str
    ) -> Answer:
        return Answer(work, self.admission, self.request_timeout, {"x-request-id": request_id})

    async def complete(
        self, prompts: Seq[Prompt], params: SamplingParams, request_ids: Seq[str], priority: int
    ) -> list[GenerateOutput]:
        """The outputs of several prompts, in their order."""
        with await self.engine.submit(prompts, params, request_ids=request_ids, priority=priority) as increments:
            outputs = {i.request_id: i.output async for i in increments if i.output is not None}
        return [outputs[request_id] for request_id in request_ids]


def default_model_name(config: EngineConfig) -> str:
    """A directory's own name, or a Hub name as it is."""
    path = Path(str(config.model))
    return path.resolve().name if path.is_dir() else str(config.model)


def now() -> int:
    """Unix seconds, for the field ``created``."""
    return int(time.time())


def usage(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, int]:
    """The tokens that a request took."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }
