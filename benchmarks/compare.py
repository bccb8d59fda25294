"""Mini-Infer and what people would use instead, side by side on the CPU: ``python -m benchmarks.compare``.

One seeded workload goes through every engine. Each engine lives in a process of its own and is stopped unless it is its
turn; after a warm-up that does not count, the rounds alternate between them, so that a machine that changes its speed
changes it for all. For the same reason its limits are measured around every single run. Reported are medians; a ratio
is the median of the rounds' own ratios, and so is the share of the limit.

``--table`` runs the workloads that the README cites, and writes one results file with a plot beside it.
"""

import shlex
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import compare_report
from benchmarks.environments import PACKAGES, make_environment
from benchmarks.report import RESULTS, processor, save
from benchmarks.roofline import Machine, floor, multiplied_as
from benchmarks.shapes import SHAPES, SMOLLM2, make_checkpoint
from benchmarks.workers.channel import Done
from benchmarks.workers.driver import Engine, Worker, WorkerError
from mini_infer.cli.bench import Range, Workload, parse_range
from mini_infer.exceptions import InvalidConfigError
from mini_infer.memory.cache_spec import block_bytes
from mini_infer.models import read_config

NEAR_TIE = 1e-4
"""Two logits this close may change places in float32."""

WARM_UP_TOKENS = 8
"""Outputs of the round that does not count."""

GREEDY = (0.0, -1, 1.0)
SAMPLED = (0.8, 50, 0.95)

Sampling = tuple[float, int, float]
"""temperature, top_k, top_p"""

SEATS = 256
"""Sequences that run at once at most: the default of Mini-Infer and of vLLM."""

console = Console(width=max(120, Console().width))


@dataclass(frozen=True)
class Scenario:
    """One workload, and who takes part.

    Attributes:
        name: what tables call it.
        num_requests, input_len, output_len: what is drawn, with seed 0.
        sampling: how tokens are chosen.
        peers: modules of the peers that take part.
        sampled_too: Mini-Infer runs it once more in every round, sampling.
    """

    name: str
    num_requests: int
    input_len: Range
    output_len: Range
    sampling: Sampling = GREEDY
    peers: tuple[str, ...] = ("hf_generate", "hf_continuous", "vllm_offline", "openvino", "llamacpp")
    sampled_too: bool = False

    @property
    def workload(self) -> Workload:
        return Workload.draw(self.num_requests, self.input_len, self.output_len)


PEERS = {
    "transformers": "hf_generate",
    "transformers-batch": "hf_continuous",
    "vllm": "vllm_offline",
    "openvino": "openvino",
    "llama.cpp": "llamacpp",
}
"""Who can be measured beside Mini-Infer, and the worker that runs it."""

ENGINES = ("vllm_offline", "openvino", "llamacpp")
"""Those that are made for speed."""
TABLE = {
    "qwen3-0.6b": (
        Scenario("16 requests", 16, (32, 256), (16, 128), sampled_too=True),
        Scenario("1 request", 1, (32, 32), (128, 128), peers=ENGINES, sampled_too=True),
        Scenario("64 requests", 64, (32, 64), (32, 64), peers=ENGINES, sampled_too=True),
        Scenario("4 long prompts", 4, (1500, 1500), (64, 64), peers=ENGINES, sampled_too=True),
    ),
    "tiny": (Scenario("64 requests", 64, (32, 256), (16, 128), sampled_too=True),),
    SMOLLM2: (Scenario("8 chat requests", 8, (64, 256), (64, 128), peers=ENGINES, sampled_too=True),),
}


EXTRAS = "qwen3-0.6b"
"""The shape whose memory and start-up the table shows; beside the tiny one, libraries would be all there is to see."""


@dataclass(frozen=True)
class Contender:
    """A worker and how it samples; Mini-Infer may appear twice."""

    label: str
    worker: Worker
    sampling: Sampling

    def run(self, workload: Workload, most_outputs: int | None = None) -> Done:
        num_outputs = [min(n, most_outputs or n) for n in workload.num_outputs]
        done = Done(*self.worker.ask("run", workload.prompts, num_outputs, *self.sampling))
        made = [len(token_ids) for token_ids in done.token_ids]
        if made != num_outputs:
            raise self.worker.error(f"generated {sum(made)} tokens instead of {sum(num_outputs)}")
        return done


