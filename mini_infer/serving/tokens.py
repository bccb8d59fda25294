"""``/tokenize`` and ``/detokenize``: text to token ids and back, as the model sees them."""

from functools import partial

from fastapi import APIRouter, Request, Response

from mini_infer.exceptions import InvalidRequestError
from mini_infer.serving.answers import Answer, Whole
from mini_infer.serving.protocol import DetokenizeBody, TokenizeBody
from mini_infer.serving.routes import body_router
from mini_infer.serving.service import Service, render


def tokens_router(service: Service) -> APIRouter:
    router = body_router(service.limits, service.pools.bodies)
    engine, limits, pool = service.engine, service.limits, service.pools.tokens

    @router.post("/tokenize", summary="The token ids of a text or a conversation")
    async def tokenize(request: Request, body: TokenizeBody) -> Response:
        service.check_model(body.model)
        return Answer(partial(tokens_of, body), None, None, {}, service.pools.answers)

    async def tokens_of(body: TokenizeBody) -> Whole:
        if body.messages is None:
            text = body.prompt or ""
            limits.check_text("prompt", text)
        else:
            text = await render(service, body.messages, body)
            if body.add_special_tokens:
                text = str(text)  # as any other text
        adds = body.add_special_tokens is not False

        def tokens_and_names() -> tuple[list[int], list[str] | None]:
            tokens = engine.tokenize(text, add_special_tokens=adds)
            return tokens, engine.tokenizer.hf.convert_ids_to_tokens(tokens) if body.return_token_strs else None

        tokens, names = await pool.run(tokens_and_names)
        content = {
            "count": len(tokens),
            "max_model_len": engine.max_model_len,
            "tokens": tokens,
            "token_strs": names,
        }
        return Whole(content, len(tokens))

    @router.post("/detokenize", summary="The text of token ids")
    async def detokenize(request: Request, body: DetokenizeBody) -> Response:
        service.check_model(body.model)
        if len(body.tokens) > limits.detokenize_ids:
            raise InvalidRequestError(
                f"there are {len(body.tokens)} tokens; the most that is taken is detokenize_ids={limits.detokenize_ids}"
            )
        return Answer(partial(text_of, body), None, None, {}, service.pools.answers)

    async def text_of(body: DetokenizeBody) -> Whole:
        return Whole({"prompt": await pool.run(partial(engine.detokenize, body.tokens))}, len(body.tokens))

    return router
