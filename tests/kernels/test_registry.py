import asyncio
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mini_infer
from mini_infer import kernels
from mini_infer.exceptions import KernelError
from mini_infer.kernels import registry


@pytest.fixture(autouse=True)
def a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MINI_INFER_KERNELS", raising=False)
    kernels.available_backends()  # ours and the installed packages' are imported now or never
    only_the_reference = {key: row for key, row in registry._table.items() if row.backend == registry.REFERENCE}
    monkeypatch.setattr(registry, "_table", only_the_reference)
    registry._resolve.cache_clear()
    yield
    registry._resolve.cache_clear()


def add(backend: str, op: str = "silu_and_mul", **options: object) -> None:
    """A backend whose silu_and_mul answers with its own name's length, to be told apart."""

    @kernels.register(op, backend=backend, **options)  # type: ignore[arg-type]
    def marked(x: Tensor) -> Tensor:
        return torch.full_like(x, len(backend))


def answer() -> int:
    return int(kernels.silu_and_mul(torch.ones(2))[0])


def test_the_reference_has_every_operation_on_every_device() -> None:
    for op in kernels.OPS:
        for device in ("cpu", "cuda", "mps", "xpu"):
            assert "reference" in kernels.available_backends(op, device)
        assert callable(getattr(kernels, op))


def test_the_highest_priority_for_the_device_is_chosen() -> None:
    add("slow", priority=-1)
    add("fast", priority=5, devices=("cpu",))
    add("gpu", priority=9, devices=["cuda"])
    assert kernels.available_backends("silu_and_mul", "cpu") == ["fast", "reference", "slow"]
    assert kernels.available_backends("silu_and_mul", torch.device("cuda", 0)) == ["gpu", "reference", "slow"]
    assert kernels.available_backends("rmsnorm", "cpu")[-1] == "reference"
    assert set(kernels.available_backends()) >= {"fast", "gpu", "reference", "slow"}
    assert kernels.backend_of("silu_and_mul") == "fast"
    assert kernels.backend_of("silu_and_mul", "cuda:1") == "gpu"
    assert kernels.backend_of("silu_and_mul", "mps") == "reference"
    assert answer() == 4


def test_a_backend_may_rank_differently_on_each_device() -> None:
    @kernels.register("silu_and_mul", backend="both", devices=("cuda",), priority=10)
    @kernels.register("silu_and_mul", backend="both", devices=("cpu",), priority=-10)
    def both(x: Tensor) -> Tensor:
        return x

    assert kernels.available_backends("silu_and_mul", "cpu")[-1] == "both"
    assert kernels.backend_of("silu_and_mul", "cuda") == "both"


def test_a_device_that_torch_does_not_know() -> None:
    with pytest.raises(RuntimeError, match="device"):
        add("typo", devices="cuda")  # a string is not a list of strings


def test_at_the_default_priority_a_backend_waits_to_be_asked() -> None:
    add("mine")
    assert kernels.backend_of("silu_and_mul") == "reference"
    with kernels.use_backend("mine"):
        assert answer() == 4


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    add("b", priority=1)
    add("env")
    add("inner")
    assert kernels.backend_of("silu_and_mul") == "b"
    monkeypatch.setenv("MINI_INFER_KERNELS", "env")
    assert answer() == 3
    with kernels.use_backend("reference"):
        assert kernels.backend_of("silu_and_mul") == "reference"
        with kernels.use_backend("inner"):
            assert answer() == 5
        with kernels.use_backend(None):
            assert answer() == 3
        assert kernels.backend_of("silu_and_mul") == "reference"
    assert answer() == 3
    monkeypatch.setenv("MINI_INFER_KERNELS", "")
    assert answer() == 1


def test_a_backend_is_seen_as_soon_as_it_is_registered() -> None:
    assert kernels.backend_of("silu_and_mul") == "reference"
    add("quick", priority=1)
    assert kernels.backend_of("silu_and_mul") == "quick"
    add("quicker", priority=2)
    assert answer() == 7


def test_the_choice_ends_with_an_exception() -> None:
    add("quick", priority=1)
    with pytest.raises(ZeroDivisionError), kernels.use_backend("reference"):
        _ = 1 / 0
    assert kernels.backend_of("silu_and_mul") == "quick"