@dataclass(frozen=True)
class Run:
    """What a contender did in one round, and what the machine could do meanwhile.

    Attributes:
        done: times and tokens.
        machine: the better of just before and just after.
        floor_seconds: the least time that the workload takes on such a machine.
    """

    done: Done
    machine: Machine
    floor_seconds: float


# ---- one scenario ------------------------------------------------------------------------------------------------


def compare(scenario: Scenario, workers: Sequence[Worker], model: Path, rounds: int, dtype: str) -> dict[str, Any]:
    """Run a scenario in alternating rounds, measuring what the machine can do before and after each run.

    A peer that fails is left out, and the result says why.
    """
    workload, precision = scenario.workload, getattr(torch, dtype)
    shape = read_config(model)
    contenders = [
        Contender(worker.engine.label, worker, scenario.sampling)
        for worker in workers
        if worker.engine.module in ("ours", *scenario.peers)
    ]
    if scenario.sampled_too:
        contenders += [
            Contender(f"{worker.engine.label}, sampled", worker, SAMPLED)
            for worker in workers
            if worker.engine.module == "ours"
        ]
    failed: dict[str, str] = {}
    runs: dict[str, list[Run]] = {contender.label: [] for contender in contenders}
    for round_ in range(rounds + 1):
        for contender in [c for c in contenders if c.label not in failed]:
            what = f"round {round_} of {rounds}" if round_ else "warming up"
            before = Machine.measure(torch.device("cpu"), precision) if round_ else None
            with console.status(f"{scenario.name}: {contender.label}, {what}"):
                try:
                    done = contender.run(workload, None if round_ else WARM_UP_TOKENS)
                except WorkerError as error:
                    failed[contender.label] = error.reason
                    console.print(f"left out: {error}", style="red", soft_wrap=True)
                    continue
            if before is not None:
                machine = before.best(Machine.measure(torch.device("cpu"), precision))
                least = floor(shape, precision.itemsize, workload, machine, SEATS)
                runs[contender.label].append(Run(done, machine, least.seconds))
    ran = [contender for contender in contenders if contender.label not in failed]
    if not ran or ran[0] is not contenders[0]:
        raise typer.Exit(1)
    with console.status(f"{scenario.name}: comparing tokens"):
        agreements = _agreements(workload, ran, runs, dtype)
    ours = runs[ran[0].label]
    bytes_per_second = statistics.median(run.machine.bytes_per_second for run in ours)
    flops_per_second = statistics.median(run.machine.flops_per_second for run in ours)
    least = floor(shape, precision.itemsize, workload, Machine(bytes_per_second, flops_per_second), SEATS)
    return {
        "name": scenario.name,
        "requests": scenario.num_requests,
        "input_tokens": workload.num_input_tokens,
        "output_tokens": workload.num_output_tokens,
        "sampling": dict(zip(("temperature", "top_k", "top_p"), scenario.sampling, strict=True)),
        "machine": {
            "read_gb_per_second": round(bytes_per_second / 1e9, 1),
            "read_gb_per_second_of_each_round": [round(run.machine.bytes_per_second / 1e9, 1) for run in ours],
            "matrix_tflops": round(flops_per_second / 1e12, 3),
            "limit": least.limit,
            "floor_seconds": round(least.seconds, 3),
            "floor_tokens_per_second": round(workload.num_output_tokens / least.seconds, 1),
        },
        "engines": {c.label: _figures(c, workload, runs[c.label], ours) | agreements.get(c.label, {}) for c in ran},
        "failed": failed,
    }


