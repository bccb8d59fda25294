"""The peer of the diffusion benchmark writes what the engine writes, padded or not."""

import random
from pathlib import Path
from shutil import copy

import pytest
import torch

from benchmarks.diffusion import WAYS, Peer, make_llada, tutor
from mini_infer import LLM, SamplingParams
from mini_infer.config import BUNDLED_MODEL
from tests.models.llada import make_llada_checkpoint


def test_the_published_sampler_and_the_engine_agree(tmp_path: Path) -> None:
    checkpoint = make_llada(tmp_path, "tiny")
    draw = random.Random(0)
    prompts = [[draw.randrange(250) for _ in range(length)] for length in (5, 19, 40)]
    peer = Peer(checkpoint, torch.float64)
    params = SamplingParams(temperature=0, gen_length=16, steps=8, block_length=8, ignore_eos=True)
    with LLM(checkpoint, dtype="float64", device="cpu") as llm:
        outputs = llm.generate(prompts, params)
    assert peer.generate(prompts, 16, 8, 8).tolist() == [output.token_ids for output in outputs]


@pytest.mark.slow
def test_what_is_measured_of_a_tutor(tmp_path: Path) -> None:
    """With random weights instead of one."""
    bundled = Path(BUNDLED_MODEL)
    path = make_llada_checkpoint(
        tmp_path / "diffusion_tutor",
        5,
        torch.bfloat16,
        vocab_size=4096,
        embedding_size=4096,
        mask_token_id=4095,
        d_model=32,
        n_heads=2,
        n_kv_heads=1,
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        copy(bundled / file, path)
    (tmp_path / "tutor").mkdir()
    copy(bundled / "heldout.json", tmp_path / "tutor")
    figures = tutor(path, rounds=1, num_questions=2)
    assert {"1 request", "16 requests", *WAYS} == figures.keys()
    exact, sparse, dual = figures["exact"], figures["sparse 0.25"], figures["dual"]
    assert exact["same_as_exact"] == exact["questions"] == 2
    assert exact["same_tokens"] == 1
    assert exact["kv_kib"] == 0 < sparse["kv_kib"] < dual["kv_kib"]
    assert dual["computed_for_each"] < exact["computed_for_each"]
    assert figures["16 requests"]["published_seconds"] > 0
