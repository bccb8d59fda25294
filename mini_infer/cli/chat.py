"""``mini-infer chat``: a conversation in the terminal, or one that is piped in."""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mini_infer import LLMEngine
from mini_infer.cli.flags import hints, parse
from mini_infer.cli.functions import Functions
from mini_infer.cli.terminal import draw_canvas, printable
from mini_infer.compat.options import SAMPLING_ALIASES
from mini_infer.config import EngineConfig
from mini_infer.engine.calls import CallBegins, CallScanner
from mini_infer.engine.calls import Text as TextPiece
from mini_infer.engine.detokenizer import canvas_cells
from mini_infer.engine.tools import ToolUse
from mini_infer.exceptions import InvalidRequestError
from mini_infer.outputs import GenerateOutput, Increment
from mini_infer.sampling import SamplingParams
from mini_infer.structured import StructuredOutputsParams

HELP = {
    "/reset": "start a new conversation",
    "/system [TEXT]": "show the system message, or begin the conversation with this one (- for none)",
    "/set [NAME [VALUE]]": "show the sampling options, or set one: /set temperature 0.2",
    "/help": "show this",
    "/exit": "leave; so does Ctrl-D",
}

MAX_HISTORY = 1000

MAX_ROUNDS = 8
"""How often a model may call tools before it answers."""


