"""Loading weights: from one file or several, and what is said about every kind of broken checkpoint."""

import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_infer import kernels
from mini_infer.exceptions import InvalidCheckpointError, OutOfMemoryError
from mini_infer.kernels import large_memory
from mini_infer.models import Decoder, load_model, read_config
from mini_infer.models.linear import Linear

from .checkpoints import FAMILIES, make_checkpoint

KERNELS = kernels.resolve("cpu")
TENSOR = "model.layers.0.mlp.down_proj.weight"


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    return load_model(directory, read_config(directory), dtype, "cpu", KERNELS)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def weights_of(model: Decoder) -> dict[str, torch.Tensor]:
    """Every weight of a loaded model; of the packed ones, what they make of nothing and of the unit vectors."""
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            inputs, dtype = module._product.in_features, module._product.dtype
            weights[name] = module(torch.cat((torch.zeros(1, inputs, dtype=dtype), torch.eye(inputs, dtype=dtype))))
    return weights


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "llama", 0, num_hidden_layers=2, tie_word_embeddings=False)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "llama", 0, num_hidden_layers=2, max_shard_size="20KB")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_loaded_model_holds_nothing_of_its_file(tmp_path: Path, backend: str, dtype: torch.dtype) -> None:
    directory = make_checkpoint(tmp_path, "llama", 0, dtype)
    model = load_model(directory, read_config(directory), dtype, "cpu", kernels.resolve("cpu", backend))
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    file = directory / "model.safetensors"
    with file.open("r+b") as written:  # in place, so that whoever has it mapped sees zeros
        written.write(bytes(file.stat().st_size))
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_hold_the_same_model(tmp_path: Path, family: str) -> None:
    one = load(make_checkpoint(tmp_path / "one", family, 7))
    several = make_checkpoint(tmp_path / "several", family, 7, max_shard_size="10KB")
    assert len(list(several.glob("*.safetensors"))) > 1
    expected = weights_of(one)
    for name, parameter in weights_of(load(several)).items():
        assert torch.equal(parameter, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_converted_on_the_way(tmp_path: Path, dtype: torch.dtype) -> None:
    # Without biases: the unit vectors give weight + bias, rounded.
    path = make_checkpoint(tmp_path, "llama", 0, num_hidden_layers=2, attention_bias=False, mlp_bias=False)
    expected = weights_of(load(path))
    for name, parameter in weights_of(load(path, dtype)).items():
        assert torch.equal(parameter, expected[name].to(dtype)), name


def test_harmless_extras_are_ignored(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama", 1, tie_word_embeddings=True)
    expected = weights_of(load(path))

    def add_relics(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(path, add_relics)
    model = load(path)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(model).items())


def test_a_missing_tensor(whole: Path) -> None:
    rewrite(whole, lambda tensors: tensors.pop(TENSOR))
    with pytest.raises(InvalidCheckpointError, match=rf"{whole} lacks {TENSOR} "):
        load(whole)


def test_an_unexpected_tensor(whole: Path) -> None:
    rewrite(whole, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(3)}))
    with pytest.raises(
        InvalidCheckpointError, match=rf"{whole} has unexpected model\.layers\.0\.self_attn\.q_norm\.weight "
    ):
        load(whole)


def test_many_tensors_are_counted_not_listed(whole: Path) -> None:
    config = read_config(whole)
    config = replace(config, layers=config.layers[:1] * 20)
    with pytest.raises(InvalidCheckpointError, match=r"and \d+ more for a LlamaForCausalLM with 20 layers") as raised:
        load_model(whole, config, torch.float32, "cpu", KERNELS)
    assert len(str(raised.value)) < 600


