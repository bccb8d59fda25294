"""Token ids to text while they come: never half a character, never half a stop string."""

import codecs
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from itertools import groupby
from typing import TypeAlias

_REPLACEMENT = "\ufffd"  # what decoding bytes that are no character, or not yet one, gives
_CONTEXT = 6  # prompt tokens that the first generated one is decoded with: its leading space depends on them
_LONGEST_RUN = 32  # tokens whose text may have to wait


def canvas_cells(canvas: Sequence[int | None], token_bytes: Callable[[int], bytes]) -> list[str | None]:
    """The text of each place of a canvas, None for a mask. A character that several neighbours spell stands at the last
    of them; until they are all written, those that are show as U+FFFD.

    Args:
        canvas: tokens, and None for masks.
        token_bytes: what a token adds to a text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    cells: list[str | None] = []
    for place, token_id in enumerate(canvas):
        is_end = place + 1 == len(canvas) or canvas[place + 1] is None
        cells.append(None if token_id is None else decoder.decode(token_bytes(token_id), final=is_end))
    return cells


class Detokenizer:
    """Decodes one growing sequence.

    A token alone has no text: a Chinese character or an emoji may span several, and whether a word starts with a space
    can depend on the token before. So a short window of tokens is decoded together, and only what is settled is
    released. The window starts where the text was settled the time before last, so the work per token is small and does
    not grow with the sequence.

    Whatever is appended, and in whatever portions, the pieces joined, with what ``end`` gives, are

        decode(prompt + tokens) without its beginning decode(prompt)

    where it begins with that. It need not: tokens can go on where the prompt stops.

    - If the prompt ends within a character, decode(prompt) shows U+FFFD for it. When the tokens complete the character,
      it is part of their text; when they do not, those U+FFFD are the prompt's.
    - Decoders that fall back on bytes take a run of byte tokens as a whole: one bad byte, and each byte of the run
      shows as U+FFFD. So the text of such a run waits for the run's end. Tokens that spoil a run that the prompt began
      cannot change the prompt's text; theirs is then what they are by themselves.
    - A run of more than 32 byte tokens is not waited for. It is taken in parts that end with whole characters, as if
      each were a run of its own.

    Args:
        decode: token ids to text.
        prompt_token_ids: the prompt; its last tokens are the first context, and are not part of the text.
        byte_tokens: ids of tokens that stand for single bytes by falling back on them.
        skipped: ids of tokens that ``decode`` leaves out.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt_token_ids: Sequence[int],
        *,
        byte_tokens: Collection[int] = (),
        skipped: Collection[int] = (),
    ) -> None:
        self._decode = decode
        self._byte_tokens = byte_tokens
        self._skipped = skipped
        self._context = self._end_of(prompt_token_ids)  # tokens whose text is released
        self._known = self._texts_of_prompt()  # what their text can be at the beginning of a longer one
        self._pending: list[int] = []  # tokens after them
        self._num_released = 0  # characters of their text that are released

    def append(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens add. An unfinished character waits for its other bytes."""
        text = ""
        shown = [token_id for token_id in token_ids if token_id not in self._skipped]
        for are_bytes, run in groupby(shown, self._byte_tokens.__contains__):
            for part in [[token_id] for token_id in run] if are_bytes else [list(run)]:
                text += self._append(part, are_bytes)
        return text

    def settle(self) -> str:
        """What waits for the end of a run of byte tokens, as if it ended here, if its last character is whole."""
        text = self._text(self._pending)
        is_whole = text and not text.endswith(_REPLACEMENT)
        return self._release(text, len(self._pending)) if is_whole else ""

    def end(self) -> str:
        """The rest of the text, once no more tokens come. An unfinished character shows as the decoder shows it."""
        return self._text(self._pending)[self._num_released :]

    def _append(self, token_ids: list[int], are_bytes: bool) -> str:
        self._pending += token_ids
        if len(self._pending) >= _LONGEST_RUN:
            return self._release_part()
        if are_bytes:
            return ""
        text = self._text(self._pending)
        if text and not text.endswith(_REPLACEMENT):
            return self._release(text, len(self._pending))
        # Only the last replacement character can stand for the beginning of a character to come.
        new = text[self._num_released : -1]
        self._num_released += len(new)
        return new

    def _release_part(self) -> str:
        """Do not wait any longer: release as much as ends with a whole character, or all if nothing does."""
        for num_open in range(4):  # a character has four bytes at most
            size = len(self._pending) - num_open
            text = self._text(self._pending[:size])
            if not text.endswith(_REPLACEMENT):
                return self._release(text, size)
        text = self._text(self._pending).removesuffix(_REPLACEMENT)
        new = self._release(text, len(self._pending))
        self._known = [known.removesuffix(_REPLACEMENT) for known in self._known]  # that one is still to come
        return new

    def _release(self, text: str, num_tokens: int) -> str:
        """Make the first pending tokens, whose text is settled, the context of the others."""
        new = text[self._num_released :]
        self._context, self._pending = self._pending[:num_tokens], self._pending[num_tokens:]
        self._known = [self._decode(self._context)]
        self._num_released = max(0, self._num_released - len(text))
        return new

    def _text(self, token_ids: list[int]) -> str:
        """The text of tokens after the context."""
        text = self._decode(self._context + token_ids)
        for known in self._known:
            if text.startswith(known):
                return text[len(known) :]
        return self._decode(token_ids)

    def _end_of(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens that have a text, with the whole of a run of byte tokens."""
        tokens: list[int] = []
        for token_id in reversed(prompt_token_ids):
            if token_id in self._skipped:
                continue
            within_run = token_id in self._byte_tokens and tokens and tokens[-1] in self._byte_tokens
            if len(tokens) >= _CONTEXT and not within_run:
                break
            tokens.append(token_id)
        return tokens[::-1]

    def _texts_of_prompt(self) -> list[str]:
        """The context's text, and if a character is unfinished at its end, also the text before that."""
        text = self._decode(self._context)
        if not text.endswith(_REPLACEMENT):
            return [text]
        if self._context[-1] not in self._byte_tokens:
            return [text, text.removesuffix(_REPLACEMENT)]
        for num_open in (1, 2, 3):
            whole = self._decode(self._context[:-num_open])
            if not whole.endswith(_REPLACEMENT):
                return [text, whole]
        return [text]


_View: TypeAlias = tuple[int, str]
"""One way to read the text: the state that it leads to, and which of that state's characters are shown: "s" for one
that is, "-" for one that is not, and nothing at all if every one is."""

_NOTHING: _View = (0, "")

_MOST_VIEWS = 64
"""Ways that are followed at once; the first is the text as it is shown."""


def _num_shown(size: int, shows: str) -> int:
    """How many of the last ``size`` characters of a view are shown."""
    return shows[-size:].count("s") if shows and size else size


class StopStringMatcher:
    """Finds stop strings in text that comes in pieces, and holds back what may become one.

    All stop strings are looked for at once, by the automaton of Aho and Corasick ("Efficient string matching", 1975):
    its state is the longest end of the text that is a beginning of some stop string, which is just what must be held
    back. The work per piece is in proportion to its length, however long and many the stop strings are.

    Text that is not shown, that of a special token, counts in either way: the text is searched with it and without it.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]  # for each state, the states that a further character leads to
        self._depth = [0]  # length of the beginning that it stands for
        self._found = [""]  # the longest stop string that ends there
        for stop in stop_strings:
            self._add(stop)
        self._shorter = self._link()  # the state of the next shorter end that is a beginning
        self._views = [_NOTHING]
        self._held: deque[str] = deque()  # the characters that are held back

    def fresh(self) -> "StopStringMatcher":
        """Another one for the same stop strings, at the beginning of a text."""
        other = copy(self)
        other._views, other._held = [_NOTHING], deque()
        return other

    def append(self, piece: str, *, shown: bool = True) -> tuple[str, str | None]:
        """The text that can be released now, and the stop string that was found, if any.

        Of several that the piece completes, the one that begins first counts.

        Args:
            shown: False for text that is looked at but never released.
        """
        if not self._next[0]:
            return piece if shown else "", None
        without = [] if shown else self._views
        start, stop = 0, None  # where the stop string begins in what is held
        for character in piece:
            if shown:
                self._held.append(character)
            self._views = list(dict.fromkeys(self._step(view, character, shown) for view in self._views))
            for state, shows in self._views:
                found = self._found[state]
                if found:
                    place = len(self._held) - _num_shown(len(found), shows)
                    if stop is None or place < start:
                        start, stop = place, found
        self._views = list(dict.fromkeys([*without, *self._views]))[:_MOST_VIEWS]
        num_held = max(_num_shown(self._depth[state], shows) for state, shows in self._views)
        num_free = len(self._held) - num_held if stop is None else start
        text = "".join(self._held.popleft() for _ in range(num_free))
        if stop is not None:
            self._held.clear()
        return text, stop

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        held = "".join(self._held)
        self._held.clear()
        return held

    def _step(self, view: "_View", character: str, shown: bool) -> "_View":
        state, shows = view
        if not shown and not shows:
            shows = "s" * self._depth[state]
        while state and character not in self._next[state]:
            state = self._shorter[state]
        state = self._next[state].get(character, 0)
        if shows or not shown:
            shows = (shows + ("s" if shown else "-"))[-self._depth[state] :] if state else ""
        return state, shows if "-" in shows else ""

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._found.append("")
            state = self._next[state][character]
        self._found[state] = stop

    def _link(self) -> list[int]:
        """By breadth, so that what a shorter end leads to is known before a longer one asks."""
        shorter = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            self._found[state] = self._found[state] or self._found[shorter[state]]
            for character, following in self._next[state].items():
                end = shorter[state]
                while end and character not in self._next[end]:
                    end = shorter[end]
                shorter[following] = self._next[end].get(character, 0)
                queue.append(following)
        return shorter


class TextStream:
    """The text of one completion: its tokens decoded, up to the first stop string.

    Stop strings are looked for in the text that is shown, and also in the text with the special tokens that are left
    out of it, all or some of them: "<|im_end|>" stops either way, and "<|im_end|>\\nuser" does where the text goes on
    with "\\n<|im_start|>user".

    Args:
        detokenizer: makes the text.
        stop_strings: looks for its end.
        hidden: ids and texts of the tokens that are left out of it.
        is_followed: somebody reads along, or looks for stop strings; else all tokens become text at the end, at once.
    """

    def __init__(
        self, detokenizer: Detokenizer, stop_strings: StopStringMatcher, hidden: Mapping[int, str], is_followed: bool
    ) -> None:
        self.stop_string: str | None = None
        self._detokenizer = detokenizer
        self._stop_strings = stop_strings
        self._hidden = hidden
        self._unread: list[int] | None = None if is_followed else []

    def append(self, token_id: int, may_stop: bool = True) -> str:
        """The text that a token releases. If it completes a stop string, ``stop_string`` says which.

        Args:
            may_stop: whether the token's text is searched.
        """
        if self._unread is not None:
            self._unread.append(token_id)
            return ""
        hidden = self._hidden.get(token_id)
        if hidden is None:
            return self._search(self._detokenizer.append([token_id]), may_stop)
        return self._search(self._detokenizer.settle(), may_stop) + self._search(hidden, may_stop, shown=False)

    def end(self) -> str:
        """The rest of the text, once no more tokens come."""
        if self.stop_string is not None:
            return ""
        unread, self._unread = self._unread, None
        text = self._search(self._detokenizer.append(unread or ()) + self._detokenizer.end())
        return text if self.stop_string is not None else text + self._stop_strings.flush()

    def _search(self, piece: str, may_stop: bool = True, *, shown: bool = True) -> str:
        if self.stop_string is not None:
            return ""
        if not may_stop:
            return piece if shown else ""
        text, self.stop_string = self._stop_strings.append(piece, shown=shown)
        return text
