"""Two machines that are really two network namespaces, with a cable between."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NAMES = ("mi-one", "mi-two")
ADDRESSES = ("10.203.0.1", "10.203.0.2")


def on(place: int) -> tuple[str, ...]:
    """What to write before a command that is to run there."""
    return ("ip", "netns", "exec", NAMES[place])


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def pull_out_the_cable() -> None:
    ip("-n", NAMES[1], "link", "set", "mi-b", "down")


UNTIL_IT_IS_CUT = """
from mini_infer import LLM, SamplingParams
from mini_infer.exceptions import RankError
endless = SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
with LLM({model!r}, tensor_parallel_size=2, {fields}) as llm:
    print(llm.generate([[1, 2, 3]], endless, False)[0].token_ids, flush=True)
    try:
        while True:
            llm.generate([[1, 2, 3]] * 4, endless, False)
            print("again", flush=True)
    except RankError as error:
        print("RankError", error, flush=True)
"""
"""A driver of two ranks, which computes until one is gone."""


def seconds_until_noticed(driver: "subprocess.Popen[str]") -> float:
    """Pull out the cable while a script computes, which says "again" from time to time, until it says RankError."""
    assert driver.stdout is not None
    while (line := driver.stdout.readline()) != "again\n":
        assert line, "it has ended"
    pull_out_the_cable()
    began = time.monotonic()
    while not (line := driver.stdout.readline()).startswith("RankError"):
        assert line, "it has ended"
    return time.monotonic() - began


@contextmanager
def two_machines() -> Iterator[None]:
    """They have no other way to anywhere; whatever still runs there in the end is killed."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2, to make network namespaces")
    remove()  # what a run that was killed has left
    try:
        for name in NAMES:
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
    try:
        ip("link", "add", "mi-a", "netns", NAMES[0], "type", "veth", "peer", "name", "mi-b", "netns", NAMES[1])
        for name, device, address in zip(NAMES, ("mi-a", "mi-b"), ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        remove()


def remove() -> None:
    """The machines, and whatever runs there."""
    for name in NAMES:
        pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
        subprocess.run(["kill", "-9", *pids], check=False, capture_output=True)
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
