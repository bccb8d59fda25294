"""Who goes first: a policy gives each sequence a key when it arrives, and the smallest key goes first.

The key never changes, so queues stay sorted without ever being sorted again. A third policy is a class with ``key``.
"""

from collections.abc import Mapping
from typing import Protocol

from mini_infer.scheduler.sequence import Sequence


class Policy(Protocol):
    """Orders sequences: the smallest key runs first and is preempted last."""

    def key(self, sequence: Sequence) -> tuple[float, ...]:
        """The key of a sequence that has just arrived, and has its ``arrival``; among equal keys that decides."""


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
