"""The diffusion tutor: the same corpus, learnt by a masked-diffusion model in LLaDA's format.

An answer, filled up with end-of-text, is seen as decoding sees it: written up to a block, of the block a share t is
masked, and behind it everything. The model sees both sides of every gap and says what belongs there. Where the block is
the whole answer, that is LLaDA's own training. The question is never masked, but for a few rows in which all of it is,
so that guidance has a model without a question to compare with.

Nie et al., Large Language Diffusion Models, 2025, https://arxiv.org/abs/2502.09992
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from mini_infer import LLM, SamplingParams

from .corpus import END_OF_TEXT, START, Exchange, Segment
from .optimizer import Optimizers, Schedule
from .tokenizer import MAX_LENGTH, VOCAB_SIZE
from .train import encode

MASK = "<|mask|>"
EMBEDDING_SIZE = VOCAB_SIZE + 32  # the mask, and rows that nobody uses
FILL = 16
"""Rows are filled with end-of-text up to a multiple of so many tokens."""

MORE_FILL = (0, 0, 0, 0, 0, 0, FILL, 4 * FILL)
"""And then with so many more, drawn for each batch: an answer may be short and the room for it long."""

BLOCK_LENGTH = 16
"""In blocks of so many tokens the model writes best; its `generation_config.json` says so."""

BLOCKS = (8, BLOCK_LENGTH, BLOCK_LENGTH, 32, 1 << 20)
"""Lengths of blocks, one drawn for each row; the last is longer than any answer."""


@dataclass(frozen=True)
class DiffusionRecipe(Schedule):
    steps: int = 5700
    tokens_per_step: int = 3072
    peak_lr: float = 1.5e-3
    muon_scale: float = 4.0
    warmup_steps: int = 100
    longest_row: int = 256
    pool: int = 512
    """So many rows are sorted by length before they are cut into batches."""
    average: float = 0.998
    """What a step leaves of the running average of the weights, which is what is exported."""
    without_question: float = 0.05
    behind: float = 0.25
    """What all gaps behind the block weigh together, where those in the block weigh 1."""


def model_config(tokenizer: Tokenizer) -> dict:
    """The checkpoint's `config.json`, with the fields that LLaDA's own has."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "block_type": "llama",
        "d_model": 256,
        "n_layers": 6,
        "n_heads": 8,
        "n_kv_heads": 4,
        "mlp_hidden_size": 768,
        "max_sequence_length": MAX_LENGTH,
        "vocab_size": EMBEDDING_SIZE,
        "embedding_size": EMBEDDING_SIZE,
        "mask_token_id": tokenizer.token_to_id(MASK),
        "eos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "pad_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "rope": True,
        "rope_theta": 10000.0,
        "rope_full_precision": True,
        "rms_norm_eps": 1e-6,
        "layer_norm_type": "rms",
        "attention_layer_norm": False,
        "activation_type": "silu",
        "include_bias": False,
        "include_qkv_bias": False,
        "weight_tying": True,
        "alibi": False,
        "scale_logits": False,
        "input_emb_norm": False,
        "torch_dtype": "bfloat16",
    }


def with_mask(tokenizer: Tokenizer) -> Tokenizer:
    """The tutor's tokenizer with one token more."""
    tokenizer.add_special_tokens([AddedToken(MASK, special=True)])
    return tokenizer


