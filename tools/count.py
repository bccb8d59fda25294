"""How many lines each room has: ``make count``, or ``python -m tools.count [FOLDER]`` for another copy of the package.

Every line of a Python file counts, with its docstrings, comments and blank lines; the second number is code alone.
"""

import ast
import io
import sys
import tokenize
from dataclasses import dataclass
from functools import cache
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
"""The rooms from engine to ground, without the fast kernels and the faces."""

BEYOND = {
    "weights that are quantised": (
        "kernels/quantized.py",
        "kernels/reference/quantized.py",
        "models/gguf/",
        "models/matrices.py",
        "models/quantization/",
    ),
    "diffusion": (
        "engine/decoding/canvas.py",
        "engine/decoding/diffusion.py",
        "executor/confidence.py",
        "executor/whole.py",
        "models/families/a2d_qwen3.py",
        "models/families/dream.py",
        "models/families/llada.py",
        "models/families/sdar.py",
        "models/keeping.py",
        "sparse.py",
    ),
    "structured outputs and tools": (
        "engine/calls.py",
        "engine/rules/grammar.py",
        "engine/rules/schema.py",
        "engine/tools.py",
        "structured.py",
    ),
    "several devices": (
        "engine/replicas.py",
        "engine/router.py",
        "executor/launch.py",
        "executor/launch_ray.py",
        "executor/rank.py",
        "executor/ranks.py",
        "executor/wire.py",
    ),
}
"""Of the core, the files and folders of what dense models on one device do without, by capability. What such a
capability has in the files of others counts as theirs."""

GOALS = {"dense": 6_500, "package": 14_000}
"""What dense models on one device, and the whole package, should have at most. Both are missed by far."""

LIMITS = {"dense": 13_700, "package": 34_200}
"""What they may have at most as things stand: whoever makes them smaller lowers this."""


@dataclass(frozen=True)
class Lines:
    """Of some files: all, and those with code on them."""

    total: int = 0
    code: int = 0

    def __add__(self, other: "Lines") -> "Lines":
        return Lines(self.total + other.total, self.code + other.code)

    def __sub__(self, other: "Lines") -> "Lines":
        return Lines(self.total - other.total, self.code - other.code)


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
    for file, lines in _files(package):
        found[room_of(file)] += lines
    return found


def beyond(package: Path = PACKAGE) -> dict[str, Lines]:
    """The lines of each capability that dense models on one device do without."""
    found = dict.fromkeys(BEYOND, Lines())
    for file, lines in _files(package):
        for capability, places in BEYOND.items():
            found[capability] += lines if file.startswith(places) else Lines()
    return found


def totals(package: Path = PACKAGE) -> dict[str, Lines]:
    """What has a goal: dense models on one device, and the whole package."""
    found = rooms(package)
    core = sum((found[room] for room in CORE), Lines())
    dense = core - sum(beyond(package).values(), Lines())
    return {"dense": dense, "package": sum(found.values(), Lines())}


@cache
def _files(package: Path) -> tuple[tuple[str, Lines], ...]:
    """Each file by its path in the package, and its lines."""
    paths = sorted(package.rglob("*.py"))
    return tuple((path.relative_to(package).as_posix(), count(path.read_text(encoding="utf-8"))) for path in paths)


def main(package: Path) -> None:
    print(f"{'':34}{'lines':>8}{'code':>8}")
    for room, lines in rooms(package).items():
        if lines.total:
            _show(room, lines)
    print("\nof " + ", ".join(CORE))
    for capability, lines in beyond(package).items():
        _show(f"  {capability}", lines)
    names = {"dense": "  the rest: dense, on one device", "package": "the whole package"}
    for name, lines in totals(package).items():
        _show(names[name], lines, f"   goal {GOALS[name]:,}, missed by {lines.total - GOALS[name]:,}")


def _show(name: str, lines: Lines, remark: str = "") -> None:
    print(f"{name:34}{lines.total:8,}{lines.code:8,}{remark}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE)
