"""``POST /v1/embeddings``: one vector for each text."""

import base64
import math
import secrets
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from mini_infer.engine.intake import list_prompts
from mini_infer.exceptions import InvalidRequestError
from mini_infer.outputs import as_embedding
from mini_infer.sampling import EMBEDDING
from mini_infer.serving.answers import Whole
from mini_infer.serving.limits import MAX_CHOICES
from mini_infer.serving.protocol import EmbeddingsBody
from mini_infer.serving.routes import body_router
from mini_infer.serving.service import Service


def embeddings_router(service: Service) -> APIRouter:
    router = body_router(service.limits, service.pools.bodies)

    @router.post("/v1/embeddings", summary="One vector for each text")
    async def create_embeddings(request: Request, body: EmbeddingsBody) -> Response:
        embeddings = _Embeddings(service, request, body)
        return service.answer(embeddings.whole, embeddings.id)

    return router


class _Embeddings:
    """One call of the endpoint."""

    def __init__(self, service: Service, request: Request, body: EmbeddingsBody) -> None:
        service.check_model(body.model)
        self.id = f"embd-{secrets.token_hex(12)}"
        self._service = service
        self._request = request
        self._body = body
        self._prompts = list_prompts(body.input)
        hidden_size = service.engine.engine.model_config.hidden_size
        if body.dimensions not in (None, hidden_size):
            raise InvalidRequestError(
                f"dimensions={body.dimensions}: this model's vectors have {hidden_size}, and mean nothing when "
                "they are cut; leave it out"
            )
        if not 1 <= len(self._prompts) <= MAX_CHOICES:
            raise InvalidRequestError(f"input has {len(self._prompts)} texts; a request has 1 to {MAX_CHOICES}")
        self._num_values = len(self._prompts) * hidden_size
        if self._num_values > service.limits.answer_size:
            raise InvalidRequestError(
                f"input has {len(self._prompts)} texts, whose vectors come to {self._num_values} numbers; the most is "
                f"answer_size={service.limits.answer_size}, send fewer at once"
            )

    async def whole(self) -> Whole:
        several = len(self._prompts) > 1
        ids = [f"{self.id}-{place}" if several else self.id for place in range(len(self._prompts))]
        outputs = await self._service.complete(self._request, self._prompts, EMBEDDING, ids, self._body.priority)
        vectors = [as_embedding(output).embedding for output in outputs]
        num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        data = (
            {"object": "embedding", "index": index, "embedding": self._encoded(vector)}
            for index, vector in enumerate(vectors)
        )
        content = {
            "object": "list",
            "data": data,
            "model": self._service.model_name,
            "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
        }
        return Whole(content, self._num_values)

    def _encoded(self, vector: list[float]) -> Any:
        """Of length 1, as OpenAI's are, so that a product of two is their cosine."""
        length = math.hypot(*vector) or 1.0
        unit = np.array(vector, dtype="<f4") / np.float32(length)
        return base64.b64encode(unit.tobytes()).decode() if self._body.encoding_format == "base64" else unit.tolist()
