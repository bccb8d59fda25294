"""The engine on random weights: decode steps, a workload, a peer, equality with the CPU, where the time goes."""

import gc
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.gpu_suite.figure import Context, Figure, untaken
from benchmarks.measure import DEVICE, copy_bandwidth, matrix_peak
from mini_infer import LLM, SamplingParams
from mini_infer.memory.cache_spec import block_bytes

VARIANTS: dict[str, dict[str, Any]] = {
    "CUDA graphs": {},
    "enforce_eager": {"enforce_eager": True},
    "CUDA graphs, overlap": {"overlap": True},
}
"""The first is what an engine does that nobody configured."""


def make_engine(context: Context, **fields: Any) -> LLM:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    sizes = context.sizes
    longest = max(max(length for _, length in sizes.steps) + sizes.rounds + 64, 2 * sizes.lengths[1])
    defaults = {"device": DEVICE, "max_num_seqs": sizes.requests, "max_num_batched_tokens": 16384}
    return LLM(context.checkpoint, max_model_len=longest, **{**defaults, **fields})


def weight_bytes(context: Context) -> int:
    """What every step must read: all weights, the tied embedding once."""
    return sum(path.stat().st_size for path in context.checkpoint.glob("*.safetensors"))


def kv_bytes_per_token(llm: LLM) -> int:
    return block_bytes(llm.model_config.cache_specs(torch.bfloat16), 1)


def decoding(context: Context, llm: LLM, batch: int, length: int) -> list[str]:
    """Start `batch` sequences of `length` tokens and run until each of them decodes."""
    draw = random.Random(batch * length)
    params = SamplingParams(temperature=0, max_tokens=context.sizes.rounds + 32, ignore_eos=True)
    ids = [
        llm.add_request([draw.randrange(context.sizes.vocabulary) for _ in range(length)], params) for _ in range(batch)
    ]
    while llm.step()[1] > 0:  # negative: only decodes
        pass
    for _ in range(3):
        llm.step()
    return ids


def step_seconds(context: Context, llm: LLM, batch: int, length: int) -> float:
    """The median decode step: from one call's return to the next's, so whatever the host does is in it."""
    ids, times = decoding(context, llm, batch, length), []
    for _ in range(context.sizes.rounds):
        start = time.perf_counter()
        _, num_tokens = llm.step()
        times.append(time.perf_counter() - start)
        if num_tokens != -batch:
            raise RuntimeError(f"a step computed {num_tokens} tokens, not {-batch}: sequences were preempted or ended")
    for request_id in ids:
        llm.abort(request_id)
    return statistics.median(times)


