"""The door: what a user hands in is checked here, once, and becomes a request that can run."""

import secrets
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from mini_infer.config import EngineConfig
from mini_infer.engine.decoding.autoregressive import Autoregressive, Stream, make_forks
from mini_infer.engine.decoding.beams import BeamOptions, BeamSearch
from mini_infer.engine.decoding.canvas import Canvas
from mini_infer.engine.decoding.diffusion import Diffusion
from mini_infer.engine.detokenizer import StopStringMatcher, TextStream
from mini_infer.engine.generation_config import GenerationDefaults
from mini_infer.engine.request import Completion, Request
from mini_infer.engine.rules import Grammar, Grammars, make_rules
from mini_infer.exceptions import ContextLengthError, InvalidRequestError
from mini_infer.fields import check_int, plain_ids
from mini_infer.outputs import Increment
from mini_infer.random import derived_seed
from mini_infer.sampling import SamplingParams
from mini_infer.scheduler import Sequence, seats_for_one
from mini_infer.typing import TokenIds

if TYPE_CHECKING:
    from mini_infer.engine.no_tokenizer import NoTokenizer
    from mini_infer.engine.tokenizer import Tokenizer
    from mini_infer.models import DiffusionConfig

Prompt: TypeAlias = str | Seq[int]
"""Text, or token ids."""


