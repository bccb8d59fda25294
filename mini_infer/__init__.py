"""Mini-Infer: an LLM inference engine to read, to learn from, and to use.

from mini_infer import LLM

llm = LLM()  # the bundled tutor; or a checkpoint directory, or a Hub name
print(llm.chat([{"role": "user", "content": "What is a KV cache?"}])[0].text)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mini_infer.config import EngineConfig
    from mini_infer.engine import LLM, AsyncLLMEngine, LLMEngine
    from mini_infer.outputs import GenerateOutput
    from mini_infer.sampling import SamplingParams
    from mini_infer.sparse import SparseConfig
    from mini_infer.structured import StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLMEngine",
    "EngineConfig",
    "GenerateOutput",
    "LLMEngine",
    "SamplingParams",
    "SparseConfig",
    "StructuredOutputsParams",
]

# Imported on first use: the scheduler and the block manager are usable, and quick to import, without torch.
_HOME = {
    "LLM": "mini_infer.engine",
    "AsyncLLMEngine": "mini_infer.engine",
    "LLMEngine": "mini_infer.engine",
    "EngineConfig": "mini_infer.config",
    "GenerateOutput": "mini_infer.outputs",
    "SamplingParams": "mini_infer.sampling",
    "SparseConfig": "mini_infer.sparse",
    "StructuredOutputsParams": "mini_infer.structured",
}


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return import_module("mini_infer.kernels")
    if name not in _HOME:
        raise AttributeError(f"module 'mini_infer' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
