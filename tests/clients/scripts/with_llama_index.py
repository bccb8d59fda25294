# needs: llama-index-llms-openai-like==0.8.1
import asyncio
import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

where = {"api_base": os.environ["BASE_URL"], "api_key": "any", "model": "tutor", "max_retries": 0}
chat = OpenAILike(**where, is_chat_model=True, max_tokens=16, temperature=0)
question = [ChatMessage(role="user", content="What is a KV cache?")]
text = chat.chat(question).message.content
assert text and "".join(piece.delta for piece in chat.stream_chat(question)) == text
assert asyncio.run(chat.achat(question)).message.content == text
assert OpenAILike(**where, is_chat_model=False, max_tokens=8).complete("Once").text
