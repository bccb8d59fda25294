"""The kernels' speed beside their floors, and beside what a user of PyTorch would write."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from benchmarks.gpu_suite.figure import Context, Figure, untaken
from benchmarks.kernel_cases import LLAMA, QWEN, Arguments, Case, decode_case, prompt_case, quantized_case, row_cases
from benchmarks.measure import DEVICE, copy_bandwidth, matrix_peak, median_seconds
from mini_infer import kernels

DTYPE = torch.bfloat16
Baselines = dict[str, Callable[[], Any]]


def row_kernels(context: Context) -> Iterator[Figure]:
    """Operations that only move bytes, as a percentage of the copy bandwidth."""
    bandwidth = copy_bandwidth()
    yield Figure("copying 1 GiB, read and written", round(bandwidth / 1e9), "GB/s")
    chosen = [case for case in row_cases(LLAMA, context.sizes.tokens, DTYPE) if case.op != "write_kv"]
    chosen += [case for case in row_cases(QWEN, context.sizes.tokens, DTYPE) if case.op == "qk_norm_rope"]
    for case in chosen:
        yield from _figures(context, case, bandwidth, 85, _row_baselines)
    writing = next(case for case in row_cases(LLAMA, context.sizes.tokens, DTYPE) if case.op == "write_kv")
    yield from _figures(context, writing, bandwidth, None, lambda _case, _arguments: {})


def attention(context: Context) -> Iterator[Figure]:
    """Decode attention as a percentage of the copy bandwidth, prompt attention in TFLOP/s."""
    sizes, bandwidth = context.sizes, copy_bandwidth()
    rng = random.Random(0)
    for model in (LLAMA, QWEN):  # four and two query heads per KV head
        for batch in (sizes.small_batch, sizes.large_batch):
            yield from _figures(
                context, decode_case(model, [sizes.context] * batch, DTYPE), bandwidth, 85, _dense_attention
            )
        ragged = [rng.randint(sizes.context, 3 * sizes.context) for _ in range(sizes.small_batch)]
        yield from _figures(context, decode_case(model, ragged, DTYPE), bandwidth, 85, _dense_attention)
        yield from _figures(context, decode_case(model, [sizes.long_context], DTYPE), bandwidth, 60, _dense_attention)

    peak = matrix_peak(DTYPE)
    yield Figure("matrix product of 8192 x 8192", round(peak / 1e12, 1), "TFLOP/s")
    for model in (LLAMA, QWEN):
        yield from _figures(context, prompt_case(model, sizes.prompt, sizes.prompt, DTYPE), peak, 350, _dense_attention)
        yield from _figures(
            context, prompt_case(model, sizes.prompt // 2, sizes.prompt, DTYPE), peak, 250, _dense_attention
        )


def products(context: Context) -> Iterator[Figure]:
    """Products with quantised weights: of few tokens by their bytes, of many by their FLOPs, beside bfloat16's."""
    bandwidth, peak = copy_bandwidth(), matrix_peak(DTYPE)
    for kind in ("int8", "int4", "float8"):
        for tokens in (1, 16, context.sizes.prompt):
            case = quantized_case(LLAMA if DEVICE == "cuda" else QWEN, tokens, kind, DTYPE)
            yield from _figures(context, case, peak if case.compute else bandwidth, None, _in_bfloat16)


def _in_bfloat16(_case: Case, arguments: Arguments) -> Baselines:
    """The same product with a weight of 16 bits."""
    x, product = arguments["x"], arguments["product"]
    weight = torch.randn(product.out_features, product.in_features, device=x.device).to(x.dtype)
    return {"bfloat16": lambda: functional.linear(x, weight)}