def test_a_misshapen_tensor(whole: Path) -> None:
    rewrite(whole, lambda tensors: tensors.update({TENSOR: tensors[TENSOR][:, 1:].contiguous()}))
    with pytest.raises(InvalidCheckpointError, match=rf"{TENSOR} in {whole}.*shape \[\d+, \d+\].*implies \[\d+, \d+\]"):
        load(whole)


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")], ids=str)
def test_a_quantized_tensor(whole: Path, dtype: torch.dtype, name: str) -> None:
    rewrite(whole, lambda tensors: tensors.update({TENSOR: tensors[TENSOR].to(dtype)}))
    with pytest.raises(InvalidCheckpointError, match=rf"{TENSOR} in {whole}.* is {name},"):
        load(whole)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file(whole: Path, kept: int) -> None:
    file = whole / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InvalidCheckpointError, match=rf"{file} cannot be read.*fetch it again"):
        load(whole)


def test_a_git_lfs_pointer(whole: Path) -> None:
    file = whole / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4567890\n")
    with pytest.raises(InvalidCheckpointError, match=rf"{file} cannot be read.*git lfs pull"):
        load(whole)


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(
        InvalidCheckpointError, match=rf"{sharded} lacks {shard.name}, named by model.safetensors.index.json"
    ):
        load(sharded)


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    tensors = load_file(first)
    save_file({**load_file(second), **tensors}, second)
    with pytest.raises(InvalidCheckpointError, match=rf"{second} repeats {sorted(tensors)[0]}"):
        load(sharded)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
    ],
)
def test_a_useless_index(sharded: Path, text: str) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(InvalidCheckpointError, match=rf"{index} cannot be used"):
        load(sharded)


def test_only_pickled_weights(whole: Path) -> None:
    (whole / "model.safetensors").rename(whole / "pytorch_model.bin")
    with pytest.raises(InvalidCheckpointError, match=rf"{whole} holds only pickled weights \(pytorch_model.bin\)"):
        load(whole)


def test_no_weights(whole: Path) -> None:
    (whole / "model.safetensors").unlink()
    with pytest.raises(InvalidCheckpointError, match=rf"{whole} has neither model.safetensors nor"):
        load(whole)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_device_that_runs_out_of_memory(whole: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(large_memory, "empty", no_room)
    with pytest.raises(OutOfMemoryError, match=rf"the weights in {whole} need \d+\.\d GiB as torch.float32.*cpu"):
        load(whole)


def test_a_model_without_memory(whole: Path) -> None:
    """What explains that memory is short takes none itself, however long the context."""
    config = replace(read_config(whole), vocab_size=2**31 - 1, max_position_embeddings=2**31 - 1)
    model = Decoder(config, torch.float32, "meta", KERNELS)
    assert model.weight_bytes > 2**31 * config.hidden_size * 4
    assert model.rotary_bytes == (2**31 - 1) * config.layers[0].attention.head_dim * 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_are_never_in_memory_twice(tmp_path: Path) -> None:
    """Private memory is sampled while a large checkpoint loads; pages of the mapped file are not private."""
    large = {"num_hidden_layers": 6, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8}
    make_checkpoint(tmp_path / "large", "llama", 0, torch.bfloat16, num_key_value_heads=8, head_dim=128, **large)
    make_checkpoint(tmp_path / "small", "llama", 0)
    program = """
        import sys, threading, time
        import torch
        from mini_infer import kernels
        from mini_infer.models import load_model, read_config

        def private_bytes():
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

        def sample():
            while not loaded:
                peaks.append(private_bytes())
                time.sleep(0.0005)

        def load(directory):
            return load_model(directory, read_config(directory), torch.float32, "cpu", kernels.resolve("cpu"))

        load(sys.argv[1])  # whatever libraries allocate on first use, let them do it now
        loaded, peaks, before = False, [], private_bytes()
        sampler = threading.Thread(target=sample)
        sampler.start()
        model = load(sys.argv[2])
        loaded = True
        sampler.join()
        print(max(peaks) - before, model.weight_bytes)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "small"), str(tmp_path / "large")]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peak, weights = map(int, output.split())
    assert weights > 300e6
    assert peak < 1.25 * weights, f"loading {weights / 1e6:.0f} MB took {peak / 1e6:.0f} MB"
