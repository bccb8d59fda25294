"""What operators ask: which model, is it well, how much does it do."""

import asyncio
from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

import mini_infer
from mini_infer.serving.answers import Answer
from mini_infer.serving.errors import ApiError
from mini_infer.serving.events import EngineEvents
from mini_infer.serving.metrics import Metrics
from mini_infer.serving.service import Service

STATS_SECONDS = 30.0
"""How long the engine's numbers are waited for."""


def operations_router(service: Service, metrics: Metrics, events: EngineEvents) -> APIRouter:
    router = APIRouter()

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "mini-infer",
            "root": str(service.engine.config.model),
            "max_model_len": service.engine.max_model_len,
            "limits": service.limits.as_dict(),
        }

    @router.get("/v1/models", summary="The model that is served, by each of its names")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in service.model_names]}

    @router.get("/v1/models/{model_name:path}", summary="The model that is served, by name")
    async def model_by_name(model_name: str) -> dict[str, Any]:
        service.check_model(model_name)
        return card(model_name)

    @router.get("/version", summary="Which version this is")
    async def version() -> dict[str, str]:
        return {"version": mini_infer.__version__}

    @router.get("/health", summary="Whether requests are taken")
    @router.get("/v1/health", summary="The same")
    async def health() -> dict[str, str]:
        service.check_ready()
        return {"status": "ok"}

    @router.get("/metrics", summary="Numbers for Prometheus", response_class=Response)
    async def prometheus() -> Response:
        try:
            stats = await asyncio.wait_for(service.engine.stats_per_replica(), STATS_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(503, "the step under way takes long; ask again", code="busy") from None
        return Response(metrics.render(stats, service.turns.num_waiting), media_type=CONTENT_TYPE_LATEST)

    @router.get("/engine/events", summary="Who runs, who waits and who holds which KV block, as server-sent events")
    async def engine_events() -> Response:
        service.check_ready()
        return Answer(events.listen, None, None, {})

    return router
