# needs: pydantic-ai-slim[openai]==2.68.0
import asyncio
import os

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ModelRequest, ModelResponse, TextPart, ToolCallPart, ToolReturnPart, UserPromptPart
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


class Blocks(BaseModel):
    """The blocks that tokens need."""

    tokens: int = Field(ge=0, le=999)


async def stream_blocks(agent: Agent[None, Blocks]) -> Blocks:
    async with agent.run_stream("How many blocks do 100 tokens need?") as result:
        return await result.get_output()


settings = {"temperature": 0, "max_tokens": 100}
for model in (OpenAIChatModel("tutor", provider=provider), OpenAIResponsesModel("tutor", provider=provider)):
    for output_type in (Blocks, ToolOutput(Blocks), NativeOutput(Blocks)):
        agent = Agent(model, output_type=output_type, model_settings=settings)
        assert isinstance(agent.run_sync("How many blocks do 100 tokens need?").output, Blocks)
    assert isinstance(asyncio.run(stream_blocks(Agent(model, output_type=Blocks, model_settings=settings))), Blocks)

    # A conversation in which a tool was called goes on.
    told = Agent(model, model_settings=settings)
    history = [
        ModelRequest(parts=[UserPromptPart("How many blocks do 100 tokens need?")]),
        ModelResponse(parts=[ToolCallPart("count_blocks", {"tokens": 100}, tool_call_id="call00001")]),
        ModelRequest(parts=[ToolReturnPart("count_blocks", "7", tool_call_id="call00001")]),
        ModelResponse(parts=[TextPart("It takes 7 blocks.")]),
    ]
    assert told.run_sync("And a KV cache?", message_history=history).output

try:
    chat.run_sync("one two three four " * 2000)
    raise AssertionError("it was not refused")
except ModelHTTPError as error:
    assert "ContextWindow" in type(error).__name__ or "context_length_exceeded" in str(error)
