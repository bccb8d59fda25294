"""Ranks that Ray places: on this machine, and on two that are really two network namespaces."""

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from mini_infer import LLM, SamplingParams

from .layouts import make_model
from .machines import ADDRESSES, UNTIL_IT_IS_CUT, on, seconds_until_noticed, two_machines

pytest.importorskip("ray")
pytestmark = pytest.mark.slow

BACKEND = f"{Path(__file__).with_name('failing_backend.py')}:failing"
FIELDS = f'dtype="float64", device="cpu", kernel_backend={BACKEND!r}, num_gpu_blocks=100'
PROMPTS = [[1, 2, 3], [200, 7], [9] * 20]
PARAMS = SamplingParams(temperature=0.7, seed=3, max_tokens=30, ignore_eos=True)

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # by itself it has workers give way to everybody
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": 64 * "a",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path) -> str:
    with LLM(model, dtype="float64", device="cpu", kernel_backend="reference", num_gpu_blocks=100) as alone:
        return str([output.token_ids for output in alone.generate(PROMPTS, PARAMS, use_tqdm=False)])


def run(script: str, *before: str, **environment: str) -> list[str]:
    """The lines that a script prints; Ray's own begin with who says them, in brackets and colours."""
    done = subprocess.run(
        [*before, sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith(("(", "\x1b"))]


ONE_MACHINE = """
import os, pathlib
import ray
from mini_infer import LLM, SamplingParams
from mini_infer.exceptions import InvalidConfigError, RankError
from mini_infer.executor import launch_ray
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
fields = dict(tensor_parallel_size=2, launch="ray", {fields})
def tokens(llm):
    return [o.token_ids for o in llm.generate({prompts}, {params}, use_tqdm=False)]
with LLM({model!r}, **fields) as llm:
    print(tokens(llm))
    order = pathlib.Path(os.environ["RANK_FAILURE"])
    order.write_text("SIGKILL")
    print(tokens(llm), order.exists())
    order.write_text("SIGKILL")
    try:
        tokens(llm)
    except RankError as error:
        print("RankError")
with LLM({model!r}, **{{**fields, "tensor_parallel_size": 1, "data_parallel_size": 2}}) as llm:
    print(tokens(llm))
try:
    LLM({model!r}, **{{**fields, "tensor_parallel_size": 4}})
except InvalidConfigError as error:
    print("refused:", error)
launch_ray.PLACEMENT_SECONDS = 2.0
class Busy:
    def ready(self): return True
busy = ray.remote(num_cpus=1)(Busy).remote()
ray.get(busy.ready.remote())
try:
    LLM({model!r}, **fields)
except RankError as error:
    print("refused:", error)
print(ray.is_initialized())
"""


def test_on_one_machine(model: Path, expected: str, tmp_path: Path) -> None:
    """Killed once is a pause, twice an error; what there is no room for is refused; a Ray that was there stays."""
    script = ONE_MACHINE.format(model=str(model), prompts=PROMPTS, params=PARAMS, fields=FIELDS)
    lines = run(script, RANK_FAILURE=str(tmp_path / "order"))
    assert len(lines) == 7, lines
    first, second, third, replicas, too_many, no_room, left = lines
    assert first == replicas == expected
    assert second == f"{expected} False"
    assert third == "RankError"
    assert "4 ranks need as many cores, and the cluster has 2" in too_many
    assert "no room for 2 ranks" in no_room
    assert left == "True"


TWO_MACHINES = """
from mini_infer import LLM, SamplingParams
with LLM({model!r}, tensor_parallel_size=2, launch="ray", {fields}) as llm:
    print([o.token_ids for o in llm.generate({prompts}, {params}, use_tqdm=False)])
    print(sorted(rank.machine for rank in llm._loop._executor._ranks))
"""


@pytest.fixture
def cluster() -> Iterator[str]:
    """A Ray on both machines, with a core on each; its address."""
    directory = tempfile.mkdtemp(prefix="mi-ray-", dir="/tmp")  # Ray's sockets want a short path
    with two_machines():
        address = f"{ADDRESSES[0]}:6399"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus", "1"]
        ray += ["--object-store-memory", "80000000"]
        head = ["--head", "--port", "6399", "--include-dashboard", "false", "--temp-dir", directory]
        for place, more in ((0, head), (1, ["--address", address])):
            command = [*on(place), *ray, "--node-ip-address", ADDRESSES[place], *more]
            done = subprocess.run(
                command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
        yield address
    shutil.rmtree(directory, ignore_errors=True)


def test_on_two_machines(model: Path, expected: str, cluster: str) -> None:
    script = TWO_MACHINES.format(model=str(model), prompts=PROMPTS, params=PARAMS, fields=FIELDS)
    tokens, machines = run(script, *on(0), RAY_ADDRESS=cluster)
    assert tokens == expected
    assert machines == str(list(ADDRESSES))


def test_the_cable_is_pulled_out(model: Path, cluster: str) -> None:
    """Ray itself takes half a minute to miss a machine, and then waits for another one."""
    driver = subprocess.Popen(
        [*on(0), sys.executable, "-c", UNTIL_IT_IS_CUT.format(model=str(model), fields=f'launch="ray", {FIELDS}')],
        env={**os.environ, **ENVIRONMENT, "RAY_ADDRESS": cluster},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert seconds_until_noticed(driver) < 10
    driver.kill()
    driver.wait()
