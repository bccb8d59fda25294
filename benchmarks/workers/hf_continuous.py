"""transformers, `generate_batch`: its continuous batching over a paged cache, with scaled_dot_product_attention."""

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from benchmarks.workers.channel import Done, Job, serve


def load(name: str, options: dict[str, Any]) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(
        name, dtype=getattr(torch, options["dtype"]), attn_implementation="paged|sdpa"
    ).eval()

    def run(*arguments: Any) -> Done:
        job = Job(*arguments)
        generation = GenerationConfig(eos_token_id=-1, pad_token_id=0, **job.sampling)
        page = 256
        batching = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=2 + sum((len(p) + n) // page + 1 for p, n in zip(job.prompts, job.num_outputs, strict=True)),
            allow_block_sharing=False,  # so that a round does not find the prompts of the one before
        )
        # `generate_batch` gives every request the same length, so this is what it does, with each one's own.
        with model.continuous_batching_context_manager(generation, continuous_batching_config=batching) as manager:
            begin = time.perf_counter()
            for place, (prompt, n) in enumerate(zip(job.prompts, job.num_outputs, strict=True)):
                manager.add_request(prompt, str(place), max_new_tokens=n, record_timestamps=True, eos_token_id=-1)
            results: dict[int, Any] = {}
            while len(results) < len(job.prompts):
                result = manager.get_result(timeout=1)
                if result is not None and result.is_finished():
                    if result.error is not None:
                        raise RuntimeError(result.error)
                    results[int(result.request_id)] = result
                elif result is None and not manager.is_running():
                    raise RuntimeError("its thread ended")
            seconds = time.perf_counter() - begin
        ordered = [results[place] for place in range(len(job.prompts))]
        return Done(
            seconds,
            [result.generated_tokens for result in ordered],
            [result.timestamps[0] - begin for result in ordered],
            [result.timestamps[-1] - begin for result in ordered],
            {},
        )

    return {"run": run}


if __name__ == "__main__":
    serve("transformers", load)
