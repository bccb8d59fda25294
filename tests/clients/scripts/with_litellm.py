# needs: litellm==1.110.2
import asyncio
import os

import litellm

litellm.suppress_debug_info = True
where = {"api_base": os.environ["BASE_URL"], "api_key": "any", "num_retries": 0}
question = [{"role": "user", "content": "What is a KV cache?"}]

for provider in ("openai", "hosted_vllm"):
    model = f"{provider}/tutor"
    answer = litellm.completion(model, question, max_tokens=16, temperature=0, **where)
    text = answer.choices[0].message.content
    assert text and answer.usage.prompt_tokens_details.cached_tokens >= 0
    pieces = litellm.completion(model, question, max_tokens=16, temperature=0, stream=True, **where)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
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
