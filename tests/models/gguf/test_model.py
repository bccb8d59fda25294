"""GGUF files of every family against transformers' models of the numbers in them."""

import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mini_infer import kernels
from mini_infer.exceptions import InvalidCheckpointError, ModelNotFoundError, UnsupportedModelError
from mini_infer.models import load_model, read_config
from mini_infer.models.gguf import GgufFile, GgufModel
from mini_infer.models.rope import LongRope, YarnRope

from ..checkpoints import make_checkpoint
from ..test_decoder import PagedRun, reference_model
from .writing import ARCHITECTURES, QUANTIZABLE, add_config, finish, write_gguf

KERNELS = kernels.resolve("cpu")
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


def make(
    tmp_path: Path, family: str, seed: int, types: tuple[str, ...] = QUANTIZABLE, **overrides: object
) -> tuple[Path, Path]:
    """A GGUF file, and a checkpoint of transformers with the same numbers."""
    options = {**SHAPE, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False, **overrides}
    if family == "llama":
        options["hidden_size"] = 4 * options["head_dim"]
    if family == "smollm3":
        options["no_rope_layer_interval"] = 4
    checkpoint = make_checkpoint(tmp_path / family, family, seed, **options)
    write_gguf(tmp_path / f"{family}.gguf", checkpoint, seed, types)
    return tmp_path / f"{family}.gguf", checkpoint


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_logits(tmp_path: Path, family: str, seed: int) -> None:
    path, checkpoint = make(tmp_path, family, seed)
    config = read_config(path)
    model = load_model(path, config, torch.float32, "cpu", KERNELS)
    draw = random.Random(seed)
    sequences = [[draw.randrange(config.vocab_size) for _ in range(length)] for length in (23, 1, 9)]
    reference = reference_model(checkpoint, torch.float32)
    with torch.inference_mode():
        computed = PagedRun(model, sequences, 4, torch.float32).finish(seed)
        for tokens, logits in zip(sequences, computed, strict=True):
            expected = reference(torch.tensor([tokens])).logits[0]
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_config(tmp_path: Path) -> None:
    path, checkpoint = make(tmp_path, "qwen3", 0, ("Q8_0",))
    ours, theirs = read_config(path), read_config(checkpoint)
    assert ours.dtype is torch.bfloat16, "what blocks are computed in"
    assert (ours.layers, ours.vocab_size, ours.max_position_embeddings) == (
        theirs.layers,
        theirs.vocab_size,
        theirs.max_position_embeddings,
    )
    assert ours.rms_norm_eps == theirs.rms_norm_eps, "not the float32 next to it"
    assert read_config(make(tmp_path, "qwen2", 0, ("F32",))[0]).dtype is torch.float32
    assert read_config(make(tmp_path, "olmo2", 0, ("F16",))[0]).dtype is torch.float16


def test_the_frequencies_of_llama_3_are_a_tensor(tmp_path: Path) -> None:
    make(tmp_path, "llama", 0, tie_word_embeddings=True)
    reader = gguf.GGUFReader(tmp_path / "llama.gguf")
    factors = [1.0, 1.0, 2.0, 4.0] * 4
    path = rewritten(tmp_path, reader, "llama", {"rope_freqs.weight": np.array(factors, dtype=np.float32)})
    (rope,) = {layer.attention.rope for layer in read_config(path).layers}
    assert isinstance(rope, LongRope)
    plain = read_config(tmp_path / "llama.gguf").layers[0].attention.rope
    assert plain is not None
    torch.testing.assert_close(rope.frequencies(32), plain.frequencies(32) / torch.tensor(factors))
    assert rope.magnitude == 1.0
    load_model(path, read_config(path), torch.float32, "cpu", KERNELS)


def rewritten(tmp_path: Path, reader: gguf.GGUFReader, architecture: str, more: dict[str, np.ndarray]) -> Path:
    """A file again, with more tensors in it."""
    path = tmp_path / "more.gguf"
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, data in more.items():
        writer.add_tensor(name, data)
    finish(writer)
    return path


