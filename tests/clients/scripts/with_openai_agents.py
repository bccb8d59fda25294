# needs: openai-agents==0.24.0
import asyncio
import os

from agents import Agent, ModelSettings, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, set_tracing_disabled
from openai import AsyncOpenAI

set_tracing_disabled(True)


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
        texts.append((result.final_output, again.final_output))
    assert texts[0] == texts[1]


asyncio.run(main())
