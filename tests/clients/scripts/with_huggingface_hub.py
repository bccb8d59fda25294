# needs: huggingface_hub==2.4.0
import os

from huggingface_hub import InferenceClient

client = InferenceClient(base_url=os.environ["BASE_URL"], api_key="any")
question = [{"role": "user", "content": "What is a KV cache?"}]
options = {"model": "tutor", "max_tokens": 16, "temperature": 0.0}
text = client.chat_completion(question, **options).choices[0].message.content
pieces = client.chat_completion(question, **options, stream=True)
assert text and "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == text
