"""Mini-Infer."""

import time
from typing import Any

from benchmarks.workers.channel import Done, Job, serve


def load(model: str, options: dict[str, Any]) -> dict[str, Any]:
    from mini_infer import LLM, SamplingParams

    llm = LLM(model, **options)

    def run(*job: Any) -> Done:
        prompts, num_outputs, temperature, top_k, top_p = Job(*job)
        params = [
            SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=n, ignore_eos=True)
            for n in num_outputs
        ]
        begin, clock = time.perf_counter(), time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        stats = llm.stats()
        return Done(
            seconds,
            [output.token_ids for output in outputs],
            [(output.metrics.first_token_time or clock) - clock for output in outputs],
            [output.metrics.finished_time - clock for output in outputs],
            {"num_blocks": stats.num_blocks, "peak_used_blocks": stats.peak_used_blocks},
        )

    return {"run": run}


if __name__ == "__main__":
    serve("mini_infer", load)
