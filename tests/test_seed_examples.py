"""The examples of the API documents that this one grew from, run as they are written.

Each block is the document's own text; only the import name and the model's name are exchanged before it runs. The
blocks of a document share one namespace, in order, because later ones use what earlier ones define.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_infer import LLM, EngineConfig, GenerateOutput, LLMEngine, SamplingParams
from mini_infer.exceptions import InvalidConfigError, InvalidRequestError, ModelNotFoundError
from tests.engine.checkpoints import make_engine_checkpoint, save_tokenizer
from tests.models.llada import make_llada_checkpoint

Run = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return make_engine_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=1, **heads)


@pytest.fixture(scope="module")
def run(checkpoint: Path) -> Run:
    return runner(checkpoint)


def runner(checkpoint: Path) -> Run:
    """Runs a block in the namespace that all blocks of a document share, and returns the namespace."""
    namespaces: dict[str, dict[str, Any]] = {}

    def execute(block: str) -> dict[str, Any]:
        document, code = block.split("\n", 1)
        namespace = namespaces.setdefault(document, {"__name__": "example"})
        for theirs in ("nanovllm", "dllmserve", "atom"):
            code = code.replace(f"from {theirs} ", "from mini_infer ")
        code = code.replace("from dllmserve.sparse.state ", "from mini_infer ")
        for theirs in MODELS:
            code = code.replace(f'"{theirs}"', repr(str(checkpoint)))
        exec(compile(code, document, "exec"), namespace)
        return namespace

    return execute


MODELS = (
    "meta-llama/Llama-2-7b-hf",
    "/path/to/model",
    "/path/to/qwen3-model",
    "/absolute/path/to/model",
    "./LLaDA-8B-Instruct",
)


class TestMiniInfer:
    """004, our own: all of it."""

    def test_the_whole_document(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        run(
            """004
from mini_infer import LLMEngine
from mini_infer.config import EngineConfig

config = EngineConfig(
    model="meta-llama/Llama-2-7b-hf",
    max_num_seqs=64,
    block_size=16
)
engine = LLMEngine(config)
"""
        )
        names = run(
            """004
outputs = engine.generate(
    prompts=["Hello, how are you?"],
    max_tokens=100,
    temperature=0.8,
    top_p=0.95
)
"""
        )
        (output,) = names["outputs"]
        assert isinstance(output, GenerateOutput)
        assert 0 < len(output.token_ids) <= 100
        assert output.finish_reason in ("stop", "length") and output.cumulative_logprob < 0

        run("004\nfrom mini_infer.sampling import SamplingParams\n")  # from the section on SamplingParams, further down
        run(
            """004
request_id = engine.add_request(
    prompt="Write a poem",
    max_tokens=50,
    sampling_params=SamplingParams(temperature=0.9)
)
"""
        )
        names = run("004\noutput = engine.get_output(request_id)\n")
        assert isinstance(names["request_id"], str) and names["output"] is None
        while names["output"] is None:
            run("004\noutput = engine.get_output(request_id)\n")
        assert 0 < len(names["output"].token_ids) <= 50

        names = run(
            """004
from mini_infer.config import EngineConfig

config = EngineConfig(
    model="meta-llama/Llama-2-7b-hf",
    tokenizer="meta-llama/Llama-2-7b-hf",
    max_num_seqs=64,
    max_model_len=2048,
    block_size=16,
    gpu_memory_utilization=0.9,
    dtype="float16"
)
"""
        )
        assert names["config"].dtype == "float16" and names["config"].trust_remote_code is False
        names = run(
            """004
from mini_infer.sampling import SamplingParams

params = SamplingParams(
    temperature=0.8,
    top_p=0.95,
    top_k=50,
    max_tokens=100
)
"""
        )
        assert names["params"].top_k == 50

        # Example usage
        names = run(
            """004
from mini_infer import LLMEngine
from mini_infer.config import EngineConfig

# Initialize
config = EngineConfig(model="meta-llama/Llama-2-7b-hf")
engine = LLMEngine(config)

# Generate
outputs = engine.generate(
    prompts=["Explain quantum computing in simple terms."],
    max_tokens=200
)

print(outputs[0].text)
"""
        )
        assert capsys.readouterr().out == names["outputs"][0].text + "\n"
        names = run(
            """004
