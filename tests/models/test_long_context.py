"""Contexts beyond max_position_embeddings, where a RoPE extension says so, as model cards tell people to write it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mini_infer import LLM, SamplingParams, kernels
from mini_infer.models import load_model, read_config
from mini_infer.models.rope import Llama3Rope
from tests.engine.checkpoints import make_engine_checkpoint

from .checkpoints import FAMILIES, ROPE_SCALINGS, make_checkpoint
from .test_decoder import compare

ORIGINAL = 64  # max_position_embeddings is left as it was
HEAD_DIM = 12

LONG_ROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0, 1.01, 1.05, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.3, 1.7, 2.5, 3.4, 4.1],
}
REACHES = {"default": 64, "linear": 192, "llama3": 512, "longrope": 256}  # and the YaRNs 256


@pytest.mark.parametrize("scaling", [*ROPE_SCALINGS, "longrope"])
def test_every_extension_reaches_as_far_as_it_says(tmp_path: Path, scaling: str) -> None:
    parameters = LONG_ROPE if scaling == "longrope" else ROPE_SCALINGS[scaling]
    family = FAMILIES[len(scaling) % len(FAMILIES)]
    path = make_checkpoint(
        tmp_path,
        family,
        0,
        torch.float64,
        rope_scaling=parameters,
        max_position_embeddings=ORIGINAL,
        num_hidden_layers=2,
        head_dim=HEAD_DIM,
    )
    reach = REACHES.get(scaling, 256)
    assert read_config(path).max_position_embeddings == reach
    lengths = tuple(length for length in (ORIGINAL + 1, 150, 192, 256, 512) if length <= reach)
    compare(path, torch.float64, block_size=16, seed=1, lengths=lengths or (ORIGINAL,))


def test_longer_than_config_and_factor_is_kept() -> None:
    """Llama 3.1's own figures: 8 times 8,192 is less than the 131,072 that its config allows."""
    assert Llama3Rope(5e5, 8.0, 1.0, 4.0, 8192).reach(131072) == 131072


@pytest.mark.parametrize(("limit", "lengths"), [(ORIGINAL, (1, 30, ORIGINAL)), (ORIGINAL + 1, (ORIGINAL + 1,))])
@pytest.mark.parametrize("options", [{}, {"attention_factor": 1.4}, {"factor": None}], ids=str)
def test_longrope_takes_the_short_factors_only_where_no_text_is_long(
    tmp_path: Path,
    limit: int,
    lengths: tuple[int, ...],
    options: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Transformers looks at the longest text of each batch; a cache cannot change its mind."""
    path = make_checkpoint(
        tmp_path,
        "llama",
        3,
        torch.float64,
        rope_scaling={**LONG_ROPE, **options},
        max_position_embeddings=4 * ORIGINAL,
        head_dim=HEAD_DIM,
    )
    config = replace(read_config(path), max_position_embeddings=limit)
    compare(path, torch.float64, block_size=4, seed=2, lengths=lengths, config=config)
    assert ("max_model_len=64" in caplog.text) == (limit > ORIGINAL)


@pytest.mark.parametrize("scaling", [{"type": "yarn"}, {"type": "linear"}])
@pytest.mark.parametrize("asked", [None, 200, 256, 1000])
def test_an_engine_reads_texts_as_long(tmp_path: Path, scaling: dict[str, Any], asked: int | None) -> None:
    path = make_engine_checkpoint(
        tmp_path, "qwen2", max_position_embeddings=ORIGINAL, rope_scaling={**scaling, "factor": 4.0}
    )
    llm = LLM(path, device="cpu", dtype="float64", max_model_len=asked)
    assert llm.max_model_len == min(asked or 256, 256)
    prompt = [(7 * place) % 200 for place in range(190)]
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    tokens = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0]
    assert output.token_ids == tokens[190:].tolist()


@pytest.mark.parametrize("positions", [10**7, 2**31 - 1])
def test_tables_are_as_long_as_the_longest_sequence(tmp_path: Path, positions: int) -> None:
    """Not as what config.json could do: tables of that length would take gigabytes."""
    path = make_checkpoint(tmp_path, "llama", 0, max_position_embeddings=positions)
    config = read_config(path)
    assert config.max_position_embeddings == positions
    model = load_model(path, replace(config, max_position_embeddings=512), torch.float32, "cpu", kernels.resolve("cpu"))
    assert model.rotary_bytes == 512 * config.layers[0].attention.head_dim * 4
