"""Threads that share a kernel's tasks: each task is done once, by whoever is awake, and nobody waits for who is not."""

import ctypes
import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

pytest.importorskip("numba")

import numpy as np

from mini_infer.kernels.cpu import jit
from mini_infer.kernels.cpu.jit import FIRST, kernel, pointer, tasks
from mini_infer.kernels.cpu.pool import Pool, pool

if not pool().threads(2) > 1:
    pytest.skip("this system has no way for threads to sleep, so kernels run on one", allow_module_level=True)


@kernel
def count(args):
    """[numbers, rounds]: task t adds t to numbers[t], after some arithmetic that the compiler cannot leave out."""
    numbers = pointer(args[FIRST], np.int64)
    for task in tasks(args):
        x = task
        for _ in range(args[FIRST + 1]):
            x = (x * 1103515245 + 12345) & 0x7FFFFFFF
        numbers[task] += task + (x < 0)


def run(num_tasks: int, rounds: int, where: Pool, num_threads: int) -> None:
    numbers = (ctypes.c_int64 * num_tasks)()
    data = (ctypes.c_int64 * (FIRST + 2))(0, num_tasks, 0, ctypes.addressof(numbers), rounds)
    where.run(count._address, ctypes.addressof(data), num_threads)
    assert list(numbers) == list(range(num_tasks))


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_every_task_is_done_once(num_threads: int) -> None:
    own = Pool()
    try:
        for number in range(3000):
            run(number % 70 + 1, number % 7 * 100, own, num_threads)
    finally:
        own.stop()
    assert not any(helper.is_alive() for helper in own._helpers)
    run(20, 100, own, num_threads)  # whoever comes later is alone


def test_callers_on_several_threads_do_not_disturb_each_other() -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for number in range(1000):
                run((seed + number) % 50 + 1, 200, pool(), 3)
        except BaseException as error:
            failures.append(error)

    callers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def test_helpers_that_never_come_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pool, "_start", lambda self, num_helpers: None)
    run(100, 10, Pool(), 4)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_process_ends_with_helpers_asleep_or_busy_and_so_does_its_child() -> None:
    program = """
        import os, torch
        from mini_infer import kernels
        from mini_infer.kernels.cpu.pool import pool

        torch.set_num_threads(3)
        x = torch.ones(64, 4096)
        with kernels.use_backend("cpu"):
            before = kernels.silu_and_mul(x).numpy().tobytes()
            child = os.fork()
            for _ in range(200):
                assert kernels.silu_and_mul(x).numpy().tobytes() == before
        if not child:
            pool().stop()
            os._exit(0)  # PyTorch's own threads do not survive a fork, and it fails as it ends them
        assert os.waitpid(child, 0)[1] == 0
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_threads_are_as_many_as_torch_says() -> None:
    before = torch.get_num_threads()
    launches: list[jit.Launch] = []
    token = jit.observer.set(launches.append)
    try:
        for wanted in (1, 2, 5):
            torch.set_num_threads(wanted)
            numbers = torch.zeros(64, dtype=torch.int64)
            count(64, numbers.data_ptr(), 10, work=1 << 20)
            count(3, numbers.data_ptr(), 10, work=1 << 20)
            count(64, numbers.data_ptr(), 10, work=1)
        assert [launch.num_threads for launch in launches] == [1, 1, 1, 2, 2, 1, 5, 3, 1]
    finally:
        jit.observer.reset(token)
        torch.set_num_threads(before)
