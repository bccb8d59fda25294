"""Measures what the pictures of chapter 11 are drawn from, and writes it to phases.json and replays.json.

PYTHONPATH=. python tutorials/11_hiding_the_host/measure.py
"""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.report import save
from mini_infer import LLM, SamplingParams

SEQUENCES, TOKENS, ROUNDS = 64, 100, 5
COMMAND = "PYTHONPATH=. python tutorials/11_hiding_the_host/measure.py"


def phases() -> dict[str, float]:
    """Milliseconds of the host's and the device's parts of a decode step."""
    path = Path(tempfile.mkdtemp()) / "steps.json"
    llm = LLM(dtype="float32", trace=path)
    prompts = [[100 + i] * 16 for i in range(SEQUENCES)]
    llm.generate(prompts, SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True), use_tqdm=False)

    spent = defaultdict(list)
    for line in path.read_text().splitlines():
        event = json.loads(line.rstrip(",")) if line.startswith('{"ph":"X"') else {"name": "step"}
        if event["name"] != "step":
            spent[event["name"]].append(event["dur"] / 1e3)
    # The first steps compute the prompts. Of the rest the lower quartile: others may use the machine, too.
    typical = {name: statistics.quantiles(times[5:])[0] for name, times in spent.items()}
    return {
        "sequences": SEQUENCES,
        "plan_ms": typical["schedule"] + typical["submit"],
        "device_ms": typical["compute"],
        "read_ms": typical["publish"],
    }


def replays() -> dict[str, list[float]]:
    """Milliseconds of a decode step by the number of sequences, each kernel called from Python or replayed."""
    sizes, engines = [1, 2, 4, 8, 16, 32, 64], (LLM(dtype="float32", enforce_eager=True), LLM(dtype="float32"))
    best: list[list[float]] = [[], []]
    for size in sizes:  # by turns, since others may use the machine, too
        rounds = [[step_ms(llm, size) for llm in engines] for _ in range(ROUNDS)]
        for times, of_engine in zip(best, zip(*rounds, strict=True), strict=True):
            times.append(min(of_engine))
    return {"sequences": sizes, "eager_ms": best[0], "replayed_ms": best[1]}


def step_ms(llm: LLM, num_sequences: int) -> float:
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    for i in range(num_sequences):
        llm.add_request([100 + i] * 16, params)
    times = []
    while not llm.is_finished():
        begin = time.perf_counter()
        llm.step()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.quantiles(times[5:])[0]


def main() -> None:
    for measure in (phases, replays):
        print(save(measure.__name__, COMMAND, measure(), Path(__file__).parent).read_text())


if __name__ == "__main__":
    main()
