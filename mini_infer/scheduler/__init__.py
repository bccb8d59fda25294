"""Which tokens run in this step, and who must wait. Importing this does not import torch."""

from mini_infer.scheduler.plan import BlockCopy, Outcome, ScheduledSequence, SchedulerOutputs
from mini_infer.scheduler.policy import POLICIES, FirstComeFirstServed, Policy, PriorityFirst, make_policy
from mini_infer.scheduler.preemption import PreemptionCosts
from mini_infer.scheduler.roster import SchedulerCounts
from mini_infer.scheduler.scheduler import Scheduler
from mini_infer.scheduler.sequence import Reuse, Sequence, SequenceStatus
from mini_infer.scheduler.shares import seats_for_one

__all__ = [
    "POLICIES",
    "BlockCopy",
    "FirstComeFirstServed",
    "Outcome",
    "Policy",
    "PreemptionCosts",
    "PriorityFirst",
    "Reuse",
    "ScheduledSequence",
    "Scheduler",
    "SchedulerCounts",
    "SchedulerOutputs",
    "Sequence",
    "SequenceStatus",
    "make_policy",
    "seats_for_one",
]
