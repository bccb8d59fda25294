"""``mini-infer demo --diffusion``: answers fill in, step by step."""

from dataclasses import replace

from rich.console import Console

from mini_infer import LLM, SamplingParams
from mini_infer.cli.terminal import draw_canvas
from mini_infer.engine.detokenizer import canvas_cells
from mini_infer.engine.loop import Flight, StepObserver, StepResult
from mini_infer.exceptions import InvalidConfigError
from mini_infer.scheduler import Sequence

TUTOR = "diffusion-tutor"
QUESTIONS = ("What is a KV cache?", "什么是分页注意力？")
WAYS = {
    "one token a step · 每步一个词元": SamplingParams(temperature=0, gen_length=64, steps=64, block_length=16),
    "all that are surer than 0.9 · 概率高于 0.9 的全部": SamplingParams(
        temperature=0, gen_length=64, block_length=16, threshold=0.9
    ),
}


class CanvasView(StepObserver):
    """Prints the canvas of every sequence after every step.

    Args:
        console: where to.
        llm: a diffusion model's engine.

    Raises:
        InvalidConfigError: it is none.
    """

    def __init__(self, console: Console, llm: LLM) -> None:
        if llm.model_config.diffusion is None:
            raise InvalidConfigError(f"{llm.config.model} writes one token after the other; name a diffusion model")
        self._console, self._llm = console, llm
        self._seen: dict[Sequence, tuple[int, list[str | None]]] = {}

    def committed(self, flight: Flight, result: StepResult) -> None:
        for item in flight.plan.scheduled:
            number, before = self._seen.pop(item.sequence, (0, []))
            cells = canvas_cells(item.sequence.canvas, self._llm.tokenizer.token_bytes)
            self._console.print(f"{number + 1:3}", draw_canvas(cells, before), highlight=False, soft_wrap=True)
            if item.sequence.finish_reason is None:
                self._seen[item.sequence] = number + 1, cells


def run_canvas_demo(console: Console, model: str | None) -> None:
    """Answer questions, and show the canvas after every step.

    Args:
        model: a diffusion model's directory or Hub name; None is the bundled diffusion tutor.

    Raises:
        InvalidConfigError: it is no diffusion model.
    """
    with LLM(model or TUTOR) as llm:
        llm.watch(CanvasView(console, llm))
        assert llm.model_config.diffusion is not None
        has_own_blocks = llm.model_config.diffusion.span is not None
        for question in QUESTIONS:
            for way, params in WAYS.items():
                console.print(f"\n[bold]{question}[/bold]  {way}", highlight=False)
                params = replace(params, block_length=None) if has_own_blocks else params
                llm.chat([{"role": "user", "content": question}], params, use_tqdm=False)
