import random
from types import SimpleNamespace

import pytest

from mini_infer.serving import kept
from mini_infer.serving.kept import Kept


def test_against_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random calls, beside a list that is looked through each time."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    now = 0.0
    monkeypatch.setattr(kept, "time", SimpleNamespace(monotonic=lambda: now))
    store: Kept[int, str] = Kept(most=5, seconds=10.0, most_size=20)
    entries: list[tuple[int, str, int, float]] = []
    for key in range(2000):
        now += rng.choice([0.0, 0.5, 3.0])
        action = rng.random()
        if action < 0.6:
            entries.append((key, f"value {key}", rng.randrange(24), now))
            store.put(*entries[-1][:3])
        while entries and (now - entries[0][3] > 10 or len(entries) > 5 or sum(size for *_, size, _ in entries) > 20):
            del entries[0]
        known = {key: value for key, value, *_ in entries}
        for asked in [*known, key, key - 6]:
            assert store.get(asked) == known.get(asked)
        if action > 0.8 and entries:
            asked = rng.choice([*known, -1])
            assert store.pop(asked) == known.get(asked)
            entries = [entry for entry in entries if entry[0] != asked]
            assert store.pop(asked) is None
