# needs: openai-agents==0.24.0
import asyncio
import os
from typing import Literal

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

set_tracing_disabled(True)


class Blocks(BaseModel):
    tokens: int = Field(ge=0, le=999)


called = []


@function_tool
def count_blocks(tokens: Literal[100, 200]) -> str:
    """Count the blocks that tokens need."""
    called.append(tokens)
    return "7"


async def main() -> None:
    client = AsyncOpenAI(base_url=os.environ["BASE_URL"], api_key="any", max_retries=0)
    settings = ModelSettings(temperature=0, max_tokens=200)
    texts = []
    for model in (OpenAIResponsesModel("tutor", client), OpenAIChatCompletionsModel("tutor", client)):
        agent = Agent("tutor", instructions="Answer briefly.", model=model, model_settings=settings)
        result = await Runner.run(agent, "What is a KV cache?")
        assert result.final_output
        streamed = Runner.run_streamed(agent, "What is a KV cache?")
        assert [event async for event in streamed.stream_events()]
        assert streamed.final_output == result.final_output
        again = await Runner.run(agent, [*result.to_input_list(), {"role": "user", "content": "And a block?"}])
        forced = ModelSettings(temperature=0, max_tokens=200, tool_choice="required", parallel_tool_calls=False)
        caller = Agent("caller", model=model, model_settings=forced, tools=[count_blocks])
        assert (await Runner.run(caller, "How many blocks do 100 tokens need?")).final_output
        typed = Agent("typed", model=model, model_settings=settings, output_type=Blocks)
        assert isinstance((await Runner.run(typed, "How many blocks?")).final_output, Blocks)
        texts.append((result.final_output, again.final_output))
    assert texts[0] == texts[1] and len(called) == 2


asyncio.run(main())
