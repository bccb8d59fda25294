"""The engine for asyncio: the same tokens, increment by increment, and nothing left running when nobody listens."""

import asyncio
import contextlib
import gc
import os
import select
import signal
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from mini_infer import LLM, AsyncLLMEngine, EngineConfig, SamplingParams
from mini_infer.engine.async_engine import Increments
from mini_infer.engine.request import Request
from mini_infer.exceptions import (
    InvalidConfigError,
    InvalidRequestError,
    MiniInferError,
    NotFiniteError,
    QueueFullError,
    StepError,
)
from mini_infer.executor.runner import ModelRunner
from mini_infer.outputs import GenerateOutput, Increment
from mini_infer.step import StepInput, StepOutput
from tests.engine.checkpoints import VOCAB_SIZE, make_engine_checkpoint
from tests.engine.executors import Corrupting, interpose, with_nan

PROMPTS = ("One", "什么是块？", "a much longer prompt, which takes a few blocks", "Two", "五", "six")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
MAX_MODEL_LEN = 32768
ENDLESS = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
"""Goes on for far longer than any test that leaves it."""

StepRaises: TypeAlias = Callable[[int, BaseException], None]
"""So many of the next steps raise this."""


class Panic(BaseException):
    """As PyO3's: none of Python's ordinary exceptions."""


PATIENCE = 20.0
"""Seconds until a test that waits in vain fails instead; nothing here takes anywhere near as long."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(
        tmp_path_factory.mktemp("model"), num_hidden_layers=1, max_position_embeddings=MAX_MODEL_LEN
    )


@pytest.fixture(scope="module")
def offline(checkpoint: Path) -> dict[str, GenerateOutput]:
    outputs = LLM(checkpoint, dtype="float64", block_size=4).generate(list(PROMPTS), GREEDY)
    return dict(zip(PROMPTS, outputs, strict=True))


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[AsyncLLMEngine]:
    engine = AsyncLLMEngine(model=checkpoint, dtype="float64", block_size=4, num_gpu_blocks=2 * MAX_MODEL_LEN // 4)
    yield engine
    engine.shutdown()
    stats = engine.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)


@pytest.fixture
def step_raises(monkeypatch: pytest.MonkeyPatch) -> StepRaises:
    forward = ModelRunner._forward
    left, news = 0, BaseException()

    def maybe(self: ModelRunner, batch: Any) -> torch.Tensor:
        nonlocal left
        if left:
            left -= 1
            raise news
        return forward(self, batch)

    def arm(times: int, error: BaseException) -> None:
        nonlocal left, news
        left, news = times, error

    monkeypatch.setattr(ModelRunner, "_forward", maybe)
    return arm


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    """A test's coroutine in an event loop of its own."""
    return asyncio.run(asyncio.wait_for(main(), PATIENCE))


async def until(condition: Callable[[], bool]) -> None:
    """The engine's thread goes on by itself, so some things are true only soon."""
    while not condition():
        await asyncio.sleep(0.001)


def idle(engine: AsyncLLMEngine) -> Callable[[], bool]:
    def nothing_left() -> bool:
        stats = engine.engine.stats()
        return (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)

    return nothing_left


async def collect(increments: AsyncIterator[Increment]) -> list[Increment]:
    return [increment async for increment in increments]


async def complete(engine: AsyncLLMEngine, prompt: str, params: SamplingParams = GREEDY) -> GenerateOutput:
    output = (await collect(engine.generate(prompt, params)))[-1].output
    assert output is not None
    return output


