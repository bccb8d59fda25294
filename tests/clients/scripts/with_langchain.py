# needs: langchain-openai==1.7.4
import asyncio
import os

from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

where = {"base_url": os.environ["BASE_URL"], "api_key": "any", "model": "tutor", "max_retries": 0}
chat = ChatOpenAI(**where, temperature=0, max_tokens=24)

answer = chat.invoke("What is a KV cache?")
assert answer.content and answer.usage_metadata["input_token_details"]["cache_read"] >= 0
pieces = list(chat.stream("What is a KV cache?", stream_usage=True))
assert "".join(piece.content for piece in pieces) == answer.content
assert len(asyncio.run(chat.abatch(["Hello", "What is a block?"]))) == 2
assert OpenAI(**where, temperature=0, max_tokens=8).invoke("Once")

responses = ChatOpenAI(**where, temperature=0, use_responses_api=True, max_tokens=24)
assert responses.invoke("What is a KV cache?").text == answer.content
assert "".join(piece.text for piece in responses.stream("What is a KV cache?")) == answer.content

embeddings = OpenAIEmbeddings(
    base_url=where["base_url"], api_key="any", model="tutor", check_embedding_ctx_length=False
)
first, second = embeddings.embed_documents(["What is a KV cache?", "Once"])
assert len(first) == len(second) == len(embeddings.embed_query("Once")) and first != second

try:
    chat.invoke("one two three four " * 2000)
    raise AssertionError("it was not refused")
except ContextOverflowError:
    pass