def _figures(contender: Contender, workload: Workload, runs: list[Run], ours: list[Run]) -> dict[str, Any]:
    def median(of: Callable[[Done], float]) -> float:
        return statistics.median(of(run.done) for run in runs)

    def inter_token(run: Done) -> float:
        """The median request's mean."""
        return statistics.median(
            (last - first) / (n - 1) if n > 1 else 0.0
            for first, last, n in zip(run.first, run.last, workload.num_outputs, strict=True)
        )

    peak = contender.worker.peak_memory()
    return {
        "tokens_per_second": round(median(lambda run: workload.num_output_tokens / run.seconds), 2),
        "tokens_per_second_of_each_round": [round(workload.num_output_tokens / run.done.seconds, 2) for run in runs],
        "mini_infer_is_times_as_fast": round(
            statistics.median(run.done.seconds / own.done.seconds for run, own in zip(runs, ours, strict=True)), 3
        ),
        "share_of_the_machine": round(statistics.median(run.floor_seconds / run.done.seconds for run in runs), 3),
        "ttft_mean_seconds": round(median(lambda run: statistics.mean(run.first)), 4),
        "ttft_p50_seconds": round(median(lambda run: statistics.median(run.first)), 4),
        "itl_seconds": round(median(inter_token), 5),
        "version": contender.worker.version,
        "dtype": contender.worker.engine.options["dtype"],
        "peak_memory_mb": peak and round(peak / 1e6),
        "ready_seconds": round(contender.worker.ready_seconds, 2),
        "first_token_seconds": round(contender.worker.first_token_seconds, 2),
    }


def _agreements(
    workload: Workload, contenders: list[Contender], runs: dict[str, list[Run]], dtype: str
) -> dict[str, dict[str, Any]]:
    """How far each engine's greedy tokens are those of transformers, and how sure transformers was where they part."""
    judge = next((c for c in contenders if c.worker.engine.module == "hf_generate" and c.sampling[0] == 0), None)
    if judge is None:
        return {}
    truth = runs[judge.label][0].done.token_ids
    found = {}
    for contender in contenders:
        if contender is judge or contender.sampling[0] > 0:
            continue
        shared, gaps = 0, []
        for prompt, right, made in zip(workload.prompts, truth, runs[contender.label][0].done.token_ids, strict=True):
            same = next((i for i, (a, b) in enumerate(zip(right, made, strict=True)) if a != b), len(right))
            shared += same
            if same < len(right):
                gaps.append(judge.worker.ask("gap", prompt + right[:same]))
        found[contender.label] = {
            "agreement": {
                "identical_requests": len(truth) - len(gaps),
                "share_of_tokens_before_the_first_difference": round(shared / workload.num_output_tokens, 4),
                "largest_logit_gap_at_a_first_difference": max(gaps, default=None),
                "agrees": agrees(gaps, dtype),
            }
        }
    return found


def agrees(gaps: list[float], dtype: str) -> bool | None:
    """Whether tokens count as equal, given the gap between the two best logits at each first difference.

    In float64 none may differ, in float32 only near ties; in narrower types tokens are no test, so None.
    """
    if dtype == "float64":
        return not gaps
    return all(gap < NEAR_TIE for gap in gaps) if dtype == "float32" else None


# ---- memory and start-up -----------------------------------------------------------------------------------------


