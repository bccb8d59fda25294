"""What a request asks of a diffusion model, checked: how many masks, written in which steps."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mini_infer.engine.decoding.diffusion import DiffusionOptions, Keeping, counts, counts_by_share, shares
from mini_infer.engine.rules import Rule
from mini_infer.exceptions import InvalidRequestError
from mini_infer.sampling import SamplingParams
from mini_infer.scheduler import Sequence
from mini_infer.typing import TokenIds

if TYPE_CHECKING:
    from mini_infer.models import DiffusionConfig

DEFAULT_GEN_LENGTH = 128
DEFAULT_STEPS = 128

_REFUSED = {
    "min_tokens": 0,
    "prompt_logprobs": None,
    "prompt_embedding": False,
    "structured_outputs": None,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
"""Options that need one token after the other, or nothing behind the prompt, and what they are where they are left."""


@dataclass(frozen=True)
class Canvas:
    """The masks behind a prompt, and the request's options for them.

    Attributes:
        model: what the model says of its masks.
        prompt_token_ids: what stands before them.
        gen_length: how many there are.
        params: as given.
    """

    model: "DiffusionConfig"
    prompt_token_ids: TokenIds
    gen_length: int
    params: SamplingParams

    @classmethod
    def of(cls, model: "DiffusionConfig", prompt_token_ids: TokenIds, params: SamplingParams, room: int) -> "Canvas":
        """Check what is asked for.

        Args:
            room: how many tokens fit behind the prompt.

        Raises:
            InvalidRequestError: an option that a diffusion model does not have, or more masks than there is room.
        """
        for name, idle in _REFUSED.items():
            if getattr(params, name) != idle:
                raise InvalidRequestError(
                    f"{name}={getattr(params, name)!r}: a diffusion model writes in any order and cannot keep to that; "
                    "leave it out"
                )
        gen_length = params.gen_length or min(DEFAULT_GEN_LENGTH, room)
        if params.threshold is not None or params.factor is not None:
            name = "factor" if params.threshold is None else "threshold"
            others = {"steps": params.steps, "factor": params.factor if name == "threshold" else None}
            for other, value in others.items():
                if value is not None:
                    raise InvalidRequestError(
                        f"{other}={value!r} beside {name}, which decides how many tokens a step keeps; give one"
                    )
            if params.remasking == "random":
                raise InvalidRequestError(f"remasking='random' beside {name}, which goes by confidence; give one")
        if params.alg is not None:
            for name in ("block_length", "remasking", "threshold", "factor", "sparse_config"):
                if getattr(params, name) is not None:
                    raise InvalidRequestError(
                        f"{name}={getattr(params, name)!r} beside alg={params.alg!r}, which writes all of the answer "
                        "by a rule of its own; give one"
                    )
        if params.alg_temp and params.alg in (None, "origin"):
            raise InvalidRequestError(
                f"alg_temp={params.alg_temp!r} needs an alg that goes by confidence: maskgit_plus, topk_margin or "
                "entropy"
            )
        if model.span is not None:
            _check_blocks(model.span, params)
        is_sparse = params.sparse_config is not None and params.sparse_config.enabled
        if is_sparse and params.kv_reuse is not None:
            raise InvalidRequestError(
                f"kv_reuse={params.kv_reuse!r} beside sparse_config, which says what is computed again; give one"
            )
        if params.refresh_interval is not None and params.kv_reuse is None and not is_sparse:
            raise InvalidRequestError("refresh_interval without kv_reuse, where every step computes all; give both")
        if gen_length > room:
            raise InvalidRequestError(
                f"gen_length={gen_length}, but behind a prompt of {len(prompt_token_ids)} tokens there is room for "
                f"{room}; shorten one of them"
            )
        return cls(model, prompt_token_ids, gen_length, params)

    @property
    def is_guided(self) -> bool:
        return bool(self.params.cfg_scale)

    @property
    def offset(self) -> int:
        """Tokens of the prompt in the first block that is written."""
        return 0 if self.model.span is None else len(self.prompt_token_ids) % self.model.span

    @property
    def block_length(self) -> int:
        if self.model.span is not None:
            return self.model.span
        sparse = self.params.sparse_config
        default = self.gen_length if sparse is None or not sparse.enabled else sparse.default_block_len
        return min(self.params.block_length or default, self.gen_length)

    @property
    def keeping(self) -> Keeping | None:
        """What is not computed in every step."""
        interval, sparse = self.params.refresh_interval, self.params.sparse_config
        if sparse is not None and sparse.enabled:
            return Keeping(True, sparse.retention_ratio, sparse.head_select, sparse.delay_step, interval)
        if self.params.kv_reuse is None:
            return None
        return Keeping(suffix=self.params.kv_reuse == "dual", interval=interval)

    @property
    def num_slots(self) -> int:
        """Tokens whose keys and values are kept, beside those that a step of a block computes: most in the first one,
        for no other is longer."""
        if self.keeping is None:
            return 0
        start = len(self.prompt_token_ids) - self.model.shift
        length = len(self.prompt_token_ids) + self.gen_length
        first = self.keeping.reuse(start, len(self.prompt_token_ids) + self.block_length, length)
        return first.num_kept + first.end - first.start

    def check_budget(self, token_budget: int, max_num_seqs: int, num_slots: int) -> None:
        """Refuse what could never run: a step computes prompt and canvas at once, or of a model in blocks one of these.

        Args:
            num_slots: tokens whose keys and values there is room for.

        Raises:
            InvalidRequestError: that is more than a step may compute, more sequences than may run, or more is to be
                kept than there is room for.
        """
        if self.model.span is not None:
            if self.model.span > token_budget:
                raise InvalidRequestError(
                    f"a block has {self.model.span} tokens, all of which a step computes at once, and "
                    f"max_num_batched_tokens is {token_budget}; raise that"
                )
            return
        num_sequences = 2 if self.is_guided else 1
        length = (len(self.prompt_token_ids) + self.gen_length) * num_sequences
        if self.num_slots * num_sequences > num_slots:
            raise InvalidRequestError(
                f"the keys and values of {self.num_slots * num_sequences} tokens are to be reused, and there is room "
                f"for {num_slots}; leave out kv_reuse or sparse_config, keep less, or raise num_gpu_blocks"
            )
        if length > token_budget:
            raise InvalidRequestError(
                f"prompt and gen_length are {length} tokens{' with cfg_scale' if self.is_guided else ''}, all of which "
                f"a step computes at once, and max_num_batched_tokens is {token_budget}; shorten one, or raise that"
            )
        if self.is_guided and max_num_seqs < 2:
            raise InvalidRequestError("cfg_scale runs two sequences at once, and max_num_seqs is 1; raise that")

    def sequence(self, request_id: str, priority: int, caller: Hashable) -> Sequence:
        """Prompt and masks, those of the first block where a model sees no more; and the same without the prompt where
        that is to guide."""
        span = self.model.span
        num_masks = self.gen_length if span is None else min(span - self.offset, self.gen_length)

        def make(prompt: TokenIds, twin: Sequence | None) -> Sequence:
            return Sequence(
                request_id=request_id,
                token_ids=[*prompt, *[self.model.mask_token_id] * num_masks],
                num_prompt_tokens=len(prompt),
                max_length=len(prompt) + self.gen_length,
                priority=priority,
                caller=caller,
                cache_salt=self.params.cache_salt,
                decides_late=True,
                num_masks=num_masks,
                mask_token_id=self.model.mask_token_id,
                is_whole=span is None,
                span=span or 1,
                num_kept_slots=self.num_slots if span is None else None,
                twin=twin,
                num_seats=1 if twin is None else 2,
            )

        nothing = [self.model.mask_token_id] * len(self.prompt_token_ids)
        return make(self.prompt_token_ids, make(nothing, None) if self.is_guided else None)

    def options(self, rules: tuple[Rule, ...], stop_token_ids: frozenset[int], seed: int) -> DiffusionOptions:
        params = self.params
        steps = params.steps or min(DEFAULT_STEPS, self.gen_length)
        return DiffusionOptions(
            mask_token_id=self.model.mask_token_id,
            shift=self.model.shift,
            gen_length=self.gen_length,
            block_length=self.block_length,
            origin=len(self.prompt_token_ids) - self.offset,
            keeps_blocks=self.model.span is not None,
            counts=(
                counts_by_share(self.gen_length, steps)
                if params.alg
                else counts(self.gen_length, steps, self.block_length, self.offset)
            ),
            shares=tuple(shares(steps)) if params.alg == "origin" else (),
            threshold=params.threshold,
            factor=params.factor,
            keeping=self.keeping,
            cfg_scale=params.cfg_scale or 0.0,
            rule=params.alg or params.remasking or "low_confidence",
            alg_temp=params.alg_temp or 0.0,
            stop_token_ids=stop_token_ids,
            rules=rules,
            seed=seed,
        )


def _check_blocks(span: int, params: SamplingParams) -> None:
    """Refuse what a model that sees in blocks does not have.

    Raises:
        InvalidRequestError: blocks of another length, or an option that blocks make pointless or are not there for.
    """
    if params.block_length not in (None, span):
        raise InvalidRequestError(
            f"block_length={params.block_length}, but this model sees in blocks of {span}; leave it out"
        )
    for name in ("kv_reuse", "refresh_interval"):
        if getattr(params, name) is not None:
            raise InvalidRequestError(
                f"{name}={getattr(params, name)!r}: this model sees in blocks, and keeps what is before one as "
                "it is, exactly; leave it out"
            )
    if params.sparse_config is not None and params.sparse_config.enabled:
        raise InvalidRequestError("sparse_config is not implemented for models that see in blocks; leave it out")
    for name in ("cfg_scale", "alg"):
        if getattr(params, name):
            raise InvalidRequestError(
                f"{name}={getattr(params, name)!r} is not implemented for models that see in blocks; leave it out"
            )
