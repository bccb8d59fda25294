"""Chapter 1: draw the next token with top-p, given one random number."""

import torch
from torch import Tensor


def sample_top_p(logits: Tensor, top_p: float, uniform: float) -> int:
    """The next token.

    1. Softmax turns the logits into probabilities.
    2. Keep the smallest set of the likeliest tokens whose probabilities together reach `top_p`.
    3. The others get probability 0; what remains is scaled so that it sums to 1 again.
    4. Lay the tokens side by side on the line from 0 to 1, in the order of their ids. Return the id of the one that
       `uniform` falls on: token i covers the numbers from where it begins up to, but without, where it ends.

    Compute in float64: the sums then differ from the exact ones by less than anybody can notice.

    Args:
        logits: `[vocab_size]`, any floating dtype.
        top_p: in (0, 1]; 1 keeps every token.
        uniform: in [0, 1).

    Returns:
        A token id, from 0 to vocab_size - 1.
    """
    ...
