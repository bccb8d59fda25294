"""Checkpoints whose parts contradict each other: what transformers computes, or a refusal; never another model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mini_infer import kernels
from mini_infer.exceptions import MiniInferError
from mini_infer.models import load_model, read_config

from .checkpoints import make_checkpoint
from .test_decoder import PagedRun

KERNELS = kernels.resolve("cpu")
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
INDEX = "model.safetensors.index.json"

Tensors = dict[str, Tensor]


def ours(directory: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    model = load_model(directory, read_config(directory), dtype, "cpu", KERNELS)
    with torch.inference_mode():
        return PagedRun(model, [TOKENS], 16, dtype).finish(0)[0]


def transformers(directory: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0]


def make(directory: Path, **options: Any) -> Path:
    options = {"num_hidden_layers": 2, "tie_word_embeddings": False, "vocab_size": 97, **options}
    return make_checkpoint(directory, "llama", 0, **options)


def change(directory: Path, edit: Callable[[Tensors], object]) -> None:
    """Edit the tensors of a checkpoint's file, or of its first one."""
    file = min(directory.glob("*.safetensors"))
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def configure(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def set_head(scale: float, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], object]:
    """An output projection that is the embedding, times a number, in a dtype of its own."""
    return lambda tensors: tensors.update({HEAD: (tensors[EMBEDDING] * scale).to(dtype)})


def halve(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name][: len(tensors[name]) // 2].contiguous()})


def narrow(tensors: Tensors) -> None:
    tensors.update({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items() if "mlp" in name})


def saved_again(directory: Path, shards: int, newer: bool) -> None:
    """A sharded checkpoint, with the whole model beside it; the shards are of another one."""
    whole = make(directory.with_name("whole"))
    change(whole, lambda tensors: tensors.update({name: tensor * 1.25 for name, tensor in tensors.items()}))
    shutil.copy(whole / "model.safetensors", directory)
    if not newer:
        (directory / sorted(path.name for path in directory.glob("model-*"))[shards]).unlink()


EQUAL: dict[str, tuple[dict[str, Any], Callable[[Path], object]]] = {
    # config.json says that the output projection is the embedding
    "tied, another head in the file": ({}, lambda d: configure(d, tie_word_embeddings=True)),
    "tied, the same head in the file": (
        {},
        lambda d: (change(d, set_head(1.0)), configure(d, tie_word_embeddings=True)),
    ),
    "tied, a head that is nearly the same": (
        {},
        lambda d: (change(d, set_head(1.0, torch.bfloat16)), configure(d, tie_word_embeddings=True)),
    ),
    "tied, a head with NaN": (
        {},
        lambda d: (change(d, set_head(float("nan"))), configure(d, tie_word_embeddings=True)),
    ),
    "tied, a head but no embedding": (
        {},
        lambda d: (change(d, lambda t: t.pop(EMBEDDING)), configure(d, tie_word_embeddings=True)),
    ),
    # it says that they are two
    "two, and equal": ({}, lambda d: change(d, set_head(1.0))),
    # dtypes
    "tensors of several dtypes": ({}, lambda d: change(d, narrow)),
    "a dtype in the config that no tensor has": ({}, lambda d: configure(d, dtype="float16")),
    # files
    "an index beside the whole model, its shards there": (
        {"max_shard_size": "20KB"},
        lambda d: saved_again(d, 1, newer=True),
    ),
    "an index beside the whole model, a shard missing": (
        {"max_shard_size": "20KB"},
        lambda d: saved_again(d, 1, newer=False),
    ),
    "an index that names files and no tensors": (
        {"max_shard_size": "20KB"},
        lambda d: (d / INDEX).write_text(
            json.dumps({"metadata": {}, "weight_map": {path.name: path.name for path in d.glob("model-*")}})
        ),
    ),
    "a file that the index does not name": (
        {"max_shard_size": "20KB"},
        lambda d: save_file({HEAD: torch.zeros(97, 8)}, d / "model-00099-of-00099.safetensors"),
    ),
    "frequencies of an older version": (
        {},
        lambda d: change(d, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})),
    ),
}