def test_the_choice_belongs_to_a_thread_or_task() -> None:
    add("mine")
    seen = {}

    async def inside(name: str) -> None:
        with kernels.use_backend(name):
            await asyncio.sleep(0)
            seen[name] = kernels.backend_of("silu_and_mul")

    async def both() -> None:
        await asyncio.gather(inside("mine"), inside("reference"))

    asyncio.run(both())
    with kernels.use_backend("mine"):
        thread = threading.Thread(target=lambda: seen.update(thread=kernels.backend_of("silu_and_mul")))
        thread.start()
        thread.join()
    assert seen == {"mine": "mine", "reference": "reference", "thread": "reference"}


def test_what_a_backend_lacks_falls_to_the_reference() -> None:
    add("mine", devices=("cuda",))
    add("eager", op="rmsnorm", priority=1)
    with kernels.use_backend("mine"):
        assert kernels.backend_of("silu_and_mul", "cuda") == "mine"
        assert kernels.backend_of("silu_and_mul", "cpu") == "reference"
        assert kernels.backend_of("rmsnorm", "cpu") == "reference"
    assert kernels.backend_of("rmsnorm", "cpu") == "eager"


def test_an_unknown_backend_is_named_along_with_those_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    add("mine")
    with pytest.raises(KernelError, match=r"unknown kernel backend 'warp'; available: .*reference.*mine"):  # noqa: SIM117
        with kernels.use_backend("warp"):
            pass
    monkeypatch.setenv("MINI_INFER_KERNELS", "warp")
    for _ in range(2):
        with pytest.raises(KernelError, match="unknown kernel backend 'warp'"):
            answer()
    add("warp")
    assert answer() == 4


def test_an_unknown_operation() -> None:
    for call in (kernels.available_backends, kernels.backend_of, lambda op: kernels.register(op, backend="mine")):
        with pytest.raises(KernelError, match=r"unknown kernel operation 'softmax'; the operations are rmsnorm, "):
            call("softmax")


def test_registering_again_replaces_but_only_from_the_same_module() -> None:
    add("mine")
    add("other")
    kernels.register("silu_and_mul", backend="mine")(lambda x: x + 41)
    with kernels.use_backend("mine"):
        assert answer() == 42
    with pytest.raises(KernelError, match=r"'reference' already has 'silu_and_mul', from module 'mini_infer\.kernels"):
        add("reference")
    assert kernels.backend_of("silu_and_mul") == "reference"


def test_installed_packages_add_backends(tmp_path: Path) -> None:
    """Three distributions as an installer leaves them: one works, one fails to import, one registers nothing."""
    sources = {
        "good": "from mini_infer.kernels import register\n"
        "register('silu_and_mul', backend='good', devices=('cpu',))(lambda x: x[..., :1] + 41)\n",
        "broken": "import a_library_that_is_not_there\n",
        "silent": "",
    }
    for name, source in sources.items():
        (tmp_path / f"{name}_kernels.py").write_text(source)
        info = tmp_path / f"{name}_kernels-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-kernels\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[mini_infer.kernels]\n{name} = {name}_kernels\n")
    script = """
        import sys, torch
        from mini_infer import kernels
        from mini_infer.exceptions import KernelError
        assert "good_kernels" not in sys.modules, "backends are imported when first needed, not before"
        assert "good" in kernels.available_backends("silu_and_mul", "cpu")
        assert kernels.backend_of("silu_and_mul") != "good"
        with kernels.use_backend("good"):
            assert kernels.silu_and_mul(torch.ones(2)).item() == 42
        for name in ("broken", "silent"):
            try:
                with kernels.use_backend(name):
                    raise SystemExit(f"{name} was accepted")
            except KernelError as error:
                print(error)
    """
    root = str(Path(next(iter(mini_infer.__path__))).parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), root))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    broken, silent = done.stdout.splitlines()
    assert "'broken' (broken_kernels failed to load: ModuleNotFoundError: No module named" in broken
    assert "'silent' (silent_kernels registered nothing under this name)" in silent
    assert done.stderr.count("Traceback") == 1, "a failure is logged once, with its cause"
    assert "a_library_that_is_not_there" in done.stderr and "silent" in done.stderr


