"""What CUDA graphs need, without a GPU: sizes, padding, static inputs, block tables that are sent by difference.

A recording is played back here by calling the recorded function again, on the same static inputs.
"""

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mini_infer import LLM, SamplingParams
from mini_infer.engine.describe import Describer, Wanted
from mini_infer.exceptions import NotRecordableError
from mini_infer.executor.device import pack, unpack
from mini_infer.executor.graphs import DecodeGraphs, graph_sizes
from mini_infer.executor.queue import make_executor
from mini_infer.executor.runner import ModelRunner
from mini_infer.kernels import AttentionMetadata
from mini_infer.memory.kv_cache import KVCache
from mini_infer.models import Batch
from mini_infer.parallel.share import WHOLE
from mini_infer.scheduler import ScheduledSequence, SchedulerOutputs, Sequence, SequenceStatus
from mini_infer.step import StepInput
from tests.engine.checkpoints import make_engine_checkpoint
from tests.engine.executors import interpose, runner_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["mistral", "qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_engine_checkpoint(tmp_path_factory.mktemp(request.param), request.param, seed=9, num_hidden_layers=2)


def test_sizes_cover_every_batch_and_end_with_the_largest() -> None:
    for most in (1, 2, 3, 7, 8, 9, 16, 17, 100, 256):
        sizes = graph_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most and sizes[0] == 1
        for num_seqs in range(1, most + 1):
            size = next(size for size in sizes if size >= num_seqs)
            assert size - num_seqs < max(16, num_seqs)  # little is padded
    assert graph_sizes(256) == [1, 2, 4, 8, *range(16, 257, 16)]


def decode(table: list[int], num_tokens: int) -> Sequence:
    """A sequence whose last token is to be computed."""
    tokens = [(7 * i + len(table)) % 250 for i in range(num_tokens)]
    sequence = Sequence("r", tokens, 1, 1000, num_computed_tokens=num_tokens - 1, block_table=table)
    sequence.status = SequenceStatus.RUNNING
    return sequence


def random_table(draw: random.Random, num_tokens: int, block_size: int) -> list[int]:
    return [draw.randrange(1000) for _ in range(-(-num_tokens // block_size))]


def describe(describer: Describer, sequences: list[Sequence]) -> StepInput:
    """A step that decodes these sequences, and draws nothing."""
    wanted = Wanted()
    items = tuple(ScheduledSequence(sequence, len(sequence) - 1, 1, 0, True) for sequence in sequences)
    for _ in items:
        wanted.end_sequence()
    return describer.describe(SchedulerOutputs(items, len(items)), wanted)


def test_tables_follow_the_sequences_and_only_changes_are_sent() -> None:
    for seed in range(60):
        draw = random.Random(seed)
        num_rows, width = draw.randint(1, 6), 12
        describer = Describer(num_rows, width, block_size=1)
        device = np.full(num_rows * width, -1, dtype=np.int32)  # what a GPU would have, updated by what is sent
        sequences = [decode([draw.randrange(1000)], 1) for _ in range(10)]
        for _ in range(80):
            for sequence in sequences:
                sequence.status = SequenceStatus.RESTING
                table = sequence.block_table
                match draw.randrange(6):
                    case 0 if len(table) < width:
                        table.append(draw.randrange(1000))
                    case 1 if table:  # its own copy of the last block
                        table[-1] = draw.randrange(1000)
                    case 2 if draw.random() < 0.2:  # preempted, and back with other blocks
                        sequence.block_table = [draw.randrange(1000) for _ in range(draw.randint(1, width))]
            running = draw.sample(sequences, draw.randint(1, num_rows))
            for sequence in running:
                sequence.status = SequenceStatus.RUNNING
            before = device.copy()
            if draw.random() < 0.2:
                describe(describer, draw.sample(running, draw.randint(1, len(running))))  # and then that step fails
                describer.forget()
            step = describe(describer, running)
            device[step.changed] = step.changed_blocks
            assert len(set(step.table_rows.tolist())) == len(running)
            for row, sequence in zip(step.table_rows, running, strict=True):
                got = device.reshape(num_rows, width)[row, : len(sequence.block_table)]
                assert got.tolist() == sequence.block_table, seed
            again = describe(describer, running)
            assert again.table_rows.tolist() == step.table_rows.tolist() and len(again.changed) == 0
            assert len(step.changed) <= sum(len(sequence.block_table) for sequence in running)
            assert np.isin(np.flatnonzero(device != before), step.changed).all()


def test_a_growing_sequence_sends_one_block_at_a_time() -> None:
    describer, sequence = Describer(2, 100, block_size=1), decode([5], 1)
    describe(describer, [sequence])
    for block in range(99):
        sequence.block_table.append(block)
        step = describe(describer, [sequence])
        assert (step.changed.tolist(), step.changed_blocks.tolist()) == ([block + 1], [block])


class Watched:
    """In a model's place: keeps the batches that it is given, and computes nothing."""

    share = WHOLE
    config = SimpleNamespace(attention_span=1, diffusion=None)

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def forward(self, batch: Batch, kv_cache: object, arriving: None) -> Tensor:
        self.batches.append(batch)
        return torch.zeros(len(batch.token_ids), 4)


class WatchedGraphs(DecodeGraphs):
    """Graphs that keep the batches that they are to run, and compute nothing."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches: list[Batch] = []

    def run(self, batch: Batch, arriving: Tensor | None = None) -> Tensor:
        self.batches.append(batch)
        return torch.zeros(len(batch.token_ids), 4)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_padding_adds_rows_that_read_and_write_nothing(block_size: int) -> None:
    draw = random.Random(block_size)
    for num_rows in (1, 2, 8, 33):
        lengths = [draw.randint(1, 90) for _ in range(draw.randint(1, num_rows))]
        sequences = [decode(random_table(draw, length, block_size), length) for length in lengths]
        step = describe(Describer(40, 90, block_size), sequences)
        model, graphs = Watched(), WatchedGraphs(lambda batch: torch.zeros(0), [num_rows], 90, CPU, Recorder())
        for some in (None, graphs):
            runner = ModelRunner(
                model,  # type: ignore[arg-type]
                KVCache([(torch.zeros(1, 1), torch.zeros(1, 1))], 0),
                CPU,
                torch.zeros((40, 90), dtype=torch.int32),
                torch.zeros(40, dtype=torch.int64),
                some,
            )
            runner.run(step)
        (plain,), (padded,) = model.batches, graphs.batches
        n = len(sequences)
        for name in ("token_ids", "positions"):
            assert getattr(padded, name)[:n].tolist() == getattr(plain, name).tolist(), name
            assert len(getattr(padded, name)) == num_rows
        for name in ("slot_mapping", "context_lens", "block_tables"):
            assert getattr(padded.attention, name)[:n].tolist() == getattr(plain.attention, name).tolist(), name
            assert len(getattr(padded.attention, name)) == num_rows
        assert padded.attention.slot_mapping[n:].tolist() == [-1] * (num_rows - n)
        assert padded.attention.context_lens[n:].tolist() == [0] * (num_rows - n)
        assert padded.attention.query_start_loc.tolist() == list(range(num_rows + 1))
        assert padded.attention.num_decodes == num_rows
        for row, length in enumerate(lengths):
            table = sequences[row].block_table
            slot = table[(length - 1) // block_size] * block_size + (length - 1) % block_size
            assert plain.attention.slot_mapping[row] == slot


def test_arrays_travel_in_one_buffer() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        arrays = []
        for _ in range(rng.integers(1, 9)):
            shape = tuple(rng.integers(0, 7, size=rng.integers(1, 3)))
            arrays.append(rng.integers(-(2**31), 2**31, size=shape).astype(rng.choice([np.int32, np.int64])))
        buffer, places = pack(arrays, pinned=False)
        for array, tensor in zip(arrays, unpack(buffer.clone(), places), strict=True):
            assert torch.equal(tensor, torch.from_numpy(array)) and tensor.dtype == torch.from_numpy(array).dtype
            assert tensor.data_ptr() % 4 == 0


class Recorder:
    """Plays a recording back by calling the function again, and counts how often."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        hidden = run()

        def replay() -> None:
            self.num_replays += 1
            with torch.inference_mode():
                hidden.copy_(run())

        return replay, hidden


def add_graphs(engine: LLM, sizes: list[int]) -> Recorder:
    runner, recorder = runner_of(engine), Recorder()
    with torch.inference_mode():
        forward = partial(runner.model.forward, kv_cache=runner.kv_cache.layers)
        graphs = DecodeGraphs(forward, sizes, runner.tables.shape[1], CPU, recorder)
    interpose(engine, lambda _: make_executor(replace(runner, graphs=graphs).run, CPU, engine.config.depth))
    return recorder


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("mistral", {}),
        ("qwen3", {}),
        ("qwen3", {"quantization": "int8"}),
        ("qwen3", {"quantization": "int8", "dtype": "bfloat16", "kv_cache_dtype": "int8"}),
        ("llama", {"quantization": "int4", "dtype": "bfloat16"}),
    ],
)
def test_a_recorded_step_on_the_cpu_is_the_step_itself(tmp_path: Path, family: str, fields: dict[str, str]) -> None:
    """With tied embeddings, so that rows of a quantised matrix are among what is recorded."""
    pytest.importorskip("numba")
    path = make_engine_checkpoint(tmp_path, family, seed=9, head_dim=16, num_hidden_layers=2, tie_word_embeddings=True)
    draw = random.Random(7)
    prompts = [[draw.randrange(250) for _ in range(draw.randint(1, 40))] for _ in range(7)]
    params = [
        SamplingParams(temperature=0, max_tokens=draw.randint(2, 30), ignore_eos=True, logprobs=1) for _ in prompts
    ]
    engines = [LLM(path, **{"dtype": "float32", **fields}, enforce_eager=eager) for eager in (True, False)]
    graphs = runner_of(engines[1]).graphs
    assert runner_of(engines[0]).graphs is None and graphs is not None
    for _ in range(2):  # recorded, then replayed from the start
        for eager, replayed in zip(*(engine.generate(prompts, params) for engine in engines), strict=True):
            assert eager.token_ids == replayed.token_ids
            for expected, got in zip(eager.logprobs or (), replayed.logprobs or (), strict=True):
                assert [e.logprob for e in expected.values()] == pytest.approx(
                    [e.logprob for e in got.values()], abs=1e-5
                )
    assert graphs.size_for(1) == 1  # it has not given up


def test_a_model_that_cannot_be_recorded_runs_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Heads of 20 features have no fast attention, and the reference's looks at the lengths."""
    path = make_engine_checkpoint(tmp_path, "llama", seed=2, head_dim=20, num_hidden_layers=2)
    with caplog.at_level(logging.INFO):
        engine = LLM(path, dtype="float32")
    if runner_of(engine).graphs is not None:  # there is numba
        assert "without graphs" in caplog.text
    prompts, params = [[1, 2, 3], [4]], SamplingParams(temperature=0, max_tokens=8)
    expected = LLM(path, dtype="float32", enforce_eager=True).generate(prompts, params)
    assert [o.token_ids for o in engine.generate(prompts, params)] == [o.token_ids for o in expected]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("sizes", [[1, 2, 4, 5], [3], [8]])
def test_replayed_steps_give_the_same_tokens(checkpoint: Path, sizes: list[int], overlap: bool) -> None:
    """Under preemption, forks, and batches that no graph is large enough for."""
    draw = random.Random(len(sizes))
    prompts = [[draw.randrange(250) for _ in range(draw.randint(1, 30))] for _ in range(14)]
    params = [
        SamplingParams(
            n=draw.choice([1, 1, 3]),
            temperature=draw.choice([0.0, 0.9]),
            seed=draw.randrange(99),
            max_tokens=draw.randint(1, 20),
            ignore_eos=True,
        )
        for _ in prompts
    ]
    fields = {
        "dtype": "float64",
        "max_model_len": 64,
        "block_size": 4,
        "num_gpu_blocks": 20,
        "num_cpu_blocks": 8,
        "preemption_mode": "swap",
        "max_num_seqs": 5,
        "max_num_batched_tokens": 40,
    }
    plain = LLM(checkpoint, **fields)
    expected = [[c.token_ids for c in output.outputs] for output in plain.generate(prompts, params)]
    engine = LLM(checkpoint, overlap=overlap, **fields)
    recorder = add_graphs(engine, sizes)
    assert [[c.token_ids for c in output.outputs] for output in engine.generate(prompts, params)] == expected
    assert recorder.num_replays > 10
    assert engine.stats().num_preemptions > 0 and engine.stats().num_used_blocks == 0


def test_one_refusal_ends_all_recording(checkpoint: Path) -> None:
    tried = []

    def capture(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        hidden = run()
        tried.append(len(hidden))
        if len(hidden) == 4:
            raise NotRecordableError("it asks")
        return lambda: None, hidden

    graphs = DecodeGraphs(lambda batch: torch.zeros(len(batch.token_ids), 4), [1, 2, 4, 8], 3, CPU, capture)
    graphs.record_all()
    assert tried == [8, 4] and graphs.size_for(1) is None and graphs.size_for(8) is None


def test_the_smallest_engine_there_can_be(checkpoint: Path) -> None:
    engine = LLM(checkpoint, max_model_len=1, block_size=1, num_gpu_blocks=9)
    (output,) = engine.generate([[3]], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert output.finish_reason == "length"


def test_a_batch_with_prompts_has_no_graph(checkpoint: Path) -> None:
    graphs = DecodeGraphs(lambda batch: torch.zeros(len(batch.token_ids), 4), [2, 4], 3, CPU, Recorder())
    assert [graphs.size_for(n) for n in range(1, 6)] == [2, 2, 4, 4, None]

    def batch(num_tokens: int, num_decodes: int) -> Batch:
        empty = torch.zeros(num_tokens, dtype=torch.int64)
        return Batch(empty, empty, AttentionMetadata(empty, empty, empty, empty, empty[:, None], num_decodes))

    assert graphs.fits(batch(4, 4)) and graphs.fits(batch(2, 2))
    assert not graphs.fits(batch(3, 3)) and not graphs.fits(batch(4, 3)) and not graphs.fits(batch(4, 0))
