"""The command line: what each command takes. What it does is in the module of its name, imported when it runs."""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import mini_infer
from mini_infer.cli.flags import engine_flags, sampling_flags
from mini_infer.cli.group import Group
from mini_infer.config import EngineConfig
from mini_infer.exceptions import MiniInferError
from mini_infer.structured import StructuredOutputsParams

CHECKOUT = Path(mini_infer.__file__).parents[1]
"""Of the repository, where the package is used from one; the course is there."""

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="Mini-Infer: an LLM inference engine to read, to learn from, and to use.",
    epilog="Start with: mini-infer demo, then mini-infer chat.\n\n"
    "Flags may be written with - or with _. Where --name switches something on, --no-name switches it off.\n\n"
    "Exit status: 0 done, 1 failed, 2 a flag, a configuration or a prompt cannot be used, 130 interrupted.",
    context_settings={"token_normalize_func": lambda name: name.replace("_", "-")},
)

ASK, LOOK, LEARN = "Ask a model", "Look inside", "Learn"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mini-infer {mini_infer.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from; may stand anywhere on the line.")
    ] = False,
) -> None:
    """Group takes care of --debug."""


@app.command(
    rich_help_panel=ASK,
    epilog="mini-infer chat\n\nmini-infer chat Qwen/Qwen3-0.6B --temperature 0.6 --system 'Answer in Chinese.'\n\n"
    "printf 'Hello\\nAnd again\\n' | mini-infer chat",
)
@engine_flags(model_argument=True)
@sampling_flags
def chat(
    config: EngineConfig,
    sampling: dict[str, Any],
    system: Annotated[str | None, typer.Option(help="Begin with this system message.", show_default=False)] = None,
    tools: Annotated[
        Path | None, typer.Option(help="Let the model call the functions of this Python file.", show_default=False)
    ] = None,
) -> None:
    """Talk with a model in the terminal.

    Answers appear as they are generated. Ctrl-C stops an answer, Ctrl-D leaves, /help lists the commands. Where the
    input is no terminal, each of its lines is a message.
    """
    from mini_infer.cli.chat import run_chat

    raise typer.Exit(run_chat(config, sampling, system, tools))


@app.command(
    rich_help_panel=ASK,
    epilog="mini-infer generate 'The KV cache is' --max-tokens 40 --temperature 0\n\n"
    "mini-infer generate --file prompts.jsonl --output answers.jsonl\n\n"
    "cat prompts.txt | mini-infer generate --output - | jq .text",
)
@engine_flags
@sampling_flags
def generate(
    config: EngineConfig,
    sampling: dict[str, Any],
    prompts: Annotated[list[str] | None, typer.Argument(help="What to complete.", show_default=False)] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Take the prompts from here; - is the standard input.", show_default=False),
    ] = None,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Read objects even if the file's name does not end in .jsonl.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Write an object per prompt here; - is the standard output.", show_default=False
        ),
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Name bad prompts and go on without them.")] = False,
    json_schema: Annotated[
        Path | None,
        typer.Option("--json-schema", help="Answer with JSON of the schema in this file.", show_default=False),
    ] = None,
) -> None:
    """Complete prompts: arguments, the lines of a file, or whatever is piped in.

    A text file holds a prompt per line; blank lines do not count. A .jsonl file holds an object per line, with
    "prompt", "prompt_token_ids" or "messages", and sampling options of its own such as "temperature".

    With --output, what is finished is kept: the same command again generates only what is missing.
    """
    from mini_infer.cli.generate import run_generate

    if json_schema is not None:
        sampling["structured_outputs"] = StructuredOutputsParams(json=json_schema.read_text(encoding="utf-8"))
    raise typer.Exit(run_generate(config, sampling, prompts or [], file, jsonl, output, skip_bad))