def measure_memory(engine: Engine, model: Path, pool_bytes: int, dtype: str) -> dict[str, Any]:
    """Peak memory of a process whose KV pool has been used to the last block, beside weights and pool alone."""
    block_size = 16
    per_block = block_bytes(read_config(model).cache_specs(getattr(torch, dtype)), block_size)
    num_blocks = pool_bytes // per_block
    options = {**engine.options, "num_gpu_blocks": num_blocks, "block_size": block_size}
    prompt_len, output_len = 1024, 64
    num_requests = -(-num_blocks * block_size // prompt_len) + 1  # more than fit, so that the pool runs full
    workload = Workload.draw(num_requests, (prompt_len, prompt_len), (output_len, output_len))
    with Worker(Engine(engine.label, engine.module, options, engine.python, engine.environment), str(model)) as worker:
        extra = Contender(engine.label, worker, GREEDY).run(workload).extra
        peak = worker.peak_memory()
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    pool = num_blocks * per_block
    return {
        "weights_mb": round(weights / 1e6),
        "kv_pool_mb": round(pool / 1e6),
        "share_of_pool_touched": round(extra["peak_used_blocks"] / extra["num_blocks"], 3),
        "peak_memory_mb": peak and round(peak / 1e6),
        "over_weights_and_pool": peak and round(peak / (weights + pool), 3),
    }


def measure_startup(engine: Engine, model: Path, rounds: int) -> dict[str, Any]:
    """Seconds from the start of the process to the first token, with an empty JIT cache and with a filled one."""
    seconds: dict[str, list[float]] = {"jit_cache_cold": [], "jit_cache_warm": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            environment = {**engine.environment, "NUMBA_CACHE_DIR": cache}
            for state in seconds:
                fresh = Engine(engine.label, engine.module, engine.options, engine.python, environment)
                with Worker(fresh, str(model)) as worker:
                    seconds[state].append(worker.first_token_seconds)
    return {f"{state}_seconds": round(statistics.median(values), 2) for state, values in seconds.items()}


# ---- the whole ---------------------------------------------------------------------------------------------------


@contextmanager
def start(engines: Sequence[Engine], model: Path) -> Iterator[list[Worker]]:
    """The engines with the model loaded, one after the other, so that each loads alone. A peer may fail."""
    for path in model.glob("*.safetensors"):  # all find it in the page cache
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
    with ExitStack() as stack:
        workers = []
        for engine in engines:
            with console.status(f"{model.name}: {engine.label} loads"):
                try:
                    workers.append(stack.enter_context(Worker(engine, str(model))))
                except WorkerError as error:
                    if engine is engines[0]:
                        raise
                    console.print(f"left out: {error}", style="red", soft_wrap=True)
        yield workers


def random_checkpoint(shape: str) -> Path:
    """A checkpoint of a named shape, made once and kept among the temporary files."""
    path = Path(tempfile.gettempdir()) / "mini-infer-checkpoints" / shape
    if not (path / "tokenizer_config.json").exists():  # which is written last
        with console.status(f"making a checkpoint of the shape {shape} in {path}"):
            make_checkpoint(path, shape)
    return path


def main(
    shape: Annotated[str, typer.Option(help=f"Random model of this shape: {', '.join(SHAPES)}.")] = "qwen3-0.6b",
    model: Annotated[Path | None, typer.Option(help="Checkpoint directory, instead of a random one.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of the workload.")] = 16,
    input_len: Annotated[str, typer.Option(help="Prompt tokens, LOW:HIGH.")] = "32:256",
    output_len: Annotated[str, typer.Option(help="Generated tokens, LOW:HIGH.")] = "16:128",
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="-1 keeps all.")] = -1,
    top_p: Annotated[float, typer.Option(help="1 keeps all.")] = 1.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, after one that does not count.")] = 3,
    dtype: Annotated[str, typer.Option(help="Of weights and activations.")] = "bfloat16",
    ours: Annotated[
        list[str] | None, typer.Option(help="Kernel backend of Mini-Infer; several run side by side.")
    ] = None,
    peer: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PEERS)}, or none; all by default.")] = None,
    vllm_python: Annotated[Path | None, typer.Option(help="Interpreter of an environment that has vLLM.")] = None,
    openvino_python: Annotated[Path | None, typer.Option(help="The same for OpenVINO GenAI.")] = None,
    llamacpp_python: Annotated[Path | None, typer.Option(help="The same for llama.cpp.")] = None,
    make_env: Annotated[
        tuple[str, Path] | None,
        typer.Option(help=f"Make such an environment, of {', '.join(PACKAGES)}, and end.", metavar="PEER PATH"),
    ] = None,
    max_model_len: Annotated[int, typer.Option(help="Of Mini-Infer and vLLM.")] = 4096,
    memory: Annotated[bool, typer.Option(help="Also: peak memory with a KV pool of 512 MB, all of it used.")] = False,
    startup: Annotated[bool, typer.Option(help="Also: from process start to first token.")] = False,
    table: Annotated[bool, typer.Option(help="All workloads that the README cites, memory and start-up too.")] = False,
    name: Annotated[str | None, typer.Option(help="Write benchmarks/results/compare-NAME.json and .png.")] = None,
) -> None:
    if make_env is not None:
        if make_env[0] not in PACKAGES:
            raise typer.BadParameter(f"{make_env[0]!r} is none of {', '.join(PACKAGES)}")
        console.print(f"its interpreter is {make_environment(*make_env)}", soft_wrap=True)
        return
    pythons = {"vllm": vllm_python, "openvino": openvino_python, "llama.cpp": llamacpp_python}
    try:
        scenario = Scenario(
            f"{requests} requests",
            requests,
            parse_range("input_len", input_len),
            parse_range("output_len", output_len),
            (temperature, top_k, top_p),
        )
    except InvalidConfigError as error:
        raise typer.BadParameter(str(error)) from error
    for given, known in (([shape], SHAPES), (peer or [], (*PEERS, "none"))):
        for value in given:
            if value not in known:
                raise typer.BadParameter(f"{value!r} is none of {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no stopped process stays behind
    engines = _engines(ours, peer, pythons, dtype, max_model_len)
    scenarios = TABLE if table else {shape: (scenario,)}

    figures: dict[str, Any] = {"dtype": dtype, "rounds": rounds, "models": {}}
    for model_name, some in scenarios.items():
        path = model if model and not table else random_checkpoint(model_name)
        found: dict[str, Any] = {"workloads": []}
        with start(engines, path) as workers:
            for each in some:
                found["workloads"].append(compare(each, workers, path, rounds, dtype))
                compare_report.show(path.name, found["workloads"][-1], console)
        extras = table and model_name == EXTRAS
        if memory or extras:
            with console.status("memory"):
                found["memory"] = measure_memory(engines[0], path, 512 << 20, dtype)
        if startup or extras:
            with console.status("start-up"):
                found["startup"] = measure_startup(engines[0], path, rounds)
        compare_report.show_rest(path.name, found, console)
        figures["models"][path.name] = found
    if table and name is None:
        name = f"cpu-{processor()}"
    if name is not None:
        paths = {str(path) for path in (*pythons.values(), model) if path is not None}
        arguments = ["PATH" if argument in paths else argument for argument in sys.argv[1:]]
        command = shlex.join(["python", "-m", "benchmarks.compare", *arguments])
        written = save(f"compare-{name}", command, figures, RESULTS)
        console.print(f"written to {written} and {compare_report.plot(figures, written.with_suffix('.png'))}")


def _engines(
    ours: list[str] | None, peer: list[str] | None, pythons: Mapping[str, Path | None], dtype: str, max_model_len: int
) -> list[Engine]:
    own = {"dtype": dtype, "max_model_len": max_model_len, "device": "cpu"}
    # Where PyTorch has no fast product of bfloat16, who computes with PyTorch would stand still.
    wide = str(multiplied_as(torch.device("cpu"), getattr(torch, dtype))).removeprefix("torch.")
    engines = [
        Engine(f"mini-infer ({backend})", "ours", own | {"kernel_backend": backend}) for backend in ours or []
    ] or [Engine("mini-infer", "ours", own)]
    for label, module in PEERS.items():
        if peer and label not in peer:
            continue
        if label not in pythons:
            engines.append(Engine(label, module, {"dtype": wide}))
            continue
        python = pythons[label]
        if python is None:
            flag = f"--{label.replace('.', '')}-python"
            console.print(f"{label} is not measured: name the interpreter of its environment with {flag}")
        elif label == "vllm":
            options = {"dtype": wide, "max_model_len": max_model_len}
            engines.append(Engine(label, module, options, str(python), {"VLLM_CPU_KVCACHE_SPACE": "4"}))
        else:
            engines.append(Engine(label, module, {"dtype": dtype, "threads": torch.get_num_threads()}, str(python)))
    return engines


if __name__ == "__main__":
    typer.run(main)
