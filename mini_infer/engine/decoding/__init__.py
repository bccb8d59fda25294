"""How logits become tokens: what a request wants of a step, what the step made known, and what follows from it.

Each request has one ``Decoding``. The loop calls it three times for each of its sequences in a step:

    want      before the step: which rows, and what is to be done with them
    decide    after it, and before anything has changed: how many tokens, which, and why the sequence ends
    publish   after all decisions of the step are committed: text, stop strings, the listener, further beams
"""

from typing import TYPE_CHECKING, Protocol

from mini_infer.outputs import FinishReason
from mini_infer.scheduler import Outcome, ScheduledSequence, Scheduler

if TYPE_CHECKING:
    from mini_infer.engine.describe import Answer, Wanted
    from mini_infer.engine.request import Request


class Decoding(Protocol):
    """Attributes:
    needs_last_token: the next step of this request depends on what the last one gave, so that none may overlap.
    """

    @property
    def needs_last_token(self) -> bool: ...

    def start(self, scheduler: Scheduler) -> None:
        """Queue the first sequence, or several."""

    def want(self, request: "Request", item: ScheduledSequence, first_row: int, wanted: "Wanted") -> None:
        """Say what is wanted of the logits after a sequence's tokens, which are the step's rows from ``first_row``."""

    def decide(self, request: "Request", item: ScheduledSequence, answer: "Answer") -> list[Outcome]:
        """What the step made known. Changes nothing."""

    def publish(self, request: "Request", item: ScheduledSequence, answer: "Answer", scheduler: Scheduler) -> int:
        """Carry on from what was committed; the number of tokens generated."""

    def stop(self, request: "Request", scheduler: Scheduler, reason: FinishReason) -> None:
        """End all that has not ended, and tell the listener."""
