"""transformers, `generate`: static batches, padded on the left to the longest prompt, until the longest output ends."""

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from benchmarks.workers.channel import Done, Job, serve

BATCH_SIZE = 16


class Clock(StoppingCriteria):
    """Stops nothing; notes when each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def load(name: str, options: dict[str, Any]) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, options["dtype"])).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)  # the checkpoint's own may stop early, or penalise

    def run(*arguments: Any) -> Done:
        job = Job(*arguments)
        token_ids: list[list[int]] = []
        first: list[float] = []
        last: list[float] = []
        begin = time.perf_counter()
        for start in range(0, len(job.prompts), BATCH_SIZE):
            prompts = job.prompts[start : start + BATCH_SIZE]
            num_outputs = job.num_outputs[start : start + BATCH_SIZE]
            longest = max(map(len, prompts))
            clock = Clock()
            output = model.generate(
                input_ids=torch.tensor([[0] * (longest - len(p)) + p for p in prompts]),
                attention_mask=torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
                max_new_tokens=max(num_outputs),
                stopping_criteria=StoppingCriteriaList([clock]),
                **job.sampling,
            )
            for row, n in zip(output.tolist(), num_outputs, strict=True):
                token_ids.append(row[longest : longest + n])
                first.append(clock.times[0] - begin)
                last.append(clock.times[n - 1] - begin)
        return Done(time.perf_counter() - begin, token_ids, first, last, {})

    def gap(token_ids: list[int]) -> float:
        """By how much the likeliest next token's logit exceeds the second's."""
        with torch.inference_mode():
            logits = model(torch.tensor([token_ids]), logits_to_keep=1).logits[0, -1].double()
        best, second = logits.topk(2).values.tolist()
        return float(best - second)

    return {"run": run, "gap": gap}


if __name__ == "__main__":
    serve("transformers", load)
