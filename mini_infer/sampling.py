"""What a request asks of its tokens: how they are chosen, and when to stop."""

from collections.abc import Mapping
from dataclasses import dataclass

from mini_infer.compat.options import SAMPLING_ALIASES, SAMPLING_REFUSED
from mini_infer.exceptions import InvalidRequestError
from mini_infer.fields import check_bool, check_choice, check_int, check_number, named_options, option, plain, plain_ids
from mini_infer.sparse import SparseConfig
from mini_infer.structured import StructuredOutputsParams

MAX_GEN_LENGTH = 8192
"""Most masks of an answer, and most steps."""

REMASKINGS = ("low_confidence", "random")

ALGS = ("origin", "maskgit_plus", "topk_margin", "entropy")

KV_REUSES = ("prefix", "dual")

DIFFUSION_OPTIONS = (
    *("gen_length", "steps", "block_length", "cfg_scale", "remasking", "alg", "alg_temp"),
    *("threshold", "factor", "kv_reuse", "refresh_interval", "sparse_config"),
)
"""What means something to diffusion models alone."""

MAX_STOP_STRINGS = 64
"""Most stop strings of a request."""

MAX_STOP_STRING_LENGTH = 512
"""Most characters of each; that much text may have to be held back."""

MAX_STOP_TOKEN_IDS = 1024
"""Most stop tokens of a request, beside the model's."""


