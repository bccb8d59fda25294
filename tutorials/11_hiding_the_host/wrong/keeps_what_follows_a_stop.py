HINT = {"en": "has to be dropped", "zh": "必须丢弃"}

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Request:
    name: str
    max_tokens: int
    stop_token_id: int


class Handle(Protocol):
    def wait(self) -> list[int]: ...


Launch = Callable[[list[str]], Handle]


def has_ended(request: Request, token_ids: list[int]) -> bool:
    return len(token_ids) == request.max_tokens or request.stop_token_id in token_ids


def run_synchronously(requests: list[Request], launch: Launch) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.name: [] for request in requests}
    while step := [request for request in requests if not has_ended(request, tokens[request.name])]:
        token_ids = launch([request.name for request in step]).wait()
        for request, token_id in zip(step, token_ids, strict=True):
            tokens[request.name].append(token_id)
    return tokens


def run_overlapped(requests: list[Request], launch: Launch) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.name: [] for request in requests}
    num_launched = dict.fromkeys(tokens, 0)
    flight: tuple[list[Request], Handle] | None = None
    while True:
        step = [
            request
            for request in requests
            if num_launched[request.name] < request.max_tokens and not has_ended(request, tokens[request.name])
        ]
        following = None
        if step:
            following = step, launch([request.name for request in step])
            for request in step:
                num_launched[request.name] += 1
        elif flight is None:
            return tokens
        if flight is not None:
            launched, handle = flight
            for request, token_id in zip(launched, handle.wait(), strict=True):
                tokens[request.name].append(token_id)
        flight = following