prompts = [
    "Write a haiku about programming",
    "Explain recursion",
    "What is machine learning?"
]

outputs = engine.generate(
    prompts=prompts,
    max_tokens=100,
    temperature=0.7
)

for i, output in enumerate(outputs):
    print(f"Prompt {i}: {output.text}\\n")
"""
        )
        shown = capsys.readouterr().out
        assert [output.prompt for output in names["outputs"]] == names["prompts"]
        assert all(f"Prompt {i}: {output.text}\n" in shown for i, output in enumerate(names["outputs"]))
        names = run(
            """004
# Add requests
req_ids = []
for prompt in prompts:
    req_id = engine.add_request(prompt, max_tokens=50)
    req_ids.append(req_id)

# Poll for results
while req_ids:
    for req_id in req_ids[:]:
        output = engine.get_output(req_id)
        if output:
            print(f"{req_id}: {output.text}")
            req_ids.remove(req_id)
"""
        )
        assert names["req_ids"] == [] and names["req_id"] + ": " in capsys.readouterr().out
        run(ERROR_HANDLING)
        assert capsys.readouterr().out == ""
        names["prompts"] = ["fine", ""]
        run(ERROR_HANDLING)
        assert capsys.readouterr().out.startswith("Invalid request: prompts[1]: prompt '' is empty")
        names["config"] = EngineConfig(model="./not/here")
        run(ERROR_HANDLING)
        assert capsys.readouterr().out == "Model not found\n"
        names["config"] = EngineConfig(
            model=names["EngineConfig"](model=str(names["engine"].config.model)).model,
            max_model_len=64,
            num_gpu_blocks=1,
        )
        run(ERROR_HANDLING)
        assert capsys.readouterr().out == "Not enough GPU memory\n"
        run(
            """004
from mini_infer.typing import (
    TokenIds,
    BlockTable,
    SequenceMetadata
)
"""
        )

    def test_scheduler(self, run: Run) -> None:
        names = run(
            """004
from mini_infer.scheduler import Scheduler

scheduler = Scheduler(
    max_num_seqs=64,
    max_model_len=2048,
    block_size=16
)
"""
        )
        run("004\nscheduled_seqs = scheduler.schedule()\n")
        assert type(names["scheduled_seqs"]).__name__ == "SchedulerOutputs"
        assert names["scheduled_seqs"].scheduled == ()

    def test_block_manager(self, run: Run) -> None:
        names = run(
            """004
from mini_infer.memory import BlockManager

block_manager = BlockManager(
    block_size=16,
    num_gpu_blocks=1024,
    num_cpu_blocks=256
)
"""
        )
        run("004\nblocks = block_manager.allocate(num_blocks=4)\n")
        assert len(set(names["blocks"])) == 4 and all(type(block) is int for block in names["blocks"])
        assert names["block_manager"].num_free_blocks == 1020
        run("004\nblock_manager.free(blocks)\n")
        assert names["block_manager"].num_free_blocks == 1024
        run("004\ncan_allocate = block_manager.can_allocate(num_blocks=4)\n")
        assert names["can_allocate"] is True
        assert names["block_manager"].can_allocate(num_blocks=1025) is False

    def test_rmsnorm(self, run: Run) -> None:
        generator = torch.Generator().manual_seed(0)
        x, weight = torch.randn(2, 5, 16, generator=generator), torch.rand(16, generator=generator)
        names = run("004\nfrom mini_infer.kernels import rmsnorm\n")
        names |= {"input_tensor": x, "weight_tensor": weight}
        run(
            """004
output = rmsnorm(
    x=input_tensor,
    weight=weight_tensor,
    eps=1e-6
)
"""
        )
        assert names["output"].shape == x.shape
        torch.testing.assert_close(names["output"], torch.nn.functional.rms_norm(x, (16,), weight, 1e-6))

    def test_rope(self, run: Run) -> None:
        generator = torch.Generator().manual_seed(0)
        query, key = torch.randn(7, 4, 8, generator=generator), torch.randn(7, 2, 8, generator=generator)
        angles = torch.arange(32)[:, None] * 0.3 ** torch.arange(4)
        names = run("004\nfrom mini_infer.kernels import apply_rotary_emb\n")
        names |= {"query_tensor": query, "key_tensor": key, "positions": torch.arange(3, 10)}
        names |= {"cos_cached": angles.cos(), "sin_cached": angles.sin()}
        run(
            """004
