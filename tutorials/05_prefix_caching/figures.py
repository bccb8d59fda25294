"""The pictures of chapter 5, drawn from what the engine did with the bundled model."""

from collections import Counter
from collections.abc import Callable
from itertools import accumulate

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from mini_infer import LLM, SamplingParams

RULES = "You are the tutor of Mini-Infer, an inference engine. Answer in one sentence, with plain words. "
QUESTIONS = ("What is a KV cache?", "什么是前缀缓存？", "What is a block table?")
CONVERSATION = (
    "What is a KV cache?",
    "What is a block?",
    "什么是块表？",
    "What is preemption?",
    "什么是抢占？",
    "What is a token?",
    "什么是词元？",
    "What is a step?",
)
BLUE, ORANGE = "#1f77b4", "#ff7f0e"
PALE_BLUE, PALE_ORANGE = "#8fbcdf", "#ffbf86"  # with black figures on them


def draw(text: Callable[[str, str], str]) -> dict[str, Figure]:
    """Both pictures."""
    return {"sharing": sharing(text), "conversation": conversation(text)}


def sharing(text: Callable[[str, str], str]) -> Figure:
    """The block tables of three prompts with one system prompt, after the step that computed all three."""
    llm = LLM(dtype="float32", enable_prefix_caching=True)
    for name, question in zip("ABC", QUESTIONS, strict=True):
        messages = [{"role": "system", "content": RULES * 3}, {"role": "user", "content": question}]
        llm.add_request(llm.render_chat(messages), SamplingParams(max_tokens=8, temperature=0), request_id=name)
    llm.step()
    sequences, size = llm.snapshot().running, llm.config.block_size
    holders = Counter(block for sequence in sequences for block in sequence.blocks)

    figure, axes = plt.subplots(figsize=(7, 3.4))
    for row, sequence in enumerate(sequences):
        for place, block in enumerate(sequence.blocks):
            num_filled = min(size, sequence.num_computed_tokens - place * size)
            colour = PALE_BLUE if holders[block] > 1 else PALE_ORANGE
            axes.add_patch(Rectangle((place + 0.04, row + 0.15), 0.92 * num_filled / size, 0.7, color=colour, lw=0))
            axes.add_patch(Rectangle((place + 0.04, row + 0.15), 0.92, 0.7, fill=False, color="#444444"))
            axes.text(place + 0.5, row + 0.5, str(block), ha="center", va="center", fontsize=13, weight="bold")
    longest = max(len(sequence.blocks) for sequence in sequences)
    axes.set_xlim(0, longest)
    axes.set_ylim(len(sequences), 0)
    axes.set_xticks([place + 0.5 for place in range(longest)])
    axes.set_xticklabels([f"{place * size}-{place * size + size - 1}" for place in range(longest)])
    axes.set_yticks([row + 0.5 for row in range(len(sequences))])
    axes.set_yticklabels([sequence.request_id for sequence in sequences], fontsize=13)
    axes.set_xlabel(text("tokens of the prompt", "提示词的词元"))
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(
        text("Three prompts, {} blocks; the number is the block's id", "三条提示词，共 {} 个块；数字是块编号").format(
            len(holders)
        )
    )
    figure.legend(
        handles=[
            Patch(color=PALE_BLUE, label=text("shared, computed once", "共用，只算一次")),
            Patch(color=PALE_ORANGE, label=text("its own", "自己的")),
            Patch(facecolor="white", edgecolor="#444444", label=text("not filled yet", "尚未写入")),
        ],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


def conversation(text: Callable[[str, str], str]) -> Figure:
    """Prompt tokens computed up to each turn of a conversation, without the prefix cache and with it."""
    llm = LLM(dtype="float32", enable_prefix_caching=True)
    messages: list[dict[str, str]] = []
    sent, computed = [], []
    for question in CONVERSATION:
        messages.append({"role": "user", "content": question})
        before = llm.stats().num_prompt_tokens
        (out,) = llm.chat(messages, temperature=0, max_tokens=60, use_tqdm=False)
        messages.append({"role": "assistant", "content": out.text})
        sent.append(len(out.prompt_token_ids))
        computed.append(llm.stats().num_prompt_tokens - before)

    figure, axes = plt.subplots(figsize=(7, 3.6))
    turns = range(1, len(sent) + 1)
    for counts, colour, marker, label in (
        (sent, ORANGE, "o", text("without the cache: all that is sent", "没有缓存：发来的全部要算")),
        (computed, BLUE, "s", text("with the cache: what is new", "有缓存：只算新的部分")),
    ):
        totals = list(accumulate(counts))
        axes.plot(turns, totals, color=colour, marker=marker, label=label)
        axes.annotate(f"{totals[-1]}", (turns[-1], totals[-1]), xytext=(7, 0), textcoords="offset points", va="center")
    axes.set_xlim(0.8, len(sent) + 0.7)
    axes.set_ylim(0)
    axes.set_xlabel(text("turn of the conversation", "对话轮次"))
    axes.set_title(text("Prompt tokens computed so far", "累计计算的提示词词元数"))
    axes.legend(frameon=False)
    return figure
