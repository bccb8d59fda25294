"""``/tokenize`` and ``/detokenize``: text to token ids and back, as the model sees them."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request

from mini_infer.exceptions import InvalidRequestError
from mini_infer.serving.protocol import DetokenizeBody, TokenizeBody
from mini_infer.serving.routes import body_router
from mini_infer.serving.service import Service, render


def tokens_router(service: Service) -> APIRouter:
    router = body_router(service.limits, service.pools.bodies)
    engine, limits, pool = service.engine, service.limits, service.pools.tokens

    @router.post("/tokenize", summary="The token ids of a text or a conversation")
    async def tokenize(request: Request, body: TokenizeBody) -> dict[str, Any]:
        service.check_model(body.model)
        if body.messages is None:
            text = body.prompt or ""
            limits.check_text("prompt", text)
        else:
            text = await render(service, body.messages, body)
            if body.add_special_tokens:
                text = str(text)  # as any other text
        adds = body.add_special_tokens is not False
        tokens = await pool.run(partial(engine.tokenize, text, add_special_tokens=adds))
        names = engine.tokenizer.hf.convert_ids_to_tokens(tokens) if body.return_token_strs else None
        return {
            "count": len(tokens),
            "max_model_len": engine.max_model_len,
            "tokens": tokens,
            "token_strs": names,
        }

    @router.post("/detokenize", summary="The text of token ids")
    async def detokenize(request: Request, body: DetokenizeBody) -> dict[str, Any]:
        service.check_model(body.model)
        if len(body.tokens) > limits.detokenize_ids:
            raise InvalidRequestError(
                f"there are {len(body.tokens)} tokens; the most that is taken is detokenize_ids={limits.detokenize_ids}"
            )
        return {"prompt": await pool.run(partial(engine.detokenize, body.tokens))}

    return router
