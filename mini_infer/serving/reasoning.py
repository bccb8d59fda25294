"""What a model thinks before it answers: told apart from the answer, and switched by ``reasoning_effort``.

Reasoning models write ``<think>…</think>`` and then answer. Some chat templates write the first mark themselves, at the
end of the prompt, or both of them where no thinking is wanted; so the prompt says where an answer begins.
"""

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

from mini_infer.exceptions import InvalidRequestError

BEGIN, END = "<think>", "</think>"

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
"""OpenAI's words."""

_BLANK = " \t\r\n"


class Piece(NamedTuple):
    """A piece of a text, told apart.

    Attributes:
        reasoning: what belongs to the thinking.
        content: what belongs to the answer.
    """

    reasoning: str
    content: str


def thinks(template: str) -> bool:
    """Whether a chat template is that of a model that thinks."""
    return END in template


def switches(template: str, effort: str | None) -> Mapping[str, Any]:
    """Variables of a chat template that ask for an effort.

    A template that has ``reasoning_effort`` gets the word itself; of one that can think or not (``enable_thinking``, as
    Qwen3's), every effort but "none" asks to.

    Raises:
        InvalidRequestError: the template has no such switch, and something is asked of it.
    """
    if effort is None:
        return {}
    if effort not in EFFORTS:
        raise InvalidRequestError(f"reasoning_effort must be one of {', '.join(EFFORTS)}, got {effort!r}")
    wanted = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    found = {name: value for name, value in wanted.items() if name in template}
    if not found and effort != "none":
        raise InvalidRequestError(
            f"reasoning_effort={effort!r} is not supported by this model: its chat template has no switch for it; "
            "leave it out"
        )
    return found


class Thinking:
    """Tells reasoning from answer while a text comes, and leaves out the marks and the blank lines around them.

    Args:
        prompt: what the text follows.

    Attributes:
        is_open: whether the text is still thinking.
    """

    def __init__(self, prompt: str) -> None:
        self.is_open = prompt.rstrip(_BLANK).endswith(BEGIN)
        self._may_begin = not self.is_open
        self._is_first = True  # of its kind: blank lines before it are left out
        self._held = ""

    def feed(self, text: str, *, is_last: bool) -> Piece:
        """More of the text; what is certain of it by now.

        Args:
            is_last: no more comes, so that nothing is held back.
        """
        self._held += text
        if self._may_begin:
            begun = self._held.lstrip(_BLANK)
            if begun.startswith(BEGIN):
                self.is_open, self._held = True, begun.removeprefix(BEGIN)
            elif BEGIN.startswith(begun) and not is_last:
                return Piece("", "")
            self._may_begin = False
            self._is_first = self.is_open
        if not self.is_open:
            return Piece("", self._take(len(self._held)))
        reasoning, mark, after = self._held.partition(END)
        if mark:
            self._held = reasoning.rstrip(_BLANK)
            thought = self._take(len(self._held))
            self.is_open, self._is_first, self._held = False, True, after
            return Piece(thought, self._take(len(after)))
        return Piece(self._take(len(self._held) if is_last else len(self._held) - _num_open(self._held)), "")

    def _take(self, size: int) -> str:
        """So much of what is held, without the blank lines that it begins with."""
        taken, self._held = self._held[:size], self._held[size:]
        if self._is_first:
            taken = taken.lstrip("\r\n")
        self._is_first = self._is_first and not taken
        return taken


def _num_open(text: str) -> int:
    """Characters at the end of a text that may belong to the mark of the end, or to the blanks before it."""
    size = next(size for size in range(len(END) - 1, -1, -1) if text.endswith(END[:size]))
    return len(text) - len(text[: len(text) - size].rstrip(_BLANK))


def num_reasoning_tokens(text: str, prompt: str, token_ids: Seq[int], bytes_of: Callable[[int], bytes]) -> int:
    """How many of a whole text's tokens were thinking, the mark of its end among them.

    Args:
        bytes_of: what a token adds to the text.
    """
    if not prompt.rstrip(_BLANK).endswith(BEGIN) and not text.lstrip(_BLANK).startswith(BEGIN):
        return 0
    if END not in text:
        return len(token_ids)
    left = len(text[: text.index(END) + len(END)].encode())
    for count, token_id in enumerate(token_ids):
        if left <= 0:
            return count
        left -= len(bytes_of(token_id))
    return len(token_ids)
