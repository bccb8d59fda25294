"""The shares of a model, computed together, are the model; and what they read of its files is theirs alone."""

import random
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_infer import kernels
from mini_infer.models import load_model, read_config
from mini_infer.models.gguf import GgufModel
from mini_infer.models.linear import Read
from mini_infer.models.matrices import cut, in_groups
from mini_infer.models.quantization.schemes import SCHEMES
from mini_infer.models.weights import Safetensors
from mini_infer.parallel.group import Alone
from mini_infer.parallel.share import Share
from mini_infer.parallel.slices import Span, whole
from tests.parallel.together import together

from .checkpoints import FAMILIES, make_checkpoint
from .gguf.test_model import make as make_gguf
from .quantization.test_formats import quantized_checkpoint
from .quantization.writers import FORMATS
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
    for size in (2, 4):
        assert_shares_are_the_model(tmp_path, size, seed)


def assert_shares_are_the_model(path: Path, size: int, seed: int, quantization: str | None = None) -> None:
    """In float64, where the order of sums is all that is left."""
    config = read_config(path)
    draw = random.Random(seed)
    texts = [[draw.randrange(config.vocab_size) for _ in range(length)] for length in (23, 1, 9)]

    def run(share: Share) -> list[torch.Tensor] | None:
        model = load_model(path, config, torch.float64, "cpu", KERNELS, quantization, share)
        return PagedRun(model, texts, 4, torch.float64).finish(seed)

    with torch.inference_mode():
        expected = run(Share())
    mine, *others = together(size, lambda group: run(Share(group)))
    assert mine is not None and expected is not None and not any(others)
    for computed, reference in zip(mine, expected, strict=True):
        torch.testing.assert_close(computed, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", FORMATS)
def test_shares_of_every_format(tmp_path: Path, name: str) -> None:
    """Cut where scales change, and between inputs that have one (96 features in four: 32, 32, 16, 16)."""
    path, _ = quantized_checkpoint(tmp_path, *FORMATS[name], num_hidden_layers=2, sliding_window=None)
    for size in (2, 4):
        assert_shares_are_the_model(path, size, 1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_shares_of_a_gguf_file(tmp_path: Path, family: str) -> None:
    """Embedding and output are in blocks, too, and Llama's rows stand in another order there."""
    path, _ = make_gguf(tmp_path, family, 2)
    for size in (2, 4):
        assert_shares_are_the_model(path, size, 2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shares_that_are_quantised_as_they_are_loaded_have_the_codes_of_the_whole(tmp_path: Path, scheme: str) -> None:
    make_checkpoint(tmp_path, "qwen3", 5, torch.float64, **sizes_of(0), intermediate_size=57)
    assert_shares_are_the_model(tmp_path, 2, 5, scheme)


# ---- what is read ------------------------------------------------------------------------------------------------

CODES = ("weight", "weight_packed", "qweight")
BLOCKS_FIT: dict[str, Any] = {"intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8}
"""Of a model with heads of 32 features, so that two ranks have whole blocks of 128 of each matrix."""


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Of each tensor, counted where a checkpoint is asked for it."""
    counted: Counter[str] = Counter()
    for kind in (Safetensors, GgufModel):
        monkeypatch.setattr(kind, "reading", counting(kind.reading, counted))
    return counted


def counting(reading: Any, counted: Counter[str]) -> Any:
    @contextmanager
    def wrapped(self: Any, names: Collection[str]) -> Iterator[Read]:
        with reading(self, names) as read:

            def counted_read(name: str, index: tuple[slice, ...] | None) -> torch.Tensor:
                tensor: torch.Tensor = read(name, index)
                counted[name] += tensor.nbytes
                return tensor

            yield counted_read

    return wrapped


def assert_each_reads_its_own(path: Path, counted: Counter[str], quantization: str | None = None) -> None:
    """Of two ranks whose borders lie between words, groups and blocks, each reads its codes, and nobody those of
    others; of four, whose borders lie within, no more than up to the next one."""
    config = read_config(path)

    def reads(share: Share) -> Counter[str]:
        counted.clear()
        load_model(path, config, torch.float32, "cpu", KERNELS, quantization, share)
        return counted.copy()

    whole, two = reads(Share()), [reads(Share(Alone(rank, 2))) for rank in range(2)]
    codes = [name for name in whole if name.rpartition(".")[2] in CODES and "norm" not in name]
    assert len(codes) > 10
    assert {name: two[0][name] + two[1][name] for name in codes} == {name: whole[name] for name in codes}
    assert all(rank[name] <= whole[name] for rank in two for name in whole)
    for rank in range(4):
        mine = reads(Share(Alone(rank, 4)))
        assert sum(mine[name] for name in codes) < 0.5 * sum(whole[name] for name in codes)


@pytest.mark.parametrize("name", FORMATS)
def test_a_rank_reads_its_own_codes(tmp_path: Path, name: str, bytes_read: Counter[str]) -> None:
    sizes = BLOCKS_FIT if "block" in name else {}
    path, _ = quantized_checkpoint(tmp_path, *FORMATS[name], num_hidden_layers=2, sliding_window=None, **sizes)
    assert_each_reads_its_own(path, bytes_read)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_rank_reads_its_own_blocks(tmp_path: Path, family: str, bytes_read: Counter[str]) -> None:
    path, _ = make_gguf(tmp_path, family, 2)
    assert_each_reads_its_own(path, bytes_read)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_rank_reads_what_it_quantises(tmp_path: Path, scheme: str, bytes_read: Counter[str]) -> None:
    make_checkpoint(tmp_path, "qwen3", 5, **{**sizes_of(0), "head_dim": 16}, intermediate_size=96)
    assert_each_reads_its_own(tmp_path, bytes_read, scheme)


def test_what_a_cut_makes_plain_is_not_quantised_again(tmp_path: Path) -> None:
    """As inputs in an order of their own are; one device keeps their codes."""
    path, _ = quantized_checkpoint(tmp_path, *FORMATS["gptq-act-order"], num_hidden_layers=2, sliding_window=None)
    assert_shares_are_the_model(path, 2, 1, "int8")


@pytest.mark.parametrize("seed", range(20))
def test_a_part_of_a_matrix_has_the_values_of_the_whole(seed: int) -> None:
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    outputs, inputs = draw.randint(2, 9), 2 * draw.randint(2, 70)
    plain = torch.randn(outputs, inputs, generator=generator)
    matrix = SCHEMES[draw.choice(list(SCHEMES))](plain)
    order = torch.randperm(inputs, generator=generator)
    matrices = [plain, matrix, in_groups(matrix, (torch.arange(inputs) // matrix.group)[order])]
    start, column = draw.randrange(outputs - 1), draw.randrange(inputs - 1)
    rows = Span(start, draw.randint(start + 1, outputs), outputs)
    columns = draw.choice([whole(inputs), Span(column, draw.randint(column + 1, inputs), inputs)])
    for each in matrices:
        values, part = (
            m if isinstance(m, torch.Tensor) else m.dequantize(torch.float64)
            for m in (each, cut(each, rows, columns, torch.float64))
        )
        assert torch.equal(part, values[rows.start : rows.stop, columns.start : columns.stop]), f"{seed=}"
