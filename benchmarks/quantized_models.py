"""Quantised weights, beside our own bfloat16 and beside llama.cpp: ``python -m benchmarks.quantized_models``.

Output tokens per second of greedy decoding, one engine after the other in each round, each in a process of its own.
Models: SmolLM2-135M-Instruct as its file is and in Q8_0 and Q4_0; and random weights in the shape of Qwen3-0.6B, as
bfloat16, int8 and int4. With ``--llama-cpp PYTHON``, an interpreter of an environment that has llama-cpp-python, the
same GGUF files run there as well, one request at a time, as that package does.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import smollm2
from benchmarks.report import RESULTS, hardware, save
from benchmarks.shapes import make_random_checkpoint
from mini_infer.models import resolve_model

OURS = """
import json, sys, time
from mini_infer import LLM, SamplingParams
model, quantization, requests, input_len, output_len = json.loads(sys.argv[1])
with LLM(model, quantization=quantization, dtype="bfloat16", max_model_len=2048, num_gpu_blocks=8192, seed=0,
         max_num_seqs=max(requests, 1), tokenizer=TOKENIZER) as llm:
    prompts = [[(7 * i + 13 * j) % 1000 + 5 for j in range(input_len)] for i in range(requests)]
    sampling = SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True)
    llm.generate(prompts, sampling, use_tqdm=False)
    began = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    print(json.dumps(requests * output_len / (time.perf_counter() - began)))
"""

THEIRS = """
import json, os, sys, time
from llama_cpp import Llama
model, _, requests, input_len, output_len = json.loads(sys.argv[1])
llm = Llama(model, n_ctx=2048, n_threads=int(os.environ["THREADS"]), n_threads_batch=int(os.environ["THREADS"]),
            verbose=False)
def run():
    for i in range(requests):
        llm.reset()
        tokens = [(7 * i + 13 * j) % 1000 + 5 for j in range(input_len)]
        for count, _ in enumerate(llm.generate(tokens, temp=0.0, reset=True), 1):
            if count == output_len:
                break
run()
began = time.perf_counter()
run()
print(json.dumps(requests * output_len / (time.perf_counter() - began)))
"""

WORKLOADS = {"1 request": (1, 32, 64), "16 requests": (16, 32, 64), "64 requests": (64, 32, 32)}


def measure(python: str, program: str, arguments: list[Any], threads: int) -> float:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "THREADS": str(threads)}
    done = subprocess.run(
        [python, "-c", program, json.dumps(arguments)], env=environment, check=True, capture_output=True, text=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has llama-cpp-python")
    parser.add_argument("--only", choices=("smollm2", "0.6b"), help="one of the models")
    parser.add_argument("--workloads", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cases: list[tuple[str, str, str | None, bool]] = []
        if options.only != "0.6b":
            cases.append(("SmolLM2 bfloat16", str(smollm2.dequantized(Path(scratch) / "plain")), None, False))
            cases.append(("SmolLM2 Q4_1 + Q8_0", str(resolve_model("smollm2")), None, True))
            for kind in ("Q8_0", "Q4_0"):
                file = smollm2.requantized(Path(scratch) / f"{kind}.gguf", kind)
                cases.append((f"SmolLM2 {kind}", str(file), None, True))
        if options.only != "smollm2":
            shape = str(make_random_checkpoint(Path(scratch) / "0.6b", "qwen3-0.6b"))
            cases += [(f"0.6B {scheme or 'bfloat16'}", shape, scheme, False) for scheme in (None, "int8", "int4")]
        rates: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for name, model, scheme, is_gguf in cases:
                for label in options.workloads:
                    arguments = [model, scheme, *WORKLOADS[label]]
                    tokenizer = "smollm2" if name.startswith("SmolLM2") else None
                    ours = OURS.replace("TOKENIZER", repr(tokenizer))
                    rates.setdefault(f"{name}, {label}", []).append(
                        measure(sys.executable, ours, arguments, options.threads)
                    )
                    if options.llama_cpp and is_gguf:
                        rates.setdefault(f"{name}, {label}, llama.cpp", []).append(
                            measure(options.llama_cpp, THEIRS, arguments, options.threads)
                        )
                    print(name, label, rates[f"{name}, {label}"][-1], flush=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    processor = re.sub(r"[^a-z0-9]+", "-", hardware()["cpu"].split(" x ")[-1].lower()).strip("-")
    figures = {"threads": options.threads, "rounds": options.rounds, "tokens_per_second": medians, "all": rates}
    command = f"python -m benchmarks.quantized_models --threads {options.threads}"
    print(save(f"quantized-models-cpu-{processor}", command, figures, options.output))


if __name__ == "__main__":
    main()
