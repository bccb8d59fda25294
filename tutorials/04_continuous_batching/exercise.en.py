"""Chapter 4: decide who runs in the next step.

Fill in the body of ``schedule``. ``mini-infer learn check 4`` grades it.
"""

from collections import deque

from mini_infer.scheduler import ScheduledSequence, Sequence


def schedule(
    running: list[Sequence], waiting: deque[Sequence], token_budget: int, max_num_seqs: int
) -> list[ScheduledSequence]:
    """Plan one step: which sequences compute how many tokens.

    ``sequence.num_uncomputed_tokens`` says how many tokens of a sequence have no keys and values yet: 1 for a sequence
    that decodes, all of the prompt for one that has just arrived, the rest for a prompt that is under way. The budget
    goes to the sequences in this order:

    1. running sequences with one token left to compute: the decodes;
    2. running sequences with more than one: prompts under way, as many of their tokens as the budget allows;
    3. while budget and seats are left: the first sequence in ``waiting``. It moves to the end of ``running``, and
       computes as much of its prompt as the budget allows. ``running`` never holds more than ``max_num_seqs``.

    Within each group, earlier comes first. A sequence that gets no token is not in the plan, and does not leave
    ``waiting``. The sequences themselves are not changed: that happens when the step has been computed.

    Args:
        running: sequences that hold a seat, in order of arrival; changed in place.
        waiting: sequences that do not, in order of arrival; changed in place (``waiting.popleft()``).
        token_budget: the most tokens that the step may compute; at least 1.
        max_num_seqs: seats.

    Returns:
        ``ScheduledSequence(sequence, num_new_tokens)`` for each sequence of the step.
    """
    ...