class TestGenerate:
    def test_as_the_offline_engine(self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput]) -> None:
        async def main() -> list[GenerateOutput]:
            return await asyncio.gather(*(complete(engine, prompt) for prompt in PROMPTS))

        for output in run(main):
            assert output.prompt is not None
            expected = offline[output.prompt]
            assert (output.token_ids, output.text) == (expected.token_ids, expected.text)
            assert output.finish_reason == "length"

    def test_they_share_steps(self, engine: AsyncLLMEngine) -> None:
        async def main() -> None:
            gate, entered = threading.Event(), threading.Event()
            # Holds the engine's thread back until both requests are there.
            held = engine.call(lambda _: entered.set() or gate.wait(PATIENCE))
            await until(entered.is_set)
            before = engine.engine.stats().num_steps
            tasks = [asyncio.create_task(complete(engine, prompt)) for prompt in ("One", "Two")]
            await until(lambda: engine._thread._inbox.qsize() == 2)
            gate.set()
            await held
            outputs = await asyncio.gather(*tasks)
            assert engine.engine.stats().num_steps - before == max(len(output.token_ids) for output in outputs)

        run(main)

    @pytest.mark.parametrize("seed", range(3))
    def test_increments_add_up(self, engine: AsyncLLMEngine, seed: int) -> None:
        params = SamplingParams(seed=seed, max_tokens=40, logprobs=2, ignore_eos=True)

        async def main() -> list[Increment]:
            return await collect(engine.generate("你好", params, request_id="mine"))

        increments = run(main)
        output = increments[-1].output
        assert output is not None and [i.output for i in increments[:-1]] == [None] * (len(increments) - 1)
        assert "".join(i.text for i in increments) == output.text
        assert [token for i in increments for token in i.token_ids] == output.token_ids
        assert [place for i in increments for place in i.logprobs or []] == output.logprobs
        assert [i.finish_reason for i in increments] == [None] * (len(increments) - 1) + ["length"]
        assert {i.request_id for i in increments} == {"mine", output.request_id}

    def test_several_completions(self, engine: AsyncLLMEngine) -> None:
        params = SamplingParams(n=3, seed=1, max_tokens=10, ignore_eos=True)

        async def main() -> list[Increment]:
            return await collect(engine.generate("你好", params))

        increments = run(main)
        output = increments[-1].output
        assert output is not None
        for completion in output.outputs:
            own = [i for i in increments if i.index == completion.index]
            assert "".join(i.text for i in own) == completion.text
            assert [token for i in own for token in i.token_ids] == completion.token_ids
            assert [i.finish_reason for i in own if i.finish_reason] == ["length"]

    def test_stop_strings_are_never_shown_half(
        self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput]
    ) -> None:
        whole = offline["One"].text
        stop = whole[len(whole) // 2 :][:2]
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop)

        async def main() -> list[Increment]:
            return await collect(engine.generate("One", params))

        increments = run(main)
        assert "".join(i.text for i in increments) == whole[: whole.index(stop)]
        assert increments[-1].finish_reason == "stop"

    def test_token_ids_and_default_params(self, engine: AsyncLLMEngine) -> None:
        async def main() -> list[Increment]:
            return await collect(engine.generate([1, 2, 3]))

        output = run(main)[-1].output
        assert output is not None and output.prompt_token_ids == [1, 2, 3]
        assert len(output.token_ids) == 100 or output.finish_reason == "stop"

    def test_no_new_tokens(self, engine: AsyncLLMEngine) -> None:
        async def main() -> list[Increment]:
            return await collect(engine.generate("One", SamplingParams(max_tokens=0, prompt_logprobs=1)))

        (increment,) = run(main)
        assert increment.output is not None and len(increment.output.prompt_logprobs or []) == 3

    def test_one_loop_after_another(self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput]) -> None:
        for prompt in PROMPTS[:3]:
            assert run(lambda prompt=prompt: complete(engine, prompt)).token_ids == offline[prompt].token_ids

    def test_an_id_may_be_used_again(self, engine: AsyncLLMEngine) -> None:
        async def main() -> None:
            for _ in range(3):
                await collect(engine.generate("One", GREEDY, request_id="same"))

        run(main)