def steps(context: Context) -> Iterator[Figure]:
    """Decode step time by batch and context, beside the floor that bandwidth sets."""
    bandwidth, weights = copy_bandwidth(), weight_bytes(context)
    llm = make_engine(context)
    for batch, length in context.sizes.steps:
        what = f"decode step, batch {batch}, context {length}"
        try:
            seconds = step_seconds(context, llm, batch, length)
        except Exception as error:
            yield untaken(what, "ms", error)
            continue
        moved = weights + batch * (length + context.sizes.rounds // 2) * kv_bytes_per_token(llm)
        details = {
            "bytes": moved,
            "floor_milliseconds": round(moved / bandwidth * 1e3, 3),
            "percent_of_floor": round(100 * moved / bandwidth / seconds, 1),
        }
        single = (batch, length) == (1, 1024)
        yield Figure(what, round(seconds * 1e3, 3), "ms", 1.2 if single else None, at_most=True, details=details)
        if (batch, length) == context.sizes.steps[-1]:
            yield Figure(f"{what}, against its floor", details["percent_of_floor"], "%", 75)


def workload(context: Context) -> Iterator[Figure]:
    """All requests at once: output tokens per second with and without graphs and overlap, KV waste, and the peer."""
    sizes = context.sizes
    draw = random.Random(0)  # nano-vllm's bench.py, number by number
    prompts = [
        [draw.randint(0, sizes.vocabulary) for _ in range(draw.randint(*sizes.lengths))] for _ in range(sizes.requests)
    ]
    outputs = [draw.randint(*sizes.lengths) for _ in range(sizes.requests)]
    total = sum(outputs)
    best = None
    for name, fields in VARIANTS.items():
        what = f"workload of {sizes.requests} requests, {name}"
        try:
            llm = make_engine(context, **fields)
            run(llm, prompts, [min(n, 4) for n in outputs])  # compiles
            seconds, waste = run(llm, prompts, outputs)
        except RuntimeError as error:  # out of memory among them
            yield untaken(what, "output tokens/s", error, 26_000)
            continue
        floor = _floor(context, llm, prompts, outputs)
        rate = total / seconds
        best = max(best or 0.0, rate)
        details = {
            "seconds": round(seconds, 2),
            "floor_seconds": round(floor, 2),
            "percent_of_floor": round(100 * floor / seconds, 1),
            "input_tokens": sum(map(len, prompts)),
            "output_tokens": total,
        }
        bar = None if "eager" in name else 26_000
        yield Figure(what, round(rate), "output tokens/s", bar, details=details)
        yield Figure(f"KV memory that holds no token, {name}", round(100 * waste, 2), "% of the blocks in use")
        del llm
    yield from _peer(context, prompts, outputs, best)


def run(llm: LLM, prompts: list[list[int]], outputs: list[int]) -> tuple[float, float]:
    """Seconds for the whole workload, and the mean of the KV waste over its steps."""
    waste = []
    start = time.perf_counter()
    for prompt, num_output in zip(prompts, outputs, strict=True):
        llm.add_request(prompt, SamplingParams(temperature=0.6, max_tokens=num_output, ignore_eos=True))
    while not llm.is_finished():
        llm.step()
        if llm.stats().num_running:
            waste.append(llm.stats().kv_waste)
    return time.perf_counter() - start, statistics.mean(waste)


def _floor(context: Context, llm: LLM, prompts: list[list[int]], outputs: list[int]) -> float:
    """Seconds that the bytes of all decode steps and the arithmetic of all prompts take at the least."""
    weights = weight_bytes(context)
    tokens_read = sum(
        len(prompt) * num_output + num_output * (num_output + 1) // 2
        for prompt, num_output in zip(prompts, outputs, strict=True)
    )
    moved = tokens_read * kv_bytes_per_token(llm) + max(outputs) * weights
    flops = weights * sum(map(len, prompts))  # two per parameter of two bytes, and token
    return moved / copy_bandwidth() + flops / matrix_peak(torch.bfloat16)


def _peer(context: Context, prompts: list[list[int]], outputs: list[int], ours: float | None) -> Iterator[Figure]:
    """transformers' continuous batching on the same requests; what it has finished when its time is up counts."""
    what = "transformers generate_batch, the same requests"
    gc.collect()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            context.checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        model = model.to(DEVICE).eval()
        config = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(outputs))
        # `generate_batch` gives every request the same length; this is what it does, with each one's own.
        with model.continuous_batching_context_manager(config, block=True, timeout=5) as manager:
            start, done = time.perf_counter(), 0
            for prompt, num_output in zip(prompts, outputs, strict=True):
                manager.add_request(prompt, max_new_tokens=num_output, eos_token_id=-1)
            num_finished = 0
            while num_finished < len(prompts) and time.perf_counter() - start < context.sizes.peer_seconds:
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("its generation thread ended")
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(result.error)
                    num_finished += 1
                    done += len(result.generated_tokens)
            seconds = time.perf_counter() - start
    except Exception as error:
        yield untaken(what, "output tokens/s", error)
        return
    details = {"seconds": round(seconds, 2), "finished": f"{num_finished} of {len(prompts)} requests"}
    yield Figure(what, round(done / seconds), "output tokens/s", details=details)
    if ours is not None and done:
        yield Figure("Mini-Infer over generate_batch", round(ours * seconds / done, 2), "times", 5)


