"""The worker's end of the pipe: one JSON object per line in, one out. Standard library only, for any interpreter."""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple


class Job(NamedTuple):
    """What every engine is given at once.

    Attributes:
        prompts: token ids.
        num_outputs: how many tokens to generate for each, whatever they are.
        temperature, top_k, top_p: how they are chosen; temperature 0 is greedy.
    """

    prompts: list[list[int]]
    num_outputs: list[int]
    temperature: float = 0.0
    top_k: int = -1
    top_p: float = 1.0

    @property
    def sampling(self) -> dict[str, Any]:
        """As transformers wants it."""
        if self.temperature == 0:
            return {"do_sample": False}
        top_k = max(self.top_k, 0)  # 0 keeps all
        return {"do_sample": True, "temperature": self.temperature, "top_k": top_k, "top_p": self.top_p}


class Done(NamedTuple):
    """What it made of it; times are in seconds since the job began.

    Attributes:
        seconds: until the last token of all.
        token_ids: per request, as many as were asked for.
        first, last: when each request had its first and its last token.
        extra: what only this engine can say.
    """

    seconds: float
    token_ids: list[list[int]]
    first: list[float]
    last: list[float]
    extra: dict[str, Any]


def serve(package: str, load: Callable[[str, dict[str, Any]], dict[str, Callable[..., Any]]]) -> None:
    """Load the model that ``argv[1]`` names with the options in ``argv[2]``, and answer messages until the pipe ends.

    Args:
        package: what the engine is, with a ``__version__``; the first answer, when the model is loaded.
        load: gives the commands, by name. A message ``[name, *arguments]`` is answered with what the command returns.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; what they print goes to the log

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        commands = load(sys.argv[1], json.loads(sys.argv[2]))
        reply(answer=importlib.import_module(package).__version__)
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            reply(answer=commands[name](*arguments))
    except Exception as error:
        traceback.print_exc()
        reply(error=f"{type(error).__name__}: {error}")
