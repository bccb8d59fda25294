"""Which policy a configuration means."""

from pathlib import Path

import pytest

from mini_infer import LLM
from mini_infer.exceptions import InvalidConfigError
from mini_infer.scheduler import FirstComeFirstServed, PriorityFirst, make_policy
from tests.scheduler.test_scheduler import sequence

SOURCE = """
class LongestFirst:
    def key(self, sequence):
        return (-len(sequence),)

ready = LongestFirst()

class NoPolicy:
    pass

class Needy(LongestFirst):
    def __init__(self, something):
        self.something = something
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_names_and_objects(file: Path) -> None:
    assert isinstance(make_policy("fcfs"), FirstComeFirstServed)
    assert isinstance(make_policy("priority"), PriorityFirst)
    own = PriorityFirst(ageing=3)
    assert make_policy(own) is own


@pytest.mark.parametrize("name", ["LongestFirst", "ready"])
def test_out_of_a_file(name: str, file: Path) -> None:
    assert make_policy(f"{file}:{name}").key(sequence("x", 7, 1)) == (-7,)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoPolicy", r"has no method key\(sequence\)"),
        ("Needy", "making one raised TypeError"),
        ("LongestLast", "did you mean 'LongestFirst'"),
    ],
)
def test_what_is_no_policy(name: str, message: str, file: Path) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        make_policy(f"{file}:{name}")


def test_an_engine_takes_it(file: Path) -> None:
    """With one seat, the longest prompt is served first although it came last."""
    llm = LLM(scheduling_policy=f"{file}:LongestFirst", max_num_seqs=1, num_gpu_blocks=64)
    ids = [llm.add_request([5] * length, max_tokens=2) for length in (3, 20, 40)]
    ended: list[str] = []
    while not llm.is_finished():
        ended += [request_id for request_id, _ in llm.step()[0]]
    assert ended == ids[::-1]
