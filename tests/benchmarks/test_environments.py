"""``benchmarks.environments``: interpreters apart from Mini-Infer's own."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import environments
from benchmarks.compare import PEERS


def test_an_environment_has_what_its_peer_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = str(tmp_path / "nowhere")
    monkeypatch.setattr(environments, "PACKAGES", {"pip": ("pip",), "absent": (nowhere,)})  # pip is there already
    python = environments.make_environment("pip", tmp_path / "environment")
    found = subprocess.run([python, "-c", "import pip, sys; print(sys.prefix)"], capture_output=True, text=True)
    assert Path(found.stdout.strip()).samefile(tmp_path / "environment")
    with pytest.raises(subprocess.CalledProcessError, match="nowhere"):
        environments.make_environment("absent", tmp_path / "environment")


def test_every_peer_with_an_environment_of_its_own_can_be_made() -> None:
    assert environments.PACKAGES.keys() <= PEERS.keys() and all(environments.PACKAGES.values())