class Chat:
    """A conversation and how it goes on.

    Args:
        llm: who answers.
        sampling: options that differ from the model's own.
        system: the system message, if any.
        notes: where everything goes that is not an answer.
        functions: what the model may call, if anything.

    Raises:
        InvalidRequestError: the model has no usable chat template, or an option cannot be used in a chat.
    """

    def __init__(
        self,
        llm: LLMEngine,
        sampling: Mapping[str, Any],
        system: str | None,
        notes: Console,
        functions: Functions | None = None,
    ) -> None:
        self._llm = llm
        self._notes = notes
        self._system = system
        self._messages: list[dict[str, Any]] = []
        self._functions = functions
        self._params = llm.default_sampling_params
        self._set({"max_tokens": None, **sampling})
        try:
            llm.render_chat([*self._beginning(), {"role": "user", "content": "?"}])
        except InvalidRequestError as error:
            raise InvalidRequestError(
                f"{llm.config.model} cannot chat: {error}. Choose a model that was made for it, or --tokenizer with a "
                "chat template; mini-infer generate needs none"
            ) from error

    def take(self, line: str) -> bool:
        """Obey a command or answer a message; False when it was ``/exit``.

        Raises:
            InvalidRequestError: it cannot be done; the conversation is as it was.
        """
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self._answer(line)
            return True
        command, _, rest = line.partition(" ")
        match command:
            case "/exit" | "/quit":
                return False
            case "/help":
                self._show_help()
            case "/reset":
                self._messages.clear()
                self._notes.print("a new conversation", style="dim")
            case "/system":
                self._change_system(rest.strip())
            case "/set":
                self._show_or_set(*rest.split(maxsplit=1))
            case _:
                raise InvalidRequestError(f"there is no {command}; /help shows what there is")
        return True

    # ---- answers -------------------------------------------------------------------------------------------------

    def _answer(self, message: str) -> None:
        conversation: list[dict[str, Any]] = [*self._messages, {"role": "user", "content": message}]
        for _ in range(MAX_ROUNDS):
            output, calls = self._stream(self._render(conversation))
            if not calls:
                break
            conversation += self._run(calls, len(conversation))
        if output.text:  # also what was there when it was stopped
            self._messages = conversation if calls else [*conversation, {"role": "assistant", "content": output.text}]
        self._show_figures(output)

    def _render(self, conversation: list[dict[str, Any]]) -> str:
        tools = () if self._functions is None else self._functions.tools
        prompt = self._llm.render_chat([*self._beginning(), *conversation], tools=tools)
        limit = self._llm.max_model_len
        num_tokens = len(self._llm.tokenize(prompt))
        if num_tokens >= limit:
            what = (
                f"the conversation has {num_tokens} tokens" if self._messages else f"{num_tokens} tokens are too many"
            )
            raise InvalidRequestError(f"the context is full: {what}, {limit} fit. /reset starts a new conversation")
        return prompt

    def _run(self, calls: list[list[str]], turn: int) -> list[dict[str, Any]]:
        """Do what the model asks for, and show it; the messages that tell of it."""
        assert self._functions is not None
        made, results = [], []
        for place, (name, arguments) in enumerate(calls):
            result = self._functions.call(name, arguments)
            self._notes.print(Text(f"{name}({arguments}) = {result}", style="dim"), soft_wrap=True)
            call_id = f"call{turn % 100:02d}{place:03d}"  # nine characters, as some templates insist
            made.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
            results.append({"role": "tool", "tool_call_id": call_id, "name": name, "content": result})
        return [{"role": "assistant", "content": "", "tool_calls": made}, *results]

    def _stream(self, prompt: str) -> tuple[GenerateOutput, list[list[str]]]:
        """Print an answer as it comes; Ctrl-C ends it after the step that is running. Also the calls that it makes,
        each a name and its arguments. In a terminal, a diffusion model's canvas is shown until the answer is there."""
        increments: list[Increment] = []
        calls: list[list[str]] = []
        params, scanner = self._params, None
        if self._functions is not None:
            form = self._llm.tokenizer.tool_format
            params, scanner = self._with_tools(ToolUse(self._functions.tools, form)), CallScanner(form)
        is_diffusion = bool(self._llm.default_sampling_params.diffusion_options)
        if is_diffusion and params.gen_length is None:
            params = replace(params, gen_length=params.max_tokens)
        request = self._llm.make_request(prompt, params, listener=increments.append)
        in_terminal = sys.stdout.isatty()
        clean = printable if in_terminal else str
        screen = Live(auto_refresh=False, transient=True) if in_terminal and is_diffusion else nullcontext()
        held, cells = "", list[str | None]()

        def told(text: str) -> str:
            if scanner is None:
                return text
            shown = ""
            for piece in scanner.feed(text) + (scanner.end() if request.finished else []):
                if isinstance(piece, TextPiece):
                    shown += piece.text
                elif isinstance(piece, CallBegins):
                    calls.append([piece.name, ""])
                else:
                    calls[piece.index][1] += piece.text
            return shown

        with _noticing_interrupts() as interrupted, screen as live:
            self._llm.submit(request)
            while not request.finished:
                if interrupted():
                    self._llm.abort(request.request_id)
                else:
                    self._llm.step()
                text = clean(told("".join(increment.text for increment in increments)))
                if live is None:
                    _write(text)
                elif increments:
                    held += text
                    before, cells = cells, canvas_cells(increments[-1].canvas, self._llm.tokenizer.token_bytes)
                    live.update(draw_canvas(cells, before), refresh=True)
                increments.clear()
        _write(held)
        output = request.output()
        if output.finish_reason != "stop":
            calls.clear()  # the last one may be cut off
        if not calls:
            _write("\n")
        return output, calls

    def _with_tools(self, use: ToolUse) -> SamplingParams:
        special = {text: token_id for token_id, text in self._llm.tokenizer.special_tokens.items()}
        params = self._params
        if use.format.mark in special:
            params = replace(params, skip_special_tokens=False)
        if use.is_constrained:
            params = replace(params, structured_outputs=StructuredOutputsParams(grammar=use.grammar(special)))
        return params

    def _show_figures(self, output: GenerateOutput) -> None:
        num_tokens, metrics = len(output.token_ids), output.metrics
        context, limit = len(output.prompt_token_ids) + num_tokens, self._llm.max_model_len
        figures = [f"{num_tokens} tokens"]
        if metrics.first_token_time is not None and metrics.time_to_first_token is not None:
            if num_tokens > 1:
                rate = (num_tokens - 1) / max(metrics.finished_time - metrics.first_token_time, 1e-9)
                figures.append(f"{rate:.0f} tokens/s")
            figures.append(f"TTFT {metrics.time_to_first_token * 1e3:.0f} ms")
        figures.append(f"context {context} of {limit}")
        if output.finish_reason == "abort":
            figures.append("stopped")
        elif output.error is not None:
            figures.append(str(output.error))
        elif output.finish_reason == "length":
            figures.append(
                "the context is full: /reset starts a new conversation" if context >= limit else "cut at max_tokens"
            )
        self._notes.print(" · ".join(figures), style="dim")

    # ---- commands ------------------------------------------------------------------------------------------------

    def _beginning(self) -> list[dict[str, str]]:
        return [] if self._system is None else [{"role": "system", "content": self._system}]

    def _show_help(self) -> None:
        table = Table.grid(padding=(0, 2))
        for command, meaning in HELP.items():
            table.add_row(escape(command), escape(meaning), style="dim")
        self._notes.print(table)

    def _change_system(self, text: str) -> None:
        if text:
            before, self._system = self._system, None if text == "-" else text
            try:
                self._llm.render_chat([*self._beginning(), {"role": "user", "content": "?"}])
            except InvalidRequestError:
                self._system = before
                raise
        self._notes.print(Text(f"system: {self._system or 'none'}", style="dim"))

    def _show_or_set(self, name: str = "", value: str | None = None) -> None:
        if not name:
            table = Table.grid(padding=(0, 2))
            for field in fields(SamplingParams):
                table.add_row(
                    field.name, str(getattr(self._params, field.name)), escape(field.metadata["help"]), style="dim"
                )
            self._notes.print(table)
            return
        names = {**{field.name: field.name for field in fields(SamplingParams)}, **SAMPLING_ALIASES}
        field_name = names.get(name.replace("-", "_"))
        if field_name is None:
            raise InvalidRequestError(f"there is no sampling option {name!r}; /set shows what there is")
        if value is not None:
            self._set({field_name: parse(hints(SamplingParams)[field_name], [value])})
        self._notes.print(Text(f"{field_name}: {getattr(self._params, field_name)}", style="dim"))

    def _set(self, options: Mapping[str, Any]) -> None:
        params = replace(self._params, **options)
        if params.n != 1:
            raise InvalidRequestError(
                f"a chat shows one answer but n is {params.n}; use mini-infer generate for several"
            )
        self._params = params