@named_options(InvalidRequestError, SAMPLING_ALIASES, SAMPLING_REFUSED)
@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen.

    The filters apply in this order: penalties and ``logit_bias``, temperature, ``top_k``, ``top_p``, ``min_p``.
    Reported log probabilities are those of the model itself, before any of them. One uniform number, a function of
    (``seed``, index among ``n``, position) alone, decides each sampled token.

    Raises:
        InvalidRequestError: a value is out of range, or an option is unknown.
    """

    n: int = option(1, "How many completions to generate for the prompt, 1 to 1024")
    temperature: float = option(1.0, "Divides the logits; 0 takes the most likely token")
    top_p: float = option(1.0, "Keep the fewest most likely tokens whose probabilities reach this sum, 0 to 1")
    top_k: int = option(-1, "Keep this many of the most likely tokens; -1 or 0 keeps all")
    min_p: float = option(0.0, "Drop tokens less likely than this fraction of the most likely one's probability")
    repetition_penalty: float = option(1.0, "Divide positive, multiply negative logits of tokens seen (CTRL, 2019)")
    presence_penalty: float = option(0.0, "Subtract this from the logits of tokens generated so far, -2 to 2")
    frequency_penalty: float = option(0.0, "Subtract this times a token's count in the generated text, -2 to 2")
    logit_bias: Mapping[int, float] | None = option(
        None, "Add to the logits of these token ids, -100 to 100 each", hash=False
    )
    seed: int | None = option(None, "Makes the tokens reproducible; None takes one from the engine's seed")
    max_tokens: int | None = option(16, "Most tokens to generate; None for as many as the context holds")
    min_tokens: int = option(0, "Generate this many tokens before any that may stop, by token or by string")
    stop: str | list[str] | tuple[str, ...] | None = option(
        None, "Strings that end the text and are not part of it; at most 64 of 512 characters"
    )
    stop_token_ids: list[int] | tuple[int, ...] | None = option(
        None, "Token ids that end the text, beside the model's; at most 1024"
    )
    ignore_eos: bool = option(False, "Go on after the model's end-of-sequence token")
    logprobs: int | None = option(None, "Report each token's log probability and those of this many likeliest")
    prompt_logprobs: int | None = option(None, "The same for the prompt's tokens; max_tokens may then be 0")
    prompt_embedding: bool = option(
        False, "Report the mean of the prompt's last hidden states; max_tokens may then be 0"
    )
    cache_salt: str | None = option(None, "Share cached prefixes only with requests of the same salt")
    skip_special_tokens: bool = option(True, "Leave special tokens out of the text")
    structured_outputs: StructuredOutputsParams | None = option(
        None, "What the text must match: a JSON schema, a regular expression, choices or a grammar"
    )
    gen_length: int | None = option(
        None, "Diffusion models: masks that an answer begins as, 1 to 8192; None is max_tokens if given, else 128"
    )
    steps: int | None = option(
        None, "Diffusion models: passes over the answer, 1 to 8192; None is 128, but no more than gen_length"
    )
    block_length: int | None = option(
        None, "Diffusion models: masks that are written before any behind them; None is all of the answer"
    )
    cfg_scale: float | None = option(
        None, "Diffusion models: how far to go away from what would be said without the prompt; None or 0 is not at all"
    )
    remasking: str | None = option(
        None, "Diffusion models: which tokens of a step stay masked: those of low_confidence (None), or random ones"
    )
    alg: str | None = option(
        None, "Diffusion models: instead of remasking, Dream's origin, maskgit_plus, topk_margin or entropy"
    )
    alg_temp: float | None = option(
        None, "Diffusion models: how far chance decides which tokens an alg writes; None or 0 is not at all"
    )
    threshold: float | None = option(
        None, "Diffusion models: instead of steps, keep every token at least so likely, 0 to 1; fewer passes"
    )
    factor: float | None = option(
        None, "Diffusion models: instead of steps, keep n tokens while (n + 1)(1 - p) is less for the n-th likeliest"
    )
    kv_reuse: str | None = option(
        None,
        "Diffusion models: compute what stands before a block ('prefix'), or around it ('dual'), once; approximate",
    )
    refresh_interval: int | None = option(
        None, "Diffusion models: and again every so many steps; None is once for each block"
    )
    sparse_config: SparseConfig | None = option(
        None, "Diffusion models: keep only a share of what stands around a block; approximate"
    )

    def __post_init__(self) -> None:
        error = InvalidRequestError
        check_int(error, "n", self.n, 1, 1024)
        check_number(error, "temperature", self.temperature, 0)
        check_number(error, "top_p", self.top_p, 0, 1)
        check_int(error, "top_k", self.top_k, -1)
        check_number(error, "min_p", self.min_p, 0, 1)
        check_number(error, "repetition_penalty", self.repetition_penalty, 0, open_low=True)
        check_number(error, "presence_penalty", self.presence_penalty, -2, 2)
        check_number(error, "frequency_penalty", self.frequency_penalty, -2, 2)
        if self.seed is not None:
            check_int(error, "seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            check_int(error, "max_tokens", self.max_tokens, 0 if self.reads_whole_prompt else 1)
        check_int(error, "min_tokens", self.min_tokens, 0, self.max_tokens)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_int(error, name, getattr(self, name), 0)
        for name, most in (("gen_length", MAX_GEN_LENGTH), ("steps", MAX_GEN_LENGTH), ("block_length", None)):
            if getattr(self, name) is not None:
                check_int(error, name, getattr(self, name), 1, most)
        if self.cfg_scale is not None:
            check_number(error, "cfg_scale", self.cfg_scale, 0)
        if self.remasking is not None:
            check_choice(error, "remasking", self.remasking, REMASKINGS)
        if self.alg is not None:
            check_choice(error, "alg", self.alg, ALGS)
        if self.alg_temp is not None:
            check_number(error, "alg_temp", self.alg_temp, 0)
        if self.threshold is not None:
            check_number(error, "threshold", self.threshold, 0, 1)
        if self.factor is not None:
            check_number(error, "factor", self.factor, 0, open_low=True)
        if self.kv_reuse is not None:
            check_choice(error, "kv_reuse", self.kv_reuse, KV_REUSES)
        if self.refresh_interval is not None:
            check_int(error, "refresh_interval", self.refresh_interval, 1)
        if isinstance(self.sparse_config, Mapping):
            object.__setattr__(self, "sparse_config", SparseConfig(**self.sparse_config))
        elif self.sparse_config is not None and not isinstance(self.sparse_config, SparseConfig):
            raise error(
                f"sparse_config must be a SparseConfig, got {repr(self.sparse_config)[:80]}; "
                "SparseConfig(retention_ratio=0.5), for example"
            )
        if self.cache_salt is not None and not (isinstance(self.cache_salt, str) and self.cache_salt):
            raise error(f"cache_salt must be a non-empty string, got {self.cache_salt!r}; leave it out for none")
        check_bool(error, "prompt_embedding", self.prompt_embedding)
        check_bool(error, "ignore_eos", self.ignore_eos)
        check_bool(error, "skip_special_tokens", self.skip_special_tokens)
        if isinstance(self.structured_outputs, Mapping):
            object.__setattr__(self, "structured_outputs", StructuredOutputsParams(**self.structured_outputs))
        elif self.structured_outputs is not None and not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise error(
                "structured_outputs must be a StructuredOutputsParams, got "
                f"{repr(self.structured_outputs)[:80]}; StructuredOutputsParams(json=schema), for example"
            )
        self._settle_collections()

    def _settle_collections(self) -> None:
        """Check the options that hold several values, and keep our own immutable copy of each."""
        error = InvalidRequestError
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(s, str) and s for s in stop):
            raise error(f"stop must be a non-empty string or a list of them, got {self.stop!r}")
        if len(stop) > MAX_STOP_STRINGS:
            raise error(f"stop has {len(stop)} strings, but at most {MAX_STOP_STRINGS} are taken")
        for string in stop:
            if len(string) > MAX_STOP_STRING_LENGTH:
                raise error(
                    f"a stop string has {len(string)} characters, but at most {MAX_STOP_STRING_LENGTH} are taken "
                    f"(it begins {string[:40]!r}); shorten it"
                )
        ids = [] if self.stop_token_ids is None else self.stop_token_ids
        ids = plain_ids(list(ids) if isinstance(ids, set | frozenset) else ids)
        if not isinstance(ids, list):
            raise error(f"stop_token_ids must be a list of token ids, got {ids!r}")
        if len(ids) > MAX_STOP_TOKEN_IDS:
            raise error(f"stop_token_ids has {len(ids)} ids, but at most {MAX_STOP_TOKEN_IDS} are taken")
        for token_id in ids:
            check_int(error, "each of stop_token_ids", token_id, 0)
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping):
            raise error(f"logit_bias must map token ids to numbers, got {bias!r}")
        bias = {plain(token_id): plain(value) for token_id, value in bias.items()}
        for token_id, value in bias.items():
            check_int(error, "each key of logit_bias", token_id, 0)
            check_number(error, f"logit_bias[{token_id}]", value, -100, 100)
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        object.__setattr__(self, "logit_bias", bias)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple, empty when there are none."""
        return tuple(self.stop or ())

    @property
    def reads_whole_prompt(self) -> bool:
        """Whether something is asked of every token of the prompt, so that none may come from the prefix cache."""
        return self.prompt_logprobs is not None or self.prompt_embedding

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, and nothing is drawn."""
        return self.temperature == 0

    @property
    def diffusion_options(self) -> dict[str, object]:
        """Those of the options that mean something to diffusion models alone which were given."""
        return {name: getattr(self, name) for name in DIFFUSION_OPTIONS if getattr(self, name) is not None}

    @property
    def has_penalties(self) -> bool:
        """Whether the next token depends on which tokens came before, beside the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


EMBEDDING = SamplingParams(max_tokens=0, prompt_embedding=True)
"""Of requests that ask for nothing but a vector."""
