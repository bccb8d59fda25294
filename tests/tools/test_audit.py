"""The audit tells "nothing found" from "nothing known"."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FAULT = {"id": "CVE-2025-62727", "fix_versions": ["0.49.1"], "aliases": [], "description": ""}


def audit(tmp_path: Path, dependencies: list[dict[str, Any]]) -> subprocess.CompletedProcess[str]:
    report = tmp_path / "audit.json"
    report.write_text(json.dumps({"dependencies": dependencies, "fixes": []}))
    command = [sys.executable, str(ROOT / "tools/audit.py"), "faults", str(report)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def package(number: int, **more: Any) -> dict[str, Any]:
    return {"name": f"package{number}", "version": "1"} | more


@pytest.mark.parametrize(
    ("dependencies", "status", "said"),
    [
        ([package(i, vulns=[]) for i in range(20)], 0, "nothing to complain of"),
        ([package(i, vulns=[]) for i in range(20)] + [package(99, skip_reason="not found")], 0, "nothing"),
        ([package(0, vulns=[FAULT])], 1, "package0 1: CVE-2025-62727, mended in 0.49.1"),
        ([package(i, skip_reason="not found") for i in range(8)], 1, "no data: only 0 of 8"),
        ([], 1, "no data"),
    ],
    ids=["clean", "one unknown", "a fault", "no advisories", "empty"],
)
def test_faults(tmp_path: Path, dependencies: list[dict[str, Any]], status: int, said: str) -> None:
    done = audit(tmp_path, dependencies)
    assert (done.returncode, said in done.stdout) == (status, True), done.stdout + done.stderr
