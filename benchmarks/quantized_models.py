"""Quantised weights beside our own bfloat16, llama.cpp and OpenVINO: ``python -m benchmarks.quantized_models``.

Output tokens per second of greedy decoding. Models: SmolLM2-135M-Instruct as its file is, and its numbers again in
Q8_0, Q4_0 and Q4_K; and random weights in the shape of Qwen3-0.6B, in bfloat16, int8 and int4. With ``--llama-cpp
PYTHON``, an interpreter of an environment that has llama-cpp-python and gguf, the same files run there (the 0.6B shape
in Q8_0 and Q4_0), and its quantiser makes Q4_K; with ``--openvino PYTHON``, one that has openvino-genai and
optimum-intel, the shape runs there with weights in int8.

The engines of one model are loaded together and take turns, each stopped while another works; of its rounds the
fastest counts. All of it takes some ten minutes on two cores; ``--only`` and ``--toy`` are for less.
"""

import argparse
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import smollm2
from benchmarks.report import RESULTS, processor, save
from benchmarks.shapes import make_random_checkpoint
from benchmarks.workers.channel import Done
from benchmarks.workers.driver import Engine, Worker
from mini_infer.models import resolve_model


class Load(NamedTuple):
    """Requests at once, tokens in, tokens out."""

    requests: int
    inputs: int
    outputs: int


LOADS: Mapping[str, Mapping[str, Load]] = {
    "SmolLM2": {"1 request": Load(1, 32, 96), "8 requests": Load(8, 32, 64)},
    "0.6B": {
        "1 request": Load(1, 32, 48),
        "16 requests": Load(16, 32, 32),
        "64 requests": Load(64, 32, 16),
        "4 × 1500 in": Load(4, 1500, 8),
    },
}
TOY = Load(1, 8, 4)
PEERS_ALONE = ("1 request", "8 requests")
"""The loads that peers are asked for: where the others stand is known from `benchmarks.compare`."""

FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K": 14}
"""As llama.cpp numbers what a file is made of mostly; the last is Q4_K_S."""

QUANTIZE = """
import sys, llama_cpp
parameters = llama_cpp.llama_model_quantize_default_params()
parameters.ftype, parameters.pure = int(sys.argv[3]), False
raise SystemExit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), parameters))
"""


class Case(NamedTuple):
    """A model's numbers in one form, and an engine that computes with them."""

    weights: str
    engine: Engine
    model: Path


def ours(weights: str, model: Path, threads: int, **options: Any) -> Case:
    fields = {"max_model_len": 2048, "num_gpu_blocks": 1024, "max_num_seqs": 64, "dtype": "bfloat16", **options}
    return Case(weights, Engine("Mini-Infer", "ours", fields, environment={"OMP_NUM_THREADS": str(threads)}), model)


def peer(label: str, module: str, python: str, weights: str, model: Path, threads: int, **options: Any) -> Case:
    fields = {"dtype": "bfloat16", "threads": threads, **options}
    return Case(weights, Engine(label, module, fields, python, {"OMP_NUM_THREADS": str(threads)}), model)


def quantized_by(python: str, plain: Path, kind: str) -> Path:
    """A GGUF file in another type, by llama.cpp's own quantiser."""
    file = plain.with_name(f"{plain.stem}-{kind}.gguf")
    command = [python, "-c", QUANTIZE, str(plain), str(file), str(FILE_TYPES[kind])]
    subprocess.run(command, check=True, capture_output=True)
    return file


