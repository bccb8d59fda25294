"""How many lines each room has: ``make count``, or ``python -m tools.count [FOLDER]`` for another copy of the package.

Every line of a Python file counts, with its docstrings, comments and blank lines; the second number is code alone.
"""

import ast
import io
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mini_infer"

ROOMS = {
    "engine": ("engine/",),
    "scheduler": ("scheduler/",),
    "memory": ("memory/",),
    "models": ("models/",),
    "executor": ("executor/",),
    "contract, registry, reference": ("kernels/",),
    "plain data": ("",),
    "cpu": ("kernels/cpu/",),
    "triton": ("kernels/triton/",),
    "serving": ("serving/",),
    "cli": ("cli/",),
    "compat": ("compat/",),
    "parallel": ("parallel/",),
    "simulate": ("simulate/",),
}
"""The folders of each room; a file belongs to the longest that it lies in. Plain data are the modules on top."""

CORE = ("engine", "scheduler", "memory", "models", "executor", "contract, registry, reference", "plain data")
CORE_LINES, PACKAGE_LINES = 6_500, 14_000
"""What the rooms from engine to ground, and the whole package, may have at most."""


@dataclass(frozen=True)
class Lines:
    """Of some files: all, and those with code on them."""

    total: int = 0
    code: int = 0

    def __add__(self, other: "Lines") -> "Lines":
        return Lines(self.total + other.total, self.code + other.code)


def room_of(file: str) -> str:
    """The room of a file, by its path in the package.

    Raises:
        LookupError: it lies in a folder that no room has.
    """
    folder = file[: file.rfind("/") + 1]
    fitting = [(len(top), room) for room, tops in ROOMS.items() for top in tops if folder.startswith(top)]
    length, room = max(fitting)
    if folder and not length:
        raise LookupError(f"{file} belongs to no room; tools/count.py names their folders")
    return room


def count(source: str) -> Lines:
    """The lines of a module."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):  # docstrings, of attributes too
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            code.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return Lines(len(source.splitlines()), len(code))


def rooms(package: Path = PACKAGE) -> dict[str, Lines]:
    """The lines of each room of a copy of the package."""
    found = dict.fromkeys(ROOMS, Lines())
    for path in sorted(package.rglob("*.py")):
        room = room_of(path.relative_to(package).as_posix())
        found[room] += count(path.read_text(encoding="utf-8"))
    return found


def core(found: dict[str, Lines]) -> Lines:
    """The rooms from engine to ground, without the fast kernels and the faces."""
    return sum((found[room] for room in CORE), Lines())


def main(package: Path) -> None:
    found = rooms(package)
    table = {room: lines for room, lines in found.items() if lines.total}
    table |= {f"= core (at most {CORE_LINES:,})": core(found)}
    table |= {f"= package (at most {PACKAGE_LINES:,})": sum(found.values(), Lines())}
    print(f"{'':34}{'lines':>8}{'code':>8}")
    for name, lines in table.items():
        print(f"{name:34}{lines.total:8,}{lines.code:8,}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
