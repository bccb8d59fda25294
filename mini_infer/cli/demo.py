"""``mini-infer demo``: the bundled tutor answers, and the engine shows its work."""

import statistics
import time

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from mini_infer import LLM, GenerateOutput, kernels
from mini_infer.cli.chat import Chat
from mini_infer.cli.functions import Functions

ALONE = ("What is a KV cache?", "什么是分页注意力？")
TOGETHER = (
    "What is continuous batching?",
    "Explain chunked prefill.",
    "What does TTFT mean?",
    "What is 7 + 8?",
    "什么是预填充？",
    "什么是连续批处理？",
    "抢占是什么意思？",
    "6 加 9 等于多少？",
)
CALLING = (
    "How large is the KV cache of 4096 tokens with 28 layers, 8 KV heads and head_dim 128?",
    "块大小为 16 时，1000 个词元需要几个块？",
)


def kv_cache_size(layers: int, kv_heads: int, head_dim: int, tokens: int) -> int:
    """Bytes of keys and values in bfloat16.

    Args:
        layers: of the model.
        kv_heads: heads of keys and values in each layer.
        head_dim: numbers in each head.
        tokens: in the cache.
    """
    return 2 * 2 * layers * kv_heads * head_dim * tokens


def count_blocks(tokens: int, block_size: int) -> int:
    """Blocks of the KV cache that so many tokens need.

    Args:
        tokens: to be stored.
        block_size: tokens of each block.
    """
    return -(-tokens // block_size)


def run_demo(console: Console) -> None:
    """Stream two answers, generate eight in one batch, let the model call two functions, and print what it took."""
    with console.status("Loading the bundled model · 正在加载内置模型"):
        llm = LLM()
    shape = llm.model_config
    attention = shape.layers[0].attention
    console.print(
        Panel(
            f"{shape.architecture}: {shape.num_layers} layers, {attention.num_heads} query and "
            f"{attention.num_kv_heads} KV heads of {attention.head_dim}, vocabulary {shape.vocab_size}",
            title="Mini-Infer · tutor",
            expand=False,
        ),
        highlight=False,
    )
    alone = [_stream_answer(console, llm, question) for question in ALONE]

    console.print("\n[bold]Eight at once · 八个问题一起来[/bold]")
    start = time.monotonic()
    outputs = llm.chat([[{"role": "user", "content": question}] for question in TOGETHER])
    seconds = time.monotonic() - start
    for question, output in zip(TOGETHER, outputs, strict=True):
        _print_question(console, question)
        console.print(output.text, style="green", markup=False, highlight=False)

    console.print("\n[bold]It calls functions of yours · 调用你的函数[/bold]")
    for question in CALLING:
        _print_question(console, question)
        Chat(llm, {}, None, console, Functions([kv_cache_size, count_blocks])).take(question)
    console.print()
    console.print(_summary(llm, alone, outputs, seconds))


def _print_question(console: Console, question: str) -> None:
    console.print(f"\n[bold cyan]?[/bold cyan] [bold]{question}[/bold]", highlight=False)


def _stream_answer(console: Console, llm: LLM, question: str) -> float:
    """Print an answer as it comes; the seconds until it began."""
    _print_question(console, question)
    start, first = time.monotonic(), None
    for piece in llm.stream(llm.render_chat([{"role": "user", "content": question}])):
        first = first or time.monotonic()
        console.print(piece, end="", style="green", markup=False, highlight=False, soft_wrap=True)
    console.print()
    return (first or time.monotonic()) - start


def _summary(llm: LLM, alone: list[float], outputs: list[GenerateOutput], seconds: float) -> Table:
    stats = llm.stats()
    batch_tokens = sum(len(output.token_ids) for output in outputs)
    waits = [output.metrics.time_to_first_token or 0.0 for output in outputs]
    table = Table(title="What it took · 用了多少", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("requests · 请求", f"{len(alone) + len(outputs)}")
    table.add_row(
        "tokens computed, generated · 计算与生成的词元", f"{stats.num_computed_tokens}, {stats.num_generated_tokens}"
    )
    table.add_row("TTFT alone · 单个请求的首词元时间", f"{statistics.median(alone) * 1e3:.0f} ms")
    table.add_row("TTFT in the batch · 批内首词元时间", f"{statistics.median(waits) * 1e3:.0f} ms")
    table.add_row("batch throughput · 批吞吐", f"{batch_tokens / seconds:.0f} tokens/s")
    table.add_row(
        "KV blocks now, peak, all · KV 块：当前、峰值、总数",
        f"{stats.num_used_blocks}, {stats.peak_used_blocks}, {stats.num_blocks}",
    )
    for op in kernels.OPS:
        table.add_row(f"kernel {op}", kernels.backend_of(op, llm.device))
    return table
