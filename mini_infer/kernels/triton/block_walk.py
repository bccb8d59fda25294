"""What both attention kernels share: the walk along a block table, and what they ask of the device.

A sequence's keys and values lie scattered over the cache in blocks of BLOCK_SIZE tokens; its row of the block table
says where. The kernels walk along the sequence in tiles of TILE tokens, starting at multiples of TILE:

    token           0        16       32       48       64
    tile            │───────────── 0 ─────────────────────│───── 1 ···        TILE = 64
    logical block   │── 0 ───│── 1 ───│── 2 ───│── 3 ───│── 4 ···             BLOCK_SIZE = 16
                        │        │        │        │
    table row       │   7    │   2    │   9    │   4    │ ? (never looked at if the sequence ends in block 3)
                        │        └─────┐  └──────┐
                        ▼              ▼         ▼
    cache           ··· block 7 ··· block 2 ··· block 9 ···     address = block * stride_block + offset * stride_token

Small blocks: every token of the tile looks up its own block id. Neighbours look up the same entry, which costs nothing,
as a warp reads it once. Large blocks (a multiple of TILE): the tile lies within one block, so a single look-up serves
them all, and the addresses within the tile become regular.

Unused table entries and unused slots may hold anything: an id out of range, NaN, infinity. So whatever a tile does not
need is masked out of the look-up (an id would become an address), out of the keys (a score of NaN would win the
maximum) and out of the values (a weight of 0 does not silence them: 0 * NaN is NaN).

Block ids and offsets are widened to 64 bits before they meet a stride: caches have more than 2³¹ elements.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NO_WINDOW = 2**31 - 1  # longer than any context
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def find_blocks(table, start, first, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The block ids of a tile's tokens `start`, `start + 1`, ...; those outside [first, end) are not looked up.

    Called one tile ahead: a tile's loads then wait for a look-up that was made while another tile was computed on.
    """
    tokens = start + tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        return tl.load(table + start // BLOCK_SIZE, start < end, other=0).to(tl.int64)
    else:
        return tl.load(table + tokens // BLOCK_SIZE, (tokens >= first) & (tokens < end), other=0).to(tl.int64)


@triton.jit
def product(a, b, accumulator=None):
    """The matrix product (plus the accumulator) in float32; float32 factors are not rounded to TensorFloat-32."""
    if INTERPRETED:  # the interpreter's product takes bfloat16's bits for integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc=accumulator, input_precision="ieee")


class Device(NamedTuple):
    """What of a device decides how attention is cut into programs."""

    shared_memory: int  # bytes that one program may use
    num_sms: int
    tensor_cores: bool  # whether Triton multiplies 16-bit numbers on them; Turing's it leaves idle


# A modest one for the interpreter: few programs, yet it does split contexts.
NO_GPU = Device(shared_memory=99 * 1024, num_sms=4, tensor_cores=True)
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}  # KiB by architecture


def device_of(tensor: Tensor) -> Device:
    return _query(tensor.device.index) if tensor.is_cuda else NO_GPU


@cache
def _query(index: int) -> Device:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    turing = torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0)
    return Device(properties["max_shared_mem"], properties["multiprocessor_count"], tensor_cores=not turing)


def compiled_device(target: Any) -> Device:
    """The device that a compile check for `target` should imagine; the number of SMs compiles into nothing."""
    return Device(SHARED_MEMORY[target.arch] * 1024, num_sms=132, tensor_cores=target.arch != 75)


def table_rows(block_tables: Tensor) -> Tensor:
    """Rows whose entries lie side by side, as the walk expects; a copy only for a table that no engine makes."""
    return block_tables if block_tables.stride(1) == 1 else block_tables.contiguous()


def compiled_dtypes(target: Any) -> dict[str, torch.dtype]:
    """By Triton's names, the dtypes that `target` computes in."""
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if target.arch == 75:
        del names["bf16"]
    return names


def signature(kernel: Any, dtype: str, out: str, constexprs: dict[str, Any]) -> dict[str, str]:
    """The types of an attention kernel's arguments for the compile check; sizes and strides are the i32."""
    known = {
        "out": f"*{out}",
        "partial": "*fp32",
        "log_sums": "*fp32",
        "query": f"*{dtype}",
        "key_cache": f"*{dtype}",
        "value_cache": f"*{dtype}",
        "block_tables": "*i32",
        "context_lens": "*i32",
        "query_start": "*i32",
        "scale": "fp32",
    }
    return {name: "constexpr" if name in constexprs else known.get(name, "i32") for name in kernel.arg_names}
