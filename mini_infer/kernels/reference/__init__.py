"""The specification: every operation in plain PyTorch, on any device, computed in float32 or wider."""

from mini_infer.kernels.reference import activation, attention, kv_cache, linear, norm, quantized, rotary, sampling

__all__ = ["activation", "attention", "kv_cache", "linear", "norm", "quantized", "rotary", "sampling"]