FILE = """
from mini_infer.kernels import register

@register("silu_and_mul", backend="own")
def silu_and_mul(x):
    return x + 41
"""


def test_a_backend_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "torch.py"  # a name that other modules have does no harm
    path.write_text(FILE)
    named = f"{path}:own"
    resolved = kernels.resolve("cpu", named)
    assert resolved.backend_of("silu_and_mul") == "own" and resolved.backend_of("rmsnorm") == "reference"
    assert sys.modules["torch"] is torch
    with kernels.use_backend(named):
        assert answer() == 42
    assert answer() == 0, "the reference's 0.73"
    monkeypatch.setenv("MINI_INFER_KERNELS", named)
    assert answer() == 42 and kernels.resolve("cpu").backend_of("silu_and_mul") == "own"

    path.write_text(FILE.replace("41", "1"))
    changed = kernels.resolve("cpu", named)
    assert changed.silu_and_mul(torch.ones(2))[0] == 2, "what the file says now"
    assert resolved.silu_and_mul(torch.ones(2))[0] == 42, "what was resolved stays what it was"


@pytest.mark.parametrize(
    ("source", "name", "says"),
    [
        (None, "own", r"'.*my\.py' cannot be read: .*No such file"),
        (FILE, "other", r"the file registers no backend 'other'; those that it does: own"),
        ("", "reference", r"the file registers no backend 'reference'; those that it does: none"),
        ("1 / 0", "own", r"'.*my\.py' failed: ZeroDivisionError: division by zero"),
        ("def", "own", r"'.*my\.py' failed: SyntaxError"),
        (FILE.replace("silu_and_mul", "softmax"), "own", r"failed: KernelError: unknown kernel operation 'softmax'"),
    ],
)
def test_a_file_that_gives_no_backend(tmp_path: Path, source: str | None, name: str, says: str) -> None:
    if source is not None:
        (tmp_path / "my.py").write_text(source)
    for ask in (kernels.resolve, lambda _, named: kernels.use_backend(named).__enter__()):
        with pytest.raises(KernelError, match=says):
            ask("cpu", f"{tmp_path / 'my.py'}:{name}")


def test_kernels_are_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the environment nor `use_backend` nor a later registration changes what was resolved."""
    add("mine")
    monkeypatch.setenv("MINI_INFER_KERNELS", "mine")
    resolved, best = kernels.resolve("cpu"), kernels.resolve("cpu", "reference")
    monkeypatch.delenv("MINI_INFER_KERNELS")
    add("better", priority=7)
    with kernels.use_backend("better"):
        assert int(resolved.silu_and_mul(torch.ones(2))[0]) == 4 and int(best.silu_and_mul(torch.ones(2))[0]) == 0
    assert kernels.resolve("cpu").backend_of("silu_and_mul") == "better"
    with pytest.raises(FrozenInstanceError):
        resolved.device = torch.device("meta")  # type: ignore[misc]
    with pytest.raises(KernelError, match="unknown kernel operation 'softmax'"):
        resolved.backend_of("softmax")


def test_attention_is_of_parts_unless_a_backend_has_it_whole() -> None:
    for op in ("paged_attention", "attention"):
        assert kernels.resolve("cpu").backend_of(op) == "reference"

    @kernels.register("paged_attention", backend="part")
    def part(query: Tensor, *others: object) -> Tensor:
        return torch.full_like(query, 3)

    @kernels.register("attention", backend="whole")
    def whole(query: Tensor, *others: object) -> Tensor:
        return torch.full_like(query, 5)

    cache = torch.zeros(2, 4, 1, 8)
    one = torch.zeros(1, dtype=torch.int64)
    metadata = kernels.AttentionMetadata(one, torch.arange(2), one, one + 1, one[None], num_decodes=1)
    for backend, name, number in (("part", "reference+part", 3), ("whole", "whole", 5)):
        resolved = kernels.resolve("cpu", backend)
        assert resolved.backend_of("attention") == name
        new = torch.ones(1, 1, 8)
        assert (resolved.attention(new, new, new, cache, cache.clone(), metadata) == number).all()
    assert cache[0, 0].eq(1).all(), "the part's keys were written by the reference"
    assert set(kernels.available_backends("attention")) == {"reference", "part", "whole"}
