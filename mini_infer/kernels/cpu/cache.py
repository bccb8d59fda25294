"""Machine code on disk, so that a kernel is compiled once on a machine and not once in every process.

A file for each kernel, named after all that its machine code depends on: the sources of this package as they were
imported, the constants that it was made with, the compiler and the processor. So a file is never updated: it appears
whole, by being renamed, and whoever else writes it at the same time writes the same. It begins with a digest of the
rest, and what does not match is compiled again. Where nothing can be read or written, kernels are compiled in every
process; nothing is ever put elsewhere.
"""

import functools
import hashlib
import logging
import os
import pickle
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
import torch
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.core.serialize import dumps

logger = logging.getLogger(__name__)

_SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).digest()
"""Taken while they are imported: a kernel calls functions of other files, and a file may change later."""

_DIGEST = hashlib.sha256().digest_size


def compiled(function: Callable[..., None], signature: Any, options: dict[str, Any]) -> CFunc:
    """A function as machine code, read from disk or compiled now; ``.address`` is where it begins."""
    code = CFunc(function, (signature.args, signature.return_type), {}, options)
    code._cache = KernelFile(function)  # Numba's own takes a kernel for unchanged if its file is
    code.compile()
    return code


class KernelFile:
    """Where one kernel's machine code is kept; the methods have the names that Numba calls them by."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        """What Numba compiled in some other process, or None."""
        path = _path(self._function)
        try:
            content = b"" if path is None or not _is_ours(path) else path.read_bytes()
        except OSError:  # it is not there, as a rule
            return None
        digest, data = content[:_DIGEST], content[_DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            if content:
                logger.warning("%s is damaged; the kernel is compiled again", path)
            return None
        if _is_of_this_package(self._function):
            rtsys.initialize(target_context)  # all that our kernels call; the rest is half of Numba, a long import
        else:
            target_context.refresh()
        return CompileResult._rebuild(target_context, *pickle.loads(data))

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep what Numba compiled, where that is possible."""
        path = _path(self._function)
        if path is None:
            return
        data = dumps(result._reduce())
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                try:
                    file.write(hashlib.sha256(data).digest() + data)
                    file.close()
                    os.replace(file.name, path)
                except BaseException:
                    file.close()
                    os.unlink(file.name)
                    raise
        except OSError as error:
            _warn(path.parent, error.strerror or str(error))


def _is_ours(path: Path) -> bool:
    """Whether nobody but this user can have written a file: it is unpickled, which may run code."""
    if not hasattr(os, "getuid"):
        return True  # Windows, where a user's directories are the user's own
    for place in (path, path.parent):
        status = place.stat()
        if status.st_uid not in (os.getuid(), 0) or status.st_mode & 0o022:
            _warn(path.parent, "others may write there, so it is not trusted")
            return False
    return True


@functools.cache
def _warn(directory: Path, reason: str) -> None:
    """Once, and not for every kernel."""
    logger.warning(
        "compiled kernels cannot be kept in %s (%s), so every process compiles them anew; XDG_CACHE_HOME chooses "
        "another place",
        directory,
        reason,
    )


def _path(function: Callable[..., None]) -> Path | None:
    """Where the machine code of a kernel belongs; None where there is no place for it."""
    directory = _directory()
    if directory is None:
        return None
    sources = _SOURCES
    if not _is_of_this_package(function):
        try:
            sources += hashlib.sha256(Path(function.__code__.co_filename).read_bytes()).digest()
        except OSError:  # a notebook's cell, say
            return None
    depends_on = (
        sources,
        function.__module__,
        function.__qualname__,
        [cell.cell_contents for cell in function.__closure__ or ()],
        *_machine(),
    )
    return directory / f"{function.__name__}-{_key(depends_on)}"


def _is_of_this_package(function: Callable[..., None]) -> bool:
    return function.__module__.startswith(f"{__package__}.")


def choices_file() -> Path | None:
    """Where `choice` keeps what it measured on this processor with these kernels; None where there is no place."""
    directory = _directory()
    return directory and directory / f"choices-{_key((_SOURCES, torch.__version__, *_machine()))}.json"


def _directory() -> Path | None:
    try:
        base = Path(numba.config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return None
    return base / "mini-infer" / "kernels"


def _machine() -> tuple[object, ...]:
    """The compiler, and the processor that it compiles for."""
    features = numba.config.CPU_FEATURES
    return (
        (platform.python_version(), numba.__version__, llvmlite.__version__, llvm.llvm_version_info),
        llvm.get_process_triple(),
        numba.config.CPU_NAME or llvm.get_host_cpu_name(),
        llvm.get_host_cpu_features().flatten() if features is None else features,
    )


def _key(depends_on: tuple[object, ...]) -> str:
    return hashlib.sha256(repr(depends_on).encode()).hexdigest()[:32]
