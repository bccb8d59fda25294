"""Which of several replicas a request goes to: one formula, over integers.

A replica's price for a request is what it would have to compute before that has its first token: prompt tokens that
wait there already, and those of the request itself that its prefix cache does not have. Every request that is under way
there counts as a few tokens more, since it has one in each step; without that, a popular beginning would draw all
requests to one replica. The cheapest takes it; of equals, the one that was used longest ago.

What a prefix cache has is taken from what the replica was sent, so that requests which arrive together already know of
each other.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

IN_FLIGHT_TOKENS = 16
"""What a request under way counts as, in prompt tokens."""


@dataclass(slots=True)
class _Load:
    """One replica's.

    Attributes:
        num_waiting_tokens: prompt tokens that are yet to be computed.
        num_requests: under way.
        last_used: when it was chosen last, counted in requests.
        blocks: contents that it was sent, each a block's tokens after all those before; least recently used first.
    """

    num_waiting_tokens: int = 0
    num_requests: int = 0
    last_used: int = -1
    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)


class Router:
    """Chooses replicas, and keeps account of what they have to do.

    Args:
        num_replicas: how many there are.
        block_size: tokens per block of their prefix caches.
        num_blocks: blocks of each; 0 where prefixes are not cached.
    """

    def __init__(self, num_replicas: int, block_size: int, num_blocks: int) -> None:
        self._loads = [_Load() for _ in range(num_replicas)]
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._routes: dict[Hashable, tuple[_Load, int]] = {}  # requests under way; what is left of their prompts
        self._num_chosen = 0

    def choose(self, request: Hashable, token_ids: Sequence[int], salt: str | None = None) -> int:
        """The replica for a request, which counts there from now on."""
        chain = self._chain(token_ids, salt)
        missing = [len(token_ids) - self._block_size * self._num_known(load, chain) for load in self._loads]

        def price(place: int) -> tuple[int, int]:
            load = self._loads[place]
            work = load.num_waiting_tokens + missing[place] + IN_FLIGHT_TOKENS * load.num_requests
            return work, load.last_used

        chosen = min(range(len(self._loads)), key=price)
        load = self._loads[chosen]
        load.num_waiting_tokens += missing[chosen]
        load.num_requests += 1
        load.last_used, self._num_chosen = self._num_chosen, self._num_chosen + 1
        for content in reversed(chain):  # the end of a prefix is worth less than its beginning
            load.blocks[content] = None
            load.blocks.move_to_end(content)
        while len(load.blocks) > self._num_blocks:
            load.blocks.popitem(last=False)
        self._routes[request] = load, missing[chosen]
        return chosen

    def computed(self, request: Hashable) -> None:
        """Its prompt is computed."""
        route = self._routes.get(request)
        if route is not None:
            load, num_tokens = route
            load.num_waiting_tokens -= num_tokens
            self._routes[request] = load, 0

    def ended(self, request: Hashable) -> None:
        """It is under way no more; harmless to say twice."""
        self.computed(request)
        route = self._routes.pop(request, None)
        if route is not None:
            route[0].num_requests -= 1

    def _chain(self, token_ids: Sequence[int], salt: str | None) -> list[int]:
        """The contents of the prompt's full blocks. The last token is always computed."""
        size = self._block_size
        num_blocks = min((len(token_ids) - 1) // size, self._num_blocks)
        chain, content = [], hash(salt)
        for start in range(0, num_blocks * size, size):
            content = hash((content, *token_ids[start : start + size]))
            chain.append(content)
        return chain

    def _num_known(self, load: _Load, chain: Sequence[int]) -> int:
        return next((place for place, content in enumerate(chain) if content not in load.blocks), len(chain))
