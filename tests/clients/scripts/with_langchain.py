# needs: langchain-openai==1.7.4
import asyncio
import os

from langchain_core.exceptions import ContextOverflowError
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

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


class Blocks(BaseModel):
    """Count the blocks that tokens need."""

    tokens: int = Field(ge=0, le=999)
    block_size: int = Field(ge=1, le=99)


def word(number: int) -> str:
    """Spell a digit."""
    return ("zero", "one", "two")[number]


for model in (ChatOpenAI(**where, temperature=0), ChatOpenAI(**where, temperature=0, use_responses_api=True)):
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Blocks, method=method).invoke("How many blocks?"), Blocks)
    (call,) = model.bind_tools([Blocks, word], tool_choice="Blocks").invoke("How many blocks?").tool_calls
    assert call["name"] == "Blocks" and Blocks(**call["args"])

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
