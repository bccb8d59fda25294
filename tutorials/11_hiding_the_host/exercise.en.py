"""Chapter 11: keep one step under way.

Fill in the body of ``run_overlapped``. ``run_synchronously`` is the loop that lets the device wait; the tokens must be
the same. ``mini-infer learn check 11`` grades your answer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """A request that decodes: every step that it is in samples one token for it.

    Attributes:
        name: no two are the same.
        max_tokens: it ends with its token number ``max_tokens``, at least 1; or before that with
        stop_token_id: this token, if it is sampled. A stop token is the last of the request's tokens.
    """

    name: str
    max_tokens: int
    stop_token_id: int


class Handle(Protocol):
    """A step under way."""

    def wait(self) -> list[int]:
        """Wait until the step is computed; one token for each request of the step, in the order of its launch."""


Launch = Callable[[list[str]], Handle]
"""Begin a step for the requests of these names and return at once; the device takes its steps in order."""


def has_ended(request: Request, token_ids: list[int]) -> bool:
    """Whether the tokens of a request, as far as they are known, end it."""
    return len(token_ids) == request.max_tokens or request.stop_token_id in token_ids


def run_synchronously(requests: list[Request], launch: Launch) -> dict[str, list[int]]:
    """The tokens of each request by its name; one step after the other."""
    tokens: dict[str, list[int]] = {request.name: [] for request in requests}
    while step := [request for request in requests if not has_ended(request, tokens[request.name])]:
        token_ids = launch([request.name for request in step]).wait()
        for request, token_id in zip(step, token_ids, strict=True):
            tokens[request.name].append(token_id)
    return tokens


def run_overlapped(requests: list[Request], launch: Launch) -> dict[str, list[int]]:
    """The same tokens, with a step under way whenever another one is read.

    Launch the first step. From then on: first launch the next step, as long as there is one, and only then ``wait``
    for the last one and read its tokens. So never more than two steps are under way.

    A step holds, in the order of ``requests``, every request that may want another token, as far as that can be known
    before the last step is read:

    - It cannot be known whether a stop token was sampled. A request that turns out to have ended is in one step too
      many; what that step samples for it is dropped.
    - It can be known that ``max_tokens`` will be reached: a token under way counts. No step is launched for more.

    An empty step is never launched.

    Args:
        requests: what to run.
        launch: begins a step.

    Returns:
        The tokens of each request, by its name.
    """
    ...
