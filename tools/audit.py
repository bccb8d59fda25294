"""Licences and known faults of everything that is installed: ``python tools/audit.py licences | faults FILE``.

What is not known is not taken for good: a package that names no licence, or for which there was no data about faults,
fails the check as one that has a bad one does.
"""

import json
import re
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

PERMISSIVE = re.compile(
    r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|MPL|Unlicense|0BSD|Zlib|HPND|CNRI|NVIDIA|Public Domain)\b",
    re.IGNORECASE,
)
"""Licences under which the package may be installed beside others; MPL covers its own files only, and NVIDIA's those
that come with PyTorch for CUDA."""

CHECKED_SHARE = 0.9
"""Least share of the packages that there must be data about; a few, such as this one, are on no list."""


def licence(package: Distribution) -> str:
    """What a package says of its licence: an expression, classifiers or a few words."""
    classifiers = [line for line in package.metadata.get_all("Classifier") or [] if line.startswith("License ::")]
    words = (package.metadata.get("License") or "").strip().split("\n")[0][:80]
    return package.metadata.get("License-Expression") or "; ".join(classifiers) or words


def check_licences() -> list[str]:
    """Complaints about what is installed for this interpreter."""
    named = {package.metadata["Name"]: licence(package) for package in distributions()}
    return [
        f"{name}: {text or 'names no licence'}" for name, text in sorted(named.items()) if not PERMISSIVE.search(text)
    ]


def check_faults(report: dict[str, Any]) -> list[str]:
    """Complaints in a report of pip-audit; that it has no data is one of them."""
    packages = report.get("dependencies", [])
    checked = [package for package in packages if "vulns" in package]
    if len(checked) < CHECKED_SHARE * max(1, len(packages)):
        return [f"no data: only {len(checked)} of {len(packages)} packages were looked up, so nothing is known"]
    return [
        f"{package['name']} {package['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions']) or 'none'}"
        for package in checked
        for fault in package["vulns"]
    ]


def main() -> int:
    what, *files = sys.argv[1:]
    complaints = check_licences() if what == "licences" else check_faults(json.loads(Path(files[0]).read_text()))
    print("\n".join(complaints) or "nothing to complain of")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
