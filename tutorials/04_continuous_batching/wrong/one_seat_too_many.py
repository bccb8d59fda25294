HINT = {"en": "seats", "zh": "座位数"}

from collections import deque

from mini_infer.scheduler import ScheduledSequence, Sequence


def schedule(
    running: list[Sequence], waiting: deque[Sequence], token_budget: int, max_num_seqs: int
) -> list[ScheduledSequence]:
    plan = []
    decodes = [s for s in running if s.num_uncomputed_tokens == 1]
    prompts = [s for s in running if s.num_uncomputed_tokens > 1]
    for sequence in decodes + prompts:
        if token_budget == 0:
            break
        num_new_tokens = min(sequence.num_uncomputed_tokens, token_budget)
        plan.append(ScheduledSequence(sequence, num_new_tokens))
        token_budget -= num_new_tokens
    while waiting and token_budget > 0 and len(running) <= max_num_seqs:
        sequence = waiting.popleft()
        running.append(sequence)
        num_new_tokens = min(sequence.num_uncomputed_tokens, token_budget)
        plan.append(ScheduledSequence(sequence, num_new_tokens))
        token_budget -= num_new_tokens
    return plan