class TestEnds:
    @pytest.mark.parametrize("leaves", [False, True])
    def test_what_has_ended_is_freed_at_once(self, engine: AsyncLLMEngine, leaves: bool) -> None:
        """Without the collector of garbage, which comes late, and stops everything when there is much."""

        async def main() -> None:
            with await engine.submit(["One"], ENDLESS if leaves else GREEDY, request_ids=["freed"]) as increments:
                increments.on_close(lambda: increments)
                async for _ in increments:
                    if leaves:
                        break
            await until(idle(engine))
            await engine.stats()

        gc.collect()
        gc.disable()
        try:
            run(main)
            things = gc.get_objects()
            requests = [thing for thing in things if type(thing) is Request]
            requests += [request for thing in things if type(thing) is Increments for request in thing.requests]
            assert not [request for request in requests if request.request_id == "freed"]
        finally:
            gc.enable()


class TestLeaving:
    @pytest.mark.parametrize("how", ["break", "aclose", "cancel", "cancel before it began", "raise"])
    def test_it_aborts_and_frees_the_blocks(
        self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput], how: str
    ) -> None:
        async def leave() -> None:
            increments = engine.generate("One", ENDLESS)
            async for _ in increments:
                if how == "aclose":
                    await increments.aclose()
                if how == "raise":
                    raise ZeroDivisionError
                if how == "break":
                    break

        async def main() -> None:
            if how.startswith("cancel"):
                task = asyncio.create_task(leave())
                if how == "cancel":
                    await until(lambda: engine.engine.stats().num_generated_tokens > 2)
                else:
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            else:
                with contextlib.suppress(ZeroDivisionError):
                    await leave()
            await until(idle(engine))
            assert (await complete(engine, "Two")).token_ids == offline["Two"].token_ids

        run(main)
        assert engine.engine.stats().num_generated_tokens < MAX_MODEL_LEN // 2

    def test_the_others_go_on(self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput]) -> None:
        async def main() -> list[GenerateOutput]:
            leaving = [engine.generate(prompt, ENDLESS) for prompt in ("three", "four", "five")]
            staying = [asyncio.create_task(complete(engine, prompt)) for prompt in PROMPTS]
            for increments in leaving:
                await anext(increments)
                await increments.aclose()
            return await asyncio.gather(*staying)

        for output in run(main):
            assert output.prompt is not None and output.token_ids == offline[output.prompt].token_ids

    def test_a_timeout_is_a_cancellation(self, engine: AsyncLLMEngine) -> None:
        async def main() -> None:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(collect(engine.generate([1], ENDLESS)), 0.001)
            await until(idle(engine))

        run(main)

    def test_a_loop_that_closes_meanwhile(self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput]) -> None:
        """Nobody is left to tell; the engine drops the request and serves the next loop."""
        loop = asyncio.new_event_loop()
        increments = engine.generate("One", ENDLESS)
        loop.run_until_complete(anext(increments))
        loop.close()

        async def main() -> None:
            await until(idle(engine))
            assert (await complete(engine, "Two")).token_ids == offline["Two"].token_ids

        run(main)
        del increments


class TestAbort:
    def test_the_iterator_ends_with_what_there_is(self, engine: AsyncLLMEngine) -> None:
        async def main() -> list[Increment]:
            increments = []
            async for increment in engine.generate("One", ENDLESS, request_id="mine"):
                increments.append(increment)
                if len(increments) == 3:
                    engine.abort("mine")
            await until(idle(engine))
            return increments

        increments = run(main)
        output = increments[-1].output
        assert output is not None and output.finish_reason == increments[-1].finish_reason == "abort"
        assert 3 <= len(output.token_ids) < MAX_MODEL_LEN // 2
        assert "".join(i.text for i in increments) == output.text
        assert [token for i in increments for token in i.token_ids] == output.token_ids

    def test_unknown_ids_are_ignored(self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput]) -> None:
        engine.abort("nobody")
        output = run(lambda: complete(engine, "One"))
        engine.abort(output.request_id)
        assert run(lambda: complete(engine, "One")).token_ids == offline["One"].token_ids

    def test_one_that_has_just_finished(self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput]) -> None:
        """It has finished, but whoever waits for it has not seen that yet."""

        async def main() -> None:
            increments = engine.generate("One", GREEDY, request_id="mine")
            first = await anext(increments)
            await until(idle(engine))
            engine.abort("mine")
            output = (await collect(increments))[-1].output
            assert output is not None and output.token_ids[:1] == first.token_ids
            assert output.finish_reason == "length"
            assert (await complete(engine, "Two")).token_ids == offline["Two"].token_ids

        run(main)


