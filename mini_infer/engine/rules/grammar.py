"""Text that keeps to a grammar: which tokens may follow, and which one must.

A regular expression is a finite automaton, and a JSON schema an automaton with a stack, over characters. A token is
several characters, so before each draw the question is which of the vocabulary's tokens the automaton could walk along
from where it stands; the others are masked, before any token is chosen. llguidance answers it in some twenty
microseconds, by walking a trie of the vocabulary and the automaton at once (Geng et al., "Generating Structured Outputs
from Language Models", 2025).

Often there is one way on alone: after ``{"na`` of an object whose one property is ``name``. Such *forced* tokens need
no model at all. They are put behind the text as drafts, and one step computes the keys and values of all of them.
"""

import json
import re
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Collection
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from mini_infer.engine.no_tokenizer import NoTokenizer
from mini_infer.engine.rules.edits import Edits
from mini_infer.engine.rules.schema import check_counts, checked_schema
from mini_infer.exceptions import DeadEndError, InvalidRequestError
from mini_infer.step import Ints
from mini_infer.structured import StructuredOutputsParams
from mini_infer.typing import TokenIds

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from mini_infer.engine.tokenizer import Tokenizer

_KEPT = 32
"""Compiled grammars that are kept for requests with the same one."""

Bits: TypeAlias = npt.NDArray[np.uint8]
"""One for each token of the vocabulary; see ``LogitEdits.masks``."""

_STYLE = {
    # As Python writes JSON, and so as models have mostly seen it. Were any whitespace allowed, a model that loses its
    # way could go on with it for ever.
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    # Nothing of a schema is passed over or guessed.
    "lenient": False,
    "coerce_one_of": False,
}

_ANY_OBJECT = '{"type": "object"}'

_MAX_FORCED = 250
"""Longest terminal, in characters, of a grammar whose forced tokens are looked for. They are found in one go, at 200
bytes and half a microsecond for each character, and a terminal may come a thousand times."""

_LITERAL = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/')
_DEFINITION = re.compile(r"^[ \t]*(\w+)[^\n:]*:", re.MULTILINE)
_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?|\n +1 \| .*", re.DOTALL)
_JSON = re.compile(r"%json\s*(?=[{\w])")