@app.command(
    rich_help_panel=ASK,
    epilog="mini-infer serve\n\nmini-infer serve Qwen/Qwen3-0.6B --port 8080 --enable-prefix-caching\n\n"
    "curl http://127.0.0.1:8000/v1/models",
)
@engine_flags(model_argument=True)
def serve(
    config: EngineConfig,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine's.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MINI_INFER_API_KEY",
            show_envvar=True,
            show_default=False,
            help="Refuse requests without this key; may be repeated. A variable, unlike a flag, is not seen by others.",
        ),
    ] = None,
    salt_by_key: Annotated[
        bool, typer.Option("--salt-by-key", help="Share no cached prefixes between callers with different keys.")
    ] = False,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What clients call the model; by default its own name. May be repeated.", show_default=False),
    ] = None,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds after which a request is given up.", show_default=False)
    ] = None,
    step_timeout: Annotated[
        float, typer.Option(help="Seconds after which a step is taken to be stuck; twice that ends the server.")
    ] = 300.0,
    cors: Annotated[
        list[str] | None,
        typer.Option(help="Let web pages of this origin in; may be repeated, * is all.", show_default=False),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Answer to this name, too, on a loopback address without a key; may be repeated.", show_default=False
        ),
    ] = None,
    drain_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that running requests have after Ctrl-C or SIGTERM.")
    ] = 30.0,
) -> None:
    """Serve a model over HTTP: OpenAI's endpoints, metrics, and a page for the browser."""
    from mini_infer.serving import serve

    if not api_key and "MINI_INFER_API_KEY" in os.environ:
        api_key = [""]  # set, but to nothing: that is no wish for a server that is open to all
    serve(
        config,
        host=host,
        port=port,
        api_key=api_key or None,
        salt_by_key=salt_by_key,
        served_model_name=served_model_name,
        request_timeout=request_timeout,
        step_timeout=step_timeout,
        cors=tuple(cors or ()),
        allowed_hosts=tuple(allowed_host or ()),
        drain_timeout=drain_timeout,
    )


@app.command(
    rich_help_panel=ASK,
    epilog="MINI_INFER_RANK_KEY=... mini-infer serve --tensor-parallel-size 2 --launch join "
    "--rank-address 192.168.0.1:7000\n\nMINI_INFER_RANK_KEY=... mini-infer rank --join 192.168.0.1:7000",
)
def rank(
    join: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the engine waits for ranks.")],
    device: Annotated[str, typer.Option(help="This rank's: auto, cpu or cuda:N.")] = "auto",
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the engine.")] = 600.0,
) -> None:
    """Be a rank of an engine on this or another machine, until it ends."""
    from mini_infer.executor.launch import call, shared_key
    from mini_infer.executor.rank import serve

    connection, machine = call(join, shared_key(), timeout)
    serve(connection, machine, device)


