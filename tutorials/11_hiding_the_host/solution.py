"""Chapter 11: keep one step under way.

Fill in the body of ``run_overlapped``. ``run_synchronously`` is the loop that lets the device wait; the tokens must be
the same. ``mini-infer learn check 11`` grades your answer.
---
第 11 章：始终让一步在途。

请补全 ``run_overlapped`` 的函数体。``run_synchronously`` 是让设备干等的那种循环，两者得到的词元必须相同。
然后用 ``mini-infer learn check 11`` 批改。
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
    ---
    正在解码的请求：每参加一步，就为它采样一个词元。

    属性：
        name: 名字，互不相同。
        max_tokens: 到第 ``max_tokens`` 个词元时结束，至少为 1；也可能提前结束于
        stop_token_id: 这个词元，只要采样到它。停止词元是该请求的最后一个词元。
    """

    name: str
    max_tokens: int
    stop_token_id: int


class Handle(Protocol):
    """A step under way. · 在途的一步。"""

    def wait(self) -> list[int]:
        """Wait until the step is computed; one token for each request of the step, in the order of its launch.
        ---
        等这一步算完；返回其中每个请求的一个词元，次序与发起时相同。
        """


Launch = Callable[[list[str]], Handle]
"""Begin a step for the requests of these names and return at once; the device takes its steps in order.
---
为这些名字的请求发起一步，立即返回；设备按次序逐步计算。
"""


def has_ended(request: Request, token_ids: list[int]) -> bool:
    """Whether the tokens of a request, as far as they are known, end it. · 就已知的词元看，请求是否已经结束。"""
    return len(token_ids) == request.max_tokens or request.stop_token_id in token_ids


def run_synchronously(requests: list[Request], launch: Launch) -> dict[str, list[int]]:
    """The tokens of each request by its name; one step after the other.
    ---
    每个请求的词元，按名字存放；一步接一步地算。
    """
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
    ---
    词元相同，但每次读取一步的结果时，都有另一步在途。

    先发起第一步。此后每一轮：只要还有下一步，就先发起它，然后才对上一步调用 ``wait``，读取其中的词元。
    所以在途的步从不超过两个。

    一步里依 ``requests`` 的次序，包含每个可能还要词元的请求；判断时只能用读取上一步之前就知道的事：

    - 无从知道是否采样到了停止词元。事后才发现已经结束的请求，会多参加一步；那一步为它采样的词元要丢弃。
    - 可以知道会不会达到 ``max_tokens``：在途的词元也要算在内。超出的部分不必发起。

    绝不发起空的一步。

    参数：
        requests: 要运行的请求。
        launch: 发起一步。

    返回：
        每个请求的词元，按名字存放。
    """
    # hole
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
                if not has_ended(request, tokens[request.name]):
                    tokens[request.name].append(token_id)
        flight = following
    # end