output_q, output_k = apply_rotary_emb(
    q=query_tensor,
    k=key_tensor,
    cos=cos_cached,
    sin=sin_cached,
    position_ids=positions
)
"""
        )
        # A rotation: lengths stay, and so does the product of a query and a key when both are moved alike.
        for before, after in ((query, names["output_q"]), (key, names["output_k"])):
            torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
        moved, _ = names["apply_rotary_emb"](query, key, angles.cos(), angles.sin(), names["positions"] + 5)
        assert not torch.allclose(moved, names["output_q"])

    def test_paged_attention(self, run: Run) -> None:
        generator = torch.Generator().manual_seed(0)
        keys, values = (torch.randn(6, 4, 2, 8, generator=generator) for _ in range(2))
        query = torch.randn(2, 4, 8, generator=generator)
        tables, lengths = (
            torch.tensor([[5, 1, 0], [2, 3, 4]], dtype=torch.int32),
            torch.tensor([6, 11], dtype=torch.int32),
        )
        names = run("004\nfrom mini_infer.kernels import paged_attention\n")
        names |= {"q": query, "k_cache": keys, "v_cache": values, "block_tables": tables, "context_lengths": lengths}
        run(
            """004
output = paged_attention(
    query=q,
    key_cache=k_cache,
    value_cache=v_cache,
    block_tables=block_tables,
    context_lens=context_lengths
)
"""
        )
        for row, length in enumerate(lengths.tolist()):
            k, v = (cache[tables[row].long()].flatten(0, 1)[:length].transpose(0, 1) for cache in (keys, values))
            expected = torch.nn.functional.scaled_dot_product_attention(query[row][:, None], k, v, enable_gqa=True)
            torch.testing.assert_close(names["output"][row], expected[:, 0])


ERROR_HANDLING = """004
from mini_infer.exceptions import (
    OutOfMemoryError,
    InvalidRequestError,
    ModelNotFoundError
)

try:
    engine = LLMEngine(config)
    outputs = engine.generate(prompts)
except OutOfMemoryError:
    print("Not enough GPU memory")
except InvalidRequestError as e:
    print(f"Invalid request: {e}")
except ModelNotFoundError:
    print("Model not found")
"""


class TestNanoVllm:
    """001: all but the example for two GPUs."""

    def test_the_constructor(self, checkpoint: Path) -> None:
        """All parameters that its signature lists, at their defaults there."""
        llm = LLM(
            model=str(checkpoint),
            max_num_batched_tokens=16384,
            max_num_seqs=512,
            max_model_len=4096,
            gpu_memory_utilization=0.9,
            tensor_parallel_size=1,
            enforce_eager=False,
            kvcache_block_size=256,
            num_kvcache_blocks=-1,
        )
        assert llm.config.block_size == 256 and llm.config.num_gpu_blocks is None

    def test_generate(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        names = run(
            """001
from nanovllm import LLM, SamplingParams

llm = LLM("/path/to/model")
sampling_params = SamplingParams(temperature=0.7, max_tokens=100)

prompts = ["Hello, how are you?", "What is machine learning?"]
outputs = llm.generate(prompts, sampling_params)

for output in outputs:
    print(f"Generated: {output['text']}")
"""
        )
        shown = capsys.readouterr().out
        assert len(names["outputs"]) == 2
        assert all(f"Generated: {output.text}" in shown for output in names["outputs"])

    def test_sampling_params(self, run: Run) -> None:
        names = run(
            """001
# Deterministic generation
deterministic = SamplingParams(temperature=0.0, max_tokens=50)

# Creative generation
creative = SamplingParams(temperature=0.8, top_p=0.9, max_tokens=100)

# Short, focused generation
focused = SamplingParams(temperature=0.3, top_k=10, max_tokens=20)
"""
        )
        assert names["deterministic"].greedy and names["focused"].top_k == 10

    def test_basic_text_generation(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        names = run(
            """001
from nanovllm import LLM, SamplingParams

# Initialize model
llm = LLM("/path/to/qwen3-model")

