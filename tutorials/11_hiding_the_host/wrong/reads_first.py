HINT = {"en": "Launch first, then wait", "zh": "先发起，再 wait"}

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
    flight: tuple[list[Request], Handle] | None = None
    while True:
        if flight is not None:
            launched, handle = flight
            for request, token_id in zip(launched, handle.wait(), strict=True):
                tokens[request.name].append(token_id)
        step = [request for request in requests if not has_ended(request, tokens[request.name])]
        if not step:
            return tokens
        flight = step, launch([request.name for request in step])
