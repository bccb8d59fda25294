"""``/tokenize`` and ``/detokenize``: text to token ids and back, as the model sees them."""

import asyncio
from typing import Any

from fastapi import APIRouter

from mini_infer.serving.protocol import DetokenizeBody, TokenizeBody
from mini_infer.serving.service import Service


def tokens_router(service: Service) -> APIRouter:
    router = APIRouter()
    engine = service.engine.engine

    @router.post("/tokenize", summary="The token ids of a text or a conversation")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        service.check_model(body.model)

        def token_ids() -> list[int]:
            if body.messages is None:
                return engine.tokenize(body.prompt or "")
            messages = [message.for_template() for message in body.messages]
            return engine.tokenize(engine.render_chat(messages, **body.chat_template_kwargs))

        tokens = await asyncio.to_thread(token_ids)
        return {"count": len(tokens), "max_model_len": engine.max_model_len, "tokens": tokens}

    @router.post("/detokenize", summary="The text of token ids")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        service.check_model(body.model)
        return {"prompt": await asyncio.to_thread(engine.detokenize, body.tokens)}

    return router
