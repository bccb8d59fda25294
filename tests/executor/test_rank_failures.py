"""Whatever happens to a rank, requests go on with the same tokens, or there is a typed error; and nothing is left."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mini_infer import LLM, AsyncLLMEngine, SamplingParams
from mini_infer.exceptions import RankError
from mini_infer.executor import ranks
from tests.engine.executors import PATIENCE

from .layouts import PRESSURE, assert_same, draw_requests, is_running, make_model, pids_of, ranks_of

BACKEND = f"{Path(__file__).with_name('failing_backend.py')}:failing"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(model: Path) -> LLM:
    return LLM(model, **PRESSURE)


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where to write what is to happen to one rank."""
    monkeypatch.setenv("RANK_FAILURE", str(tmp_path / "order"))
    return tmp_path / "order"


def start(model: Path, **fields: Any) -> LLM:
    return LLM(model, **{**PRESSURE, "tensor_parallel_size": 2, "kernel_backend": BACKEND, **fields})


def wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_rank_that_is_killed_is_a_pause_and_then_an_error(
    model: Path, alone: LLM, order: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a step; then, soon after, however slow this machine is, while nothing is computed."""
    monkeypatch.setattr(ranks, "RESTART_INTERVAL", math.inf)
    prompts, params = draw_requests(21, 8)
    engine = start(model, overlap=2)
    first = pids_of(engine)
    order.write_text("SIGKILL")
    assert_same(engine.generate(prompts, params, False), alone.generate(prompts, params, False))
    assert not order.exists(), "it did happen"
    second = pids_of(engine)
    assert not set(first) & set(second) and not any(map(is_running, first))

    os.kill(second[1], signal.SIGKILL)
    wait_for(lambda: not is_running(second[1]))
    began = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1.*SIGKILL"):
        engine.generate(prompts, params, False)
    assert not any(map(is_running, second))
    assert time.monotonic() - began < PATIENCE
    with pytest.raises(RankError):
        engine.generate(prompts, params, False)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("what", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_killed_or_stopped_while_idle(
    model: Path, alone: LLM, victim: int, layout: tuple[int, int], what: signal.Signals
) -> None:
    prompts, params = draw_requests(22, 6)
    fields = {"tensor_parallel_size": layout[0], "pipeline_parallel_size": layout[1], "rank_timeout": 5.0}
    with start(model, **fields) as engine:
        pids = pids_of(engine)
        os.kill(pids[victim], what)
        assert_same(engine.generate(prompts, params, False), alone.generate(prompts, params, False))
        assert not any(map(is_running, pids))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["raise", "SIGSTOP", "SIGABRT", "SIGKILL"])
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_whatever_happens_in_a_step(
    model: Path, alone: LLM, order: Path, what: str, victim: int, layout: tuple[int, int]
) -> None:
    prompts, params = draw_requests(23, 6)
    fields = {"tensor_parallel_size": layout[0], "pipeline_parallel_size": layout[1], "rank_timeout": 5.0}
    with start(model, **fields) as engine:
        order.write_text(f"{what} {victim}")
        assert_same(engine.generate(prompts, params, False), alone.generate(prompts, params, False))
        assert not order.exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_what_raises_again_is_an_error_with_its_words(
    model: Path, order: Path, monkeypatch: pytest.MonkeyPatch, victim: int
) -> None:
    """And not with those of the other one, which loses its peer."""
    with start(model) as engine:
        monkeypatch.setattr(engine._loop._executor, "_last_restart", time.monotonic())
        order.write_text(f"raise {victim}")
        with pytest.raises(RankError, match=f"rank {victim}: ArithmeticError: as ordered"):
            engine.generate([[1, 2, 3]], use_tqdm=False)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["raise", "SIGKILL"])
@pytest.mark.parametrize("victim", [0, 1])
def test_while_it_loads(model: Path, order: Path, what: str, victim: int) -> None:
    order.write_text(f"{what} {victim}")  # in the first warm-up
    with pytest.raises(RankError, match=f"rank {victim}.*as ordered" if what == "raise" else "SIGKILL"):
        start(model)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_hangs_while_it_loads(model: Path, order: Path, victim: int) -> None:
    order.write_text(f"SIGSTOP {victim}")
    with pytest.raises(RankError, match="in time"):
        start(model, start_timeout=60.0, rank_timeout=2.0)


@pytest.mark.slow
def test_ctrl_c_leaves_a_usable_engine(model: Path, alone: LLM) -> None:
    prompts, params = draw_requests(24, 8)
    with start(model) as engine:
        pids = pids_of(engine)
        endless = SamplingParams(max_tokens=80, ignore_eos=True)
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            while True:
                engine.generate([[1, 2, 3]] * 6, endless, False)
        assert_same(engine.generate(prompts, params, False), alone.generate(prompts, params, False))
        assert pids_of(engine) == pids


SCRIPT = """
import os, sys
from mini_infer import LLM, SamplingParams
llm = LLM({model!r}, tensor_parallel_size=2, device="cpu", kernel_backend="reference", num_gpu_blocks=50)
print([rank.process.pid for rank in llm._loop._executor._ranks], flush=True)
outputs = llm.generate(["Hi"], SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)
print("generated", len(outputs[0].token_ids), flush=True)
"""


def run_script(model: Path, more: str = "") -> "subprocess.Popen[str]":
    text = textwrap.dedent(SCRIPT.format(model=str(model))) + more
    return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["by itself", "SIGKILL", "SIGTERM"])
def test_a_plain_script_and_however_it_ends(model: Path, end: str) -> None:
    """Without a guard for ``__main__``; and its ranks do not outlive it."""
    more = "" if end == "by itself" else "import time; time.sleep(600)"
    with run_script(model, more) as script:
        assert script.stdout is not None
        pids = [int(pid) for pid in script.stdout.readline().strip("[]\n").split(",")]
        assert script.stdout.readline().startswith("generated")
        if end != "by itself":
            script.send_signal(getattr(signal, end))
        script.wait(PATIENCE)
    wait_for(lambda: not any(map(is_running, pids)))


@pytest.mark.slow
def test_many_starts_and_stops_leave_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    def children() -> str:
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text()

    def shared_memory() -> set[str]:  # whoever else uses this machine has names of his own
        return {name for name in os.listdir("/dev/shm") if name.startswith(("torch", "sem.", "psm_", "__KMP"))}

    start(model).close()
    before = open_files(), children()
    in_shared_memory = shared_memory()
    for _ in range(50):
        start(model).close()
    assert (open_files(), children()) == before
    assert shared_memory() <= in_shared_memory
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_an_asynchronous_engine_ends_with_its_ranks(model: Path) -> None:
    async def main() -> None:
        engine = AsyncLLMEngine(model=model, tensor_parallel_size=2, **PRESSURE)
        executor = ranks_of(engine.engine)  # type: ignore[arg-type]
        executor._last_restart = time.monotonic()
        with pytest.raises(RankError):
            async for increment in engine.generate([1, 2, 3], SamplingParams(max_tokens=80, ignore_eos=True)):
                if increment.output is None and executor._ranks:
                    process = executor._ranks[0].process
                    assert process is not None
                    process.kill()
        assert not engine.is_running
        with pytest.raises(RankError):
            await engine.submit([[1]], request_ids=[None])

    asyncio.run(main())
