# needs: instructor==1.17.0
import os

import instructor
from openai import OpenAI

client = instructor.from_openai(OpenAI(base_url=os.environ["BASE_URL"], api_key="any", max_retries=0))
question = [{"role": "user", "content": "What is a KV cache?"}]
answer = client.chat.completions.create(model="tutor", messages=question, response_model=None, max_tokens=16)
assert answer.choices[0].message.content
