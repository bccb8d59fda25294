"""The operations for calls by hand: arguments are checked, and the implementation is looked up at each call."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Concatenate, ParamSpec, TypeVar

from mini_infer.kernels.checks import CHECKS
from mini_infer.kernels.contract import Operations
from mini_infer.kernels.registry import ambient

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _by_hand(operation: Callable[Concatenate[Operations, _Arguments], _Result]) -> Callable[_Arguments, _Result]:
    """The operation as a function: checked, then performed by whatever is chosen in this thread now."""
    check = CHECKS[operation.__name__]

    @wraps(operation)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        return operation(ambient(check(*args, **kwargs)), *args, **kwargs)

    whole = signature(operation)
    call.__signature__ = whole.replace(parameters=list(whole.parameters.values())[1:])  # type: ignore[attr-defined]
    return call


rmsnorm = _by_hand(Operations.rmsnorm)
add_rmsnorm = _by_hand(Operations.add_rmsnorm)
apply_rotary_emb = _by_hand(Operations.apply_rotary_emb)
qk_norm_rope = _by_hand(Operations.qk_norm_rope)
silu_and_mul = _by_hand(Operations.silu_and_mul)
allocate_kv_cache = _by_hand(Operations.allocate_kv_cache)
write_kv = _by_hand(Operations.write_kv)
paged_attention = _by_hand(Operations.paged_attention)
paged_prefill_attention = _by_hand(Operations.paged_prefill_attention)
attention = _by_hand(Operations.attention)
pack_linear = _by_hand(Operations.pack_linear)
pack_quantized = _by_hand(Operations.pack_quantized)
argmax_logprob = _by_hand(Operations.argmax_logprob)
draw_tokens = _by_hand(Operations.draw_tokens)
