"""Puts results into the documentation: ``python -m benchmarks.tables``.

A page holds a pair of markers, ``<!-- compare -->`` and ``<!-- /compare -->``; what stands between them is replaced by
a table made of a results file, in the page's language.
"""

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {"en": DOCS / "cpu.md", "zh": DOCS / "zh" / "cpu.md"}

WORDS = {
    "en": {
        "head": "| workload | Mini-Infer | sampled | vLLM | transformers | over vLLM | over transformers "
        "| of the floor |",
        "1 request": "0.6B shape, 1 request, 32 in, 128 out",
        "16 requests": "0.6B shape, 16 requests, 32-256 in, 16-128 out",
        "64 requests": "0.6B shape, 64 requests, 32-64 in and out",
        "4 long prompts": "0.6B shape, 4 requests, 1500 in, 64 out",
        "tiny": "tiny shape, 64 requests, 32-256 in, 16-128 out",
        "rest": "Output tokens per second, medians of {rounds} alternating rounds in bfloat16, on {cpu}, {date}. "
        "Start of the process to the first token (0.6B): {warm} s, with nothing compiled yet {cold} s. Peak memory "
        "with a KV pool of {pool} MB in full use: {peak} MB, {over} times weights and pool.",
        "kernels": "| operation | shape | reference | `cpu` | speedup | rate | of peak |",
        "machine": "bfloat16, {cpu}, {date}; `pytest --benchmark`, `benchmarks/results/kernels-cpu.json`.",
    },
    "zh": {
        "head": "| 负载 | Mini-Infer | 随机采样 | vLLM | transformers | 对 vLLM | 对 transformers | 占下限 |",
        "1 request": "0.6B 规模，1 个请求，输入 32、输出 128",
        "16 requests": "0.6B 规模，16 个请求，输入 32-256、输出 16-128",
        "64 requests": "0.6B 规模，64 个请求，输入、输出各 32-64",
        "4 long prompts": "0.6B 规模，4 个请求，输入 1500、输出 64",
        "tiny": "微型规模，64 个请求，输入 32-256、输出 16-128",
        "rest": "单位为每秒输出词元数，bfloat16，轮流运行 {rounds} 轮取中位数；{cpu}，{date}。"
        "从进程启动到首个词元（0.6B）：{warm} 秒；算子尚未编译时 {cold} 秒。"
        "{pool} MB 的 KV 池全部用满时，内存峰值 {peak} MB，是权重与 KV 池之和的 {over} 倍。",
        "kernels": "| 操作 | 形状 | 参考实现 | `cpu` | 加速比 | 速率 | 占峰值 |",
        "machine": "bfloat16，{cpu}，{date}；`pytest --benchmark`，`benchmarks/results/kernels-cpu.json`。",
    },
}


def compare_table(results: dict[str, Any], words: dict[str, str]) -> str:
    """Mini-Infer beside its peers."""
    figures, lines = results["figures"], [words["head"], "|---|" + "---:|" * 7]
    for model, found in figures["models"].items():
        for workload in found["workloads"]:
            engines = workload["engines"]
            ours = engines["mini-infer"]["tokens_per_second"]

            def rate(label: str, engines: dict[str, Any] = engines) -> str:
                return f"{engines[label]['tokens_per_second']:.1f}" if label in engines else "-"

            def over(label: str, engines: dict[str, Any] = engines) -> str:
                ratio = engines[label]["mini_infer_is_times_as_fast"] if label in engines else None
                return f"{ratio:.2f}x" if ratio else "-"

            share = f"{100 * engines['mini-infer']['share_of_the_machine']:.0f} %"
            name = words["tiny" if model == "tiny" else workload["name"]]
            cells = [name, f"**{ours:.1f}**", rate("mini-infer, sampled"), rate("vllm"), rate("transformers")]
            lines.append("| " + " | ".join([*cells, over("vllm"), over("transformers"), share]) + " |")
    found = figures["models"]["qwen3-0.6b"]
    rest = words["rest"].format(
        rounds=figures["rounds"],
        cpu=results["hardware"]["cpu"],
        date=results["date"],
        warm=found["startup"]["jit_cache_warm_seconds"],
        cold=found["startup"]["jit_cache_cold_seconds"],
        pool=found["memory"]["kv_pool_mb"],
        peak=found["memory"]["peak_memory_mb"],
        over=found["memory"]["over_weights_and_pool"],
    )
    return "\n".join([*lines, "", rest])


def kernels_table(results: dict[str, Any], words: dict[str, str]) -> str:
    """Each operation beside its reference, in bfloat16."""
    rows = [row for row in results["figures"]["kernels"] if row["dtype"] == "bfloat16"]
    before = {(row["op"], row["shape"]): row["microseconds"] for row in rows if row["backend"] == "reference"}
    lines = [words["kernels"], "|---|---|" + "---:|" * 5]
    for row in rows:
        if row["backend"] == "cpu":
            times = f"{before[row['op'], row['shape']]:,.0f} µs | {row['microseconds']:,.0f} µs"
            rate = f"{row['rate']:.3g} {row['unit']} | {row['percent_of_peak']:.0f} %"
            speedup = f"{row['speedup_over_reference']:.1f}x"
            lines.append(f"| `{row['op']}` | {row['shape']} | {times} | {speedup} | {rate} |")
    machine = words["machine"].format(cpu=results["hardware"]["cpu"], date=results["date"])
    return "\n".join([*lines, "", machine])


def fill(page: str, name: str, table: str) -> str:
    """The page with a table between its markers.

    Raises:
        ValueError: it has no such markers.
    """
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    if not re.search(pattern, page, re.DOTALL):
        raise ValueError(f"the page has no pair of markers <!-- {name} --> and <!-- /{name} -->; put them in")
    return re.sub(pattern, lambda found: f"{found[1]}\n{table}\n\n{found[2]}", page, flags=re.DOTALL)


def main() -> None:
    tables = {"compare": ("compare-cpu.json", compare_table), "kernels": ("kernels-cpu.json", kernels_table)}
    for language, path in PAGES.items():
        page = path.read_text(encoding="utf-8")
        for name, (file, table) in tables.items():
            results = json.loads((RESULTS / file).read_text(encoding="utf-8"))
            page = fill(page, name, table(results, WORDS[language]))
        path.write_text(page, encoding="utf-8")
        print(f"wrote {path.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()
