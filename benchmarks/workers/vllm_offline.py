"""vLLM, its `LLM` class. Runs in the interpreter of vLLM's own environment."""

import time
from typing import Any

from benchmarks.workers.channel import Done, Job, serve


def load(model: str, options: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    # Without prefix caching, so that a round does not find the prompts of the one before; the statistics hold TTFT.
    llm = LLM(model, enable_prefix_caching=False, disable_log_stats=False, **options)

    def run(*job: Any) -> Done:
        prompts, num_outputs, temperature, top_k, top_p = Job(*job)
        params = [
            SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=n, ignore_eos=True)
            for n in num_outputs
        ]
        begin, clock = time.perf_counter(), time.time()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        metrics = [output.metrics for output in outputs]
        first = [m.arrival_time - clock + m.first_token_latency for m in metrics]
        return Done(
            seconds,
            [list(output.outputs[0].token_ids) for output in outputs],
            first,
            [begun + m.last_token_ts - m.first_token_ts for begun, m in zip(first, metrics, strict=True)],
            {},
        )

    return {"run": run}


if __name__ == "__main__":
    serve("vllm", load)
