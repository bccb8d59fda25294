"""The project as others receive it: what the wheel holds, what importing needs, and pages that keep their promises."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mini_infer.compat.options import ENGINE_ALIASES, SAMPLING_ALIASES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mini_infer"
ASSETS = {f"mini_infer/assets/{model}/model.safetensors" for model in ("tutor", "diffusion_tutor")}


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints; its whole output is in the failure if it does not succeed."""
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="building the wheel needs hatchling")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder)
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_whole_package(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mini_infer/")}
    there = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert held == {name for name in there if "__pycache__" not in name}
    assert ASSETS | {"mini_infer/py.typed"} <= held


@pytest.mark.slow
def test_wheel_runs_the_demo_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "env")
    programs = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    run(programs / "python", "-m", "pip", "install", "--quiet", wheel, "-c", ROOT / "constraints.txt")
    screen = run(programs / "mini-infer", "demo", cwd=tmp_path)
    assert re.search(r"[A-Za-z]{3,} [A-Za-z]{3,} [A-Za-z]{3,}", screen), screen
    assert re.search(r"[\u4e00-\u9fff]{5,}", screen), screen


@pytest.mark.parametrize("name", ["mini_infer.memory.BlockManager", "mini_infer.scheduler.Scheduler"])
def test_policy_needs_no_torch(name: str) -> None:
    module, attribute = name.rsplit(".", 1)
    loaded = run(sys.executable, "-c", f"import sys; from {module} import {attribute}; print(*sys.modules, sep='\\n')")
    assert not {"torch", "numpy", "transformers"} & set(loaded.split())


def test_core_imports_without_what_may_be_missing() -> None:
    run(
        sys.executable,
        "-c",
        "import sys\n"
        "for missing in ('triton', 'fastapi', 'uvicorn', 'pydantic', 'prometheus_client', 'numba', 'hypothesis'):\n"
        "    sys.modules[missing] = None\n"  # importing it is a ModuleNotFoundError now
        "from mini_infer import *\n"
        "import mini_infer.cli, mini_infer.kernels, mini_infer.models",
    )


def test_constraints_cover_every_dependency_and_leave_triton_to_torch() -> None:
    tomllib = pytest.importorskip("tomllib", reason="reading pyproject.toml needs Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {re.match(r"[\w-]+", requirement).group().lower() for requirement in asked}  # type: ignore[union-attr]
    pins = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    assert names - pins == {"triton"}


@pytest.mark.parametrize("page", [p.relative_to(ROOT) for p in sorted((ROOT / "docs").rglob("*.md"))], ids=str)
def test_every_page_has_its_twin(page: Path) -> None:
    inside = page.relative_to("docs")
    twin = Path(*inside.parts[1:]) if inside.parts[0] == "zh" else Path("zh", inside)
    assert (ROOT / "docs" / twin).is_file()


@pytest.mark.parametrize("page", ["docs/compatibility.md", "docs/zh/compatibility.md"])
def test_every_alias_is_documented(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for alias, name in (*ENGINE_ALIASES.items(), *SAMPLING_ALIASES.items()):
        assert f"`{alias}`" in text and f"`{name}`" in text


@pytest.mark.parametrize("page", ["README.md", "README.zh.md", "docs/index.md", "docs/zh/index.md"])
def test_python_on_the_first_pages_runs_as_written(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    for code in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL):
        exec(code, {})
    assert capsys.readouterr().out.strip()
