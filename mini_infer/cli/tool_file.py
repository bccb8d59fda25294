"""Tools for ``mini-infer chat``: the functions of a Python file, and what becomes of a call."""

import inspect
import json
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from mini_infer.engine.tools import Tool, read_tools
from mini_infer.exceptions import InvalidRequestError


class ToolFile:
    """The functions that a Python file defines; those whose names begin with ``_`` are its own business.

    A function says what it does in its docstring, and what it takes by its annotations and the docstring's ``Args:``.

    Args:
        path: the file, which is run.

    Raises:
        InvalidRequestError: it cannot be run, defines no function, or one says too little of itself.
    """

    def __init__(self, path: Path) -> None:
        try:
            found = runpy.run_path(str(path))
        except Exception as error:
            raise InvalidRequestError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
        self._functions: dict[str, Callable[..., Any]] = {
            name: value
            for name, value in found.items()
            if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == found["__name__"]
        }
        if not self._functions:
            raise InvalidRequestError(f"{path} defines no functions; each of them is to be a tool")
        self.tools: tuple[Tool, ...] = read_tools(
            [_described(path, name, function) for name, function in self._functions.items()]
        )

    def call(self, name: str, arguments: str) -> str:
        """The result of a call, as JSON or as the text that it is; an error's words where it fails, for the model."""
        function = self._functions.get(name)
        if function is None:
            return f"error: there is no function {name!r}"
        try:
            given = json.loads(arguments)
            result = function(**given) if isinstance(given, Mapping) else function(given)
            return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)
        except Exception as error:
            return f"error: {type(error).__name__}: {error}"


def _described(path: Path, name: str, function: Callable[..., Any]) -> Any:
    try:
        return get_json_schema(function)
    except Exception as error:  # of several kinds, all of them the author's to mend
        raise InvalidRequestError(f"{path}: {name} cannot be a tool: {error}") from error
