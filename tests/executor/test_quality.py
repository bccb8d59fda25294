"""The measures of quality against their definitions, written out in float64."""

import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mini_infer import kernels
from mini_infer.executor.quality import compare, stored_bytes
from mini_infer.models import load_model, read_config
from tests.models.checkpoints import make_checkpoint
from tests.models.test_decoder import reference_model

KERNELS = kernels.resolve("cpu")


def test_against_the_definitions(tmp_path: Path) -> None:
    paths = [make_checkpoint(tmp_path / str(seed), "qwen3", 5, rope_scaling=None) for seed in range(2)]
    from safetensors.torch import load_file, save_file

    weights = load_file(paths[1] / "model.safetensors")
    noise = {name: tensor + 0.02 * torch.randn(tensor.shape) for name, tensor in weights.items()}
    save_file(noise, paths[1] / "model.safetensors", {"format": "pt"})
    config = replace(read_config(paths[0]), max_position_embeddings=64)
    base, model = (load_model(path, config, torch.float64, "cpu", KERNELS) for path in paths)
    draw = random.Random(0)
    tokens = [draw.randrange(config.vocab_size) for _ in range(150)]
    quality = compare(model, base, tokens, 64)

    klds, surprises, same = [], [], 0
    right, other = (reference_model(path, torch.float64) for path in paths)
    for start in (0, 64, 128):
        window = torch.tensor([tokens[start : start + 64]])
        with torch.inference_mode():
            p, q = (m(window).logits[0, :-1].double().log_softmax(-1) for m in (right, other))
        for place in range(len(p)):
            klds.append(float((p[place].exp() * (p[place] - q[place])).sum()))
            surprises.append(-float(q[place][window[0, place + 1]]))
            same += int(p[place].argmax() == q[place].argmax())
    assert quality.num_tokens == len(klds) == 147
    assert quality.mean_kld == pytest.approx(sum(klds) / len(klds), rel=1e-5)
    assert quality.max_kld == pytest.approx(max(klds), rel=1e-5)
    assert quality.perplexity == pytest.approx(math.exp(sum(surprises) / len(surprises)), rel=1e-5)
    assert quality.same_top == same / len(klds)
    variance = sum((kld - sum(klds) / len(klds)) ** 2 for kld in klds) / (len(klds) - 1)
    assert quality.mean_kld_error == pytest.approx(math.sqrt(variance / len(klds)), rel=1e-4)


def test_a_model_is_itself(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen2", 0, rope_scaling=None, hidden_size=64, intermediate_size=96)
    model = load_model(path, read_config(path), torch.float32, "cpu", KERNELS)
    quality = compare(model, model, list(range(40)), 16)
    assert (quality.mean_kld, quality.same_top) == (0, 1)
    assert quality.bytes_per_weight == pytest.approx(4, rel=0.01)
    small = load_model(path, read_config(path), torch.float32, "cpu", KERNELS, "int8")
    assert stored_bytes(small) < stored_bytes(model) / 2
    assert compare(small, model, list(range(40)), 16).mean_kld > 0
