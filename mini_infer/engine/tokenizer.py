"""Text to token ids, with the checks that keep bad text from going any further."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mini_infer.config import EngineConfig
from mini_infer.exceptions import InvalidCheckpointError, InvalidRequestError, MiniInferError

_TEMPLATE_OPTIONS = {
    "messages",
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
} - {"tools", "documents"}
"""Names that are no variables of a chat template, but say what is rendered and how."""

Renderer: TypeAlias = Callable[[str, Mapping[str, Any]], str]
"""Makes text of a chat template and its variables, among them ``messages``."""


class Tokenizer:
    """A transformers tokenizer and what the engine needs of it.

    Attributes:
        hf: the tokenizer itself.
        renderer: makes text of a chat template and its variables, in the tokenizer's place. For servers, which must
            not wait for a template that has no end.
    """

    renderer: Renderer | None = None

    def __init__(self, directory: Path, config: EngineConfig) -> None:
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(
                directory, use_fast=config.tokenizer_mode == "auto", trust_remote_code=config.trust_remote_code
            )
        except Exception as error:  # transformers raises almost anything for a damaged or missing tokenizer
            raise InvalidCheckpointError(
                f"no usable tokenizer in {str(directory)!r} ({type(error).__name__}: {error}); "
                "give EngineConfig(tokenizer=...) a directory or Hub name that has one"
            ) from error
        self._longest_token = max(map(len, self.hf.get_vocab()), default=1)

    def encode(self, text: str, max_tokens: int) -> list[int]:
        """The token ids of a prompt, with the model's beginning-of-sequence token if it has one.

        A prompt that already starts with that token, such as a rendered chat, does not get a second one.

        Args:
            max_tokens: most tokens a prompt can have. A text that must have more is refused before the work.

        Raises:
            InvalidRequestError: the text is no valid Unicode, is far too long, or has no tokens at all.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"prompt has a lone surrogate {text[error.start]!r} at character {error.start}, which no tokenizer can "
                "read; replace it, for example with text.encode(errors='replace').decode()"
            ) from error
        at_least = len(text) // self._longest_token
        if at_least > max_tokens:
            raise InvalidRequestError(
                f"prompt has {len(text)} characters, so at least {at_least} tokens, but only {max_tokens} fit; "
                f"shorten it or raise max_model_len (it begins {text[:40]!r})"
            )
        bos = self.hf.bos_token
        token_ids: list[int] = self.hf.encode(text, add_special_tokens=not (bos and text.startswith(bos)))
        if not token_ids:
            raise InvalidRequestError(f"prompt {text[:40]!r} has no tokens; give at least one")
        return token_ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids, exactly: nothing is tidied up."""
        text: str = self.hf.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return text

    def decode_token(self, token_id: int) -> str:
        """The text of one token by itself; a token that is part of a character shows as a replacement character."""
        return self.decode([token_id], skip_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], /, **template_kwargs: Any) -> str:
        """The prompt that the model's own chat template makes of a conversation, ready for its next answer.

        Args:
            messages: each with "role" and "content".
            template_kwargs: further variables of the template, for example ``enable_thinking=False``.

        Raises:
            InvalidRequestError: there are no messages, one is malformed, or the model has no chat template; or a
                template variable would change how the template is run, instead of what it sees.
        """
        reserved = sorted(template_kwargs.keys() & _TEMPLATE_OPTIONS)
        if reserved:
            raise InvalidRequestError(f"chat template variables must not be called {', '.join(reserved)}")
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
            raise InvalidRequestError(f"messages must be a non-empty list of dicts, got {messages!r}")
        for message in messages:
            well_formed = isinstance(message, Mapping) and isinstance(message.get("role"), str)
            if not well_formed or not isinstance(message.get("content"), str):
                raise InvalidRequestError(f'a message must be {{"role": str, "content": str}}, got {message!r}')
        try:
            text = self._apply_template(list(messages), template_kwargs)
        except MiniInferError:
            raise
        except Exception as error:  # a missing template, or whatever the template itself raises
            raise InvalidRequestError(f"the chat template cannot render these messages: {error}") from error
        return text

    def _apply_template(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        has_own_way = type(self.hf).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
        if self.renderer is None or has_own_way:
            text: str = self.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
            return text
        special = {name: str(token) for name, token in self.hf.special_tokens_map.items()}
        template: str = self.hf.get_chat_template(None, variables.get("tools"))
        return self.renderer(template, {"messages": messages, **special, **variables})
