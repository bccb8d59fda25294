"""Every device has one place, and every place one device."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_infer.parallel.mesh import Mesh, Place

sizes = st.integers(1, 6)


@given(sizes, sizes, sizes)
def test_places_and_devices_are_one_to_one(replicas: int, stages: int, shards: int) -> None:
    mesh = Mesh(replicas, stages, shards)
    places = [mesh.place(device) for device in range(mesh.size)]
    assert [mesh.device(place) for place in places] == list(range(mesh.size))
    assert set(places) == {Place(r, s, t) for r in range(replicas) for s in range(stages) for t in range(shards)}
    assert places == sorted(places), "neighbours share layers, then come stages, then replicas"


@pytest.mark.parametrize("device", [-1, 8])
def test_a_device_that_is_not_there(device: int) -> None:
    with pytest.raises(ValueError, match="there are 8 devices"):
        Mesh(2, 2, 2).place(device)


def test_only_this_room_knows_torch_distributed() -> None:
    package = Path(__file__).parents[2] / "mini_infer"
    users = {
        path.parent.name
        for path in package.rglob("*.py")
        if "distributed" in path.read_text()
        and any(
            line.lstrip().startswith(
                ("import torch.distributed", "from torch.distributed", "from torch import distributed")
            )
            for line in path.read_text().splitlines()
        )
    }
    assert users == {"parallel"}
