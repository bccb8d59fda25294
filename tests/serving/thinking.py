"""A model that thinks: the bundled one, with a chat template such as Qwen3's, and with words put into its mouth."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoTokenizer

from mini_infer.config import BUNDLED_MODEL
from mini_infer.engine.llm_engine import LLMEngine
from tests.engine.executors import Saying, interpose

TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.reasoning_content %}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{%- endif %}
{{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- if forced is defined %}{{- '<think>\n' }}{%- endif %}
{%- endif %}"""
"""Like Qwen3's; and with ``forced`` like those that begin to think in the prompt."""


def save_tokenizer(directory: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@contextmanager
def saying(engine: LLMEngine, text: str) -> Iterator[None]:
    """The next answer is this text, then its end; for an idle engine."""
    end = engine._intake._defaults.eos_token_ids
    script = [*engine.tokenize(text, add_special_tokens=False), min(end)]
    own = engine._loop._executor
    interpose(engine, lambda inner: Saying(inner, script))
    try:
        yield
    finally:
        engine._loop._executor = own
