"""The loop, and the pieces only it uses."""

from mini_infer.engine.async_engine import AsyncLLMEngine
from mini_infer.engine.llm_engine import LLM, LLMEngine
from mini_infer.engine.stats import EngineStats

__all__ = ["LLM", "AsyncLLMEngine", "EngineStats", "LLMEngine"]
