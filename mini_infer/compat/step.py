"""nano-vllm's ``step()``: finished requests as pairs, and a number of tokens whose sign tells the kind of step."""

from collections.abc import Sequence
from typing import TypeAlias

from mini_infer.outputs import GenerateOutput

SignedStep: TypeAlias = tuple[list[tuple[str, list[int]]], int]


def signed_step(finished: Sequence[GenerateOutput], num_tokens: int, only_decodes: bool) -> SignedStep:
    """``(request_id, token_ids)`` of each request that finished in a step, and the number of tokens computed in it,
    negative if it only decoded."""
    return [(output.request_id, output.token_ids) for output in finished], -num_tokens if only_decodes else num_tokens
