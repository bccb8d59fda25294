"""Puts results into the documentation: ``python -m benchmarks.tables``.

A page holds pairs of markers, such as ``<!-- compare -->`` and ``<!-- /compare -->``; what stands between them is
replaced by a table made of the results files, in the page's language. The charts in ``docs/assets`` are drawn from the
same files. No measured number is typed by hand.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.bars import Bar, Group, chart
from benchmarks.report import RESULTS

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "docs" / "assets"

WORDS: Mapping[str, Mapping[str, str]] = {
    "en": {
        "machine": "{cores} cores of an {model}",
        "source": "{machine}, {date}; `{command}`, `benchmarks/results/{file}`.",
        "compare": "| workload | Mini-Infer | sampled | vLLM | OpenVINO | llama.cpp | transformers "
        "| over the best of them | of the floor |",
        "figures": "| output tokens per second, bfloat16 | Mini-Infer | vLLM | OpenVINO | llama.cpp | transformers "
        "| over the best of them |",
        "8 chat requests": "SmolLM2-135M, 8 requests, 64-256 in, 64-128 out",
        "figures_note": "Medians of {rounds} alternating rounds; {machine}, {date}; a dash: not measured; below 1.00x "
        "we lose. How, and how to repeat it: [Benchmarks]({page}).",
        "1 request": "0.6B shape, 1 request, 32 in, 128 out",
        "16 requests": "0.6B shape, 16 requests, 32-256 in, 16-128 out",
        "64 requests": "0.6B shape, 64 requests, 32-64 in and out",
        "4 long prompts": "0.6B shape, 4 requests, 1500 in, 64 out",
        "tiny": "tiny shape, 64 requests, 32-256 in, 16-128 out",
        "rest": "Output tokens per second, medians of {rounds} alternating rounds in bfloat16, on {machine}, {date}. "
        "Start of the process to the first token (0.6B): {warm} s, with nothing compiled yet {cold} s. Peak memory "
        "with a KV pool of {pool} MB in full use: {peak} MB, {over} times weights and pool.",
        "kernels": "| operation | shape | reference | `cpu` | speedup | rate | of peak |",
        "kernel": "| bfloat16 | floor | reference | `cpu` | of the floor |",
        "quantized models": "| weights | load | Mini-Infer | of its bfloat16 | llama.cpp | OpenVINO |",
        "load": "{requests} × {inputs} in, {outputs} out",
        "quantized": "| tokens | bfloat16 | int8 | int8, groups of 32 | int4, groups of 32 | table, groups of 32 |",
        "tricks": "| trick | measured on | without | with | speedup |",
        "runs": "3. Tasks of 2 MiB instead of one panel | product 1024 to 151936, batch {tokens}",
        "turns": "6. Threads take several tasks at a time | norm and addition, {tokens} tokens",
        "drawing": "7. A token drawn by one kernel | `top_k` 50, vocabulary 151936, batch {tokens}",
        "recording": "9. A decode step replayed instead of called | {shape} shape, batch {tokens}",
        "products": "| product; tokens: | {tokens} |",
        "sampled": "| workload | drawing tokens takes longer than taking the likeliest by | quartiles of the rounds |",
        "neighbours": "Decoding {requests} sequences of the {shape} shape beside one program that only counts keeps "
        "{one:.2f} of its speed, beside two {two:.2f}.",
        "quality": "| model | weights | bytes per weight | mean KLD | 99.9 % KLD | same top token | perplexity "
        "| held-out answers |",
        "batching": "| question | figure | command |",
        "static": "Tokens per second of continuous batching, over static batches of {batch}",
        "waste": "KV memory that is held and holds no token",
        "occupancy": "KV memory in use while requests wait",
        "reuse": "Mean time to first token of {clients} clients that share {prefix} of {total} prompt tokens: without "
        "prefix caching over with",
        "plan": "Planning a step of 256 sequences of 8000 tokens",
        "requests": "Requests per second through the scheduler alone, {requests} of them",
        "serving": "| milliseconds | p50 | p90 | p99 |",
        "ttft": "time to first token",
        "itl": "inter-token latency",
        "e2e": "whole answer",
        "event_loop_lag": "lag of the event loop",
        "serving_rest": "{requests} requests from {clients} clients at once, of whom {left} left in the middle: "
        "{rate} output tokens per second; {equal} of {equal_of} answers equal the offline engine's, {wrong} differ; "
        "{blocks} KV blocks in use afterwards.",
        "parallel": "| the tutor in {dtype}, output tokens per second | {requests} requests | | {few} requests | |",
        "one": "one process with two threads",
        "tp": "`tensor_parallel_size=2`, a thread each",
        "pp": "`pipeline_parallel_size=2`, a thread each",
        "dp": "`data_parallel_size=2`, a thread each",
        "hit_rates": "{groups} groups of {each} prompts that begin alike: of all prompt tokens one replica finds {one} "
        "in its prefix cache, two with the router {router}, and two that take turns {turns}.",
        "noticed": "A rank was killed {times} times, idle or in a step: the driver knew after {first:.2f} to "
        "{last:.2f} seconds.",
        "structured": "{shape}, {dtype}",
        "no_structured": "Not measured yet: `python -m benchmarks.structured`.",
        "no_schemas": "Which keywords of JSON schemas are followed, `python -m benchmarks.schemas` shows.",
        "schemas": "keywords of JSON schemas",
        "followed": "followed",
        "partly": "in part",
        "refused": "refused by name",
        "drawn": "random schemas",
        "drawn_ends": "{schemas}, of which {refused} are refused; of the answers to the others at temperature 2, "
        "{finished} were finished and {invalid} of these are not valid; {cut} were cut at 200 tokens",
        "masks_0": "a decode step of 16 greedy requests that are masked, over one of free ones",
        "masks_1": "the same at temperature 1",
        "new_schema": "delay of the first token by a schema that was never seen before",
        "forced": "{requests} answers with a schema ({tokens} tokens, {steps} steps), over free text of that length",
        "one_process": "One process before there were ranks: {before:,.0f} tokens per second ({shape} shape, "
        "{requests} requests). With the commit that brought them {with_ratio:.3f} times that ({with_low:.3f} to "
        "{with_high:.3f} in {rounds} rounds), and now {now_ratio:.3f} times ({now_low:.3f} to {now_high:.3f}).",
        "no_parallel": "No figures are given here yet: that command has not been run with nothing beside it.",
        "canvas: 1 request": "1 request",
        "canvas: 16 requests": "16 requests",
        "canvas: 1 request, prefix reuse": "1 request, prefix reuse",
        "canvas: exact": "exact",
        "canvas: threshold": "threshold 0.9",
        "canvas: prefix": "prefix reuse",
        "canvas: prefix and threshold": "prefix reuse and threshold 0.9",
        "canvas: dual": "dual reuse",
        **{f"canvas: sparse {ratio}": f"sparse, {ratio} retained" for ratio in (0.75, 0.5, 0.25)},
        "diffusion": "| model | requests | published sampler | exact | faster, approximate |",
        "diffusion_answers": (
            "| way | tokens written by a pass | computed for each token | right, of {questions} | as the exact answer "
            "| tokens as there | KV cache of a sequence | time |"
        ),
        "no_diffusion": "No figures are given here yet; they come from `benchmarks/results/diffusion-cpu.json`.",
        "gpu": "| section | figure | measured | bar | |",
        "no_gpu": "No figures are given here yet: neither the kernels nor the engine have been timed on a GPU. When "
        "they have, they will come from that file.",
        "pass": "reached",
        "miss": "missed",
        "untaken": "not taken",
        "chart_compare": "Output tokens per second on a CPU",
        "chart_kernels": "Share of the machine's limit reached on a CPU",
        "reference": "reference",
    },
    "zh": {
        "machine": "{model} 的 {cores} 个核心",
        "source": "{machine}，{date}；`{command}`，`benchmarks/results/{file}`。",
        "compare": "| 负载 | Mini-Infer | 随机采样 | vLLM | OpenVINO | llama.cpp | transformers "
        "| 对其中最快者 | 占下限 |",
        "figures": "| 每秒输出词元数，bfloat16 | Mini-Infer | vLLM | OpenVINO | llama.cpp | transformers "
        "| 对其中最快者 |",
        "8 chat requests": "SmolLM2-135M，8 个请求，输入 64-256、输出 64-128",
        "figures_note": "轮流运行 {rounds} 轮取中位数；{machine}，{date}；"
        "短横表示未测，低于 1.00x 表示我们输了。怎样测的、怎样重做，见[性能测量]({page})。",
        "1 request": "0.6B 规模，1 个请求，输入 32、输出 128",
        "16 requests": "0.6B 规模，16 个请求，输入 32-256、输出 16-128",
        "64 requests": "0.6B 规模，64 个请求，输入、输出各 32-64",
        "4 long prompts": "0.6B 规模，4 个请求，输入 1500、输出 64",
        "tiny": "微型规模，64 个请求，输入 32-256、输出 16-128",
        "rest": "单位为每秒输出词元数，bfloat16，轮流运行 {rounds} 轮取中位数；{machine}，{date}。"
        "从进程启动到首个词元（0.6B）：{warm} 秒；算子尚未编译时 {cold} 秒。"
        "{pool} MB 的 KV 池全部用满时，内存峰值 {peak} MB，是权重与 KV 池之和的 {over} 倍。",
        "kernels": "| 操作 | 形状 | 参考实现 | `cpu` | 加速比 | 速率 | 占峰值 |",
        "kernel": "| bfloat16 | 下限 | 参考实现 | `cpu` | 占下限 |",
        "quantized models": "| 权重 | 负载 | Mini-Infer | 与自身 bfloat16 之比 | llama.cpp | OpenVINO |",
        "load": "{requests} 个请求，各输入 {inputs}、输出 {outputs}",
        "quantized": "| 词元 | bfloat16 | int8 | int8，每组 32 个 | int4，每组 32 个 | 码表，每组 32 个 |",
        "tricks": "| 技巧 | 测量对象 | 不用 | 使用 | 加速比 |",
        "runs": "3. 一个任务 2 MiB，而不是一块面板 | 乘法 1024 到 151936，批大小 {tokens}",
        "turns": "6. 线程一次领取多个任务 | 归一化与相加，{tokens} 个词元",
        "drawing": "7. 一个算子完成随机抽取 | `top_k` 50，词表 151936，批大小 {tokens}",
        "recording": "9. 解码步重放，而不是逐个调用 | {shape} 规模，批大小 {tokens}",
        "products": "| 乘法；词元数： | {tokens} |",
        "sampled": "| 负载 | 随机采样比贪心多用的时间 | 各轮的四分位数 |",
        "neighbours": "{shape} 规模的 {requests} 个序列解码时，旁边有一个只管计数的程序，速度为独占时的 {one:.2f}；"
        "有两个则为 {two:.2f}。",
        "quality": "| 模型 | 权重 | 每个权重的字节数 | 平均 KL 散度 | 99.9% 分位 | 首选词元相同 | 困惑度 "
        "| 留出问题答对 |",
        "batching": "| 问题 | 数字 | 命令 |",
        "static": "连续批处理每秒的词元数，相对每批 {batch} 个的静态批",
        "waste": "已占用却没有存放词元的 KV 内存",
        "occupancy": "有请求排队时 KV 内存的使用率",
        "reuse": "{clients} 个客户端共享提示词 {total} 个词元中的 {prefix} 个，平均首词元时间：关闭前缀缓存与开启之比",
        "plan": "为 256 个 8000 词元的序列安排一步",
        "requests": "单独运行调度器，每秒处理的请求数，共 {requests} 个",
        "serving": "| 毫秒 | p50 | p90 | p99 |",
        "ttft": "首词元时间",
        "itl": "词元间延迟",
        "e2e": "完整回答",
        "event_loop_lag": "事件循环的滞后",
        "serving_rest": "{clients} 个客户端同时发出 {requests} 个请求，其中 {left} 个中途离开：每秒输出 {rate} 个词元；"
        "{equal_of} 个回答中有 {equal} 个与离线引擎的完全相同，{wrong} 个不同；结束后仍被占用的 KV 块为 {blocks} 个。",
        "parallel": "| 内置模型，{dtype}，每秒输出词元数 | {requests} 个请求 | | {few} 个请求 | |",
        "one": "一个进程，两个线程",
        "tp": "`tensor_parallel_size=2`，各一个线程",
        "pp": "`pipeline_parallel_size=2`，各一个线程",
        "dp": "`data_parallel_size=2`，各一个线程",
        "hit_rates": "{groups} 组提示词，每组 {each} 个开头相同：全部提示词词元中，单个副本在前缀缓存里找到 {one}，"
        "两个副本经路由分配找到 {router}，两个副本轮流找到 {turns}。",
        "noticed": "杀死 rank {times} 次，有空闲时也有计算途中：驱动进程在 {first:.2f} 到 {last:.2f} 秒后得知。",
        "structured": "{shape}，{dtype}",
        "no_structured": "尚未测量：`python -m benchmarks.structured`。",
        "no_schemas": "支持 JSON Schema 的哪些关键字，`python -m benchmarks.schemas` 会列出。",
        "schemas": "JSON Schema 的关键字",
        "followed": "支持",
        "partly": "部分支持",
        "refused": "指名拒绝",
        "drawn": "随机 Schema",
        "drawn_ends": "{schemas} 个，其中拒绝 {refused} 个；其余的在温度 2 下写出的回答中，"
        "{finished} 个写完，其中 {invalid} 个不合法；{cut} 个在 200 个词元处截断",
        "masks_0": "16 个带掩码的贪心请求，一个解码步比不带掩码时多用的时间",
        "masks_1": "同上，温度为 1",
        "new_schema": "没见过的 schema 使首个词元推迟",
        "forced": "{requests} 个符合 schema 的回答（{tokens} 个词元，{steps} 步），与同样长的自由文本相比的速度",
        "one_process": "单进程引擎在有 rank 之前：每秒 {before:,.0f} 个词元（{shape} 规模，{requests} 个请求）。"
        "引入 rank 的那次提交是它的 {with_ratio:.3f} 倍（{rounds} 轮，{with_low:.3f} 至 {with_high:.3f}），"
        "现在是 {now_ratio:.3f} 倍（{now_low:.3f} 至 {now_high:.3f}）。",
        "no_parallel": "这里暂时没有数字：这条命令还没有在空闲的机器上运行过。",
        "canvas: 1 request": "1 个请求",
        "canvas: 16 requests": "16 个请求",
        "canvas: 1 request, prefix reuse": "1 个请求，前缀复用",
        "canvas: exact": "精确",
        "canvas: threshold": "阈值 0.9",
        "canvas: prefix": "前缀复用",
        "canvas: prefix and threshold": "前缀复用与阈值 0.9",
        "canvas: dual": "双侧复用",
        **{f"canvas: sparse {ratio}": f"稀疏，保留 {ratio}" for ratio in (0.75, 0.5, 0.25)},
        "diffusion": "| 模型 | 请求 | 公开的采样器 | 精确 | 更快，近似 |",
        "diffusion_answers": (
            "| 方式 | 每遍写下的词元 | 每个词元的计算量 | {questions} 题中答对 | 与精确答案相同 | 词元相同 "
            "| 一个序列的 KV 缓存 | 用时 |"
        ),
        "no_diffusion": "这里还没有数字；它们将来自 `benchmarks/results/diffusion-cpu.json`。",
        "gpu": "| 项目 | 数字 | 实测 | 标准 | |",
        "no_gpu": "这里暂时没有数字，因为算子和引擎都还没有在 GPU 上测过。测过之后，一切数字都将取自该文件。",
        "pass": "达标",
        "miss": "未达标",
        "untaken": "未能测得",
        "chart_compare": "CPU 上每秒输出的词元数",
        "chart_kernels": "算子在 CPU 上达到本机极限的百分比",
        "reference": "参考实现",
    },
}

BENCHMARKS_PAGE = {"en": "docs/benchmarks.md", "zh": "docs/zh/benchmarks.md"}
"""As the README links to it."""


def results(name: str) -> dict[str, Any]:
    """What stands in ``benchmarks/results/NAME.json``."""
    read: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return read


def compared(what: str = "compare-cpu") -> list[str]:
    """The results of `benchmarks.compare`, or of another command, one for each processor that was met."""
    return sorted(path.stem for path in RESULTS.glob(f"{what}-*.json"))


def tables(language: str) -> dict[str, str]:
    """Every table there is, in a language, by the name in its markers."""
    words = WORDS[language]
    kernels = results("kernels-cpu")
    each = {f"kernel {op}": kernel_table(kernels, op, words) for op in _ops(kernels)}
    return each | {
        "compare": "\n\n".join(compare_table(name, words) for name in compared()),
        "figures": "\n\n".join(figures_table(name, words, BENCHMARKS_PAGE[language]) for name in compared()),
        "kernels": kernels_table(kernels, words),
        "quantized": quantized_table(results("quantized-cpu"), words),
        "quantized models": "\n\n".join(
            quantized_models_table(name, words) for name in compared("quantized-models-cpu")
        ),
        "tricks": tricks_table(results("tricks-cpu"), words),
        "products": "\n\n".join(products_table(name, words) for name in compared("products-cpu")),
        "sampled": "\n\n".join(sampled_table(name, words) for name in compared("sampled-cpu")),
        "neighbours": "\n\n".join(neighbours_text(name, words) for name in compared("neighbours-cpu")),
        "batching": batching_table(words),
        "quality": quality_table(results("quality"), words),
        "serving": serving_table(results("serving"), words),
        "parallel": parallel_table(words),
        "one_process": one_process(words),
        "diffusion": diffusion_table(words),
        "structured": structured_table(words),
        "schemas": schemas_table(words),
        "gpu": gpu_tables(words),
    }


def charts(language: str) -> dict[str, str]:
    """Every chart there is, in a language, by its file's name."""
    words = WORDS[language]
    return {
        f"compare-cpu.{language}.svg": compare_chart([results(name) for name in compared()], words),
        f"kernels-cpu.{language}.svg": kernels_chart(results("kernels-cpu"), words),
    }


