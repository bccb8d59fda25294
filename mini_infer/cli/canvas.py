"""``mini-infer demo --diffusion``: answers fill in, step by step."""

from itertools import groupby
from pathlib import Path

from rich.console import Console

from mini_infer import LLM, SamplingParams
from mini_infer.cli.terminal import printable
from mini_infer.config import BUNDLED_MODEL
from mini_infer.engine.loop import Flight, NullObserver, StepResult
from mini_infer.exceptions import InvalidConfigError
from mini_infer.scheduler import Sequence

TUTOR = Path(BUNDLED_MODEL).with_name("diffusion_tutor")
QUESTIONS = ("What is a KV cache?", "什么是分页注意力？")
WAYS = {
    "one token a step · 每步一个词元": SamplingParams(temperature=0, gen_length=64, steps=64, block_length=16),
    "all that are surer than 0.9 · 概率高于 0.9 的全部": SamplingParams(
        temperature=0, gen_length=64, block_length=16, threshold=0.9
    ),
}
MASK = "░"


class CanvasView(NullObserver):
    """Prints the canvas of every sequence after every step: a shaded cell for each mask.

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
        self._mask = llm.model_config.diffusion.mask_token_id
        self._num_steps: dict[str, int] = {}

    def committed(self, flight: Flight, result: StepResult) -> None:
        for item in flight.plan.scheduled:
            request_id = item.sequence.request_id
            number = self._num_steps[request_id] = self._num_steps.get(request_id, 0) + 1
            line = f"{number:3} {self._drawn(item.sequence)}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _drawn(self, sequence: Sequence) -> str:
        runs = groupby(sequence.token_ids[sequence.num_prompt_tokens :], lambda token_id: token_id == self._mask)
        parts = (len(list(run)) * MASK if is_mask else self._llm.detokenize(list(run)) for is_mask, run in runs)
        return printable("".join(parts)).replace("\n", " ")


def run_canvas_demo(console: Console, model: str | None) -> None:
    """Answer questions, and show the canvas after every step.

    Args:
        model: a diffusion model's directory or Hub name; None is the bundled diffusion tutor.

    Raises:
        InvalidConfigError: it is no diffusion model, or none is bundled.
    """
    if model is None and not TUTOR.is_dir():
        raise InvalidConfigError(
            "no diffusion tutor is bundled here: name a model with --model, or make the tutor with "
            "`python -m tools.train_tutor --diffusion`"
        )
    with LLM(model or TUTOR) as llm:
        llm.watch(CanvasView(console, llm))
        for question in QUESTIONS:
            for way, params in WAYS.items():
                console.print(f"\n[bold]{question}[/bold]  {way}", highlight=False)
                llm.chat([{"role": "user", "content": question}], params, use_tqdm=False)
