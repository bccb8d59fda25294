"""Who owns which KV block. Importing this does not import torch."""

from mini_infer.memory.block_manager import BlockManager

__all__ = ["BlockManager"]