class TestErrors:
    @pytest.mark.parametrize(
        ("prompt", "params", "shown"),
        [
            ("", GREEDY, "''"),
            ([VOCAB_SIZE], GREEDY, str(VOCAB_SIZE)),
            ("x" * 10_000_000, GREEDY, "10000000"),
            (None, GREEDY, "None"),
            ("\ud800", GREEDY, r"\ud800"),
            ("One", {"temperature": 0}, "{'temperature': 0}"),
        ],
        ids=["empty", "token id", "10 MB", "None", "surrogate", "params"],
    )
    def test_a_bad_request(
        self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput], prompt: Any, params: Any, shown: str
    ) -> None:
        async def main() -> None:
            good = asyncio.create_task(complete(engine, "Two"))
            with pytest.raises(InvalidRequestError) as caught:
                await collect(engine.generate(prompt, params))
            assert shown in str(caught.value)
            assert (await good).token_ids == offline["Two"].token_ids

        run(main)

    def test_an_id_that_is_taken(self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput]) -> None:
        """The second is refused; the first, whose id it is, is none the worse for it."""

        async def main() -> None:
            first = engine.generate("One", GREEDY, request_id="mine")
            start = await anext(first)
            second = engine.generate("Two", GREEDY, request_id="mine")
            if engine.engine.stats().num_running:  # else the first has finished already, and its id is free
                try:
                    await anext(second)
                except InvalidRequestError as error:
                    assert "'mine' is taken" in str(error)
            rest = await collect(first)
            assert start.token_ids + [t for i in rest for t in i.token_ids] == offline["One"].token_ids

        run(main)

    def test_a_full_queue(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        async def main() -> None:
            async with AsyncLLMEngine(model=checkpoint, block_size=4, max_num_seqs=1, max_waiting=1) as engine:
                running = engine.generate("One", ENDLESS)
                await anext(running)
                waiting = asyncio.create_task(complete(engine, "Two"))
                await until(lambda: engine.engine.stats().num_waiting == 1)
                with pytest.raises(QueueFullError, match="max_waiting is 1"):
                    await anext(engine.generate("three", GREEDY))
                await running.aclose()
                assert (await waiting).finish_reason == "length"

        run(main)

    def test_a_step_that_raises_is_tried_again(
        self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput], step_raises: StepRaises
    ) -> None:
        async def main() -> None:
            tasks = [asyncio.create_task(complete(engine, prompt)) for prompt in PROMPTS]
            await until(lambda: engine.engine.stats().num_generated_tokens > 0)
            step_raises(1, RuntimeError("cosmic ray"))
            for task in tasks:
                output = await task
                assert output.prompt is not None and output.token_ids == offline[output.prompt].token_ids

        run(main)
        assert engine.is_healthy

    @pytest.mark.parametrize("error", [RuntimeError("cosmic ray"), Panic("cosmic ray")])
    def test_one_that_raises_twice_fails_those_under_way(
        self,
        engine: AsyncLLMEngine,
        offline: dict[str, GenerateOutput],
        step_raises: StepRaises,
        error: BaseException,
    ) -> None:
        async def main() -> None:
            under_way = [engine.generate(prompt, ENDLESS) for prompt in ("three", "four")]
            for increments in under_way:
                await anext(increments)
            step_raises(2, error)
            for increments in under_way:
                with pytest.raises(StepError, match="cosmic ray"):
                    await collect(increments)
            await until(idle(engine))
            assert (await complete(engine, "One")).token_ids == offline["One"].token_ids
            assert engine.is_healthy

        run(main)

    def test_a_completion_that_cannot_go_on_says_why_though_others_of_its_request_could(
        self, engine: AsyncLLMEngine
    ) -> None:
        def poison(number: int, step: StepInput, output: StepOutput) -> StepOutput:
            return with_nan(output, 1) if number == 2 else output

        async def main() -> None:
            interpose(engine.engine, lambda executor: Corrupting(executor, poison))
            with pytest.raises(NotFiniteError):
                await collect(engine.generate([1, 2, 3], SamplingParams(n=3, max_tokens=9, ignore_eos=True)))
            await until(idle(engine))

        run(main)

    def test_a_device_that_is_broken_shows_and_one_that_recovers_too(
        self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput], step_raises: StepRaises
    ) -> None:
        async def main() -> None:
            step_raises(10**9, RuntimeError("device-side assert"))
            with pytest.raises(StepError, match="device-side assert"):
                await complete(engine, "One")
            await until(lambda: not engine.is_healthy)
            step_raises(0, RuntimeError())
            assert (await complete(engine, "One")).token_ids == offline["One"].token_ids
            assert engine.is_healthy

        run(main)

    def test_a_command_that_raises_harms_nobody(
        self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def raises(requests: Any) -> None:
            monkeypatch.undo()
            raise RuntimeError("a fault of ours")

        async def main() -> None:
            monkeypatch.setattr(engine.engine, "discard", raises)
            engine.abort("nobody")
            assert (await complete(engine, "One")).token_ids == offline["One"].token_ids
            with pytest.raises(Panic):
                await engine.call(lambda _: (_ for _ in ()).throw(Panic()))
            assert (await complete(engine, "Two")).token_ids == offline["Two"].token_ids

        run(main)

    def test_an_observer_that_raises_is_told_no_more(
        self, engine: AsyncLLMEngine, offline: dict[str, GenerateOutput]
    ) -> None:
        told: list[Increment] = []

        def observe(request: Any, increment: Increment) -> None:
            told.append(increment)
            raise RuntimeError("a fault of an observer's")

        engine.observe(observe)
        assert run(lambda: complete(engine, "One")).token_ids == offline["One"].token_ids
        assert len(told) == 1

    def test_a_thread_that_dies_tells_everybody(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, step_raises: StepRaises
    ) -> None:
        """Those under way, those that wait for a command, and those that come too late."""

        async def main() -> None:
            engine = AsyncLLMEngine(model=checkpoint, block_size=4)
            running = engine.generate("One", ENDLESS)
            await anext(running)
            monkeypatch.setattr(engine._thread, "_send", lambda: (monkeypatch.undo(), 1 / 0))
            with pytest.raises(MiniInferError, match=r"has died \(ZeroDivisionError"):
                await collect(running)
            await until(lambda: not engine.is_running)
            with pytest.raises(MiniInferError, match="has died"):
                await engine.stats()
            with pytest.raises(MiniInferError, match="has died"):
                await complete(engine, "Two")

        run(main)

    def test_the_config_is_checked_at_once(self, checkpoint: Path) -> None:
        with pytest.raises(InvalidConfigError, match="max_num_seqs"):
            AsyncLLMEngine(model=checkpoint, max_num_seqs=0)
        with pytest.raises(InvalidConfigError, match="not both"):
            AsyncLLMEngine(EngineConfig(model=checkpoint), max_num_seqs=1)


class TestShutdown:
    def test_twice(self, checkpoint: Path) -> None:
        engine = AsyncLLMEngine(EngineConfig(model=checkpoint))
        engine.shutdown()
        engine.shutdown()

    def test_it_ends_what_runs_and_what_waits(self, checkpoint: Path) -> None:
        async def main() -> None:
            engine = AsyncLLMEngine(model=checkpoint, block_size=4, max_num_seqs=1)
            running = engine.generate("One", ENDLESS)
            await anext(running)
            waiting = asyncio.create_task(complete(engine, "Two"))
            await until(lambda: engine.engine.stats().num_waiting == 1)
            await asyncio.to_thread(engine.shutdown)
            for left in (collect(running), waiting):
                with pytest.raises(MiniInferError, match="shut down"):
                    await left
            assert idle(engine)()

        run(main)

    def test_leaving_the_context(self, checkpoint: Path, offline: dict[str, GenerateOutput]) -> None:
        async def main() -> None:
            async with AsyncLLMEngine(model=checkpoint, dtype="float64", block_size=4) as engine:
                assert (await complete(engine, "One")).token_ids == offline["One"].token_ids
                abandoned = engine.generate("Two", ENDLESS)
                await anext(abandoned)
            assert idle(engine)()
            with pytest.raises(MiniInferError, match="shut down"):
                await collect(abandoned)

        run(main)

    def test_a_step_that_does_not_end(self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is left to itself, and nobody waits for it."""
        gate = threading.Event()
        forward = ModelRunner._forward

        def stuck(self: ModelRunner, batch: Any) -> torch.Tensor:
            gate.wait(PATIENCE)
            return forward(self, batch)

        async def main() -> None:
            engine = AsyncLLMEngine(model=checkpoint, block_size=4)
            running = engine.generate("One", ENDLESS)
            await anext(running)
            monkeypatch.setattr(ModelRunner, "_forward", stuck)
            await until(lambda: engine.step_seconds > 0.05)
            asked = engine.stats()
            asking = asyncio.create_task(asked)
            await asyncio.sleep(0)
            await asyncio.to_thread(engine.shutdown, 0.05)
            with pytest.raises(MiniInferError, match="shut down"):
                await collect(running)
            with pytest.raises(MiniInferError, match="shut down"):
                await asking
            gate.set()
            await until(idle(engine))

        run(main)

    def test_without_it_a_forgotten_engine_is_freed(self, checkpoint: Path) -> None:
        async def main() -> "weakref.ref[Any]":
            engine = AsyncLLMEngine(model=checkpoint, block_size=4)
            await complete(engine, "One")
            increments = engine.generate("Two", ENDLESS)
            await anext(increments)
            await increments.aclose()
            return weakref.ref(engine.engine)

        before = threading.active_count()
        inner = run(main)

        async def gone() -> None:
            await until(lambda: gc.collect() >= 0 and inner() is None and threading.active_count() <= before)

        run(gone)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    @pytest.mark.parametrize("overlap", [False, True])
    def test_a_forked_child_is_told(self, checkpoint: Path, overlap: bool) -> None:
        engine = AsyncLLMEngine(model=checkpoint, block_size=4, overlap=overlap)
        offline = LLM(checkpoint, overlap=overlap)
        run(lambda: complete(engine, "One"))
        offline.generate("One", GREEDY)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            said = []
            for attempt in (lambda: run(lambda: complete(engine, "One")), lambda: offline.generate("One", GREEDY)):
                try:
                    attempt()
                except MiniInferError as error:
                    said.append(str(error))
            os.write(writing, "\n".join(said).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as said_by_child:
            ready, _, _ = select.select([said_by_child], [], [], PATIENCE)
            if not ready:
                os.kill(child, signal.SIGKILL)
            lines = said_by_child.read().splitlines()
        os.waitpid(child, 0)
        assert len(lines) == 2 and all("a fork of it" in line and "'spawn'" in line for line in lines)
        assert run(lambda: complete(engine, "One")).finish_reason == "length"
        engine.shutdown()

    def test_afterwards_it_refuses(self, checkpoint: Path) -> None:
        async def main() -> None:
            engine = AsyncLLMEngine(model=checkpoint)
            engine.shutdown()
            with pytest.raises(MiniInferError, match="shut down"):
                await collect(engine.generate("One", GREEDY))
            engine.abort("mine")

        run(main)
