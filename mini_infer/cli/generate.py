"""``mini-infer generate``: many prompts through one engine, and a file of results that can be continued."""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from mini_infer import LLMEngine
from mini_infer.cli.prompts import BadLine, Item, is_jsonl, read_arguments, read_lines
from mini_infer.cli.terminal import printable
from mini_infer.compat.mapping import as_plain
from mini_infer.config import EngineConfig
from mini_infer.engine.progress import generation_progress
from mini_infer.engine.request import Request
from mini_infer.exceptions import InvalidRequestError, QueueFullError
from mini_infer.outputs import FinishReason, GenerateOutput, Increment
from mini_infer.random import derived_seed

STANDARD = Path("-")

Sink = Callable[[Item, Increment], None]
"""Is told of every increment of every prompt."""


def run_generate(
    config: EngineConfig,
    sampling: Mapping[str, Any],
    prompts: list[str],
    file: Path | None,
    jsonl: bool,
    output: Path | None,
    skip_bad: bool,
) -> int:
    """Complete all prompts; the exit status.

    Raises:
        InvalidRequestError: a prompt cannot be used, or ``output`` was made by others. Nothing has run then.
    """
    notes = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    found = _read(prompts, file, jsonl)
    items = [item for item in found if isinstance(item, Item)]
    bad = [line for line in found if isinstance(line, BadLine)]
    _report(bad, skip_bad, notes)

    settings = sorted(sampling.items()), config.model, config.revision, config.seed
    keys = {item.index: item.key(*settings) for item in items}
    done, good_bytes = set[int](), 0
    if output is not None and output != STANDARD and output.is_file():
        done, good_bytes = _read_results(output, keys)
        if done:
            notes.print(f"{output} has {len(done)} of {len(items)} results already", style="dim")
    missing = [item for item in items if item.index not in done]
    if not missing:
        return 1 if bad else 0

    finished: list[tuple[Item, FinishReason]] = []
    with _open(output, good_bytes) as stream:
        told: deque[tuple[Item, Increment]] = deque()

        def listen(item: Item, increment: Increment) -> None:
            told.append((item, increment))

        def deliver() -> None:
            while told:
                item, increment = told.popleft()
                sink(item, increment)
                if increment.output is not None:
                    finished.append((item, increment.output.finish_reason))

        llm = LLMEngine(config)
        usable, requests, unusable = _make_requests(llm, config, sampling, missing, listen)
        _report(unusable, skip_bad, notes)
        num_completions = [request.params.n for request in requests]
        sink = TextPrinter(usable, num_completions) if stream is None else _line_writer(stream, keys)
        in_sight = output is None and sys.stdout.isatty()  # then the texts themselves show how far it is
        try:
            with _naming(output):
                _run(llm, requests, deliver, finished, sys.stderr.isatty() and not in_sight)
        except KeyboardInterrupt:
            deliver()
            notes.print(f"interrupted; {len(finished)} of {len(requests)} are done", style="dim")
            raise
    if output is None and "max_tokens" not in sampling:
        ends = [reason for item, reason in finished if "max_tokens" not in item.sampling]
        if num_cut_short := ends.count("length"):
            limit = llm.default_sampling_params.max_tokens
            notes.print(
                f"{num_cut_short} of {len(finished)} stopped after {limit} tokens; see --max-tokens", style="dim"
            )
    return 1 if bad or unusable else 0


# ---- in ----------------------------------------------------------------------------------------------------------


def _read(prompts: list[str], file: Path | None, jsonl: bool) -> list[Item | BadLine]:
    if prompts and file is not None:
        raise InvalidRequestError("give prompts either as arguments or with --file, not both")
    if prompts:
        return read_arguments(prompts)
    if file is not None and file != STANDARD:
        with file.open("rb") as stream:
            found = list(read_lines(stream, str(file), jsonl or is_jsonl(file)))
    elif file is None and sys.stdin.isatty():
        raise InvalidRequestError("no prompts; give them as arguments, with --file, or pipe them in")
    else:
        found = list(read_lines(sys.stdin.buffer, "standard input", jsonl))
    if not found:
        raise InvalidRequestError(f"{file or 'standard input'} holds no prompts")
    return found


def _report(bad: list[BadLine], skip: bool, notes: Console) -> None:
    if bad and not skip:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise InvalidRequestError(f"{bad[0]}{more}; nothing was run. --skip-bad goes on without such prompts")
    for line in bad:
        notes.print(Text.assemble(("skipped: ", "yellow"), str(line)))


def _make_requests(
    llm: LLMEngine, config: EngineConfig, sampling: Mapping[str, Any], items: list[Item], listen: Sink
) -> tuple[list[Item], list[Request], list[BadLine]]:
    """The prompts that this model can take, a request for each of them, and the other prompts."""
    usable, requests, unusable = [], [], []
    for item in items:
        options = {**sampling, **item.sampling}
        if options.get("seed") is None:
            # Of the prompt's own place, so that what is left over later comes out as it would have at once.
            options["seed"] = derived_seed(config.seed, item.index)
        try:
            prompt = llm.render_chat(item.content) if item.kind == "messages" else item.content
            params = replace(llm.default_sampling_params, **options)
            requests.append(llm.make_request(prompt, params, listener=partial(listen, item)))
            usable.append(item)
        except InvalidRequestError as error:
            unusable.append(BadLine(item.index, item.place, str(error)))
    return usable, requests, unusable


