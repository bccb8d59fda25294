"""The FastAPI example of nano-vllm's document, run as it is written but for the import and the model's name."""

import socket
import threading

import httpx
import uvicorn

from mini_infer import LLM, SamplingParams

from .running import PATIENCE, wait_until

EXAMPLE = """
from fastapi import FastAPI
from pydantic import BaseModel
from mini_infer import LLM, SamplingParams

app = FastAPI()
llm = LLM("/path/to/model")

class GenerationRequest(BaseModel):
    prompt: str
    temperature: float = 0.7
    max_tokens: int = 100

@app.post("/generate")
async def generate_text(request: GenerationRequest):
    sampling_params = SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_tokens
    )

    outputs = llm.generate([request.prompt], sampling_params)
    return {"generated_text": outputs[0]["text"]}
"""


def test_the_example(offline: LLM) -> None:
    namespace = {"__name__": "example"}
    exec(EXAMPLE.replace('"/path/to/model"', "dtype='float32', num_gpu_blocks=128"), namespace)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(namespace["app"], log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started)
        body = {"prompt": "Hello, how are you?", "temperature": 0, "max_tokens": 12}
        answer = httpx.post(f"http://127.0.0.1:{listener.getsockname()[1]}/generate", json=body, timeout=60)
        server.should_exit = True
        thread.join(PATIENCE)
    expected = offline.generate(body["prompt"], SamplingParams(temperature=0, max_tokens=12))[0]  # type: ignore[arg-type]
    assert answer.json() == {"generated_text": expected.text}
