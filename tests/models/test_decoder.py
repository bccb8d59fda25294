"""The decoder against transformers' models: same weights, same tokens, same logits."""

import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm
from transformers import AutoModelForCausalLM, PreTrainedModel

from mini_infer import kernels
from mini_infer.models import Batch, Decoder, ModelConfig, load_model, read_config

from .checkpoints import FAMILIES, ROPE_SCALINGS, make_checkpoint

KERNELS = kernels.resolve("cpu")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


def reference_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Transformers' model in `dtype` throughout; left alone, it computes norms and softmax in float32 even so."""
    if dtype == torch.float32:
        return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").to(dtype)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            weight, eps = module.weight, module.variance_epsilon
            module.forward = partial(rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
    return model


class PagedRun:
    """Runs sequences through a decoder a few tokens at a time, over blocks handed out in random order."""

    def __init__(self, model: Decoder, sequences: list[list[int]], block_size: int, dtype: torch.dtype) -> None:
        self.model = model
        self.sequences = sequences
        self.block_size = block_size
        self.done = [0] * len(sequences)
        self.logits: list[list[Tensor]] = [[] for _ in sequences]
        needed = [-(-len(tokens) // block_size) for tokens in sequences]
        block_ids = list(range(sum(needed) + 1))
        random.Random(0).shuffle(block_ids)
        self.tables = [[block_ids.pop() for _ in range(count)] for count in needed]
        self.kv_cache = [
            KERNELS.allocate_kv_cache(sum(needed) + 1, block_size, spec.num_kv_heads, spec.head_dim, spec.dtype, "cpu")
            for spec in model.config.cache_specs(dtype, model.share)
        ]
        for caches in self.kv_cache:
            for cache in caches:
                cache.fill_(torch.nan)  # whatever is read before it is written shows

    def step(self, chunks: dict[int, int]) -> None:
        """Compute the next ``chunks[sequence]`` tokens of each sequence in `chunks`, together."""
        order = sorted(chunks, key=lambda sequence: chunks[sequence] > 1)
        spans = {s: range(self.done[s], self.done[s] + chunks[s]) for s in order}
        places = [(s, p) for s in order for p in spans[s]]
        slots = [self.tables[s][p // self.block_size] * self.block_size + p % self.block_size for s, p in places]
        width = max(len(self.tables[s]) for s in order)
        starts = [0]
        for s in order:
            starts.append(starts[-1] + chunks[s])
        num_decodes = sum(chunks[s] == 1 for s in order)
        batch = Batch(
            token_ids=torch.tensor([self.sequences[s][p] for s, p in places]),
            positions=torch.tensor([p for _, p in places]),
            attention=kernels.AttentionMetadata(
                slot_mapping=torch.tensor(slots),
                query_start_loc=torch.tensor(starts, dtype=torch.int32),
                prefill_start_loc=torch.tensor(starts[num_decodes:], dtype=torch.int32) - num_decodes,
                context_lens=torch.tensor([spans[s].stop for s in order], dtype=torch.int32),
                block_tables=torch.tensor(
                    [self.tables[s] + [999] * (width - len(self.tables[s])) for s in order], dtype=torch.int32
                ),
                num_decodes=num_decodes,
            ),
        )
        logits = self.model.compute_logits(self.model(batch, self.kv_cache))
        for s in order:
            self.done[s] += chunks[s]
        if logits is not None:  # of ranks that share a model one has them
            for s, rows in zip(order, logits.split([chunks[s] for s in order]), strict=True):
                self.logits[s].append(rows)

    def finish(self, seed: int) -> list[Tensor]:
        """Step random sequences by random chunks, then by single tokens, until all is computed; logits per sequence."""
        draw = random.Random(seed)
        while unfinished := [s for s in range(len(self.sequences)) if self.done[s] < len(self.sequences[s])]:
            chosen = draw.sample(unfinished, draw.randint(1, len(unfinished)))
            self.step({s: min(draw.choice((1, 1, 3, 8, 17)), len(self.sequences[s]) - self.done[s]) for s in chosen})
        return [torch.cat(rows) for rows in self.logits if rows]


def compare(
    path: Path,
    dtype: torch.dtype,
    block_size: int,
    seed: int,
    lengths: tuple[int, ...] = (23, 1, 9, 40),
    config: ModelConfig | None = None,
) -> None:
    """Random token sequences of these lengths through both models; all logits must agree."""
    config = config or read_config(path)
    model = load_model(path, config, dtype, "cpu", KERNELS)
    draw = random.Random(seed)
    sequences = [[draw.randrange(config.vocab_size) for _ in range(length)] for length in lengths]
    reference = reference_model(path, dtype)
    with torch.inference_mode():
        computed = PagedRun(model, sequences, block_size, dtype).finish(seed)
        for tokens, logits in zip(sequences, computed, strict=True):
            expected = reference(torch.tensor([tokens])).logits[0]
            assert logits.dtype == dtype
            assert expected.std() > 0.5, "a checkpoint whose logits hardly differ tests little"
            torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_agree_with_transformers(tmp_path: Path, family: str, seed: int, dtype: torch.dtype) -> None:
    compare(make_checkpoint(tmp_path, family, seed, dtype), dtype, block_size=(1, 4, 16, 512)[seed % 4], seed=seed)


@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_rope_scaling_agrees_up_to_the_last_position(tmp_path: Path, family: str, scaling: str) -> None:
    path = make_checkpoint(tmp_path, family, 0, torch.float64, rope_scaling=ROPE_SCALINGS[scaling], num_hidden_layers=1)
    compare(path, torch.float64, block_size=16, seed=0, lengths=(256,))


@pytest.mark.parametrize("block_size", [1, 4, 16, 512])
@pytest.mark.parametrize("window", [1, 5, 16])
def test_a_window_shorter_than_the_prompt_agrees(tmp_path: Path, window: int, block_size: int) -> None:
    mistral = make_checkpoint(tmp_path / "mistral", "mistral", 1, torch.float64, sliding_window=window)
    compare(mistral, torch.float64, block_size, seed=window)
    qwen = make_checkpoint(
        tmp_path / "qwen3",
        "qwen3",
        1,
        torch.float64,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=window,
        max_window_layers=1,
    )
    compare(qwen, torch.float64, block_size, seed=window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_stay_near_the_wide_model(tmp_path: Path, dtype: torch.dtype) -> None:
    path = make_checkpoint(tmp_path, "qwen3", 2, num_hidden_layers=2)
    config = read_config(path)
    tokens = [[t % config.vocab_size for t in range(5, 95, 3)]]
    with torch.inference_mode():
        (narrow,) = PagedRun(load_model(path, config, dtype, "cpu", KERNELS), tokens, 16, dtype).finish(0)
        (wide,) = PagedRun(load_model(path, config, torch.float32, "cpu", KERNELS), tokens, 16, torch.float32).finish(0)
    assert narrow.dtype == dtype
    assert (narrow.float() - wide).norm() / wide.norm() < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_once_and_packed_ones_too(tmp_path: Path, family: str, tied: bool) -> None:
    path = make_checkpoint(tmp_path, family, 0, torch.float32, tie_word_embeddings=tied)
    model = load_model(path, read_config(path), torch.float32, "cpu", KERNELS)
    assert model.num_parameters == AutoModelForCausalLM.from_pretrained(path).num_parameters()


def test_nothing_has_a_gradient(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", 3, attention_bias=True, mlp_bias=True)
    model = load_model(path, read_config(path), torch.float32, "cpu", KERNELS)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_shorter_context_needs_smaller_tables_and_changes_no_logits(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", 4, rope_scaling=ROPE_SCALINGS["yarn"])
    config = read_config(path)
    short = replace(config, max_position_embeddings=30)
    tokens = [list(range(30))]
    (expected,) = PagedRun(load_model(path, config, torch.float32, "cpu", KERNELS), tokens, 4, torch.float32).finish(0)
    model = load_model(path, short, torch.float32, "cpu", KERNELS)
    assert model.rotary_bytes == 2 * 30 * config.layers[0].attention.head_dim // 2 * 4
    (logits,) = PagedRun(model, tokens, 4, torch.float32).finish(0)
    assert torch.equal(logits, expected)
