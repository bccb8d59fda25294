"""The message of an answer, whole or as it is written: its text, and the calls of tools in it."""

import secrets
import string
from typing import Any

from mini_infer.engine.calls import Arguments, CallBegins, CallScanner, Piece, Text
from mini_infer.engine.tools import ToolFormat
from mini_infer.serving.reasoning import Thinking

_LETTERS = string.ascii_letters + string.digits


class Message:
    """The message of one choice.

    Args:
        format: how the model writes calls; None if it may make none, and all is text.
        thinking: tells apart what the model thinks before it answers; None if it does not.
    """

    def __init__(self, format: ToolFormat | None, thinking: Thinking | None) -> None:
        self._format = format
        self._thinking = thinking
        self._scanner = None if format is None else CallScanner(format)

    def feed(self, text: str, is_last: bool) -> list[dict[str, Any]]:
        """What further text adds to the message, as the deltas of a stream."""
        thought: dict[str, str] = {}
        if self._thinking is not None:
            reasoning, text = self._thinking.feed(text, is_last=is_last)
            thought = {"reasoning_content": reasoning} if reasoning else {}
        if self._scanner is None:
            delta = thought | ({"content": text} if text else {})
            return [delta] if delta else []
        pieces = self._scanner.feed(text)
        deltas = [self._delta(piece) for piece in (pieces + self._scanner.end() if is_last else pieces)]
        return [thought, *deltas] if thought else deltas

    @property
    def has_calls(self) -> bool:
        """Whether a tool was called so far."""
        return self._scanner is not None and self._scanner.num_calls > 0

    def finish_reason(self, reason: str | None) -> str | None:
        """Why the choice ends, in OpenAI's words."""
        return "tool_calls" if reason == "stop" and self.has_calls else reason

    def _delta(self, piece: Piece) -> dict[str, Any]:
        if isinstance(piece, Text):
            return {"content": piece.text}
        if isinstance(piece, CallBegins):
            call = {"index": piece.index, "id": self._new_id(), "type": "function"}
            return {"tool_calls": [{**call, "function": {"name": piece.name, "arguments": ""}}]}
        assert isinstance(piece, Arguments)
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.text}}]}

    def _new_id(self) -> str:
        length = self._format.id_length if self._format is not None else None
        if length is not None:
            return "".join(secrets.choice(_LETTERS) for _ in range(length))
        return f"call_{secrets.token_hex(12)}"


def whole_message(text: str, format: ToolFormat | None, thinking: Thinking | None) -> tuple[dict[str, Any], bool]:
    """A finished text as OpenAI's message, and whether it calls tools."""
    message = Message(format, thinking)
    content, reasoning, calls = "", "", list[dict[str, Any]]()
    for delta in message.feed(text, is_last=True):
        content += delta.get("content", "")
        reasoning += delta.get("reasoning_content", "")
        for piece in delta.get("tool_calls", ()):
            if "id" in piece:
                calls.append({name: piece[name] for name in ("id", "type", "function")})
            else:
                calls[piece["index"]]["function"]["arguments"] += piece["function"]["arguments"]
    whole: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else "")}
    if thinking is not None:
        whole["reasoning_content"] = reasoning or None
    return whole | ({"tool_calls": calls} if calls else {}), bool(calls)
