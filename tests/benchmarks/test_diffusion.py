"""The peer of the diffusion benchmark writes what the engine writes, padded or not."""

import random
from pathlib import Path

import torch

from benchmarks.diffusion import Peer, make_llada
from mini_infer import LLM, SamplingParams


def test_the_published_sampler_and_the_engine_agree(tmp_path: Path) -> None:
    checkpoint = make_llada(tmp_path, "tiny")
    draw = random.Random(0)
    prompts = [[draw.randrange(250) for _ in range(length)] for length in (5, 19, 40)]
    peer = Peer(checkpoint, torch.float64)
    params = SamplingParams(temperature=0, gen_length=16, steps=8, block_length=8, ignore_eos=True)
    with LLM(checkpoint, dtype="float64", device="cpu") as llm:
        outputs = llm.generate(prompts, params)
    assert peer.generate(prompts, 16, 8, 8).tolist() == [output.token_ids for output in outputs]
