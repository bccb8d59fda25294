from collections.abc import Iterator

import httpx
import openai
import pytest

from mini_infer import LLM, AsyncLLMEngine, EngineConfig

from .running import Running, running

CONFIG = EngineConfig(dtype="float32", num_gpu_blocks=1024, max_num_seqs=64, enable_prefix_caching=True)
"""The bundled model, small enough that tests of memory pressure press it."""


@pytest.fixture(scope="session")
def offline() -> LLM:
    """The same model without a server."""
    return LLM(dtype="float32", num_gpu_blocks=1024)


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """Shared by all tests that leave it as they find it."""
    with running(AsyncLLMEngine(CONFIG)) as server:
        yield server
        assert server.is_idle()


@pytest.fixture
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client