@pytest.mark.parametrize("what", EQUAL)
def test_it_computes_what_transformers_computes(tmp_path: Path, what: str) -> None:
    options, contradict = EQUAL[what]
    path = make(tmp_path / "model", **options)
    contradict(path)
    torch.testing.assert_close(ours(path), transformers(path), rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_heads_are_compared_in_the_dtype_of_the_model(
    tmp_path: Path, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Rounded to bfloat16 the two are one; that is for transformers to say, too."""
    path = make(tmp_path)
    change(path, set_head(1.0, torch.bfloat16))
    configure(path, tie_word_embeddings=True)
    model = load_model(path, read_config(path), dtype, "cpu", KERNELS)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    tied = theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    assert (model.embedding is None) == tied == (dtype == torch.bfloat16)
    assert ("config.json says that lm_head.weight is model.embed_tokens.weight" in caplog.text) == (not tied)


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Path], object], str]] = {
    "tied, a head of another shape": (
        {},
        lambda d: (change(d, halve(HEAD)), configure(d, tie_word_embeddings=True)),
        r"lm_head\.weight in .* has shape",
    ),
    "tied, neither of the two": (
        {},
        lambda d: (
            change(d, lambda t: (t.pop(EMBEDDING), t.pop(HEAD))),
            configure(d, tie_word_embeddings=True),
        ),
        r"lacks lm_head\.weight",
    ),
    "two, no head": ({}, lambda d: change(d, lambda t: t.pop(HEAD)), r"lacks lm_head\.weight"),
    "two, no embedding": ({}, lambda d: change(d, lambda t: t.pop(EMBEDDING)), r"lacks model\.embed_tokens\.weight"),
    "fewer layers in the files": ({}, lambda d: configure(d, num_hidden_layers=3), r"lacks model\.layers\.2"),
    "more layers in the files": ({}, lambda d: configure(d, num_hidden_layers=1), r"unexpected model\.layers\.1"),
    "biases that the config does not have": (
        {"attention_bias": True},
        lambda d: configure(d, attention_bias=False),
        r"unexpected model\.layers\.0\.self_attn\..*bias",
    ),
    "no biases, though the config has them": (
        {"attention_bias": False},
        lambda d: configure(d, attention_bias=True),
        r"lacks model\.layers\.0\.self_attn\..*bias",
    ),
    "another vocabulary": (
        {},
        lambda d: configure(d, vocab_size=98),
        r"shape \[97, \d+\] but config.json implies \[98",
    ),
    "another feed-forward width": ({}, lambda d: configure(d, intermediate_size=41), "has shape"),
    "other heads": ({}, lambda d: configure(d, head_dim=14), "has shape"),
    "a matrix that is a vector": (
        {},
        lambda d: change(d, lambda t: t.update({"model.norm.weight": t["model.norm.weight"][None]})),
        r"model\.norm\.weight in .* has shape \[1, ",
    ),
    "integers": (
        {},
        lambda d: change(d, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int64)})),
        r"model\.norm\.weight in .* is I64",
    ),
    "tensors of a model without a head": (
        {},
        lambda d: change(
            d, lambda t: [t.update({name.removeprefix("model."): t.pop(name)}) for name in list(t) if "model." in name]
        ),
        r"lacks model\.embed_tokens\.weight",
    ),
    "a tensor in two shards": (
        {"max_shard_size": "20KB"},
        lambda d: change(d, lambda t: t.update({"model.norm.weight": torch.ones(8)})),
        "repeats model.norm.weight",
    ),
    "a tensor that the index names and no shard has": (
        {"max_shard_size": "20KB"},
        lambda d: change(d, lambda t: t.popitem()),
        "lacks model",
    ),
    "weights in a file that the config names": (
        {},
        lambda d: (shutil.copy(d / "model.safetensors", d / "b.safetensors"), configure(d, transformers_weights="b")),
        "transformers_weights",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused(tmp_path: Path, what: str) -> None:
    """Transformers makes random numbers of what is missing, and leaves out what is too much."""
    options, contradict, message = REFUSED[what]
    path = make(tmp_path / "model", **options)
    contradict(path)
    with pytest.raises(MiniInferError, match=message):
        ours(path)