@app.command(
    rich_help_panel=LOOK,
    epilog="mini-infer info\n\nmini-infer info Qwen/Qwen3-0.6B --dtype bfloat16 --max-model-len 8192\n\n"
    "mini-infer info --json | jq .memory",
)
@engine_flags(model_argument=True)
def info(
    config: EngineConfig,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show a model's shape and how many tokens and sequences fit, without loading its weights."""
    from mini_infer.cli.info import show_info

    show_info(config, Console(), json)


@app.command(
    rich_help_panel=LOOK,
    epilog="mini-infer bench\n\nmini-infer bench Qwen/Qwen3-0.6B --requests 64 --output-len 128 --json",
)
@engine_flags(model_argument=True)
def bench(
    config: EngineConfig,
    requests: Annotated[int, typer.Option(min=1, help="How many requests.")] = 16,
    input_len: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Tokens of each prompt.")] = "32:256",
    output_len: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Tokens to generate for each.")] = "16:128",
    temperature: Annotated[float, typer.Option(min=0, help="How tokens are chosen; 0 takes the likeliest.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep this many of the likeliest; -1 keeps all.")] = -1,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest up to this probability.")] = 1.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure throughput and latency of a model on this machine.

    Prompts are random token ids and answers have the drawn length, whatever the model would say; --seed draws others.
    """
    from mini_infer.cli.bench import Workload, parse_range, run_bench
    from mini_infer.sampling import SamplingParams

    ranges = parse_range("input_len", input_len), parse_range("output_len", output_len)
    sampling = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    run_bench(config, Workload.draw(requests, *ranges, config.seed), sampling, Console(), json)


@app.command(
    rich_help_panel=LOOK,
    epilog="mini-infer quality Qwen/Qwen3-0.6B --quantization int4\n\n"
    "mini-infer quality model-Q4_K_M.gguf --against model-F16.gguf --json",
)
@engine_flags(model_argument=True)
def quality(
    config: EngineConfig,
    against: Annotated[
        str | None,
        typer.Option(help="The model that is right; by default the same, not quantised.", show_default=False),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="The text; by default one that comes along.", show_default=False)
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens that are read together.")] = 512,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what quantisation costs: perplexity, KL divergence, the share of equal choices, bytes per weight.

    Both models read the same text. Figures compare within one text and one version of this program alone.
    """
    from mini_infer.cli.quality import show_quality

    show_quality(config, against, text, window, Console(), json)


@app.command(
    rich_help_panel=LOOK,
    epilog="mini-infer quantize Qwen/Qwen3-0.6B qwen3-int8\n\nmini-infer chat qwen3-int8",
)
def quantize(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or Hub name.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write to.", show_default=False)],
    quantization: Annotated[str, typer.Option("--quantization", help="int8 or int4.")] = "int8",
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of the Hub repository.", show_default=False)
    ] = None,
) -> None:
    """Write a quantised copy of a checkpoint, in compressed-tensors' format, which vLLM reads, too."""
    from mini_infer.models import resolve_model
    from mini_infer.models.quantization.writing import quantize_checkpoint

    config = EngineConfig(model=model, revision=revision, quantization=quantization)
    quantize_checkpoint(resolve_model(str(config.model), revision), target, quantization)


@app.command(rich_help_panel=ASK)
def demo(
    diffusion: Annotated[
        bool, typer.Option("--diffusion", help="Show how a diffusion model's answers fill in, step by step.")
    ] = False,
    model: Annotated[
        str | None, typer.Option(metavar="PATH|NAME", help="With --diffusion: the model; else the bundled one.")
    ] = None,
) -> None:
    """Ask the bundled model in English and in Chinese, then run a batch and show what the engine did."""
    if diffusion:
        from mini_infer.cli.canvas import run_canvas_demo

        run_canvas_demo(Console(), model)
        return
    if model is not None:
        raise typer.BadParameter("only --diffusion takes one; mini-infer chat MODEL talks to any", param_hint="--model")
    from mini_infer.cli.demo import run_demo

    run_demo(Console())


@app.command(rich_help_panel=LOOK)
def kernels(
    kernel_backend: Annotated[
        str | None, typer.Option(metavar="[FILE:]NAME", help="What if an engine asked for this backend.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure anew which product is the fastest on this CPU.")
    ] = False,
) -> None:
    """Show which backend runs each operation on this machine, and why the others do not."""
    from mini_infer.cli.kernels import measure_products, show_kernels

    if measure:
        measure_products(Console())
    else:
        show_kernels(Console(), kernel_backend)


@app.command(
    rich_help_panel=LOOK,
    epilog="mini-infer generate --trace run.json --file prompts.txt\n\nmini-infer trace run.json",
)
def trace(
    path: Annotated[Path, typer.Argument(help="What --trace wrote.", show_default=False)],
    rows: Annotated[int, typer.Option(min=1, help="Most sequences in the timeline.")] = 40,
) -> None:
    """Draw a trace: totals, who ran when, and who held which KV block. Perfetto opens the same file."""
    from mini_infer.cli.trace import show_trace

    show_trace(path, Console(), rows)


@app.command(
    rich_help_panel=LEARN,
    add_help_option=False,  # the course has a help of its own, and its own arguments
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def learn(context: typer.Context) -> None:
    """Work through the course: list its chapters, begin an exercise, have the answer graded. · 学习课程并批改练习"""
    if not (CHECKOUT / "tutorials" / "learn.py").is_file():
        raise MiniInferError(
            "the course is part of the repository and not of the installed package; clone the repository and run "
            "pip install -e '.[dev]' in it · 课程在代码仓库里，不在安装包里；请克隆仓库，并在其中运行 "
            "pip install -e '.[dev]'"
        )
    sys.path.insert(0, str(CHECKOUT))
    course = import_module("tutorials.learn")
    raise typer.Exit(course.app(context.args, prog_name="mini-infer learn", standalone_mode=False) or 0)
