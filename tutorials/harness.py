"""Plays the model for pages and checks that need none: a scheduler plans, and what the model would sample is given.

Only public verbs are used: ``schedule`` plans a step, ``commit`` says what came of it.
"""

from mini_infer.scheduler import Outcome, Scheduler, SchedulerOutputs


def outcomes(plan: SchedulerOutputs, token_id: int = 0) -> list[Outcome]:
    """What a plan leads to if the model samples ``token_id`` for everybody.

    Every sequence whose last token is computed in the step gets one, as does whoever forks from it there. Its keys and
    values are valid up to that last token.
    """
    return [
        Outcome(sequence, (token_id,), num_valid=item.end)
        for item in plan.scheduled
        if item.num_logits
        for sequence in (item.sequence, *item.forks)
    ]


def step(scheduler: Scheduler, token_id: int = 0) -> SchedulerOutputs:
    """One whole step; returns its plan."""
    plan = scheduler.schedule()
    scheduler.commit(outcomes(plan, token_id))
    return plan


def computed(plan: SchedulerOutputs) -> dict[str, int]:
    """How many tokens the step computes of whom, in the order of the plan."""
    return {item.sequence.request_id: item.num_tokens for item in plan.scheduled}