class Intake:
    """Makes requests of prompts and sampling parameters.

    Holds no state but a counter and compiled grammars, so requests may be made on any thread while the engine runs on
    another.

    Args:
        tokenizer: reads text prompts.
        defaults: the model's sampling defaults and end-of-sequence tokens.
        vocab_size: token ids are below this.
        max_model_len: most tokens of prompt and completion together.
        config: says how many sequences run at once, and the seed that those of requests without one follow from.
        diffusion: how the model fills in masks; None for one that writes one token after the other.
        num_slots: tokens whose keys and values there is room for.

    Attributes:
        grammars: compiles those of structured outputs.
    """

    def __init__(
        self,
        tokenizer: "Tokenizer | NoTokenizer",
        defaults: GenerationDefaults,
        vocab_size: int,
        max_model_len: int,
        config: EngineConfig,
        diffusion: "DiffusionConfig | None" = None,
        num_slots: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._max_num_seqs = config.max_num_seqs
        self._seed = config.seed
        self._token_budget = config.token_budget
        self._diffusion = diffusion
        self._num_slots = num_slots
        self._numbers = count()
        self.grammars = Grammars(tokenizer, vocab_size, defaults.eos_token_ids)

    def make_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        overrides: Mapping[str, Any],
        *,
        request_id: str | None = None,
        priority: int = 0,
        caller: Hashable = None,
        listener: Callable[[Increment], None] | None = None,
    ) -> Request:
        """Check one prompt and its parameters.

        Args:
            sampling_params: None is the model's default.
            overrides: options that go before ``sampling_params``; None stands for not given.
            caller: who asks, for whom others are not to wait; None asks alone.

        Raises:
            InvalidRequestError: the prompt, a parameter or the id is unusable.
        """
        params = self._params(sampling_params, overrides)
        number = next(self._numbers)
        if request_id is None:
            # The random part keeps it from being hit by ids of the user's own.
            request_id = f"request-{number}-{secrets.token_hex(4)}"
        elif not isinstance(request_id, str) or not request_id:
            raise InvalidRequestError(f"request_id must be a non-empty string, got {shown(request_id)}")
        priority = check_int(InvalidRequestError, "priority", priority, -(2**31), 2**31)
        token_ids = self._token_ids(prompt)
        seed = params.seed if params.seed is not None else derived_seed(self._seed, number)
        stop_token_ids = self._stop_token_ids(params)
        completions = self._completions(params, token_ids, is_followed=listener is not None)
        text = str(prompt) if isinstance(prompt, str) else None
        if self._diffusion is not None:
            if params.gen_length is None and overrides.get("max_tokens") is not None:
                params = replace(params, gen_length=params.max_tokens)
            canvas = Canvas.of(self._diffusion, token_ids, params, self._check_room(len(token_ids), least=1))
            canvas.check_budget(self._token_budget, self._max_num_seqs, self._num_slots)

            def masked() -> Sequence:
                return canvas.sequence(request_id, priority, caller)

            options = canvas.options(make_rules(params, token_ids, stop_token_ids)[0], stop_token_ids, seed)
            answers = {masked(): completion for completion in completions}
            diffusion = Diffusion(answers, options, self._tokenizer.token_text)
            return Request(request_id, text, token_ids, params, completions, diffusion, listener)
        for name, value in params.diffusion_options.items():
            raise InvalidRequestError(
                f"{name}={value!r} steers a diffusion language model, and this model writes one token after the other; "
                "use max_tokens and temperature"
            )
        max_length = self._max_length(len(token_ids), params)

        def sequence() -> Sequence:
            return Sequence(
                request_id=request_id,
                token_ids=list(token_ids),
                num_prompt_tokens=len(token_ids),
                max_length=max_length,
                priority=priority,
                caller=caller,
                cache_salt=params.cache_salt,
                reads_prefix_cache=not params.reads_whole_prompt,
            )

        num_seats = self._max_num_seqs if caller is None else seats_for_one(self._max_num_seqs)
        sequences = make_forks(sequence, params.n, num_seats)
        rules = make_rules(params, token_ids, stop_token_ids)
        grammars = self._compile(params, stop_token_ids)
        streams = {
            sequence: Stream(completion, own if grammar is None else (*own, grammar), grammar)
            for sequence, completion, own, grammar in zip(sequences, completions, rules, grammars, strict=True)
        }
        autoregressive = Autoregressive(streams, stop_token_ids, seed, self._tokenizer.token_text)
        return Request(request_id, text, token_ids, params, completions, autoregressive, listener)

    def make_beam_search(
        self, prompt: Prompt, params: SamplingParams, length_penalty: float, early_stopping: bool
    ) -> Request:
        """Check one prompt, for a search of width ``params.n``.

        Raises:
            InvalidRequestError: the prompt or a parameter is unusable.
        """
        if self._diffusion is not None:
            raise InvalidRequestError("a diffusion model has no beams to search along: it writes in any order")
        request_id = f"beams-{next(self._numbers)}-{secrets.token_hex(4)}"
        token_ids = self._token_ids(prompt)
        options = BeamOptions(
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            stop_token_ids=self._stop_token_ids(params),
            max_length=self._max_length(len(token_ids), params),
        )
        decoding = BeamSearch(request_id, token_ids, params.n, options)
        text = str(prompt) if isinstance(prompt, str) else None
        return Request(request_id, text, token_ids, params, self._completions(params, token_ids, False), decoding, None)

    def _completions(self, params: SamplingParams, prompt_token_ids: TokenIds, is_followed: bool) -> list[Completion]:
        matcher = StopStringMatcher(params.stop_strings)
        hides = params.skip_special_tokens and params.stop_strings
        hidden = self._tokenizer.special_tokens if hides else {}

        def stream() -> TextStream:
            detokenizer = self._tokenizer.detokenizer(prompt_token_ids, params.skip_special_tokens)
            return TextStream(detokenizer, matcher.fresh(), hidden, is_followed or bool(params.stop_strings))

        return [Completion(place, params.min_tokens, stream()) for place in range(params.n)]

    def _compile(self, params: SamplingParams, stop_token_ids: frozenset[int]) -> Seq[Grammar | None]:
        """The grammar of each completion."""
        if params.structured_outputs is None:
            return [None] * params.n
        return self.grammars.compile(params.structured_outputs, stop_token_ids, params.n)

    def _stop_token_ids(self, params: SamplingParams) -> frozenset[int]:
        stop_token_ids = frozenset(params.stop_token_ids or ())
        return stop_token_ids if params.ignore_eos else stop_token_ids | self._defaults.eos_token_ids

    def _params(self, sampling_params: SamplingParams | None, overrides: Mapping[str, Any]) -> SamplingParams:
        params = self._defaults.sampling if sampling_params is None else sampling_params
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"sampling_params must be a SamplingParams, got {shown(params)}")
        given = {name: value for name, value in overrides.items() if value is not None}
        params = replace(params, **given) if given else params
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token_id in ids or ():
                if token_id >= self._vocab_size:
                    raise InvalidRequestError(
                        f"{name} has {token_id}, but the vocabulary has {self._vocab_size} tokens and ends at "
                        f"{self._vocab_size - 1}"
                    )
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self._vocab_size:
                raise InvalidRequestError(
                    f"{name}={getattr(params, name)} but the vocabulary has {self._vocab_size} tokens"
                )
        return params

    def _token_ids(self, prompt: Prompt) -> TokenIds:
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt, self._max_model_len)
        token_ids = plain_ids(prompt)
        if not isinstance(token_ids, list):
            raise InvalidRequestError(f"a prompt must be a string or a list of token ids, got {shown(prompt)}")
        if not token_ids:
            raise InvalidRequestError(f"prompt {prompt!r} is empty; give at least one token")
        self._check_room(len(token_ids), least=0)
        return self.check_token_ids(token_ids)

    def check_token_ids(self, token_ids: Seq[int]) -> TokenIds:
        """The ids as a list of Python's own integers.

        Raises:
            InvalidRequestError: there is another thing among them, or one that the vocabulary does not have.
        """
        known: TokenIds = plain_ids(token_ids)
        for place, token_id in enumerate(known):
            if type(token_id) is not int:
                raise InvalidRequestError(f"token {place} of the prompt must be an integer, got {shown(token_id)}")
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequestError(
                    f"token {place} of the prompt is {token_id}, but the vocabulary is 0 to {self._vocab_size - 1}"
                )
        return known

    def _max_length(self, num_prompt_tokens: int, params: SamplingParams) -> int:
        """Length at which a sequence ends; refuses a prompt that leaves no room."""
        room = self._check_room(num_prompt_tokens, least=0 if params.max_tokens == 0 else 1)
        return num_prompt_tokens + (room if params.max_tokens is None else min(room, params.max_tokens))

    def _check_room(self, num_prompt_tokens: int, least: int) -> int:
        """How many tokens fit after a prompt; refuses it if that is less than ``least``."""
        room = self._max_model_len - num_prompt_tokens
        if room < least:
            raise ContextLengthError(
                self._max_model_len, f"{num_prompt_tokens} tokens, which leaves no room to generate"
            )
        return room


def list_prompts(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """One prompt becomes a list of one; so does a list of integers, which is one prompt's token ids."""
    prompts = plain_ids(prompts)
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, list):
        raise InvalidRequestError(f"prompts must be a string, token ids, or a list of those, got {shown(prompts)}")
    return [prompts] if prompts and all(isinstance(item, int) for item in prompts) else prompts


_Kind = TypeVar("_Kind")


def one_for_each(name: str, kind: type[_Kind], given: _Kind | Seq[_Kind] | None, num_prompts: int) -> Seq[_Kind | None]:
    """One set of parameters per prompt.

    Args:
        name: what these parameters are called.
        kind: what they are.
        given: one for all, or one for each; None is none for any.

    Raises:
        InvalidRequestError: a list of another length.
    """
    if given is None or isinstance(given, kind):
        return [given] * num_prompts
    if not isinstance(given, list | tuple):
        raise InvalidRequestError(f"{name} must be a {kind.__name__} or a list of them, got {shown(given)}")
    if len(given) != num_prompts:
        raise InvalidRequestError(f"{num_prompts} prompts but {len(given)} {name}; give one for all or one for each")
    return given


def shown(value: object) -> str:
    """A value as an error message shows it: its beginning, and its type."""
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
