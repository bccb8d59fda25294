"""What a request changes in the logits that its tokens are drawn from: a list of rules, each with one idea.

A rule says what it changes as arrays, which the executor applies; it never sees a tensor. Arrays are made once for a
request, so that a step costs nothing for each entry that a caller sent.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from mini_infer.engine.rules.bias import Ban, Bias
from mini_infer.engine.rules.edits import Edits
from mini_infer.engine.rules.grammar import Grammar, Grammars
from mini_infer.engine.rules.penalties import Penalties
from mini_infer.sampling import SamplingParams
from mini_infer.typing import TokenIds

__all__ = ["Ban", "Bias", "Edits", "Grammar", "Grammars", "Penalties", "Rule", "make_rules"]


class Rule(Protocol):
    """Changes the logits of one completion.

    Attributes:
        needs_last_token: what it changes depends on every token before, so that steps of this request cannot overlap.
    """

    @property
    def needs_last_token(self) -> bool: ...

    def apply(self, draw: int, position: int, drafts: TokenIds, edits: Edits) -> None:
        """Add what changes for one draw.

        Args:
            draw: which row of the step's draws.
            position: which token of the sequence is drawn.
            drafts: the tokens before it that ``accept`` has not told of, since they are not certain. Only a rule that
                needs the last token is ever given some that it must look at.
            edits: where to.
        """

    def accept(self, token_id: int) -> None:
        """The completion goes on with this token."""


def make_rules(
    params: SamplingParams, prompt_token_ids: TokenIds, stop_token_ids: frozenset[int]
) -> list[tuple[Rule, ...]]:
    """The rules of each of a request's ``n`` completions. What keeps no state they share."""
    shared: list[Rule] = []
    if params.logit_bias:
        ids = np.fromiter(params.logit_bias.keys(), dtype=np.int64)
        shared.append(Bias(ids, np.fromiter(params.logit_bias.values(), dtype=np.float64)))
    if params.min_tokens and stop_token_ids:
        shared.append(Ban(np.array(sorted(stop_token_ids)), before=len(prompt_token_ids) + params.min_tokens))
    if not params.has_penalties:
        return [tuple(shared)] * params.n
    prompt_ids = np.unique(np.array(prompt_token_ids, dtype=np.int64))
    in_prompt = frozenset(prompt_token_ids)
    return [(Penalties.of(params, prompt_ids, in_prompt), *shared) for _ in range(params.n)]


def needs_last_token(rules: Sequence[Rule]) -> bool:
    """Whether any of them does."""
    return any(rule.needs_last_token for rule in rules)
