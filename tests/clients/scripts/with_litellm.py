# needs: litellm==1.110.2
import asyncio
import json
import os

import litellm
from pydantic import BaseModel, Field

litellm.suppress_debug_info = True
where = {"api_base": os.environ["BASE_URL"], "api_key": "any", "num_retries": 0}
question = [{"role": "user", "content": "What is a KV cache?"}]


class Blocks(BaseModel):
    """Count the blocks that tokens need."""

    tokens: int = Field(ge=0, le=999)


tool = {"type": "function", "function": {"name": "count_blocks", "parameters": Blocks.model_json_schema()}}
calling = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 80, "temperature": 0}

for provider in ("openai", "hosted_vllm"):
    model = f"{provider}/tutor"
    answer = litellm.completion(model, question, max_tokens=16, temperature=0, **where)
    text = answer.choices[0].message.content
    assert text and answer.usage.prompt_tokens_details.cached_tokens >= 0
    pieces = litellm.completion(model, question, max_tokens=16, temperature=0, stream=True, **where)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
    made = litellm.completion(model, question, **calling, **where).choices[0]
    (call,) = made.message.tool_calls
    assert made.finish_reason == "tool_calls" and Blocks.model_validate_json(call.function.arguments)
    chunks = list(litellm.completion(model, question, **calling, stream=True, **where))
    (streamed,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    assert (streamed.function.name, streamed.function.arguments) == ("count_blocks", call.function.arguments)
    told = [*question, made.message, {"role": "tool", "tool_call_id": call.id, "content": "7"}]
    assert litellm.completion(model, told, tools=[tool], tool_choice="none", max_tokens=16, **where).choices
    form = litellm.completion(model, question, response_format=Blocks, max_tokens=80, temperature=0, **where)
    assert Blocks.model_validate_json(form.choices[0].message.content)
    anything = {"type": "json_object"}
    form = litellm.completion(model, question, response_format=anything, max_tokens=200, temperature=0, **where)
    assert form.choices[0].finish_reason == "length" or isinstance(json.loads(form.choices[0].message.content), dict)
    try:
        litellm.completion(model, [{"role": "user", "content": "one two three four " * 2000}], **where)
        raise AssertionError("it was not refused")
    except litellm.ContextWindowExceededError:
        pass
    try:
        litellm.completion(f"{provider}/unknown", question, **where)
        raise AssertionError("it was not refused")
    except litellm.NotFoundError:
        pass

assert asyncio.run(litellm.acompletion("openai/tutor", question, max_tokens=4, **where)).choices
assert litellm.text_completion("Once", "text-completion-openai/tutor", max_tokens=4, **where).choices[0].text
assert len(litellm.embedding("openai/tutor", ["Once", "What?"], **where).data) == 2
response = litellm.responses(model="openai/tutor", input="What is a KV cache?", max_output_tokens=16, **where)
assert response.output[0].content[0].text
