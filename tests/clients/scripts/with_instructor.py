# needs: instructor==1.17.0
import os
from typing import Literal

import instructor
from openai import OpenAI
from pydantic import BaseModel, Field

openai = OpenAI(base_url=os.environ["BASE_URL"], api_key="any", max_retries=0)
question = [{"role": "user", "content": "How many blocks do 100 tokens need?"}]
asked = {"model": "tutor", "messages": question, "max_tokens": 60, "temperature": 0, "max_retries": 1}


class Blocks(BaseModel):
    """Count the blocks that tokens need."""

    tokens: int = Field(ge=0, le=999)
    block_size: Literal[16, 32]


client = instructor.from_openai(openai)
plain = client.chat.completions.create(**asked, response_model=None)
assert plain.choices[0].message.content

for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.RESPONSES_TOOLS):
    blocks = instructor.from_openai(openai, mode=mode).chat.completions.create(**asked, response_model=Blocks)
    assert isinstance(blocks, Blocks), mode

*_, last = client.chat.completions.create_partial(**asked, response_model=Blocks)
assert Blocks.model_validate(last.model_dump())
