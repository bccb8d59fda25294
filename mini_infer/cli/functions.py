"""What a model may call in a terminal: Python functions, and what becomes of a call."""

import inspect
import json
import runpy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import get_json_schema

from mini_infer.engine.tools import Tool, read_tools
from mini_infer.exceptions import InvalidRequestError


class Functions:
    """Functions as tools. Each says what it does in its docstring, and what it takes by its annotations and the
    docstring's ``Args:``.

    Raises:
        InvalidRequestError: one says too little of itself.
    """

    def __init__(self, functions: Iterable[Callable[..., Any]]) -> None:
        self._functions = {function.__name__: function for function in functions}
        self.tools: tuple[Tool, ...] = read_tools([_described(function) for function in self._functions.values()])

    @classmethod
    def of_file(cls, path: Path) -> "Functions":
        """Those that a Python file defines; those whose names begin with ``_`` are its own business.

        Raises:
            InvalidRequestError: it cannot be run, defines no function, or one says too little of itself.
        """
        try:
            found = runpy.run_path(str(path))
        except Exception as error:
            raise InvalidRequestError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
        functions = [
            value
            for name, value in found.items()
            if inspect.isfunction(value) and not name.startswith("_") and value.__module__ == found["__name__"]
        ]
        if not functions:
            raise InvalidRequestError(f"{path} defines no functions; each of them is to be a tool")
        return cls(functions)

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


def _described(function: Callable[..., Any]) -> Any:
    try:
        return get_json_schema(function)
    except Exception as error:  # of several kinds, all of them the author's to mend
        where = inspect.getfile(function)
        raise InvalidRequestError(f"{where}: {function.__name__} cannot be a tool: {error}") from error
