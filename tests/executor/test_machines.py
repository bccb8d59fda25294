"""Ranks that somebody starts by hand: with the key and without, too few of them, and on two machines that are really
two network namespaces, with the cable between them pulled out."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mini_infer import LLM, SamplingParams
from mini_infer.exceptions import InvalidConfigError, RankError
from mini_infer.executor.rank import ORPHANED

from .layouts import PRESSURE, assert_same, draw_requests, make_model
from .machines import UNTIL_IT_IS_CUT, on, seconds_until_noticed, two_machines

NOTICED = 10.0
"""Seconds after which both sides know that the cable is out, however long a rank may compute."""

KEY = "a long text that nobody guesses"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def rank_process(address: str, key: str = KEY, *before: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [*before, sys.executable, "-m", "mini_infer", "rank", "--join", address, "--device", "cpu", "--timeout", "90"],
        env={**os.environ, "MINI_INFER_RANK_KEY": key},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_ranks_join_with_the_key_and_nobody_without(model: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_INFER_RANK_KEY", KEY)
    address = f"127.0.0.1:{port}"
    stranger = rank_process(address, "something else")
    ranks = [rank_process(address) for _ in range(2)]
    fields = {"tensor_parallel_size": 2, "launch": "join", "rank_address": address, "start_timeout": 120.0}
    with LLM(model, **PRESSURE, **fields) as engine:
        prompts, params = draw_requests(41, 6)
        outputs = engine.generate(prompts, params, False)
    assert_same(outputs, LLM(model, **PRESSURE).generate(prompts, params, False))
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    assert stranger.wait(60) != 0
    assert stranger.stdout is not None and "another key" in stranger.stdout.read()


def test_one_is_missing(model: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINI_INFER_RANK_KEY", KEY)
    address = f"127.0.0.1:{port}"
    rank = rank_process(address)
    fields = {"tensor_parallel_size": 2, "launch": "join", "rank_address": address, "start_timeout": 20.0}
    with pytest.raises(RankError, match="1 of 2 ranks have joined"):
        LLM(model, **PRESSURE, **fields)
    assert rank.wait(60) != 0


def test_without_a_key_nobody_listens(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINI_INFER_RANK_KEY", raising=False)
    with pytest.raises(InvalidConfigError, match="MINI_INFER_RANK_KEY"):
        LLM(model, **PRESSURE, launch="join")


# ---- two machines ------------------------------------------------------------------------------------------------

FIELDS = (
    'launch="join", rank_address="10.203.0.1:7007", dtype="float64", device="cpu", kernel_backend="reference", '
    "num_gpu_blocks=100, start_timeout=90.0"
)


@pytest.fixture
def machines() -> Iterator[None]:
    with two_machines():
        yield


def test_two_machines_until_the_cable_is_pulled_out(model: Path, machines: None) -> None:
    """Their hostname resolves to a loopback address, as that of many machines does."""
    driver = subprocess.Popen(
        [*on(0), sys.executable, "-c", UNTIL_IT_IS_CUT.format(model=str(model), fields=FIELDS)],
        env={**os.environ, "MINI_INFER_RANK_KEY": KEY},
        stdout=subprocess.PIPE,
        text=True,
    )
    ranks = [rank_process("10.203.0.1:7007", KEY, *on(place)) for place in (0, 1)]
    assert driver.stdout is not None
    tokens = driver.stdout.readline()
    alone = LLM(model, dtype="float64", device="cpu", kernel_backend="reference", num_gpu_blocks=100)
    endless = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
    assert tokens.strip() == str(alone.generate([[1, 2, 3]], endless, False)[0].token_ids)
    assert seconds_until_noticed(driver) < NOTICED
    words = [rank.communicate(timeout=NOTICED)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [ORPHANED] * 2
    assert all("RankError: the engine has ended, or cannot be reached" in each for each in words)
    assert driver.wait(30) == 0
