"""Text to token ids, with the checks that keep bad text from going any further, and what each token stands for."""

import importlib.util
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mini_infer.config import CheckpointOptions
from mini_infer.engine.detokenizer import Detokenizer
from mini_infer.engine.tools import ToolFormat, find_format, prepare, read_tools
from mini_infer.exceptions import ContextLengthError, InvalidCheckpointError, InvalidRequestError, MiniInferError
from mini_infer.models.gguf import is_gguf, read_tokenizer
from mini_infer.models.hf_config import read_json

logger = logging.getLogger(__name__)

_TEMPLATE_OPTIONS = {
    "messages",
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
} - {"tools", "documents"}
"""Names that are no variables of a chat template, but say what is rendered and how."""

_MANY = 1024
"""Ids from which on it takes long to make text of them."""

Renderer: TypeAlias = Callable[[str, Mapping[str, Any]], str]
"""Makes text of a chat template and its variables, among them ``messages``."""


class RenderedChat(str):
    """A prompt that a chat template made: it holds every special token that it should, so that none is added to it."""


class Tokenizer:
    """A transformers tokenizer and what the engine needs of it.

    Args:
        directory: where its files are, or a GGUF file that holds it.
        config: how to read them.
        vocab_size: the model's; ids from there on exist for the tokenizer alone, and never leave this class.

    Attributes:
        hf: the tokenizer itself.
        end_token_ids: those that end a text.
        special_tokens: id and text of each token that can be left out of a text.
        byte_tokens: ids of SentencePiece's byte tokens, such as ``<0xF0>``, several of which spell a character. A
            byte-level vocabulary, every token of which is made of bytes, has none.
        unused_ids: ids of the model that stand for no token.
        renderer: makes text of a chat template and its variables, in the tokenizer's place. For servers, which must
            not wait for a template that has no end.
    """

    renderer: Renderer | None = None

    def __init__(self, directory: Path, config: CheckpointOptions, vocab_size: int) -> None:
        self.hf, self.end_token_ids = _read(directory, config)
        self._has_plain_decoder = getattr(type(self.hf), "_decode", None) is PreTrainedTokenizerFast._decode
        self._vocab_size = vocab_size
        vocab: dict[str, int] = self.hf.get_vocab()
        self._longest_token = max(map(len, vocab), default=1)
        self._warn_of_tokens_beyond(vocab)
        self.special_tokens = self._find_special_tokens()
        self.byte_tokens = self._find_byte_tokens(vocab)
        self.unused_ids = frozenset(range(vocab_size)) - frozenset(vocab.values())
        self._is_byte_level = any(
            self.decode([vocab[name]], skip_special_tokens=False) == text
            for name, text in (("Ġ", " "), ("Ċ", "\n"))
            if name in vocab
        )
        self._adds_bos = bool(self.hf.bos_token) and self.hf.encode("")[:1] == [self.hf.bos_token_id]
        self._left_out = {False: self.unused_ids, True: self.unused_ids | self.special_tokens.keys()}
        self._token_bytes: dict[int, bytes] = {}  # of those that were asked for

    @property
    def chat_template(self) -> str:
        """The model's own; empty if it has none."""
        template = self.hf.chat_template or ""
        return template if isinstance(template, str) else str(template.get("default", ""))

    # ---- text to ids ---------------------------------------------------------------------------------------------

    def encode(self, text: str, max_tokens: int, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a prompt, with the special tokens that the tokenizer puts around a text.

        A text that already begins with the beginning-of-sequence token does not get a second one. To a chat that
        ``render_chat`` made nothing is added.

        Args:
            max_tokens: most tokens a prompt can have. A text that must have more is refused before the work.
            add_special_tokens: false leaves out what the tokenizer puts around a text.

        Raises:
            InvalidRequestError: the text is no valid Unicode, is far too long, has no tokens at all, or has one that
                the model does not know.
        """
        if not isinstance(text, str):
            raise InvalidRequestError(f"a text must be a string, got {repr(text)[:40]} ({type(text).__name__})")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"prompt has a lone surrogate {text[error.start]!r} at character {error.start}, which no tokenizer can "
                "read; replace it, for example with text.encode(errors='replace').decode()"
            ) from error
        at_least = len(text) // self._longest_token
        if at_least > max_tokens:
            raise ContextLengthError(
                max_tokens, f"{len(text)} characters, so at least {at_least} tokens (it begins {text[:40]!r})"
            )
        adds = add_special_tokens and not isinstance(text, RenderedChat)
        # It would warn of lengths that are checked here.
        token_ids: list[int] = self.hf.encode(str(text), add_special_tokens=adds, verbose=False)
        if adds and self._adds_bos and text.startswith(self.hf.bos_token):
            del token_ids[0]
        if not token_ids:
            raise InvalidRequestError(f"prompt {text[:40]!r} is empty, it has no tokens; give at least one token")
        self._check_known(token_ids)
        return token_ids

    def _check_known(self, token_ids: Sequence[int]) -> None:
        largest = max(token_ids)
        if largest >= self._vocab_size:
            raise InvalidRequestError(
                f"token {token_ids.index(largest)} of the prompt is {largest} "
                f"({self.hf.convert_ids_to_tokens(largest)!r}), which the tokenizer has but the model does not: its "
                f"vocabulary is 0 to {self._vocab_size - 1}; leave it out"
            )

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Any] = (),
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> RenderedChat:
        """The prompt that the model's own chat template makes of a conversation, ready for its next answer.

        ``encode`` makes of it exactly the ids that ``apply_chat_template(tokenize=True)`` of transformers gives.

        Args:
            messages: each with "role" and "content", which is a text or a list of parts ``{"type": "text", "text":
                ...}``, put on lines of their own. The template sees further keys as well. Calls of tools and their
                results are written as OpenAI has them.
            tools: functions that the answer may call; where the template knows none, a system message tells of them.
            add_generation_prompt: end with what begins an answer.
            continue_final_message: leave the last message open instead, so that the answer goes on with it; then
                ``add_generation_prompt`` must be false.
            template_kwargs: further variables of the template, for example ``enable_thinking=False``.

        Raises:
            InvalidRequestError: there are no messages, one is malformed, or the model has no chat template; or a
                template variable would change how the template is run, instead of what it sees.
        """
        if add_generation_prompt and continue_final_message:
            raise InvalidRequestError(
                "continue_final_message leaves the last message open, and add_generation_prompt begins a new one; set "
                "one of them to false"
            )
        reserved = sorted(template_kwargs.keys() & _TEMPLATE_OPTIONS)
        if reserved:
            raise InvalidRequestError(f"chat template variables must not be called {', '.join(reserved)}")
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
            raise InvalidRequestError(f"messages must be a non-empty list of dicts, got {messages!r}")
        conversation = []
        for message in messages:
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise InvalidRequestError(f'a message must be {{"role": str, "content": str}}, got {message!r}')
            content = whole_text(message.get("content"))
            if content is None and message.get("tool_calls"):
                content = ""
            if not isinstance(content, str):
                raise InvalidRequestError(f'a message must be {{"role": str, "content": str}}, got {message!r}')
            conversation.append({**message, "content": content})
        known, form = read_tools(tools), self.tool_format
        if form.knows_tools and known:
            template_kwargs["tools"] = [tool.for_template() for tool in known]
        try:
            text = self._apply_template(
                prepare(conversation, known, form),
                template_kwargs
                | {"add_generation_prompt": add_generation_prompt, "continue_final_message": continue_final_message},
            )
        except MiniInferError:
            raise
        except Exception as error:  # a missing template, or whatever the template itself raises
            raise InvalidRequestError(f"the chat template cannot render these messages: {error}") from error
        return RenderedChat(text)

    @property
    def tool_format(self) -> ToolFormat:
        """How the model writes calls of tools, by its chat template."""
        try:
            return find_format(self.hf.get_chat_template(None, [{}]))
        except ValueError:  # it has no template
            return find_format(None)

    def _apply_template(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        has_own_way = type(self.hf).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
        if self.renderer is None or has_own_way:
            text: str = self.hf.apply_chat_template(messages, tokenize=False, **variables)
            return text
        special = {name: str(token) for name, token in self.hf.special_tokens_map.items()}
        template: str = self.hf.get_chat_template(None, variables.get("tools"))
        return self.renderer(template, {"messages": messages, **special, **variables})

    # ---- ids to text ---------------------------------------------------------------------------------------------

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of token ids, exactly: nothing is tidied up."""
        text: str
        if not self._has_plain_decoder:
            text = self.hf.decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces=False)
        elif len(token_ids) > _MANY:  # in a way that lets other threads run meanwhile
            (text,) = self.hf.backend_tokenizer.decode_batch([list(token_ids)], skip_special_tokens)
        else:  # twice as fast as by way of transformers
            text = self.hf.backend_tokenizer.decode(token_ids, skip_special_tokens)
        return text

    def detokenizer(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> Detokenizer:
        """What makes text of the tokens that follow a prompt, while they come."""
        return Detokenizer(
            partial(self.decode, skip_special_tokens=skip_special_tokens),
            prompt_token_ids,
            byte_tokens=self.byte_tokens,
            skipped=self._left_out[skip_special_tokens],
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text, wherever it stands: with its leading space, and where it is a part of
        a character, that part. Joined, those of a text's tokens are the text's own."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._find_token_bytes(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """``token_bytes`` as text; parts of a character show as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def _find_token_bytes(self, token_id: int) -> bytes:
        if token_id in self.byte_tokens:
            return bytes([self.byte_tokens[token_id]])
        if token_id in self.unused_ids:
            return b""
        name = self.hf.convert_ids_to_tokens(token_id)
        if self._is_byte_level:
            known = all(character in _BYTES for character in name)
            return bytes(_BYTES[character] for character in name) if known else name.encode()
        # Some decoders drop the space in front of a text, so a token is looked at behind itself.
        once, twice = (self.decode([token_id] * count, skip_special_tokens=False) for count in (1, 2))
        return (twice[len(once) :] if twice.startswith(once) else once).encode()

    # ---- what there is -------------------------------------------------------------------------------------------

    def _warn_of_tokens_beyond(self, vocab: Mapping[str, int]) -> None:
        largest = max(vocab, key=vocab.__getitem__, default=None)
        if largest is not None and vocab[largest] >= self._vocab_size:
            logger.warning(
                "the tokenizer has tokens up to %d (%r) but the model's vocabulary ends at %d; prompts with a token "
                "beyond that are refused",
                vocab[largest],
                largest,
                self._vocab_size - 1,
            )

    def _find_special_tokens(self) -> dict[int, str]:
        candidates = {*self.hf.added_tokens_decoder, *self.hf.all_special_ids}
        texts = {token_id: self.decode([token_id], skip_special_tokens=False) for token_id in candidates}
        return {
            token_id: text
            for token_id, text in texts.items()
            if text and not self.decode([token_id], skip_special_tokens=True)
        }

    def _find_byte_tokens(self, vocab: Mapping[str, int]) -> dict[int, int]:
        """Ids of the tokens that are bytes, and which ones; none if the decoder takes such names literally."""
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
        byte_tokens = {vocab[name]: byte for name, byte in names.items() if name in vocab}
        letter = next((token_id for token_id, byte in byte_tokens.items() if chr(byte).isalpha() and byte < 128), None)
        if letter is None or self.decode([letter], skip_special_tokens=False) != chr(byte_tokens[letter]):
            return {}
        return byte_tokens


def _read(path: Path, config: CheckpointOptions) -> tuple[Any, frozenset[int]]:
    """The tokenizer of transformers, and the ids of the tokens that end a text."""
    if is_gguf(path):
        return read_tokenizer(path)
    try:
        hf: Any = AutoTokenizer.from_pretrained(
            path,
            config=None if config.trust_remote_code else _config_of_unknown(path),
            use_fast=config.tokenizer_mode == "auto",
            trust_remote_code=config.trust_remote_code,
        )
    except Exception as error:  # transformers raises almost anything for a damaged or missing tokenizer
        raise InvalidCheckpointError(_why_unusable(path, error)) from error
    return hf, frozenset() if hf.eos_token_id is None else frozenset({hf.eos_token_id})


def _config_of_unknown(directory: Path) -> PretrainedConfig | None:
    """What a tokenizer has to know of a model that is unknown to transformers, a diffusion model for example; None for
    all others. Without it transformers would read the model's config as another's, and warn of that."""
    file = directory / "config.json"
    fields = read_json(file) if file.is_file() else {}
    if fields.get("model_type") is None or fields["model_type"] in CONFIG_MAPPING:
        return None
    config = PretrainedConfig()
    config.tokenizer_class = fields.get("tokenizer_class")
    return config


def whole_text(content: Any) -> Any:
    """The text of a message whose content comes in parts, all of them texts; content of any other kind as it is.

    Raises:
        InvalidRequestError: a part is no text, or there is none.
    """
    if not isinstance(content, list | tuple):
        return content
    if not content:
        raise InvalidRequestError("a message's content has no parts; give a text, or a list of text parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f'only text parts, {{"type": "text", "text": ...}}, are supported, got type {repr(kind)[:40]}'
            )
        texts.append(part["text"])
    return "\n".join(texts)


def _byte_characters() -> dict[str, int]:
    """How byte-level vocabularies write each byte (GPT-2): as itself where that prints, else as one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_characters()


def _why_unusable(directory: Path, error: Exception) -> str:
    models = sorted(path.name for path in directory.glob("*.model"))
    missing = [package for module, package in _SENTENCEPIECE.items() if not _is_installed(module)]
    if models and missing and not (directory / "tokenizer.json").is_file() and _is_sentencepiece(directory / models[0]):
        return (
            f"the tokenizer in {str(directory)!r} is a SentencePiece file, {models[0]}, and reading it takes packages "
            f"that are not here: pip install {' '.join(missing)}"
        )
    return (
        f"no usable tokenizer in {str(directory)!r} ({type(error).__name__}: {error}); "
        "give EngineConfig(tokenizer=...) a directory or Hub name that has one"
    )


_SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
"""Modules that SentencePiece files are read with, and the packages that have them."""


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is a part of
        return False


def _is_sentencepiece(path: Path) -> bool:
    """Whether a file is a SentencePiece model, a protocol buffer that begins with a piece, rather than tiktoken's."""
    with path.open("rb") as file:
        return file.read(1) == b"\x0a"
