"""Grades ``feed_forward``: by hand, then what it reads and says, then on ranks that are processes of their own."""

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from mini_infer.parallel.group import Store

PATIENCE = 5.0  # seconds that a rank waits for the others


class File:
    """A matrix in a file, which counts what is read of it."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.num_read = matrix, matrix.shape, 0

    def __getitem__(self, place: Any) -> Tensor:
        part = self.matrix[place]
        self.num_read += part.numel()
        return part


class Sum:
    """Adds up what the ranks give, which are threads here."""

    def __init__(self, size: int) -> None:
        self.given: list[Tensor | None] = [None] * size
        self.calls = [0] * size
        self.barrier = threading.Barrier(size, timeout=PATIENCE)

    def of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def sum_over_ranks(x: Tensor) -> Tensor:
            self.calls[rank] += 1
            self.given[rank] = x
            self.barrier.wait()
            total = sum(self.given)
            self.barrier.wait()
            return total

        return sum_over_ranks


def on_ranks(answer: Any, size: int, x: Tensor, up: Tensor, down: Tensor, bias: Tensor) -> tuple[list, list, Sum]:
    """What each rank returns, the files that it had, and what they said to each other."""
    files, sums = [(File(up), File(down)) for _ in range(size)], Sum(size)

    def run(rank: int) -> Tensor:
        try:
            return answer.feed_forward(x, *files[rank], bias, rank, size, sums.of(rank))
        except threading.BrokenBarrierError:
            raise AssertionError(
                f"rank {rank} waits for a sum that another one does not make · "
                f"rank {rank} 在等一次别的 rank 没有参加的求和"
            ) from None
        except BaseException:
            sums.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size))), files, sums


def close(results: list, wanted: Tensor) -> None:
    """Every rank has the right result."""
    for rank, out in enumerate(results):
        assert out is not None, f"rank {rank} returned None · rank {rank} 返回了 None"
        assert out.shape == wanted.shape, (
            f"rank {rank}: the result has shape {list(out.shape)}, expected {list(wanted.shape)} · "
            f"rank {rank}：结果的形状是 {list(out.shape)}，应为 {list(wanted.shape)}"
        )
        got, right = out.double().flatten(), wanted.double().flatten()
        assert bool(((got - right).abs() <= 1e-9 * (1 + right.abs())).all()), (
            f"rank {rank}: got {[round(v, 4) for v in got[:6].tolist()]}, expected "
            f"{[round(v, 4) for v in right[:6].tolist()]} · "
            f"rank {rank}：得到 {[round(v, 4) for v in got[:6].tolist()]}，应为 "
            f"{[round(v, 4) for v in right[:6].tolist()]}"
        )


def layer(hidden: int, features: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, U, D, b, and what one device makes of them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, hidden), (features, hidden), (hidden, features), (hidden,))
    x, up, down, bias = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, up, down, bias, silu(x @ up.T) @ down.T + bias


def test_alone(answer, explain):
    """one rank · 一个 rank"""
    explain(
        "A group of one: it has all features, and the sum gives back what it got.",
        "只有一个 rank：全部特征都归它，求和原样返回。",
    )
    *given, wanted = layer(4, 6, 0)
    close(on_ranks(answer, 1, *given)[0], wanted)


def test_two_halves(answer, explain):
    """two ranks, no bias · 两个 rank，没有偏置"""
    explain(
        "One token, x = [1, 1]; four features, whose rows of U are [1, 0], [0, 1], [1, 1] and [2, -2], so x Uᵀ is "
        "[1, 1, 2, 0]; D is a row of ones. Each of two ranks has half of the features: silu(1) + silu(1) = 1.4621 "
        "there, silu(2) + silu(0) = 1.7616 here. Either alone is half of the truth; the sum, 3.2237, is the result on "
        "both. If you cut x instead, silu sees halves: silu of a sum of two halves is not the sum of two silus.",
        "一个词元，x = [1, 1]；四个特征，U 的各行是 [1, 0]、[0, 1]、[1, 1]、[2, -2]，所以 x Uᵀ 是 [1, 1, 2, 0]；"
        "D 是一行 1。两个 rank 各有一半特征：一边是 silu(1) + silu(1) = 1.4621，另一边是 silu(2) + silu(0) = 1.7616。"
        "单看哪一边都不完整；两者之和 3.2237 才是结果，两个 rank 都要得到它。"
        "如果切的是 x，silu 看到的就只是一半：两半之和的 silu 不等于两个 silu 之和。",
    )
    up = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, -2]], dtype=torch.float64)
    down = torch.ones(1, 4, dtype=torch.float64)
    x, bias = torch.ones(1, 2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    close(on_ranks(answer, 2, x, up, down, bias)[0], silu(x @ up.T) @ down.T)


def test_bias(answer, explain):
    """the bias · 偏置"""
    explain(
        "U and D are zeros, so the result is the bias, 1 and 10, and nothing else. On two ranks the bias is added once "
        "in all: if both add it, the sum has it twice.",
        "U 和 D 全是零，所以结果就是偏置 1 和 10。两个 rank 的时候，偏置只加一次："
        "如果两个 rank 都加，求和之后就有了两份。",
    )
    zeros = torch.zeros(4, 2, dtype=torch.float64)
    bias = torch.tensor([1.0, 10], dtype=torch.float64)
    close(on_ranks(answer, 2, torch.ones(1, 2, dtype=torch.float64), zeros, zeros.T, bias)[0], bias[None])


def test_uneven(answer, explain):
    """features that do not divide · 除不尽的特征"""
    explain(
        "Seven features on three ranks are 3, 2 and 2: what is left over goes to the first ranks, one each. Then one "
        "feature on two ranks: the second has none, and still takes part in the sum.",
        "七个特征分给三个 rank，是 3、2、2：除不尽的归前几个 rank，一个分一个。再看一个特征、两个 rank："
        "第二个 rank 一个特征也没有，但照样参加求和。",
    )
    for features, size in ((7, 3), (1, 2)):
        *given, wanted = layer(5, features, 1)
        close(on_ranks(answer, size, *given)[0], wanted)


def test_what_is_read(answer, explain):
    """what a rank reads · 每个 rank 读多少"""
    explain(
        "8 features of 4 hidden numbers on two ranks: 16 numbers of U and 16 of D for each. A model is shared out "
        "because it does not fit; who reads all of it and then takes a part has not saved anything.",
        "8 个特征、隐藏维度 4、两个 rank：每个 rank 读 U 的 16 个数和 D 的 16 个数。"
        "分摊模型正是因为一处放不下；全读进来再取一部分，等于没有省。",
    )
    *given, wanted = layer(4, 8, 2)
    results, files, _ = on_ranks(answer, 2, *given)
    close(results, wanted)
    for rank, (up, down) in enumerate(files):
        assert (up.num_read, down.num_read) == (16, 16), (
            f"rank {rank} reads {up.num_read} numbers of U and {down.num_read} of D, expected 16 and 16 · "
            f"rank {rank} 读了 U 的 {up.num_read} 个数、D 的 {down.num_read} 个数，应为 16 和 16"
        )


def test_what_is_said(answer, explain):
    """what ranks say to each other · rank 之间传多少"""
    explain(
        "Two products need one message: the activations between them are complete on the rank that has them, and "
        "nobody else needs them.",
        "两个乘法只需要一次通信：中间的激活在各自的 rank 上是完整的，别人也用不着。",
    )
    *given, wanted = layer(4, 8, 3)
    results, _, sums = on_ranks(answer, 4, *given)
    close(results, wanted)
    assert sums.calls == [1] * 4, (
        f"the ranks called sum_over_ranks {sums.calls} times, expected once each · "
        f"各个 rank 调用 sum_over_ranks 的次数是 {sums.calls}，应为每个一次"
    )


REAL = """
import importlib.util, sys, torch
from mini_infer.parallel.group import interface_of, join
rank, port, path = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
spec = importlib.util.spec_from_file_location("answer", path)
answer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(answer)
group, _ = join(("127.0.0.1", port), rank, 1, 2, torch.device("cpu"), interface_of("127.0.0.1"), 30.0)
generator = torch.Generator().manual_seed(4)
x, up, down, bias = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 8), (9, 8), (8, 9), (8,)))
result = answer.feed_forward(x, up, down, bias, rank, 2, group.sum)
print((result - torch.nn.functional.silu(x @ up.T) @ down.T - bias).abs().max().item() < 1e-12)
"""


def test_real_ranks(answer, explain):
    """two processes · 两个进程"""
    explain(
        "The same on two real ranks: processes of their own, which sum by way of a socket, as those of an engine do.",
        "同样的计算，在两个真正的 rank 上：各自是一个进程，经套接字求和，与引擎里的 rank 一样。",
    )
    store = Store("127.0.0.1")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", REAL, str(rank), str(store.port), answer.__file__],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        out, error = process.communicate()
        said = (out or error).strip()[-300:]
        assert said == "True", f"rank {rank} says {said}, expected True · rank {rank} 的输出是 {said}，应为 True"