# Configure generation
sampling_params = SamplingParams(
    temperature=0.7,
    max_tokens=100,
    top_p=0.9
)

# Generate text
prompts = ["Explain quantum computing in simple terms."]
outputs = llm.generate(prompts, sampling_params)

print(outputs[0]["text"])
"""
        )
        assert capsys.readouterr().out == names["outputs"][0].text + "\n"

    def test_batch_processing(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        names = run(
            """001
from nanovllm import LLM, SamplingParams

llm = LLM("/path/to/model")

# Multiple prompts with different parameters
prompts = [
    "Write a short story about a robot.",
    "Explain photosynthesis.",
    "What is the capital of France?"
]

sampling_params = [
    SamplingParams(temperature=0.8, max_tokens=200),  # Creative story
    SamplingParams(temperature=0.3, max_tokens=150),  # Factual explanation
    SamplingParams(temperature=0.1, max_tokens=50),   # Direct answer
]

outputs = llm.generate(prompts, sampling_params)

for i, output in enumerate(outputs):
    print(f"Prompt {i+1}: {output['text']}\\n")
"""
        )
        assert all(f"Prompt {i}: " in capsys.readouterr().out or i > 1 for i in (1, 2, 3))
        for output, limit in zip(names["outputs"], (200, 150, 50), strict=True):
            assert 0 < len(output.token_ids) <= limit

    def test_manual_control(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        run(
            """001
from nanovllm import LLM, SamplingParams

llm = LLM("/path/to/model")

# Add requests manually
llm.add_request("Start a story:", SamplingParams(temperature=0.8, max_tokens=100))
llm.add_request("Explain AI:", SamplingParams(temperature=0.3, max_tokens=80))

# Process step by step
while not llm.is_finished():
    outputs, num_tokens = llm.step()
    
    for seq_id, token_ids in outputs:
        print(f"Completed sequence {seq_id}: {len(token_ids)} tokens")
    
    print(f"Processed {num_tokens} tokens this step")
"""  # noqa: W293  (as it is in the document)
        )
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"Processed {len('Start a story:') + len('Explain AI:')} tokens this step"
        assert "Processed -2 tokens this step" in lines  # two sequences decode
        assert sum(line.startswith("Completed sequence ") for line in lines) == 2

    def test_multi_gpu_setup(self, run: Run) -> None:
        """On two ranks of a CPU where there are no GPUs."""
        names = run(
            """001
from nanovllm import LLM, SamplingParams

# Use 2 GPUs for tensor parallelism
llm = LLM(
    "/path/to/model",
    tensor_parallel_size=2,
    gpu_memory_utilization=0.8
)
"""
        )
        with names["llm"] as llm:
            assert len(llm.generate("Hello", max_tokens=3, use_tqdm=False)[0].token_ids) == 3

    def test_token_level_control(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        names = run(
            """001
from transformers import AutoTokenizer
from nanovllm import LLM, SamplingParams

tokenizer = AutoTokenizer.from_pretrained("/path/to/model")

# Use token IDs directly
token_ids = tokenizer.encode("The future of AI is")
llm = LLM("/path/to/model")

sampling_params = SamplingParams(temperature=0.7, max_tokens=50)
outputs = llm.generate([token_ids], sampling_params)

# Access both text and token IDs
result = outputs[0]
print(f"Text: {result['text']}")
print(f"Token IDs: {result['token_ids']}")
"""
        )
        assert f"Token IDs: {names['result'].token_ids}" in capsys.readouterr().out
        assert names["result"].prompt_token_ids == names["token_ids"]

    @pytest.mark.parametrize(
        "block",
        [
            """001
# Optimize for memory usage
llm = LLM(
    "/path/to/model",
    gpu_memory_utilization=0.7,  # Use less GPU memory
    max_num_batched_tokens=8192,  # Smaller batches
    max_num_seqs=256,             # Fewer concurrent sequences
    kvcache_block_size=512        # Larger blocks for efficiency
)
""",
            """001
# Optimize for speed
llm = LLM(
    "/path/to/model",
    enforce_eager=False,          # Enable CUDA graphs
    gpu_memory_utilization=0.95,  # Use more GPU memory
    max_num_batched_tokens=32768, # Larger batches
    max_num_seqs=1024             # More concurrent sequences
)
""",
            """001
