"""What all decodings do with sequences that make completions: start them, and end them."""

from collections.abc import Iterable

from mini_infer.engine.request import Completion, Request
from mini_infer.outputs import FinishReason
from mini_infer.scheduler import Scheduler, Sequence


def start_all(scheduler: Scheduler, sequences: Iterable[Sequence]) -> None:
    """Queue all of them, or none."""
    sequences = list(sequences)
    try:
        for sequence in sequences:
            scheduler.add(sequence)
    except BaseException:  # the policy may be somebody's own
        for sequence in sequences:
            scheduler.finish(sequence, "error")
        raise


def stop_all(
    request: Request, scheduler: Scheduler, completions: Iterable[tuple[Sequence, Completion]], reason: FinishReason
) -> None:
    """End those that go on."""
    going_on = [(sequence, completion) for sequence, completion in completions if completion.finish_reason is None]
    for sequence, _ in going_on:  # all of them before anything can raise
        scheduler.finish(sequence, reason)
    for sequence, completion in going_on:
        close_completion(request, sequence, completion, reason, "", 0)


def close_completion(
    request: Request, sequence: Sequence, completion: Completion, reason: FinishReason, text: str, num_tokens: int
) -> None:
    """A completion's sequence has ended: release the rest of its text and tell the listener.

    Args:
        text, num_tokens: what the last step added before that.
    """
    text += completion.end(reason)
    request.num_preemptions += sequence.num_preemptions
    request.emit(completion, text, num_tokens, sequence.canvas)
