"""What stands in for a tokenizer where there is none: prompts are token ids, and texts are empty."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mini_infer.exceptions import InvalidRequestError


class NoTokenizer:
    """For an engine whose prompts and answers are token ids alone."""

    def encode(self, text: str, max_tokens: int) -> NoReturn:
        raise InvalidRequestError(f"this engine has no tokenizer, so a prompt must be token ids, got {text[:40]!r}")

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        return ""

    def decode_token(self, token_id: int) -> str:
        return ""

    def render_chat(self, messages: Sequence[Mapping[str, Any]], /, **template_kwargs: Any) -> NoReturn:
        raise InvalidRequestError("this engine has no tokenizer, so it has no chat template; give token ids")