# Disable optimizations for debugging
llm = LLM(
    "/path/to/model",
    enforce_eager=True,           # Disable CUDA graphs
    tensor_parallel_size=1        # Single GPU only
)
""",
            """001
# Reduce memory usage
llm = LLM("/path/to/model", gpu_memory_utilization=0.7)
""",
            """001
# Ensure model path is correct
llm = LLM("/absolute/path/to/model")
""",
            """001
# Disable CUDA graphs
llm = LLM("/path/to/model", enforce_eager=True)
""",
        ],
        ids=["memory", "speed", "debug", "out of memory", "model not found", "CUDA graph errors"],
    )
    def test_configurations(self, run: Run, block: str) -> None:
        names = run(block)
        assert len(names["llm"].generate("Hello", max_tokens=3, use_tqdm=False)) == 1

    def test_with_transformers(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        names = run(
            """001
from transformers import AutoTokenizer
from nanovllm import LLM, SamplingParams

# Load tokenizer
tokenizer = AutoTokenizer.from_pretrained("/path/to/model")

# Initialize Nano-vLLM
llm = LLM("/path/to/model")

# Use chat template
messages = [{"role": "user", "content": "Hello, how are you?"}]
prompt = tokenizer.apply_chat_template(
    messages,
    tokenize=False,
    add_generation_prompt=True
)

sampling_params = SamplingParams(temperature=0.7, max_tokens=100)
outputs = llm.generate([prompt], sampling_params)

print(outputs[0]["text"])
"""
        )
        assert capsys.readouterr().out == names["outputs"][0].text + "\n"
        chatted = names["llm"].chat(names["messages"], max_tokens=1)[0]
        assert chatted.prompt_token_ids == names["outputs"][0].prompt_token_ids

    def test_with_fastapi(self, run: Run) -> None:
        pytest.importorskip("fastapi", reason="fastapi is not installed; it comes with the serve requirements")
        pytest.importorskip("httpx", reason="httpx is not installed; it is among the dev requirements")
        from fastapi.testclient import TestClient

        names = run(
            """001
from fastapi import FastAPI
from pydantic import BaseModel
from nanovllm import LLM, SamplingParams

app = FastAPI()
llm = LLM("/path/to/model")

class GenerationRequest(BaseModel):
    prompt: str
    temperature: float = 0.7
    max_tokens: int = 100

@app.post("/generate")
async def generate_text(request: GenerationRequest):
    sampling_params = SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_tokens
    )
    
    outputs = llm.generate([request.prompt], sampling_params)
    return {"generated_text": outputs[0]["text"]}
"""  # noqa: W293  (as it is in the document)
        )
        answer = TestClient(names["app"]).post("/generate", json={"prompt": "Hello", "temperature": 0, "max_tokens": 8})
        expected = names["llm"].generate("Hello", temperature=0, max_tokens=8)[0].text
        assert (answer.status_code, answer.json()) == (200, {"generated_text": expected})


class TestAtom:
    """000: outputs are objects that read as text, instead of bare strings."""

    def test_the_class(self, run: Run) -> None:
        names = run(
            """000
from atom import LLMEngine

llm = LLMEngine(model="meta-llama/Llama-2-7b-hf")
"""
        )
        assert isinstance(names["llm"], LLMEngine)
        run(
            """000
from atom import SamplingParams

params = SamplingParams(
    temperature=0.8,
    max_tokens=100,
    ignore_eos=False,
    stop_strings=["</s>", "\\n\\n"]
)
"""
        )
        assert names["params"].stop == ("</s>", "\n\n")
        names["prompts"] = ["Hello"]
        run(
            """000
sampling_params = SamplingParams(max_tokens=50, temperature=0.8)
outputs = llm.generate(prompts, sampling_params)
"""
        )
        assert [str(output) for output in names["outputs"]] == [output.text for output in names["outputs"]]
        run(
            """000
outputs = llm.generate(["Hello, world!"], sampling_params)
# outputs is list[str], e.g., ["Hello, world! How are you today?"]
"""
        )
        assert len(names["outputs"]) == 1

    COMPLETE = """000
from atom import LLM, SamplingParams

# Initialize model
llm = LLM(
    model="meta-llama/Llama-2-7b-hf",
    tensor_parallel_size=2,
    gpu_memory_utilization=0.9
)

