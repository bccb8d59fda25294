"""A recording computes what the function computes, whatever its inputs hold by then; and refuses what it could not."""

import ctypes
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from mini_infer import LLM, kernels
from mini_infer.exceptions import NotRecordableError
from mini_infer.kernels import registry

pytest.importorskip("numba")

from mini_infer.kernels.cpu import jit, recording
from mini_infer.kernels.cpu.recording import cpu_capture

WIDTH = 64


class Network:
    """Random layers of kernels and PyTorch's own operations, like a model's but of any order."""

    def __init__(self, draw: random.Random, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(draw.randrange(2**31))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.norm = normal(WIDTH)
        self.wide = kernels.pack_linear(normal(2 * WIDTH, WIDTH) / 8, None)
        self.square = kernels.pack_linear(normal(WIDTH, WIDTH) / 8, normal(WIDTH))
        self.embedding = kernels.pack_linear(normal(100, WIDTH), None)
        self.kinds = [draw.choice(["norm", "add", "gate", "view", "copy", "in place", "product"]) for _ in range(12)]

    def __call__(self, ids: Tensor) -> Tensor:
        hidden = self.embedding.rows(ids)
        residual = torch.zeros_like(hidden)
        for kind in self.kinds:
            if kind == "norm":
                hidden = kernels.rmsnorm(hidden, self.norm, 1e-6)
            elif kind == "add":
                hidden, residual = kernels.add_rmsnorm(hidden, residual, self.norm, 1e-6)
            elif kind == "gate":
                hidden = kernels.silu_and_mul(self.wide(hidden))
            elif kind == "view":
                first, second = self.wide(hidden).unflatten(-1, (2, WIDTH)).unbind(1)
                hidden = kernels.rmsnorm(second, self.norm, 1e-6) + first
            elif kind == "copy":
                hidden = hidden.t().contiguous().t()
            elif kind == "in place":
                hidden = self.square(hidden)
                hidden[:, ::2].mul_(0.5)
            else:
                hidden = self.square(hidden)
        return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 3])
@torch.inference_mode()
def test_replays_are_the_function_for_other_inputs(dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        for seed in range(25):
            draw = random.Random(seed)
            networks = [Network(draw, dtype) for _ in range(3)]
            inputs = [torch.randint(100, (draw.randint(1, 40),)) for _ in networks]
            capture = cpu_capture()  # all three share its memory
            recordings = []
            for network, ids in zip(networks, inputs, strict=True):
                replay, result = capture(lambda network=network, ids=ids: network(ids))
                torch.testing.assert_close(result, network(ids), rtol=0, atol=0)
                recordings.append((replay, result))
            for _ in range(12):
                which = draw.randrange(3)
                inputs[which].random_(0, 100)
                replay, result = recordings[which]
                result.fill_(torch.nan)
                replay()
                torch.testing.assert_close(result, networks[which](inputs[which]), rtol=0, atol=0, msg=f"seed {seed}")
    finally:
        torch.set_num_threads(1)


@torch.inference_mode()
def test_a_replay_outlives_what_recorded_it() -> None:
    network, ids = Network(random.Random(2), torch.float32), torch.arange(30)
    replay, result = cpu_capture()(lambda: network(ids))
    others = [torch.full((4000,), torch.nan) for _ in range(200)]  # would take the memory if it were free
    replay()
    assert all(other.isnan().all() for other in others)
    torch.testing.assert_close(result, network(ids), rtol=0, atol=0)


@torch.inference_mode()
def test_a_replay_needs_no_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "parallel", lambda: jit._alone)
    monkeypatch.setattr(recording, "parallel_address", lambda: 0)
    network, ids = Network(random.Random(1), torch.float32), torch.arange(7)
    replay, result = cpu_capture()(lambda: network(ids))
    ids.random_(0, 100)
    replay()
    torch.testing.assert_close(result, network(ids), rtol=0, atol=0)


@torch.inference_mode()
def test_memory_of_intermediate_results_is_used_again() -> None:
    weight, x = torch.randn(WIDTH), torch.randn(50, WIDTH)

    def deep() -> Tensor:
        y = x
        for _ in range(40):
            y = kernels.rmsnorm(y, weight, 1e-6)
        return y

    addresses: set[int] = set()
    token = jit.observer.set(lambda launch: addresses.add(launch.data[jit.FIRST + 3]))
    try:
        recorder = recording._Recorder([], recording._Arena())
        with recorder:
            deep()
    finally:
        jit.observer.reset(token)
    assert len(addresses) == 2  # one is read while the other is written