def in_gguf(python: str, checkpoint: Path) -> Path:
    """A checkpoint in bfloat16 as one GGUF file, by the worker's own converter."""
    program = "import sys; from benchmarks.workers.llamacpp import converted; print(converted(sys.argv[1]))"
    done = subprocess.run([python, "-c", program, str(checkpoint)], check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


def smollm2_cases(scratch: Path, llama_cpp: str | None, threads: int) -> Iterator[Case]:
    file = resolve_model("smollm2")
    plain = smollm2.dequantized(scratch / "smollm2")
    yield ours("bfloat16", plain, threads, tokenizer="smollm2")
    kinds = ("Q8_0", "Q4_0", "Q4_K") if llama_cpp else ("Q8_0", "Q4_0")
    source = in_gguf(llama_cpp, plain) if llama_cpp else None
    files = {"Q4_1 + Q8_0": file}
    for kind in kinds:
        if llama_cpp and source:
            files[kind] = quantized_by(llama_cpp, source, kind)
        else:
            files[kind] = smollm2.requantized(scratch / f"{kind}.gguf", kind)
    for kind, path in files.items():
        yield ours(kind, path, threads, tokenizer="smollm2")
        if llama_cpp:
            yield peer("llama.cpp", "llamacpp", llama_cpp, kind, path, threads)


def shape_cases(shape: str, scratch: Path, llama_cpp: str | None, openvino: str | None, threads: int) -> Iterator[Case]:
    plain = make_random_checkpoint(scratch / shape, shape)
    for scheme in (None, "int8", "int4"):
        yield ours(scheme or "bfloat16", plain, threads, quantization=scheme)
    if llama_cpp:
        source = in_gguf(llama_cpp, plain)
        for kind in ("Q8_0", "Q4_0"):
            yield peer("llama.cpp", "llamacpp", llama_cpp, kind, quantized_by(llama_cpp, source, kind), threads)
    if openvino:
        yield peer("OpenVINO", "openvino", openvino, "int8", plain, threads, in_int8=True)


def measure(cases: list[Case], loads: Mapping[str, Load], rounds: int) -> list[dict[str, Any]]:
    """Each engine's best rate under each load; the engines take turns."""
    rates: dict[tuple[str, str, str], list[float]] = {}
    with ExitStack() as stack:
        workers = [(case, stack.enter_context(Worker(case.engine, str(case.model)))) for case in cases]
        for number in range(rounds + 1):
            for label, load in loads.items():
                for case, worker in workers:
                    if case.engine.label != "Mini-Infer" and label not in PEERS_ALONE:
                        continue
                    prompts = [
                        [(7 * i + 13 * j + 29 * number) % 1000 + 5 for j in range(load.inputs)]
                        for i in range(load.requests)
                    ]
                    outputs = [load.outputs if number else 2] * load.requests  # the first round warms up
                    done = Done(*worker.ask("run", prompts, outputs, 0.0, -1, 1.0))
                    if number:
                        rate = load.requests * load.outputs / done.seconds
                        rates.setdefault((case.weights, label, case.engine.label), []).append(rate)
                        print(case.weights, label, case.engine.label, f"{rate:.1f}", flush=True)
    return [
        {"weights": weights, "load": label, "engine": engine, "tokens_per_second": max(each), "rounds": each}
        for (weights, label, engine), each in rates.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has llama-cpp-python and gguf")
    parser.add_argument("--openvino", metavar="PYTHON", help="one that has openvino-genai and optimum-intel")
    parser.add_argument("--only", choices=tuple(LOADS), help="one of the models")
    parser.add_argument("--toy", action="store_true", help="few tokens, and a tiny shape: to see that all of it runs")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    models: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, loads in LOADS.items():
            if options.only not in (None, name):
                continue
            scratch = Path(directory) / name
            if name == "SmolLM2":
                cases = list(smollm2_cases(scratch, options.llama_cpp, options.threads))
            else:
                shape = "tiny" if options.toy else "qwen3-0.6b"
                cases = list(shape_cases(shape, scratch, options.llama_cpp, options.openvino, options.threads))
            models[name] = measure(cases, dict.fromkeys(loads, TOY) if options.toy else loads, options.rounds)
    given = [f"--threads {options.threads}"]
    given += [f"--{peer} PYTHON" for peer in ("llama-cpp", "openvino") if getattr(options, peer.replace("-", "_"))]
    command = f"python -m benchmarks.quantized_models {' '.join(given)}"
    figures = {"threads": options.threads, "loads": {name: dict(LOADS[name]) for name in models}, "models": models}
    print(save(f"quantized-models-cpu-{processor()}", command, figures, options.output))


if __name__ == "__main__":
    main()
