"""A reader's own classes, by file and name: ``my_policy.py:ShortestFirst`` wherever the name of a policy or a kernel
backend is accepted."""

import difflib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from mini_infer.exceptions import InvalidConfigError


def names_a_file(text: str) -> bool:
    """Whether this is ``FILE:NAME``, and not the plain name of something that is built in or installed."""
    file, colon, name = text.rpartition(":")
    return bool(colon and file and name.isidentifier())


def load_object(reference: str, error: type[Exception] = InvalidConfigError) -> Any:
    """Run a Python file and take an object out of it.

    The file runs anew at each call, so that an edited one counts. The folder it lies in is not searched for imports.

    Args:
        reference: ``FILE:NAME``, the file's path relative to the working directory and the name of a global in it.
        error: raised when there is no such file or name, or when the file cannot be run; the cause is chained to it.
    """
    file, _, name = reference.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not names_a_file(reference):
        raise error(f"{reference!r} is not FILE:NAME, such as 'my_policy.py:ShortestFirst'")
    if not path.is_file():
        raise error(f"{reference!r}: there is no file {str(path)!r}")
    module = ModuleType(re.sub(r"\W", "_", str(path)))  # no other module's name, since dataclasses look theirs up by it
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    try:
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    except Exception as cause:
        del sys.modules[module.__name__]
        raise error(f"{reference!r}: running {str(path)!r} raised {type(cause).__name__}: {cause}") from cause
    if not hasattr(module, name):
        there = [known for known in vars(module) if not known.startswith("_")]
        close = difflib.get_close_matches(name, there, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(there) or 'no names at all'}"
        raise error(f"{reference!r}: {str(path)!r} defines no {name!r}; {hint}")
    return getattr(module, name)