class Grammar:
    """Lets one completion go on only with what its grammar allows. A rule, and more: it knows forced tokens.

    Args:
        matcher: the compiled grammar at its beginning, for this completion alone.
        vocab_size: the model's.
        end_token_ids: tokens that are no text but ends of it, for any request.
        stop_token_ids: those that end this one; they may come where the text is complete, and nowhere else.
    """

    needs_last_token = True

    def __init__(
        self, matcher: "LLMatcher", vocab_size: int, end_token_ids: Collection[int], stop_token_ids: Collection[int]
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._end_token_ids = np.array(sorted(end_token_ids), dtype=np.int64)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._stops = np.array(sorted(stop_token_ids), dtype=np.int64)
        self._forced: deque[int] = deque(matcher.compute_ff_tokens())

    @property
    def forced(self) -> TokenIds:
        """The tokens that must come next, as far as that is certain."""
        return list(self._forced)

    def apply(self, draw: int, position: int, drafts: TokenIds, edits: Edits) -> None:
        if len(drafts) < len(self._forced):
            edits.force(draw, self._forced[len(drafts)])
            return
        num_taken = self._matcher.try_consume_tokens(drafts)
        edits.mask(draw, self._allowed())  # of no use behind a draft that is not taken, and then not used
        self._matcher.rollback(num_taken)

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        if self._forced:
            self._forced.popleft()
        else:
            self._forced.extend(self._matcher.compute_ff_tokens())

    def num_accepted(self, token_ids: TokenIds) -> int:
        """How many of some next tokens, from the first on, may come. The last may be a stop token."""
        num_text = self._matcher.validate_tokens(token_ids)
        may_stop = num_text == len(token_ids) - 1 and token_ids[-1] in self._stop_token_ids
        return len(token_ids) if may_stop and self.is_complete_after(token_ids[:-1]) else num_text

    def is_complete_after(self, token_ids: TokenIds) -> bool:
        """Whether the text may end after these further tokens."""
        num_taken = self._matcher.try_consume_tokens(token_ids)
        is_complete: bool = self._matcher.is_accepting()
        self._matcher.rollback(num_taken)
        return is_complete

    def dead_end(self, request_id: str) -> DeadEndError:
        """Why a completion cannot go on."""
        reason = self._matcher.get_error() or "no token of the vocabulary, or none that is not banned, continues it"
        return DeadEndError(f"request {request_id!r}: its text came to a dead end of its grammar: {reason[:200]}")

    def _allowed(self) -> Bits:
        """A bit for each token; see ``LogitEdits``."""
        words = np.zeros(-(-self._vocab_size // 32), dtype=np.int32)
        if not self._matcher.is_error():
            self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        allowed = words.view(np.uint8)[: -(-self._vocab_size // 8)]
        _write(allowed, self._end_token_ids, False)
        if self._matcher.is_accepting():
            _write(allowed, self._stops, True)
        return allowed


class Grammars:
    """Compiles grammars for one vocabulary, and keeps the last ones. May be used from several threads.

    Args:
        tokenizer: the vocabulary.
        vocab_size: the model's; ids beyond the tokenizer's own are never allowed.
        end_token_ids: the model's end-of-sequence tokens.
    """

    def __init__(self, tokenizer: "Tokenizer | NoTokenizer", vocab_size: int, end_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = frozenset(end_token_ids)
        self._vocabulary: LLTokenizer | None = None
        self._kept: OrderedDict[StructuredOutputsParams, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, params: StructuredOutputsParams, stop_token_ids: Collection[int], count: int) -> list[Grammar]:
        """A request's grammar at its beginning, for each of its completions.

        Raises:
            InvalidRequestError: it is malformed, too large, or says what llguidance cannot follow; or that package is
                not installed, or there is no tokenizer.
        """
        vocabulary = self.read_vocabulary()
        with self._lock:
            matcher = self._kept.get(params)
        if matcher is None:
            matcher = _compile(params, vocabulary)
        with self._lock:
            self._kept[params] = matcher
            self._kept.move_to_end(params)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            copies = [matcher.deep_copy() for _ in range(count)]
        ends = self._end_token_ids | set(vocabulary.eos_tokens)
        return [Grammar(copy, self._vocab_size, ends, stop_token_ids) for copy in copies]

    def read_vocabulary(self) -> "LLTokenizer":
        """Prepare for grammars, once; of a large vocabulary that takes about a second."""
        if isinstance(self._tokenizer, NoTokenizer):
            raise InvalidRequestError("this engine has no tokenizer, so that no grammar can be followed")
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError as error:
            raise InvalidRequestError(
                "structured outputs need a package that is not here: pip install 'mini-infer[grammar]'"
            ) from error
        with self._lock:
            if self._vocabulary is None:
                tokenizer = self._tokenizer
                ends = [token_id for token_id in self._end_token_ids if token_id not in tokenizer.unused_ids]
                if tokenizer.hf.is_fast and len(tokenizer.hf) <= self._vocab_size and ends:
                    from llguidance.hf import from_tokenizer

                    self._vocabulary = from_tokenizer(tokenizer.hf, self._vocab_size, ends)
                else:
                    words = _Words(tokenizer, self._vocab_size, ends)
                    self._vocabulary = LLTokenizer(TokenizerWrapper(words), len(words.tokens), words.eos_token_id)
            return self._vocabulary


class _Words:
    """A vocabulary as llguidance reads it where it cannot read the tokenizer's own file: the bytes of each token."""

    bos_token_id = None

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int, end_token_ids: list[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_tokens.keys() & set(range(vocab_size)))
        self.eos_token_id = end_token_ids[0] if end_token_ids else vocab_size
        if not end_token_ids:  # llguidance needs one; it is beyond what the model can draw
            self.tokens.append(b"<end>")
            self.special_token_ids.append(vocab_size)

    def __call__(self, text: str) -> TokenIds:
        token_ids: TokenIds = self._tokenizer.hf.encode(text, add_special_tokens=False)
        return token_ids


def _compile(params: StructuredOutputsParams, vocabulary: "LLTokenizer") -> "LLMatcher":
    from llguidance import LLMatcher, LLParserLimits

    try:
        if params.regex is not None:
            longest = len(params.regex) + check_counts(params.regex)
            source = json.loads(LLMatcher.grammar_from_regex(params.regex))["grammars"][0]["lark_grammar"]
        elif params.choice is not None:
            texts = [json.dumps(text, ensure_ascii=False) for text in params.choice]
            longest = max(map(len, texts))
            source = f"start: {' | '.join(texts)}"
        elif params.grammar is not None:
            source = _with_checked_schemas(params.grammar)
            longest = _longest_terminal(source)
        else:
            source = f"start: %json {_schema(_ANY_OBJECT if params.json is None else str(params.json))}"
            longest = _longest_terminal(source)
        if longest > _MAX_FORCED:
            source += '\n%llguidance {"no_forcing": true}'
        limits = LLParserLimits(
            initial_lexer_fuel=200_000,  # some 0.2 s and 50 MB
            step_lexer_fuel=100_000,  # some 7 ms
            step_max_items=max(2_000, min(50_000, 300_000 // max(1, longest))),
            max_lexer_states=20_000,  # some 2 kB each
            max_grammar_size=20_000,
            verbose_errors=False,
        )
        matcher = LLMatcher(vocabulary, LLMatcher.grammar_from_lark(source), log_level=0, limits=limits)
    except ValueError as error:
        raise InvalidRequestError(f"structured outputs: {error}"[:400]) from error
    if matcher.is_error():
        reason = matcher.get_error()
        if params.grammar is None:  # where that is in our own lines is of no use
            reason = _PLACE.sub("", reason)
        raise InvalidRequestError(f"structured outputs: {reason[:300]}")
    return matcher


def _longest_terminal(source: str) -> int:
    """About how many characters one terminal of a grammar may hold: all of them may be forced at once."""
    _, *definitions = _DEFINITION.split(_LITERAL.sub("", source))
    for name, body in zip(definitions[::2], definitions[1::2], strict=True):
        if name.isupper() and re.search("[A-Z{]", body):
            return sys.maxsize  # it repeats something, or is made of other terminals that may
    return max((len(found[0]) + check_counts(found[0]) for found in _LITERAL.finditer(source)), default=0)


def _schema(text: str) -> str:
    """A schema that was checked, with the style that its JSON is to have."""
    schema = checked_schema(text)
    return json.dumps({**schema, "x-guidance": _STYLE} if isinstance(schema, dict) else schema)


def _with_checked_schemas(grammar: str) -> str:
    """A grammar in which every ``%json {...}`` was checked like a schema that stands alone."""
    first, *others = _JSON.split(grammar)
    parts = [first]
    for part in others:
        try:
            _, end = json.JSONDecoder().raw_decode(part)
        except (ValueError, RecursionError) as error:
            raise InvalidRequestError(f"behind %json must stand a JSON schema of bounded depth: {error}") from error
        parts.append(f"%json {_schema(part[:end])}{part[end:]}")
    return "".join(parts)


def _write(bits: Bits, places: Ints, on: bool) -> None:
    places = places[places < len(bits) * 8]
    flags = (1 << (places % 8)).astype(np.uint8)
    if on:
        np.bitwise_or.at(bits, places // 8, flags)
    else:
        np.bitwise_and.at(bits, places // 8, ~flags)
