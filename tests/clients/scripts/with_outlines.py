# needs: outlines==1.3.3 openai
import os

import openai
import outlines

client = openai.OpenAI(base_url=os.environ["BASE_URL"], api_key="any", max_retries=0)
for make in (outlines.from_openai, outlines.from_vllm):
    assert make(client, "tutor")("What is a KV cache?", max_tokens=16)