class Block(nn.Module):
    def __init__(self, config: dict) -> None:
        super().__init__()
        size, inner = config["d_model"], config["mlp_hidden_size"]
        self.num_heads, self.head_dim = config["n_heads"], size // config["n_heads"]
        kv_size = config["n_kv_heads"] * self.head_dim
        self.attn_norm, self.ff_norm = (nn.RMSNorm(size, config["rms_norm_eps"]) for _ in range(2))
        self.q_proj, self.attn_out = (nn.Linear(size, size, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(size, kv_size, bias=False) for _ in range(2))
        self.ff_proj, self.up_proj = (nn.Linear(size, inner, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = self.attn_norm(x)
        q, k, v = (
            p(normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v, enable_gqa=True)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(2))
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class DiffusionModel(nn.Module):
    """LLaDA's modules under LLaDA's names; ``[B, T]`` tokens to ``[B, T, d_model]`` hidden states."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        size = config["d_model"]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config["embedding_size"], size),
                "blocks": nn.ModuleList(Block(config) for _ in range(config["n_layers"])),
                "ln_f": nn.RMSNorm(size, config["rms_norm_eps"]),
            }
        )
        head_dim = size // config["n_heads"]
        frequencies = config["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.outer(torch.arange(config["max_sequence_length"], dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        parts, length = self.transformer, ids.shape[1]
        x = parts["wte"](ids)
        for block in parts["blocks"]:
            x = block(x, self.cos[:length], self.sin[:length])
        return parts["ln_f"](x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.transformer["wte"].weight)


def warm_start(model: DiffusionModel, tutor: Path) -> None:
    """Begin with what the autoregressive tutor knows of words and answers: embedding, values, feed-forward layers.

    Where it looks is learnt anew, since it never looked ahead and normalised its queries and keys; until then attention
    gives nothing.
    """
    theirs = load_file(tutor / "model.safetensors")
    ours = model.transformer.state_dict()
    ours["wte.weight"][:VOCAB_SIZE] = theirs["model.embed_tokens.weight"].float()
    ours["ln_f.weight"].copy_(theirs["model.norm.weight"])
    names = {
        "attn_norm": "input_layernorm",
        "ff_norm": "post_attention_layernorm",
        "v_proj": "self_attn.v_proj",
        "ff_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "ff_out": "mlp.down_proj",
    }
    for i in range(len(model.transformer["blocks"])):
        for name, theirs_name in names.items():
            ours[f"blocks.{i}.{name}.weight"].copy_(theirs[f"model.layers.{i}.{theirs_name}.weight"])
        ours[f"blocks.{i}.attn_out.weight"].zero_()


@dataclass(frozen=True)
class Row:
    question: list[int]
    answer: list[int]

    def __len__(self) -> int:
        return len(self.question) + len(self.answer)


def rows(tokenizer: Tokenizer, documents: Iterator[list[Segment]], seed: int, longest: int) -> Iterator[Row]:
    """Conversations, and questions with their answers as plain text: one thing said in each is the answer, and all
    before it the question."""
    rng = random.Random(seed)
    for document in documents:
        first = document[0].text
        is_chat = first.startswith(START) and not first.startswith(f"{START}tools")  # calls are left to the other tutor
        if not is_chat and len(document) != 2:
            continue
        turn = rng.choice([i for i, segment in enumerate(document) if segment.learn][:2])
        question, _ = encode(tokenizer, document[:turn])
        answer, _ = encode(tokenizer, document[turn : turn + 1])
        if len(question) + len(answer) <= longest:
            yield Row(question, answer)


def batches(source: Iterator[Row], recipe: DiffusionRecipe, rng: random.Random) -> Iterator[tuple[list[Row], int]]:
    """Rows of about the same length, and the length to fill them up to."""
    while True:
        pool = sorted((next(source) for _ in range(recipe.pool)), key=len)
        cut: list[tuple[list[Row], int]] = []
        while pool:
            width = -(-len(pool[-1]) // FILL) * FILL + rng.choice(MORE_FILL)
            taken = pool[-max(1, recipe.tokens_per_step // width) :]
            del pool[-len(taken) :]
            cut.append((taken, width))
        rng.shuffle(cut)
        yield from cut


def masked(
    batch: list[Row], width: int, config: dict, recipe: DiffusionRecipe, rng: random.Random
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows with gaps ``[B, width]``, what belongs there, and each gap's weight, zero where there is none.

    Of a block with L tokens exactly ceil(tL) are masked, each weighing 1 / ceil(tL), and so a row 1; the t of a batch
    are spread evenly over (0, 1].
    """
    ids = torch.tensor([r.question + r.answer + [config["eos_token_id"]] * (width - len(r)) for r in batch])
    seen, weights = ids.clone(), torch.zeros(ids.shape)
    shift = rng.random()
    for i, row in enumerate(batch):
        length = rng.choice(BLOCKS)
        begin = len(row.question) + length * rng.randrange(-(-len(row.answer) // length))
        end = min(begin + length, width)
        share = (i + shift) / len(batch)
        gaps = torch.randperm(end - begin)[: max(1, math.ceil(share * (end - begin)))] + begin
        seen[i, gaps] = seen[i, end:] = config["mask_token_id"]
        weights[i, gaps] = 1 / len(gaps)
        weights[i, end:] = recipe.behind / max(1, width - end)
        if rng.random() < recipe.without_question:
            seen[i, : len(row.question)] = config["mask_token_id"]
    return seen, ids, weights


def train_diffusion(
    config: dict,
    tokenizer: Tokenizer,
    documents: Callable[[int], Iterator[list[Segment]]],
    tutor: Path,
    recipe: DiffusionRecipe,
    state_file: Path,
    on_step: Callable[[int, float, DiffusionModel], None],
    save_every: int,
) -> DiffusionModel:
    """Train from the autoregressive tutor's weights, or go on from ``state_file`` if it is there.

    ``on_step`` hears the step just done, its loss and the average of the weights so far.
    """
    torch.manual_seed(recipe.seed)
    model, average = DiffusionModel(config), DiffusionModel(config)
    warm_start(model, tutor)
    average.load_state_dict(model.state_dict())
    parts = model.transformer
    optimizers = Optimizers(parts["blocks"], parts["wte"].weight, [parts["ln_f"].weight], recipe)
    begin = 0
    if state_file.exists():
        saved = torch.load(state_file, weights_only=True)
        begin = saved["step"]
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        for optimizer, state in zip(optimizers.each, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    seed = recipe.seed + begin  # whoever goes on hears something new
    rng = random.Random(seed)
    source = batches(rows(tokenizer, documents(seed), seed, recipe.longest_row), recipe, rng)
    for step in range(begin, recipe.steps):
        seen, ids, weights = masked(*next(source), config, recipe, rng)
        gaps = weights > 0
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.logits(model(seen)[gaps])
        losses = F.cross_entropy(logits.float(), ids[gaps], reduction="none")
        loss = (losses * weights[gaps]).sum() / len(ids)
        loss.backward()
        optimizers.step(step)
        keep = min(recipe.average, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(now, 1 - keep)
        if (step + 1) % save_every == 0:
            state = {"step": step + 1, "model": model.state_dict(), "average": average.state_dict()}
            torch.save({**state, "optimizers": [optimizer.state_dict() for optimizer in optimizers.each]}, state_file)
        on_step(step + 1, loss.item(), average)
    return average.eval()


def evaluate_diffusion(directory: Path, suites: dict[str, list[Exchange]], at_most: int) -> dict:
    """How many answers are right word for word, of as many from each suite, spread evenly over it: 64 masks, one of
    them written in each pass, computed in float32."""
    scores = {}
    params = SamplingParams(temperature=0, gen_length=64, steps=64, block_length=BLOCK_LENGTH)
    with LLM(directory, dtype="float32", device="cpu", max_num_batched_tokens=8192) as llm:
        for name, exchanges in suites.items():
            chosen = exchanges[:: max(1, len(exchanges) // at_most)][:at_most]
            outputs = llm.chat([[{"role": "user", "content": exchange.question}] for exchange in chosen], params)
            right = [output.text == exchange.answer for output, exchange in zip(outputs, chosen, strict=True)]
            scores[name] = {"correct": sum(right), "total": len(right)}
    return scores
