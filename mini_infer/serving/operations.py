"""What operators ask: which model, is it well, how much does it do."""

from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from mini_infer.engine import LLMEngine
from mini_infer.serving.answers import Answer
from mini_infer.serving.events import EngineEvents
from mini_infer.serving.metrics import Metrics
from mini_infer.serving.service import Service


def operations_router(service: Service, metrics: Metrics, events: EngineEvents) -> APIRouter:
    router = APIRouter()

    model = {
        "id": service.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "mini-infer",
        "max_model_len": service.engine.engine.max_model_len,
    }

    @router.get("/v1/models", summary="The model that is served")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @router.get("/v1/models/{model_name:path}", summary="The model that is served, by name")
    async def model_by_name(model_name: str) -> dict[str, Any]:
        service.check_model(model_name)
        return model

    @router.get("/health", summary="Whether requests are taken")
    @router.get("/v1/health", summary="The same")
    async def health() -> dict[str, str]:
        service.check_ready()
        return {"status": "ok"}

    @router.get("/metrics", summary="Numbers for Prometheus", response_class=Response)
    async def prometheus() -> Response:
        stats = await service.engine.call(LLMEngine.stats)
        return Response(metrics.render(stats), media_type=CONTENT_TYPE_LATEST)

    @router.get("/engine/events", summary="Who runs, who waits and who holds which KV block, as server-sent events")
    async def engine_events() -> Response:
        service.check_ready()
        return Answer(events.listen, None, None, {})

    return router
