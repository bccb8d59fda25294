"""Measures the phases that a picture of chapter 11 is drawn from, and writes them to phases.json.

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

SEQUENCES, TOKENS = 64, 100


def main() -> None:
    path = Path(tempfile.mkdtemp()) / "steps.json"
    llm = LLM(dtype="float32", trace=path)
    runner, prepare, preparing = llm._loop._runner, llm._loop._runner.prepare, []

    def timed(scheduled):
        """The trace counts this among "forward"; it is the host's."""
        begin = time.perf_counter()
        batch = prepare(scheduled)
        preparing.append((time.perf_counter() - begin) * 1e3)
        return batch

    vars(runner)["prepare"] = timed
    prompts = [[100 + i] * 16 for i in range(SEQUENCES)]
    llm.generate(prompts, SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True), use_tqdm=False)

    spent = defaultdict(list)
    for line in path.read_text().splitlines():
        event = json.loads(line.rstrip(",")) if line.startswith('{"ph":"X"') else {"name": "step"}
        if event["name"] != "step":
            spent[event["name"]].append(event["dur"] / 1e3)
    # The first steps compute the prompts. Of the rest the lower quartile: others may use the machine, too.
    typical = {name: statistics.quantiles(times[5:])[0] for name, times in {**spent, "prepare": preparing}.items()}
    figures = {
        "sequences": SEQUENCES,
        "plan_ms": typical["schedule"] + typical["copy"] + typical["prepare"],
        "device_ms": typical["forward"] - typical["prepare"] + typical["sample"],
        "read_ms": typical["publish"],
    }
    command = "PYTHONPATH=. python tutorials/11_hiding_the_host/measure.py"
    print(save("phases", command, figures, Path(__file__).parent).read_text())


if __name__ == "__main__":
    main()