def test_yarn(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "qwen2", "qwen2", 0, **SHAPE, rope_scaling=None)
    yarn = {"add_rope_scaling_factor": 4.0, "add_rope_scaling_orig_ctx_len": 64}
    scaling = gguf.RopeScalingType.YARN
    write_gguf(tmp_path / "m.gguf", checkpoint, 0, add_rope_scaling_type=scaling, **yarn)
    rope = read_config(tmp_path / "m.gguf").layers[0].attention.rope
    assert isinstance(rope, YarnRope)
    assert (rope.factor, rope.original_max_positions) == (4.0, 64)


def test_a_file_in_several_parts(tmp_path: Path) -> None:
    path, _ = make(tmp_path, "qwen3", 1)
    whole = GgufFile(path)
    reader = gguf.GGUFReader(path)
    for number in (1, 2):
        part = gguf.GGUFWriter(tmp_path / f"part-{number:05}-of-00002.gguf", "qwen3")
        if number == 1:
            for name, field in reader.fields.items():
                if not name.startswith("GGUF.") and name != "general.architecture":
                    part.add_key_value(name, field.contents(), field.types[0])
        for place, tensor in enumerate(reader.tensors):
            if place % 2 == number - 1:
                part.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        finish(part)
    model = GgufModel(tmp_path / "part-00002-of-00002.gguf")
    assert len(model.tensors) == len(whole.tensors)
    assert model.fields == GgufModel(path).fields
    one = load_model(path, read_config(path), torch.float32, "cpu", KERNELS)
    two = load_model(tmp_path / "part-00001-of-00002.gguf", read_config(path), torch.float32, "cpu", KERNELS)
    x = torch.randn(3, 64)
    assert torch.equal(one.compute_logits(x), two.compute_logits(x))
    (tmp_path / "part-00001-of-00002.gguf").unlink()
    with pytest.raises(InvalidCheckpointError, match=r"part-00001-of-00002\.gguf of them is not there"):
        read_config(tmp_path / "part-00002-of-00002.gguf")


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        read_config(tmp_path / "no.gguf")
    writer = gguf.GGUFWriter(tmp_path / "bert.gguf", "bert")
    finish(writer)
    with pytest.raises(UnsupportedModelError, match="architecture 'bert' is not supported; supported are llama, qwen2"):
        read_config(tmp_path / "bert.gguf")
    checkpoint = make_checkpoint(tmp_path / "qwen3", "qwen3", 0, **SHAPE, rope_scaling=None)
    write_gguf(tmp_path / "experts.gguf", checkpoint, 0, add_expert_count=8)
    with pytest.raises(UnsupportedModelError, match=r"qwen3\.expert_count is not supported; got 8"):
        read_config(tmp_path / "experts.gguf")
    writer = gguf.GGUFWriter(tmp_path / "iq1.gguf", "qwen3")
    data = np.zeros((4, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.IQ1_S][1]), dtype=np.uint8)
    writer.add_tensor("token_embd.weight", data, raw_dtype=gguf.GGMLQuantizationType.IQ1_S)
    finish(writer)
    with pytest.raises(UnsupportedModelError, match=r"'token_embd\.weight' is IQ1_S, which is not supported"):
        read_config(tmp_path / "iq1.gguf")


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "qwen3", "qwen3", 0, **SHAPE, rope_scaling=None)
    weights = load_file(checkpoint / "model.safetensors")
    from transformers import AutoConfig

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
    add_config(writer, AutoConfig.from_pretrained(checkpoint))
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("surprise.weight", weights["model.norm.weight"].numpy())
    finish(writer)
    config = read_config(tmp_path / "m.gguf")
    with pytest.raises(InvalidCheckpointError, match=r"lacks .* and has unexpected surprise\.weight|too few for"):
        load_model(tmp_path / "m.gguf", config, torch.float32, "cpu", KERNELS)
