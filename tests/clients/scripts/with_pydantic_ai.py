# needs: pydantic-ai-slim[openai]==2.68.0
import asyncio
import os

from pydantic_ai import Agent
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=os.environ["BASE_URL"], api_key="any")
chat = Agent(OpenAIChatModel("tutor", provider=provider), model_settings={"temperature": 0, "max_tokens": 24})

first = chat.run_sync("What is a KV cache?")
assert first.output and first.usage.input_tokens > 0
assert chat.run_sync("And a block?", message_history=first.all_messages()).output


async def stream() -> str:
    async with chat.run_stream("What is a KV cache?") as result:
        return "".join([piece async for piece in result.stream_text(delta=True)])


assert asyncio.run(stream()) == first.output
responses = Agent(OpenAIResponsesModel("tutor", provider=provider), model_settings={"temperature": 0, "max_tokens": 24})
assert responses.run_sync("What is a KV cache?").output == first.output

try:
    chat.run_sync("one two three four " * 2000)
    raise AssertionError("it was not refused")
except ModelHTTPError as error:
    assert "ContextWindow" in type(error).__name__ or "context_length_exceeded" in str(error)
