"""Which tokens run in this step, and who must wait. Importing this does not import torch."""

from mini_infer.scheduler.scheduler import ScheduledSequence, Scheduler, SchedulerOutputs
from mini_infer.scheduler.sequence import Sequence, SequenceStatus

__all__ = ["ScheduledSequence", "Scheduler", "SchedulerOutputs", "Sequence", "SequenceStatus"]