# ---- Mini-Infer beside its peers ---------------------------------------------------------------------------------


def _workloads(compared: dict[str, Any], words: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each workload is called, and how each engine did."""
    for model, found in compared["figures"]["models"].items():
        for workload in found["workloads"]:
            yield words["tiny" if model == "tiny" else workload["name"]], workload["engines"]


def _rate(engines: dict[str, Any], label: str) -> str:
    if label not in engines:
        return "-"
    rate = engines[label]["tokens_per_second"]
    return f"{rate:,.{0 if rate >= 1000 else 1}f}"


PEERS = {"vllm": "vLLM", "openvino": "OpenVINO", "llama.cpp": "llama.cpp", "transformers": "transformers"}


def _over_the_best(engines: dict[str, Any]) -> str:
    """How many times as fast as the fastest peer of this workload."""
    ratios = [engines[label]["mini_infer_is_times_as_fast"] for label in PEERS if label in engines]
    return f"{min(ratios):.2f}x" if ratios else "-"


def compare_table(name: str, words: Mapping[str, str]) -> str:
    """Mini-Infer beside its peers, on one processor."""
    compared = results(name)
    lines = [words["compare"], "|---|" + "---:|" * 8]
    for workload, engines in _workloads(compared, words):
        rates = [_rate(engines, label) for label in ("mini-infer, sampled", *PEERS)]
        share = f"{100 * engines['mini-infer']['share_of_the_machine']:.0f} %"
        cells = [workload, f"**{_rate(engines, 'mini-infer')}**", *rates, _over_the_best(engines), share]
        lines.append("| " + " | ".join(cells) + " |")
    extras = compared["figures"]["models"]["qwen3-0.6b"]
    startup, used = extras["startup"], extras["memory"]
    rest = words["rest"].format(
        rounds=compared["figures"]["rounds"],
        machine=_machine(compared, words),
        date=compared["date"],
        warm=startup["jit_cache_warm_seconds"],
        cold=startup["jit_cache_cold_seconds"],
        pool=used["kv_pool_mb"],
        peak=used["peak_memory_mb"],
        over=f"{used['over_weights_and_pool']:.2f}",
    )
    return "\n".join([*lines, "", rest, "", _source(compared, name, words)])


def figures_table(name: str, words: Mapping[str, str], page: str) -> str:
    """The same in short, for the README."""
    compared = results(name)
    lines = [words["figures"], "|---|" + "---:|" * 6]
    for workload, engines in _workloads(compared, words):
        cells = [f"**{_rate(engines, 'mini-infer')}**", *(_rate(engines, label) for label in PEERS)]
        lines.append(f"| {workload} | " + " | ".join([*cells, _over_the_best(engines)]) + " |")
    note = words["figures_note"].format(
        rounds=compared["figures"]["rounds"], machine=_machine(compared, words), date=compared["date"], page=page
    )
    return "\n".join([*lines, "", note])


def compare_chart(all_compared: list[dict[str, Any]], words: Mapping[str, str]) -> str:
    """The same as bars; with several processors, each group says whose it is."""
    names = {"mini-infer": "Mini-Infer", **PEERS}
    measured = {label for compared in all_compared for _, engines in _workloads(compared, words) for label in engines}
    shown = {label: name for label, name in names.items() if label in measured}
    groups = []
    for compared in all_compared:
        where = f"{_machine(compared, words)}: " if len(all_compared) > 1 else ""
        for name, engines in _workloads(compared, words):
            there = [label for label in shown if label in engines]
            best = max(engines[label]["tokens_per_second"] for label in there)
            bars = [
                Bar(list(shown).index(label), engines[label]["tokens_per_second"] / best, _rate(engines, label))
                for label in there
            ]
            groups.append(Group(where + name, bars))
    return chart(words["chart_compare"], list(shown.values()), groups)


# ---- kernels -----------------------------------------------------------------------------------------------------


def _bfloat16(kernels: dict[str, Any], backend: str) -> list[dict[str, Any]]:
    rows = kernels["figures"]["kernels"]
    return [row for row in rows if row["dtype"] == "bfloat16" and row["backend"] == backend]


def _ops(kernels: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["op"] for row in _bfloat16(kernels, "cpu")))


def _pairs(kernels: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each measurement of the CPU's kernels with that of their reference."""
    before = {(row["op"], row["shape"]): row for row in _bfloat16(kernels, "reference")}
    for row in _bfloat16(kernels, "cpu"):
        yield row, before[row["op"], row["shape"]]


def kernels_table(kernels: dict[str, Any], words: Mapping[str, str]) -> str:
    """Each operation beside its reference, in bfloat16."""
    lines = [words["kernels"], "|---|---|" + "---:|" * 5]
    for row, reference in _pairs(kernels):
        times = f"{reference['microseconds']:,.0f} µs | {row['microseconds']:,.0f} µs"
        rate = f"{row['rate']:.3g} {row['unit']} | {row['percent_of_peak']:.0f} %"
        speedup = f"{row['speedup_over_reference']:.1f}x"
        lines.append(f"| `{row['op']}` | {row['shape']} | {times} | {speedup} | {rate} |")
    return "\n".join([*lines, "", _source(kernels, "kernels-cpu", words)])


SAME_NUMBERS = {"int8": "Q8_0", "int4": "Q4_0"}
"""What llama.cpp runs beside weights that we quantise ourselves."""


def quantized_models_table(name: str, words: Mapping[str, str]) -> str:
    """Output tokens per second of whole models, and how many times as fast as a peer with as many bits we are."""
    found = results(name)
    figures = found["figures"]
    lines = [words["quantized models"], "|---|---|---:|---:|---:|---:|"]
    for model, rows in figures["models"].items():
        speeds = {(row["weights"], row["load"], row["engine"]): row["tokens_per_second"] for row in rows}
        for weights, load, engine in speeds:
            if engine != "Mini-Infer":
                continue
            mine = speeds[weights, load, engine]
            peers = [
                speeds.get((SAME_NUMBERS.get(weights, weights), load, "llama.cpp")),
                speeds.get((weights, load, "OpenVINO")),
            ]
            requests, inputs, outputs = figures["loads"][model][load]
            what = words["load"].format(requests=requests, inputs=inputs, outputs=outputs)
            cells = [f"{mine:,.1f}", f"{mine / speeds['bfloat16', load, engine]:.2f}x"]
            cells += ["" if peer is None else f"{peer:,.1f}, {mine / peer:.2f}x" for peer in peers]
            lines.append(f"| {model}, {weights} | {what} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _source(found, name, words)])


def tricks_table(tricks: dict[str, Any], words: Mapping[str, str]) -> str:
    """What can be switched off, without it and with it."""
    lines = [words["tricks"], "|---|---|" + "---:|" * 3]
    for row in tricks["figures"]["tricks"]:
        times = f"{row['before_ms']:.2f} ms | {row['after_ms']:.2f} ms | {row['speedup']:.2f}x"
        lines.append(f"| {words[row['trick']].format_map(row)} | {times} |")
    return "\n".join([*lines, "", _source(tricks, "tricks-cpu", words)])


def kernel_table(kernels: dict[str, Any], op: str, words: Mapping[str, str]) -> str:
    """One operation, beside the time that its bytes or its arithmetic must take."""
    lines = [words["kernel"], "|---|" + "---:|" * 4]
    for row, reference in _pairs(kernels):
        if row["op"] == op:
            floor = row["microseconds"] * row["percent_of_peak"] / 100
            times = (floor, reference["microseconds"], row["microseconds"])
            cells = " | ".join(f"{time:,.{0 if time >= 100 else 1}f} µs" for time in times)
            lines.append(f"| {row['shape']} | {cells} | {row['percent_of_peak']:.0f} % |")
    return "\n".join(lines)


def kernels_chart(kernels: dict[str, Any], words: Mapping[str, str]) -> str:
    """How much of the machine each kernel uses, beside its reference, at the sizes of a real model."""
    pairs = [pair for pair in _pairs(kernels) if not pair[0]["shape"].startswith("tutor")]
    longest = max(row["percent_of_peak"] for row, _ in pairs)
    groups = [
        Group(
            f"{row['op']}: {row['shape']}",
            [
                Bar(series, each["percent_of_peak"] / longest, f"{each['percent_of_peak']:.0f} %")
                for series, each in enumerate((row, reference))
            ],
        )
        for row, reference in pairs
    ]
    return chart(words["chart_kernels"], ["cpu", words["reference"]], groups)


def gpu_tables(words: Mapping[str, str]) -> str:
    """What the GPU suite measured, for each GPU that it ran on: the figures that are held against something."""
    tables = []
    for path in sorted(path for path in RESULTS.glob("gpu-*.json") if not path.stem.endswith("-tiny")):
        found = results(path.stem)
        lines = [words["gpu"], "|---|---|---:|---:|---|"]
        for section, measured in found["figures"].items():
            for row in measured["figures"]:
                if row["bar"] is not None:
                    value = "-" if row["value"] is None else f"{_short(row['value'])} {row['unit']}".strip()
                    bar = f"{'≤' if row['at_most'] else '≥'} {row['bar']:,g}"
                    lines.append(f"| `{section}` | {row['what']} | {value} | {bar} | {words[row['verdict']]} |")
        source = words["source"].format(
            machine=found["hardware"]["gpu"], date=found["date"], command=found["command"], file=path.name
        )
        tables.append("\n".join([*lines, "", source]))
    return "\n\n".join(tables) or words["no_gpu"]


# ---- diffusion models ---------------------------------------------------------------------------------------------


def diffusion_table(words: Mapping[str, str]) -> str:
    """Seconds beside the published sampler, and what is exact and what is not."""
    if not (RESULTS / "diffusion-cpu.json").exists():
        return words["no_diffusion"]
    found = results("diffusion-cpu")
    lines, answers = [words["diffusion"], "|---|---|---:|---:|---:|"], []
    for model in ("random", "tutor"):
        for case, one in (found["figures"][model] or {}).items():
            if "published_seconds" in one:
                cells = (
                    f"{one[f'{way}_seconds']} s ({one[f'{way}_over_published']}x)" if f"{way}_seconds" in one else "-"
                    for way in ("exact", "faster")
                )
                name = found["figures"]["shape"] if model == "random" else model
                lines.append(
                    f"| `{name}` | {words[f'canvas: {case}']} | {one['published_seconds']} s | {' | '.join(cells)} |"
                )
            else:
                answers.append(
                    f"| {words[f'canvas: {case}']} | {one['tokens_per_pass']} | {one['computed_for_each']} "
                    f"| {one['right']} | {one['same_as_exact']} | {100 * one['same_tokens']:.0f} % "
                    f"| {one['kv_kib']} KiB | {one['seconds']} s |"
                )
    if answers:
        questions = found["figures"]["tutor"]["exact"]["questions"]
        lines += ["", words["diffusion_answers"].format(questions=questions), "|---|" + 7 * "---:|", *answers]
    return "\n".join([*lines, "", _source(found, "diffusion-cpu", words)])


# ---- scheduling and serving --------------------------------------------------------------------------------------


def batching_table(words: Mapping[str, str]) -> str:
    """What continuous batching, prefix reuse and the scheduler bring or cost."""
    batching, reuse, scheduler = results("continuous_batching"), results("prefix_reuse"), results("scheduler")
    some, shared, planned = batching["figures"], reuse["figures"], scheduler["figures"]
    total = shared["prefix_tokens"] + shared["suffix_tokens"]
    rows = [
        (words["static"].format(batch=some["batch_size"]), f"{some['continuous_over_static']:.2f}x", batching),
        (words["waste"], f"{100 * some['kv_waste']:.1f} %", batching),
        (words["occupancy"], f"{100 * some['pool_occupancy_while_requests_wait']:.1f} %", batching),
        (
            words["reuse"].format(clients=shared["clients"], prefix=shared["prefix_tokens"], total=total),
            f"{shared['ratio']:.1f}x",
            reuse,
        ),
        (words["plan"], f"{planned['step_ms_256_sequences_of_8000_tokens']:.2f} ms", scheduler),
        (
            words["requests"].format(requests=f"{planned['requests']:,}"),
            f"{planned['requests_per_second']:,}",
            scheduler,
        ),
    ]
    lines = [words["batching"], "|---|---:|---|"]
    lines += [f"| {question} | {figure} | `{found['command']}` |" for question, figure, found in rows]
    return "\n".join(lines)


def quantized_table(measured: dict[str, Any], words: Mapping[str, str]) -> str:
    """Products with quantised weights, each with how many times faster than bfloat16 it is."""
    lines = [words["quantized"], "|---:" * 6 + "|"]
    products = measured["figures"]["products"]
    for tokens in dict.fromkeys(row["tokens"] for row in products):
        base, *others = (row for row in products if row["tokens"] == tokens)
        cells = [f"{row['microseconds']:,.0f} µs, {row['speedup']:.2f}x" for row in others]
        lines.append(" | ".join([f"| {tokens}", f"{base['microseconds']:,.0f} µs", *cells]) + " |")
    return "\n".join([*lines, "", _source(measured, "quantized-cpu", words)])


def products_table(name: str, words: Mapping[str, str]) -> str:
    """Products with a layer's weights at each number of tokens, beside the machine's limit and beside oneDNN."""
    found = results(name)
    rows = found["figures"]["products"]
    tokens = list(dict.fromkeys(row["tokens"] for row in rows))
    lines = [words["products"].format(tokens=" | ".join(map(str, tokens))), "|---|" + "---:|" * len(tokens)]
    for model, inputs, outputs in dict.fromkeys((row["model"], row["inputs"], row["outputs"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["inputs"], row["outputs"]) == (model, inputs, outputs)]
        limits = [f"{100 * row['of_the_machine']:.0f} %" for row in mine]
        onednn = [f", {row['of_onednn']:.2f}x" if "of_onednn" in row else "" for row in mine]  # it may not be there
        cells = map("".join, zip(limits, onednn, strict=True))
        lines.append(f"| {model}, {inputs} → {outputs} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _source(found, name, words)])


def sampled_table(name: str, words: Mapping[str, str]) -> str:
    """How much longer it takes to draw tokens than to take the likeliest."""
    found = results(name)
    lines = [words["sampled"], "|---|---:|---:|"]
    for model, scenarios in found["figures"]["models"].items():
        for scenario, row in scenarios.items():
            low, high = row["quartiles"]
            what = words["tiny" if model == "tiny" else scenario]
            lines.append(f"| {what} | {row['slower']:.1%} | {low:.1%}, {high:.1%} |")
    return "\n".join([*lines, "", _source(found, name, words)])


def neighbours_text(name: str, words: Mapping[str, str]) -> str:
    """How much of its speed an engine keeps beside busy programs."""
    found = results(name)
    figures = found["figures"]
    one, two = (figures["neighbours"][count]["share_of_idle"] for count in "12")
    said = words["neighbours"].format(requests=figures["requests"], shape=figures["shape"], one=one, two=two)
    return f"{said}\n\n{_source(found, name, words)}"


def quality_table(found: dict[str, Any], words: Mapping[str, str]) -> str:
    """What quantisation costs."""
    lines = [words["quality"], "|---|---|" + "---:|" * 6]
    for row in found["figures"]["rows"]:
        # The bundled model knows one subject, so that its perplexity on prose says nothing.
        perplexity = f"{row['perplexity'] / row['base_perplexity']:.3f} ×"
        cells = (
            row["model"],
            row["weights"],
            f"{row['bytes_per_weight']:.2f}",
            f"{row['mean_kld']:.4f} ± {row['mean_kld_error']:.4f}",
            f"{row['kld_999']:.3f}",
            f"{row['same_top']:.1%}",
            perplexity,
            "-" if row.get("answers") is None else f"{row['answers']:.1%}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _source(found, "quality", words)])


def serving_table(served: dict[str, Any], words: Mapping[str, str]) -> str:
    """Many clients at once, some of which leave."""
    figures = served["figures"]
    lines = [words["serving"], "|---|" + "---:|" * 3]
    for what in ("ttft", "itl", "e2e", "event_loop_lag"):
        cells = " | ".join(f"{figures[f'{what}_{p}'] * 1e3:,.1f}" for p in ("p50", "p90", "p99"))
        lines.append(f"| {words[what]} | {cells} |")
    rest = words["serving_rest"].format(
        requests=figures["requests"],
        clients=figures["clients"],
        left=figures["disconnects"],
        rate=f"{figures['output_tokens_per_second']:,.0f}",
        equal=figures["equal_to_offline"],
        equal_of=figures["requests"] - figures["disconnects"],
        wrong=figures["wrong"],
        blocks=f"{figures['kv_blocks_in_use_afterwards']:.0f}",
    )
    return "\n".join([*lines, "", rest, "", _source(served, "serving", words)])


def parallel_table(words: Mapping[str, str]) -> str:
    """Two ranks beside one on the same cores, and what the router finds."""
    if not (RESULTS / "parallel.json").exists():
        return words["no_parallel"]
    found = results("parallel")
    figures = found["figures"]
    few, rates = figures["few"], {name: f"{rate:.1%}" for name, rate in figures["hit_rates"].items()}
    lines = [words["parallel"].format(**figures | {"few": few["requests"]}), "|---|---:|---:|---:|---:|"]
    for name, many in figures["layouts"].items():
        cells = (f"{each['tokens_per_second']:,.0f} | {each['of_one']:.2f}x" for each in (many, few["layouts"][name]))
        lines.append(" | ".join([f"| {words[name]}", *cells]) + " |")
    hits = words["hit_rates"].format(groups=figures["groups"], each=figures["each"], **rates)
    waits = figures["seconds_until_noticed"].values()
    noticed = words["noticed"].format(times=len(waits), first=min(waits), last=max(waits))
    return "\n".join([*lines, "", hits, "", noticed, "", _source(found, "parallel", words)])


def one_process(words: Mapping[str, str]) -> str:
    """What ranks cost an engine that has none."""
    if not (RESULTS / "one_process.json").exists():
        return words["no_parallel"]
    found = results("one_process")
    figures = found["figures"]
    versions = figures["versions"]
    ratios = {
        f"{name}_{short}": versions[name][field]
        for name in ("with", "now")
        for short, field in (("ratio", "of_before"), ("low", "lowest"), ("high", "highest"))
    }
    said = words["one_process"].format(**figures, **ratios, before=versions["before"]["tokens_per_second"])
    return f"{said}\n\n{_source(found, 'one_process', words)}"


def structured_table(words: Mapping[str, str]) -> str:
    """What grammars cost and what forced tokens save."""
    if not (RESULTS / "structured-cpu.json").exists():
        return words["no_structured"]
    found = results("structured-cpu")
    figures = found["figures"]
    rows = [(words[f"masks_{each['temperature']:g}"], f"{each['ratio'] - 1:.1%}") for each in figures["masks"]]
    rows.append((words["new_schema"], f"{figures['new_schemas']['delay_ms']:.0f} ms"))
    rows += [(words["forced"].format(**each), f"{each['speedup']:.2f}x") for each in figures["forced"]]
    lines = [
        f"| {words['structured'].format(**figures)} | |",
        "|---|---:|",
        *(f"| {what} | {how} |" for what, how in rows),
    ]
    return "\n".join([*lines, "", _source(found, "structured-cpu", words)])


def schemas_table(words: Mapping[str, str]) -> str:
    """Which keywords of JSON schemas are followed, and what became of random schemas."""
    if not (RESULTS / "schemas.json").exists():
        return words["no_schemas"]
    found = results("schemas")
    features, drawn = found["figures"]["features"], found["figures"]["random"]

    def names(where: Callable[[dict[str, Any]], bool]) -> str:
        return ", ".join(f"`{name}`" for name, row in features.items() if where(row))

    rows = [
        (words["followed"], names(lambda row: row["refused"] == 0)),
        (words["partly"], names(lambda row: row["refused"] and row["compiled"])),
        (words["refused"], names(lambda row: row["compiled"] == 0)),
        (words["drawn"], words["drawn_ends"].format(**drawn | {"invalid": len(drawn["invalid"])})),
    ]
    lines = [f"| {words['schemas']} | |", "|---|---|", *(f"| {what} | {which or '-'} |" for what, which in rows)]
    return "\n".join([*lines, "", _source(found, "schemas", words)])


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# ---- into the pages ----------------------------------------------------------------------------------------------


def _machine(found: dict[str, Any], words: Mapping[str, str]) -> str:
    cores, model = found["hardware"]["cpu"].split(" x ")
    return words["machine"].format(cores=cores, model=model)


def _source(found: dict[str, Any], name: str, words: Mapping[str, str]) -> str:
    return words["source"].format(
        machine=_machine(found, words), date=found["date"], command=found["command"], file=f"{name}.json"
    )


def fill(page: str, name: str, table: str) -> str:
    """The page with a table between its markers.

    Raises:
        ValueError: it has no such markers.
    """
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    if not re.search(pattern, page, re.DOTALL):
        raise ValueError(f"the page has no pair of markers <!-- {name} --> and <!-- /{name} -->; put them in")
    return re.sub(pattern, lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """The pages that may hold tables, and the language of each."""
    english = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
    chinese = [*sorted((ROOT / "docs" / "zh").glob("*.md")), ROOT / "README.zh.md"]
    return dict.fromkeys(english, "en") | dict.fromkeys(chinese, "zh")


def filled(page: str, tables: Mapping[str, str]) -> str:
    """The page with every table that it has markers for."""
    for name, table in tables.items():
        if f"<!-- {name} -->" in page:
            page = fill(page, name, table)
    return page


def files() -> dict[Path, str]:
    """Every page and every chart as it should be."""
    made = {language: tables(language) for language in WORDS}
    found = {path: filled(path.read_text(encoding="utf-8"), made[language]) for path, language in pages().items()}
    return found | {ASSETS / name: svg for language in WORDS for name, svg in charts(language).items()}


def main() -> None:
    for path, content in files().items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