# Configure sampling
sampling_params = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    max_tokens=200
)

# Generate
prompts = ["Tell me about AMD GPUs"]
outputs = llm.generate(prompts, sampling_params=sampling_params)

for output in outputs:
    print(f"Prompt: {output.prompt}")
    print(f"Generated: {output.text}")
"""

    @pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_the_complete_example(self, run: Run, capsys: pytest.CaptureFixture[str], devices: int) -> None:
        names = run(self.COMPLETE.replace("parallel_size=2", f"parallel_size={devices}"))
        names["llm"].close()
        expected = f"Prompt: Tell me about AMD GPUs\nGenerated: {names['outputs'][0].text}\n"
        assert capsys.readouterr().out == expected


class TestDllmServe:
    """002, with a diffusion model."""

    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory: pytest.TempPathFactory) -> Run:
        path = make_llada_checkpoint(tmp_path_factory.mktemp("llada"), 0)
        save_tokenizer(path)
        return runner(path)

    def test_the_class(self, run: Run) -> None:
        names = run(
            """002
from dllmserve import LLM

llm = LLM(
    "./LLaDA-8B-Instruct",
    enforce_eager=True,
    tensor_parallel_size=1,
    max_model_len=4096,
)
"""
        )
        assert names["llm"].max_model_len == 256  # the model's own, and a warning
        run("002\nfrom dllmserve import SamplingParams\n")
        assert names["SamplingParams"] is SamplingParams

    def test_generating(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        names = run(
            """002
from dllmserve import LLM, SamplingParams

llm = LLM("./LLaDA-8B-Instruct", enforce_eager=True)
params = SamplingParams(temperature=0.6, gen_length=64, steps=64, cfg_scale=0.0, remasking="low_confidence")

outputs = llm.generate(["Hello, world!"], params)
print(outputs[0]['text'])
"""
        )
        assert capsys.readouterr().out == names["outputs"][0].text + "\n"
        names = run(
            """002
prompts = ["Prompt 1", "Prompt 2", "Prompt 3"]
params = SamplingParams(temperature=0.0, gen_length=32, steps=32, cfg_scale=0.0, remasking="low_confidence")
outputs = llm.generate(prompts, params)
"""
        )
        assert all(0 < len(output.token_ids) <= 32 for output in names["outputs"])
        names = run(
            """002
prompts = prompts[:2]
params_list = [
    SamplingParams(temperature=0.0, gen_length=32, steps=32, cfg_scale=0.0, remasking="low_confidence"),
    SamplingParams(temperature=0.6, gen_length=64, steps=64, cfg_scale=0.0, remasking="low_confidence"),
]
outputs = llm.generate(prompts, params_list)
"""
        )
        assert len(names["outputs"]) == 2
        names = run(
            """002
from dllmserve.sparse.state import SparseConfig

sparse_config = SparseConfig(enabled=True, retention_ratio=0.5)
outputs = llm.generate(prompts, params, sparse_configs=sparse_config)
"""
        )
        assert all(0 < len(output.token_ids) <= 32 for output in names["outputs"])
        run(
            """002
from dllmserve.sparse.state import SparseConfig

sparse_config = SparseConfig(
    enabled=True,
    retention_ratio=0.5,  # Use 50% of heads
    delay_step=1,
    default_block_len=32,
    head_select=True,
)
"""
        )

    def test_parameters(self, run: Run) -> None:
        run("002\nfrom dllmserve import LLM, SamplingParams\n")
        run(
            """002
# Diffusion model parameters
params = SamplingParams(
    temperature=0.6,
    gen_length=128,
    steps=128,
    cfg_scale=0.0,
    remasking="low_confidence",
)
"""
        )
        with pytest.raises(ValueError, match="gen_length must be an integer from 1 to 8192, got 10000") as caught:
            run(
                """002
