# needs: haystack-ai==3.4.1
import os

from haystack.components.embedders import OpenAITextEmbedder
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.utils import Secret

where = {"api_key": Secret.from_token("any"), "api_base_url": os.environ["BASE_URL"], "model": "tutor"}
question = [ChatMessage.from_user("What is a KV cache?")]
pieces = []
options = {"max_tokens": 16, "temperature": 0}
whole = OpenAIChatGenerator(**where, generation_kwargs=options).run(question)["replies"][0].text
OpenAIChatGenerator(**where, generation_kwargs=options, streaming_callback=lambda piece: pieces.append(piece)).run(
    question
)
assert whole and "".join(piece.content for piece in pieces) == whole
assert OpenAITextEmbedder(**where).run("Once")["embedding"]