def _figures(
    context: Context,
    case: Case,
    limit: float,
    bar: float | None,
    baselines: Callable[[Case, Arguments], Baselines],
) -> Iterator[Figure]:
    """Time a case and its baselines. `limit` is in bytes per second, or in FLOP/s where the case computes."""
    operation = case.function or getattr(kernels, case.op)
    backend = "triton" if DEVICE == "cuda" else kernels.backend_of(case.op, DEVICE)
    with kernels.use_backend(backend):  # which may keep a weight in an order of its own
        arguments = case.make()
    with torch.inference_mode():
        try:
            with kernels.use_backend(backend):
                seconds = median_seconds(lambda: operation(**arguments), context.sizes.rounds)
        except Exception as error:
            yield untaken(case.label, "", error, bar)
            return
        times = {name: _median(function, context.sizes.rounds) for name, function in baselines(case, arguments).items()}
    work = case.flops if case.compute else case.bytes_moved
    rate, floor = work / seconds, work / limit
    details = {
        "microseconds": round(seconds * 1e6, 1),
        "floor_microseconds": round(floor * 1e6, 1),
        "flops" if case.compute else "bytes": work,
        "times_faster_than": {
            name: round(time / seconds, 2) if isinstance(time, float) else time for name, time in times.items()
        },
    }
    percent = round(100 * floor / seconds, 1)
    if case.compute:
        details["percent_of_matrix_peak"] = percent
        yield Figure(case.label, round(rate / 1e12, 1), "TFLOP/s", bar, details=details)
    else:
        details["gb_per_s"] = round(rate / 1e9)
        yield Figure(case.label, percent, "% of copy bandwidth", bar, details=details)


def _median(function: Callable[[], Any], rounds: int) -> float | str:
    try:
        return median_seconds(function, rounds)
    except Exception as error:  # a baseline that does not run says so, and costs us nothing
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def _row_baselines(case: Case, arguments: Arguments) -> Baselines:
    """What transformers does, op by op; the same compiled; and PyTorch's own norm."""
    eager = _in_transformers_style(case.op, arguments)
    found: Baselines = {"transformers, eager": eager}
    if DEVICE == "cuda":
        found["torch.compile of it"] = torch.compile(eager, dynamic=False)
    if case.op == "rmsnorm":
        x, weight = arguments["x"], arguments["weight"]
        found["F.rms_norm"] = lambda: functional.rms_norm(x, weight.shape, weight, 1e-6)
    elif case.op == "add_rmsnorm":
        x, residual, weight = arguments["x"], arguments["residual"], arguments["weight"]

        def add_and_norm() -> tuple[Tensor, Tensor]:
            total = x + residual
            return functional.rms_norm(total, weight.shape, weight, 1e-6), total

        found["F.rms_norm after an addition"] = add_and_norm
    return found


def _in_transformers_style(op: str, arguments: Arguments) -> Callable[[], Any]:
    def norm_with(weight: Tensor) -> LlamaRMSNorm:
        norm = LlamaRMSNorm(len(weight), 1e-6).to(weight.device, weight.dtype)
        norm.weight.data = weight
        return norm

    if op == "silu_and_mul":
        gate, up = (half.contiguous() for half in arguments["x"].chunk(2, dim=-1))  # two projections there
        return lambda: functional.silu(gate) * up
    if op == "rmsnorm":
        x, norm = arguments["x"], norm_with(arguments["weight"])
        return lambda: norm(x)
    if op == "add_rmsnorm":
        x, residual, norm = arguments["x"], arguments["residual"], norm_with(arguments["weight"])

        def add_and_norm() -> tuple[Tensor, Tensor]:
            total = x + residual
            return norm(total), total

        return add_and_norm
    q, k, positions = arguments["q"], arguments["k"], arguments["position_ids"]
    # Looked up once per forward pass there, for all layers, so it does not count.
    cos, sin = (arguments[name][positions].repeat(1, 2).to(q.dtype) for name in ("cos", "sin"))
    if op == "apply_rotary_emb":
        return lambda: apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1)
    q_norm, k_norm = norm_with(arguments["q_weight"]), norm_with(arguments["k_weight"])
    return lambda: apply_rotary_pos_emb(q_norm(q), k_norm(k), cos, sin, unsqueeze_dim=1)


def _dense_attention(case: Case, arguments: Arguments) -> Baselines:
    """PyTorch's attention on keys and values that lie side by side, where that can say the same: all lengths equal."""
    contexts = arguments["context_lens"].tolist()
    num_seqs, context = len(contexts), contexts[0]
    new = len(arguments["query"]) // num_seqs
    if len(set(contexts)) > 1 or 1 < new < context:
        return {}
    query = arguments["query"].unflatten(0, (num_seqs, new)).transpose(1, 2).contiguous()
    keys, values = (
        arguments[name].flatten(0, 1).unflatten(0, (num_seqs, -1))[:, :context].transpose(1, 2).contiguous()
        for name in ("key_cache", "value_cache")
    )
    return {
        "scaled_dot_product_attention, dense": lambda: functional.scaled_dot_product_attention(
            query, keys, values, is_causal=new > 1, enable_gqa=True
        )
    }
