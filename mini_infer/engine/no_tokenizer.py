"""What stands in for a tokenizer where there is none: prompts are token ids, and texts are empty."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mini_infer.engine.detokenizer import Detokenizer
from mini_infer.exceptions import InvalidRequestError


class NoTokenizer:
    """For an engine whose prompts and answers are token ids alone."""

    special_tokens: Mapping[int, str] = {}

    def encode(self, text: str, max_tokens: int, *, add_special_tokens: bool = True) -> NoReturn:
        raise InvalidRequestError(f"this engine has no tokenizer, so a prompt must be token ids, got {text[:40]!r}")

    def render_chat(self, messages: Sequence[Mapping[str, Any]], /, **template_kwargs: Any) -> NoReturn:
        raise InvalidRequestError("this engine has no tokenizer, so it has no chat template; give token ids")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return ""

    def detokenizer(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> Detokenizer:
        return Detokenizer(lambda token_ids: "", prompt_token_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return b""

    def token_text(self, token_id: int) -> str:
        return ""
