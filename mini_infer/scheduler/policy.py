"""Who goes first: a policy gives each sequence a key when it arrives, and the smallest key goes first.

The key never changes, so queues stay sorted without ever being sorted again. A third policy is a class
with ``key``: pass an object of it, or name it as ``FILE:NAME``.
"""

from collections.abc import Mapping
from typing import TypeAlias

from mini_infer.exceptions import InvalidConfigError
from mini_infer.plugins import load_object
from mini_infer.scheduler.sequence import Sequence
from mini_infer.typing import SchedulingPolicy

Policy: TypeAlias = SchedulingPolicy


class FirstComeFirstServed:
    """In order of arrival, whatever the priority."""

    def key(self, sequence: Sequence) -> tuple[float, ...]:
        return (sequence.arrival,)


class PriorityFirst:
    """Higher priority first, then in order of arrival; waiting counts too, so nobody starves.

    A sequence's claim is its priority plus its age, where ``ageing`` arrivals after it count as one priority level.
    Between two sequences the difference of their ages never changes, so the claim can be written as a fixed key:
    arrival - ageing * priority. However urgent the newcomers are, a sequence of p levels less is overtaken by at most
    ``ageing * p`` of them.
    """

    def __init__(self, ageing: int = 1000) -> None:
        self.ageing = ageing

    def key(self, sequence: Sequence) -> tuple[float, ...]:
        return (sequence.arrival - self.ageing * sequence.priority,)


POLICIES: Mapping[str, type[FirstComeFirstServed] | type[PriorityFirst]] = {
    "fcfs": FirstComeFirstServed,
    "priority": PriorityFirst,
}
"""The policies that have a name in ``EngineConfig.scheduling_policy``."""


def make_policy(policy: str | Policy) -> Policy:
    """The policy that ``EngineConfig.scheduling_policy`` means: a name, ``FILE:NAME``, or a policy as it is.

    Raises:
        InvalidConfigError: the file cannot be run, or what it names is no policy.
    """
    if not isinstance(policy, str):
        return policy
    if policy in POLICIES:
        return POLICIES[policy]()
    loaded = load_object(policy)
    try:
        made = loaded() if isinstance(loaded, type) else loaded
    except Exception as cause:
        raise InvalidConfigError(f"scheduling_policy={policy!r}: making one raised {cause!r}") from cause
    if not callable(getattr(made, "key", None)):
        raise InvalidConfigError(f"scheduling_policy={policy!r} is {loaded!r}, which has no method key(sequence)")
    return made  # type: ignore[no-any-return]