def equality(context: Context) -> Iterator[Figure]:
    """The bundled model in float32: the GPU beside the reference on the CPU, greedily.

    Up to the first difference, log probabilities lie within 1e-4; and that difference is allowed only where the
    reference's two best lie within 1e-4.
    """
    torch.set_float32_matmul_precision("highest")  # TensorFloat-32 off
    prompts = ["What is a KV cache?", "什么是分页注意力？", "Why are decode steps slow?", "Paged attention", "一二三"]
    params = SamplingParams(temperature=0, max_tokens=16 if DEVICE == "cpu" else 128, logprobs=2)
    sides = [
        LLM(dtype="float32", **fields).generate(prompts, params, use_tqdm=False)
        for fields in ({"device": "cpu", "kernel_backend": "reference"}, {"device": DEVICE})
    ]
    compared, ties, wrong, worst = 0, 0, [], 0.0
    for prompt, reference, other in zip(prompts, *sides, strict=True):
        places = zip(reference.token_ids, other.token_ids, reference.logprobs, other.logprobs, strict=False)
        for place, (token, theirs, expected, got) in enumerate(places):
            compared += 1
            if token != theirs:
                best, second, *_ = sorted((entry.logprob for entry in expected.values()), reverse=True)
                if best - second < 1e-4:
                    ties += 1
                else:
                    wrong.append(f"{prompt!r}, token {place}: {theirs}, not {token}")
                break
            worst = max(worst, abs(expected[token].logprob - got[token].logprob))
    details = {"tokens": compared, "differences_at_ties": ties, "wrong": wrong}
    yield Figure("sequences that differ, float32, GPU beside CPU", len(wrong), "", 0, at_most=True, details=details)
    yield Figure("largest difference of a log probability", float(f"{worst:.2e}"), "", 1e-4, at_most=True)


def where_time_goes(context: Context) -> Iterator[Figure]:
    """One decode step of the largest batch, kernel by kernel, and how much of the host's time the device waits for."""
    batch, length = context.sizes.steps[-1]
    walls, busy = {}, 0.0
    for name, fields in VARIANTS.items():
        llm = make_engine(context, **fields)
        walls[name] = step_seconds(context, llm, batch, length)
        if name == "enforce_eager":  # in a graph the profiler would see the same kernels
            decoding(context, llm, batch, length)
            rounds = min(10, context.sizes.rounds)
            activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])
            with profile(activities=activities) as profiler:
                for _ in range(rounds):
                    llm.step()
            rows = [(_device_microseconds(event) / rounds, event) for event in profiler.key_averages()]
            busy = sum(microseconds for microseconds, _ in rows)
            for microseconds, event in sorted(rows, key=lambda row: -row[0])[:15]:
                details = {"calls": event.count / rounds, "percent": round(100 * microseconds / busy, 1)}
                yield Figure(event.key[:70], round(microseconds, 1), "µs per step", details=details)
            yield Figure("all kernels of a step", round(busy / 1e3, 3), "ms")
        yield Figure(f"step of batch {batch}, {name}", round(walls[name] * 1e3, 3), "ms")
        del llm
    alone, overlapped = walls["CUDA graphs"], walls["CUDA graphs, overlap"]
    what, host = "host time hidden by overlap", alone - busy / 1e6
    if host <= 0:
        yield untaken(what, "%", "without overlap the host is not waited for either", 80)
    else:
        yield Figure(what, round(100 * (alone - overlapped) / host, 1), "%", 80)


def _device_microseconds(event: Any) -> float:
    """Of kernels and copies on a GPU; to rehearse on a CPU, of operators."""
    if DEVICE == "cpu":
        return float(event.self_cpu_time_total)
    on_device = event.device_type == DeviceType.CUDA
    return float(event.self_device_time_total) if on_device else 0.0