LOOKS: dict[str, Callable[[Tensor], object]] = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x.sum().item(),
    "numpy": lambda x: x.numpy(),
    "bool": lambda x: bool(x.any()),
    "int": lambda x: int(x[0]),
    "nonzero and its size": lambda x: len(x.nonzero().tolist()),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@torch.inference_mode()
def test_what_looks_at_values_is_refused(look: Callable[[Tensor], object]) -> None:
    x = torch.arange(5)

    def run() -> Tensor:
        look(x)
        return x + 1

    with pytest.raises(NotRecordableError, match="depend"):
        cpu_capture()(run)
    assert jit.observer.get() is None
    assert look(x) is not None  # nothing of the refusal is left


def doubled_by_pointer(x: Tensor) -> Tensor:
    """What PyTorch's dispatcher does not see: two pieces of memory, by their addresses."""
    out = torch.empty_like(x)
    here, there = (
        np.ctypeslib.as_array(ctypes.cast(tensor.data_ptr(), ctypes.POINTER(ctypes.c_float)), tensor.shape)
        for tensor in (x, out)
    )
    there[:] = 2 * here
    return out


UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "NumPy views": lambda x: torch.from_numpy(2 * np.asarray(x)),
    "pointers": doubled_by_pointer,
    "DLPack": lambda x: torch.from_dlpack(2 * np.from_dlpack(x)),
}


@pytest.mark.parametrize("double", UNSEEN.values(), ids=UNSEEN)
@pytest.mark.parametrize("by_hand", [True, False])
@torch.inference_mode()
def test_a_kernel_of_another_backend_is_refused(
    by_hand: bool, double: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_table", dict(registry._table))
    kernels.register("silu_and_mul", backend="unseen")(lambda x: double(x[..., ::2].contiguous()))
    kernels.register("pack_linear", backend="unseen")(lambda weight, bias: (double, double))
    resolved = kernels.resolve("cpu", "unseen")
    operations = kernels if by_hand else resolved
    x, product = torch.ones(2, 6), resolved.pack_linear(torch.ones(6, 6))
    with kernels.use_backend("unseen"):
        runs: list[Callable[[], Tensor]] = [
            lambda: operations.silu_and_mul(x) + 1,
            lambda: product.multiply(x) + 1,
            lambda: product.rows(x) + 1,
        ]
        for run in runs:
            for _ in range(2):  # also after a refusal it computes, and from the values of now
                with pytest.raises(NotRecordableError, match="'unseen' performs"):
                    cpu_capture()(run)
                x.add_(1)
                assert run()[0, 0] == 2 * x[0, 0] + 1
    assert not registry.recording.get()
    registry._resolve.cache_clear()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_our_own_are_called_without_a_detour(backend: str) -> None:
    functions = kernels.resolve("cpu", backend).functions
    unguarded = {row.function for row in registry._table.values() if row.backend in ("cpu", "reference")}
    assert all(functions[op] in unguarded for op in kernels.OPS if op != "attention")


def test_an_engine_with_a_kernel_that_nobody_sees(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is the best for the device, so nobody asks for it; beside our own, which would be recorded."""
    monkeypatch.setattr(registry, "_table", dict(registry._table))

    @kernels.register("silu_and_mul", backend="unseen", devices=("cpu",), priority=1000)
    def silu_and_mul(x: Tensor) -> Tensor:
        gate, up = np.split(np.asarray(x), 2, axis=-1)
        return torch.from_numpy(gate / (1 + np.exp(-gate)) * up)

    answers = []
    for enforce_eager in (False, True):
        with caplog.at_level("INFO"):
            llm = LLM(dtype="float32", num_gpu_blocks=8, enforce_eager=enforce_eager)
            output = llm.generate("What is a KV cache?", max_tokens=12, temperature=0, use_tqdm=False)[0]
        answers.append(output.token_ids)
    registry._resolve.cache_clear()
    assert answers[0] == answers[1]
    assert [record.levelname for record in caplog.records if "'unseen' performs" in record.getMessage()] == ["INFO"]
