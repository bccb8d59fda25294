"""llama.cpp, by its batch interface: prompts in chunks, then one token of every sequence in each batch.

Runs in the interpreter of an environment of its own, which has llama-cpp-python and gguf.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workers.channel import Done, Job, serve

BATCH = 2048
"""Tokens of one batch at most, the library's default."""

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def converted(model: str) -> Path:
    """The checkpoint as GGUF, bfloat16 and without a tokenizer; made once, and kept among the temporary files."""
    path = Path(tempfile.gettempdir()) / "mini-infer-checkpoints" / "gguf" / f"{Path(model).name}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        _convert(Path(model), part)
        part.rename(path)
    return path


def _convert(model: Path, path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    config = json.loads((model / "config.json").read_text())
    kind = config["model_type"]
    if kind not in ("qwen3", "llama"):
        raise ValueError(f"a model of type {kind!r} is not converted here")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = GGUFWriter(path, kind)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    for name, array in _tensors(model / "model.safetensors"):
        bare = name.removesuffix(".weight")
        if bare.startswith("model.layers."):
            number, inner = bare.removeprefix("model.layers.").split(".", 1)
            target = f"blk.{number}.{NAMES[inner]}.weight"
        else:
            target = f"{NAMES[bare]}.weight"
        if array.ndim == 1:  # norms are float32 there
            writer.add_tensor(target, (array.astype(np.uint32) << 16).view(np.float32))
            continue
        if kind == "llama" and bare.endswith(("q_proj", "k_proj")):  # rotary pairs side by side, instead of in halves
            array = array.reshape(-1, 2, head_dim // 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        data = np.ascontiguousarray(array).view(np.uint8)
        writer.add_tensor(target, data, raw_shape=data.shape, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(path: Path) -> Any:
    """Names and numbers of a safetensors file of bfloat16, as uint16."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    length = int(data[:8].view(np.uint64)[0])
    for name, entry in json.loads(bytes(data[8 : 8 + length])).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise ValueError(f"{name} is {entry['dtype']}; bfloat16 is expected")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        yield name, np.frombuffer(data[begin:end], dtype=np.uint16).reshape(entry["shape"])


def load(model: str, options: dict[str, Any]) -> dict[str, Any]:
    import llama_cpp

    if options["dtype"] != "bfloat16":
        raise ValueError(f"only bfloat16 is converted; got {options['dtype']}")
    llama_cpp.llama_backend_init()
    file = (model if model.endswith(".gguf") else str(converted(model))).encode()
    loaded = llama_cpp.llama_model_load_from_file(file, llama_cpp.llama_model_default_params())
    if not loaded:
        raise RuntimeError("the model cannot be loaded")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    batch = llama_cpp.llama_batch_init(BATCH, 0, 1)

    def decode(context: Any, tokens: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (token, position, sequence, wants logits); the likeliest next tokens of those that want any."""
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wants) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wants
            batch.seq_id[i][0] = sequence
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        wanting = [i for i, token in enumerate(tokens) if token[3]]
        if not wanting:
            return []
        rows = [llama_cpp.llama_get_logits_ith(context, i) for i in wanting]
        return [int(np.argmax(np.ctypeslib.as_array(row, (vocab_size,)))) for row in rows]

    def run(*arguments: Any) -> Done:
        job = Job(*arguments)
        if job.temperature > 0:
            raise ValueError("this worker is greedy")
        parameters = llama_cpp.llama_context_default_params()
        longest = max(len(p) + n for p, n in zip(job.prompts, job.num_outputs, strict=True))
        parameters.n_seq_max = len(job.prompts)
        parameters.n_ctx = sum(len(p) + n + 32 for p, n in zip(job.prompts, job.num_outputs, strict=True)) + longest
        parameters.n_batch, parameters.kv_unified = BATCH, True
        parameters.n_threads = parameters.n_threads_batch = options["threads"]
        context = llama_cpp.llama_init_from_model(loaded, parameters)
        if not context:
            raise RuntimeError("no context can be made")
        token_ids: list[list[int]] = [[] for _ in job.prompts]
        first, last = [0.0] * len(token_ids), [0.0] * len(token_ids)
        begin = time.perf_counter()

        def take(sequences: list[int], tokens: list[int]) -> None:
            now = time.perf_counter() - begin
            for sequence, token in zip(sequences, tokens, strict=True):
                first[sequence] = first[sequence] if token_ids[sequence] else now
                last[sequence] = now
                token_ids[sequence].append(token)

        waiting = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(job.prompts)
            for position, token in enumerate(prompt)
        ]
        for start in range(0, len(waiting), BATCH):
            some = waiting[start : start + BATCH]
            take([token[2] for token in some if token[3]], decode(context, some))
        while True:
            running = [s for s, made in enumerate(token_ids) if len(made) < job.num_outputs[s]]
            if not running:
                break
            tokens = [(token_ids[s][-1], len(job.prompts[s]) + len(token_ids[s]) - 1, s, True) for s in running]
            take(running, decode(context, tokens))
        seconds = time.perf_counter() - begin
        llama_cpp.llama_free(context)
        return Done(seconds, token_ids, first, last, {})

    return {"run": run}


if __name__ == "__main__":
    serve("llama_cpp", load)
