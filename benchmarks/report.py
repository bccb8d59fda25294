"""Results files: what was measured, on what, when."""

import json
import platform
import re
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def hardware() -> dict[str, Any]:
    """The machine and the versions that a figure depends on."""
    import torch

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    # A name is not enough: of two machines that give the same one, only one may have, or show, AVX-512.
    cpu = f"{cpu} ({torch.backends.cpu.get_cpu_capability()})"
    packages = {}
    for package in ("torch", "transformers", "triton", "numpy"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    return {
        "cpu": cpu,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **packages,
    }


def processor() -> str:
    """The processor's name and instructions as a part of a file's name."""
    return re.sub("[^a-z0-9]+", "-", hardware()["cpu"].split(" x ")[-1].lower()).strip("-")


def save(name: str, command: str, figures: dict[str, Any], directory: Path = RESULTS) -> Path:
    """Write ``NAME.json`` into the directory of results; returns its path."""
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.json"
    report = {
        "command": command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": hardware(),
        "figures": figures,
    }
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    return path
