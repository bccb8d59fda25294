# needs: smolagents[openai]==1.26.0
import os

from smolagents import OpenAIServerModel

model = OpenAIServerModel("tutor", api_base=os.environ["BASE_URL"], api_key="any", max_tokens=16, temperature=0)
question = [{"role": "user", "content": [{"type": "text", "text": "What is a KV cache?"}]}]
text = model(question).content
assert text and "".join(piece.content or "" for piece in model.generate_stream(question)) == text
