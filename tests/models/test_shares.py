"""The shares of a model, computed together, are the model; and what they read of its files is theirs alone."""

import random
from pathlib import Path

import pytest
import torch

from mini_infer import kernels
from mini_infer.models import load_model, read_config
from mini_infer.parallel.share import Share
from tests.parallel.together import ThreadGroup, together

from .checkpoints import FAMILIES, make_checkpoint
from .test_decoder import PagedRun

KERNELS = kernels.resolve("cpu", "reference")


def sizes_of(seed: int) -> dict[str, int]:
    """Heads for up to four ranks: enough KV heads for each, half as many, or one that all have a copy of."""
    kv_heads = (4, 2, 1)[seed % 3]
    return {"num_attention_heads": 4 * (1 + seed % 2), "num_key_value_heads": kv_heads, "head_dim": 8}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_the_layers_together_are_the_model(tmp_path: Path, family: str, seed: int) -> None:
    make_checkpoint(tmp_path, family, seed, torch.float64, **sizes_of(seed))
    config = read_config(tmp_path)
    draw = random.Random(seed)
    texts = [[draw.randrange(config.vocab_size) for _ in range(length)] for length in (23, 1, 9)]
    with torch.inference_mode():
        expected = PagedRun(load_model(tmp_path, config, torch.float64, "cpu", KERNELS), texts, 4, torch.float64)
        whole = expected.finish(seed)
    for size in (2, 4):

        def work(group: ThreadGroup) -> list[torch.Tensor] | None:
            model = load_model(tmp_path, config, torch.float64, "cpu", KERNELS, share=Share(group))
            return PagedRun(model, texts, 4, torch.float64).finish(seed)

        mine, *others = together(size, work)
        assert mine is not None and not any(others)
        for computed, reference in zip(mine, whole, strict=True):
            torch.testing.assert_close(computed, reference, rtol=1e-10, atol=1e-12)