# This will raise ValueError
params = SamplingParams(gen_length=10000)  # Exceeds maximum
"""
            )
        assert isinstance(caught.value, InvalidRequestError)

    @pytest.mark.slow
    def test_several_devices(self, run: Run) -> None:
        run("002\nfrom dllmserve import LLM, SamplingParams\n")
        run('002\nllm = LLM("./LLaDA-8B-Instruct", tensor_parallel_size=2)\n')["llm"].close()

    def test_parameters_that_both_kinds_of_model_have(self) -> None:
        params = SamplingParams(temperature=1.0, max_tokens=64, ignore_eos=False)
        assert params.max_tokens == 64

    def test_results_read_as_dictionaries(self, checkpoint: Path) -> None:
        outputs = LLM(checkpoint).generate(["Prompt 1", "Prompt 2"], SamplingParams(temperature=0.0, max_tokens=4))
        for output in outputs:
            assert {"text", "token_ids"} <= dict(output).keys()


class TestFuriosa:
    """003: its flags, as fields."""

    @pytest.mark.parametrize(
        ("flag", "value", "field"),
        [
            ("tokenizer", "path", "tokenizer"),
            ("tokenizer_mode", "auto", "tokenizer_mode"),
            ("tokenizer_mode", "slow", "tokenizer_mode"),
            ("seed", 42, "seed"),
            ("devices", "cpu", "device"),
            ("pipeline_parallel_size", 2, "pipeline_parallel_size"),
            ("data_parallel_size", 4, "data_parallel_size"),
            ("cache_dir", "cache", "cache_dir"),
            ("cache_dir", None, "cache_dir"),
            ("paged_attention_num_blocks", 64, "num_gpu_blocks"),
            ("npu_queue_limit", 2, "overlap"),
            ("max_processing_samples", 100, "max_waiting"),
            ("spare_blocks_ratio", 0.2, "watermark"),
            ("is_offline", True, "offline"),
            ("is_offline", False, "offline"),
        ],
    )
    def test_accepted(self, flag: str, value: Any, field: str) -> None:
        config = EngineConfig(model="/path/to/model", **{flag: value})
        assert getattr(config, field) == value

    @pytest.mark.parametrize(
        ("flag", "value", "field"),
        [
            ("npu_queue_limit", 5, "overlap"),
        ],
    )
    def test_refused_by_name(self, flag: str, value: Any, field: str) -> None:
        with pytest.raises(InvalidConfigError, match=f"{field}={value}"):
            EngineConfig(model="/path/to/model", **{flag: value})

    @pytest.mark.parametrize("devices", ["npu:0", "npu:0:*"])
    def test_other_devices_are_refused_by_name(self, checkpoint: Path, devices: str) -> None:
        with pytest.raises(InvalidConfigError, match=f"device='{devices[:5]}"):
            LLM(checkpoint, devices=devices)

    def test_its_model_is_not_here(self) -> None:
        with pytest.raises(ModelNotFoundError, match="/path/to/model"):
            LLM("/path/to/model")

    def test_flags_together_on_a_real_engine(self, checkpoint: Path) -> None:
        llm = LLM(
            checkpoint,
            tokenizer=checkpoint,
            tokenizer_mode="auto",
            seed=7,
            devices="cpu",
            paged_attention_num_blocks=64,
            npu_queue_limit=2,
            max_processing_samples=10,
            spare_blocks_ratio=0.1,
            is_offline=True,
        )
        assert llm.stats().num_blocks == 64
        assert len(llm.generate("Hello", max_tokens=3)) == 1

    @pytest.mark.parametrize(
        "more",
        [
            "--devices cpu",
            pytest.param("--devices cpu:2 --pipeline-parallel-size 2", marks=pytest.mark.slow),
            pytest.param("--devices cpu:2 --data-parallel-size 2", marks=pytest.mark.slow),
        ],
    )
    def test_its_command_line(self, tmp_path: Path, more: str) -> None:
        """Every flag that it lists, on the script that it shows."""
        make_engine_checkpoint(tmp_path, num_hidden_layers=2)
        script = Path(__file__).parents[1] / "examples" / "llm_engine.py"
        flags = (
            f"--model {tmp_path} --tokenizer {tmp_path} --tokenizer-mode auto --seed 7 --cache-dir {tmp_path} "
            "--paged-attention-num-blocks 64 --npu-queue-limit 2 --max-processing-samples 10 --spare-blocks-ratio 0.1 "
            f"--is-offline True {more}"
        )
        done = subprocess.run(
            [sys.executable, str(script), *flags.split()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert sorted(line.split(":")[0] for line in done.stdout.splitlines()) == ["0", "1", "2"]