def _run(
    llm: LLMEngine, requests: list[Request], deliver: Callable[[], None], finished: Sized, show_progress: bool
) -> None:
    """Run them all. What comes is delivered between steps, so that a full disk is no failure of the engine's."""
    waiting = deque(requests)
    with generation_progress(len(requests), show_progress) as report:
        while waiting or not llm.is_finished():
            try:
                while waiting:
                    llm.submit(waiting[0])
                    waiting.popleft()
            except QueueFullError:
                pass  # max_waiting holds here too: the rest comes when these have begun
            llm.step()
            deliver()
            report(len(finished), llm.stats().num_generated_tokens)


# ---- out ---------------------------------------------------------------------------------------------------------


@contextmanager
def _open(output: Path | None, good_bytes: int) -> Iterator[IO[bytes] | None]:
    """Where result objects go, cut back to ``good_bytes`` if it is a file; None where texts are printed instead.

    A pipe or a device is neither read nor cut.
    """
    if output is None:
        yield None
    elif output == STANDARD:
        yield sys.stdout.buffer
    elif output.exists() and not output.is_file():
        with output.open("wb", buffering=0) as stream:
            yield stream
    else:
        with output.open("ab", buffering=0) as stream:
            stream.truncate(good_bytes)
            yield stream


@contextmanager
def _naming(output: Path | None) -> Iterator[None]:
    """Errors of the system say where they happened."""
    try:
        yield
    except BrokenPipeError:  # whoever reads has had enough
        raise
    except OSError as error:
        place = "standard output" if output in (None, STANDARD) else str(output)
        raise OSError(error.errno, error.strerror, error.filename or place) from error


def _line_writer(stream: IO[bytes], keys: Mapping[int, str]) -> Sink:
    """Writes an object per prompt, once it has finished."""

    def write(item: Item, increment: Increment) -> None:
        if increment.output is not None:
            result = _result(item, keys[item.index], increment.output)
            line = memoryview(json.dumps(result, ensure_ascii=False).encode() + b"\n")
            while line:  # a system need not take all at once
                line = line[stream.write(line) :]
            stream.flush()

    return write


def _result(item: Item, key: str, output: GenerateOutput) -> dict[str, Any]:
    plain = as_plain(output)
    result = {
        "index": item.index,
        item.kind: item.content,
        "text": output.text,
        "finish_reason": output.finish_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "token_ids": output.token_ids,
        "key": key,
    }
    if len(output.outputs) > 1:
        result["outputs"] = plain["outputs"]
    if output.logprobs is not None:
        result["logprobs"] = plain["outputs"][0]["logprobs"]
    if output.prompt_logprobs is not None:
        result["prompt_logprobs"] = plain["prompt_logprobs"]
    return result


def _read_results(path: Path, keys: Mapping[int, str]) -> tuple[set[int], int]:
    """The prompts that a file has results for, and how many of its bytes are whole lines.

    Raises:
        InvalidRequestError: it holds something else, or the results of other prompts or options.
    """
    done, good_bytes = set(), 0
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break  # whoever wrote it was stopped in the middle
        try:
            result = json.loads(line)
            index, key = int(result["index"]), result["key"]
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidRequestError(
                f"{path}, line {number}: not a result of mini-infer generate; choose another --output"
            ) from error
        if keys.get(index) != key:
            raise InvalidRequestError(
                f"{path}, line {number}: the result of another prompt, or made by another model or with other options; "
                "choose another --output"
            )
        done.add(index)
        good_bytes += len(line)
    return done, good_bytes


class TextPrinter:
    """Prints texts in the order of the prompts: the first unfinished one as it grows, the others when it is their turn.

    Args:
        items: the prompts.
        num_completions: how many texts each has.
    """

    def __init__(self, items: list[Item], num_completions: list[int]) -> None:
        self._texts = {
            (item.index, place): _Growing([_title(item, place, number)])
            for item, number in zip(items, num_completions, strict=True)
            for place in range(number)
        }
        self._queue = deque(self._texts.values())
        if len(self._queue) == 1:
            self._queue[0].pieces.clear()
        self._clean = printable if sys.stdout.isatty() else str

    def __call__(self, item: Item, increment: Increment) -> None:
        text = self._texts[item.index, increment.index]
        text.pieces.append(increment.text)
        if increment.finish_reason is not None:
            text.pieces.append("\n")
            text.ended = True
        while self._queue:
            head = self._queue[0]
            sys.stdout.write(self._clean("".join(head.pieces)))
            head.pieces.clear()
            if not head.ended:
                break
            self._queue.popleft()
        sys.stdout.flush()


@dataclass
class _Growing:
    """A text that is being generated: what is not yet printed of it, and whether it has ended."""

    pieces: list[str]
    ended: bool = False


def _title(item: Item, place: int, num_completions: int) -> str:
    content = item.content if item.kind == "prompt" else json.dumps(item.content, ensure_ascii=False)
    which = f"{item.index + 1}.{place + 1}" if num_completions > 1 else f"{item.index + 1}"
    return f"[{which}] {content}\n"
