"""Requests and words: what users call, and the loop that runs it. Importing this does not import torch."""

from mini_infer.engine.async_engine import AsyncLLMEngine
from mini_infer.engine.llm_engine import LLM, LLMEngine
from mini_infer.engine.stats import EngineStats

__all__ = ["LLM", "AsyncLLMEngine", "EngineStats", "LLMEngine"]
