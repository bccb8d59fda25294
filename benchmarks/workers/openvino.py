"""OpenVINO GenAI, its continuous batching. Runs in the interpreter of an environment of its own."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workers.channel import Done, Job, serve


def converted(model: str, in_int8: bool) -> Path:
    """The checkpoint in OpenVINO's own format, weights as they are or in int8; made once, and kept among the temporary
    files.

    It has no tokenizer, since prompts are token ids.
    """
    path = (
        Path(tempfile.gettempdir()) / "mini-infer-checkpoints" / "openvino" / f"{Path(model).name}{'-int8' * in_int8}"
    )
    if not path.exists():
        from optimum.intel import OVModelForCausalLM

        part = path.with_suffix(".part")
        OVModelForCausalLM.from_pretrained(model, export=True, load_in_8bit=in_int8, compile=False).save_pretrained(
            part
        )
        part.rename(path)
    return path


def load(model: str, options: dict[str, Any]) -> dict[str, Any]:
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 4  # GB, as vLLM's here
    scheduler.max_num_seqs = 256
    scheduler.enable_prefix_caching = False  # so that a round does not find the prompts of the one before
    precision = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[options["dtype"]]
    if precision.upper() not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        precision = "f32"  # what it computes in where the processor has nothing narrower, and refuses a cache of less
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        converted(model, options.get("in_int8", False)),
        scheduler,
        "CPU",
        {"INFERENCE_PRECISION_HINT": precision, "KV_CACHE_PRECISION": precision},
    )

    def run(*arguments: Any) -> Done:
        job = Job(*arguments)
        begin = time.perf_counter()
        handles = []
        for place, (prompt, n) in enumerate(zip(job.prompts, job.num_outputs, strict=True)):
            config = openvino_genai.GenerationConfig()
            config.set_eos_token_id(0)  # a checkpoint that has none is refused, though it is ignored
            config.max_new_tokens, config.ignore_eos = n, True
            config.do_sample = job.temperature > 0
            if config.do_sample:
                config.temperature, config.top_p, config.top_k = job.temperature, job.top_p, max(job.top_k, 0)
            handles.append(pipeline.add_request(place, openvino.Tensor(np.array([prompt], dtype=np.int64)), config))
        token_ids: list[list[int]] = [[] for _ in handles]
        first, last = [0.0] * len(handles), [0.0] * len(handles)
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter() - begin
            for place, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        first[place] = first[place] if token_ids[place] else now
                        last[place] = now
                        token_ids[place] += output.generated_ids
        return Done(time.perf_counter() - begin, token_ids, first, last, {})

    return {"run": run}


if __name__ == "__main__":
    serve("openvino_genai", load)