def run_chat(config: EngineConfig, sampling: Mapping[str, Any], system: str | None, tools: Path | None) -> int:
    """Hold a conversation until the input ends; the exit status, 2 if a line of piped input could not be used."""
    notes = Console(stderr=True, highlight=False, soft_wrap=True)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    functions = None if tools is None else Functions.of_file(tools)
    with notes.status("Loading the model") if interactive else nullcontext():
        chat = Chat(LLMEngine(config), sampling, system, notes, functions)
    if interactive:
        notes.print(Text(f"{Path(str(config.model)).name} · /help shows the commands", style="dim"))
    status = 0
    for line in _typed_lines() if interactive else _piped_lines():
        try:
            if not chat.take(line):
                break
        except InvalidRequestError as error:
            notes.print(Text.assemble(("error: ", "red"), str(error)))
            status = 0 if interactive else 2
    return status


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


# ---- lines -------------------------------------------------------------------------------------------------------


def _typed_lines() -> Iterator[str]:
    with _history():
        while True:
            try:
                yield input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(Ctrl-D leaves)")
            except UnicodeDecodeError:
                print("(that was not UTF-8)")


def _piped_lines() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
            raise InvalidRequestError(f"standard input, line {number}: {byte}, which is not UTF-8") from error


@contextmanager
def _history() -> Iterator[None]:
    """Editing and history of typed lines, where Python has readline; kept in a file that only its owner can read."""
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    path = _state_directory() / "chat_history"
    with suppress(OSError):  # there is none yet
        readline.read_history_file(path)
    readline.set_history_length(MAX_HISTORY)
    try:
        yield
    finally:
        with suppress(OSError):  # a home that cannot be written to is no reason to fail
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            readline.write_history_file(path)


def _state_directory() -> Path:
    """Where the XDG base directories keep what is worth keeping but not configuration."""
    home = os.environ.get("XDG_STATE_HOME")
    return (Path(home) if home else Path.home() / ".local" / "state") / "mini-infer"


@contextmanager
def _noticing_interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted, so that no step of the engine is torn apart; a second one interrupts as ever.

    Yields:
        A function that tells whether it was pressed.
    """
    pressed = False

    def note(signal_number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
