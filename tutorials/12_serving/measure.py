"""Measures the load that the picture of chapter 12 is drawn from, and writes it to load.json.

PYTHONPATH=. python tutorials/12_serving/measure.py
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.load import Server, bench_server
from benchmarks.report import save
from mini_infer import SamplingParams
from mini_infer.cli.bench import Workload
from mini_infer.exceptions import MiniInferError

SEATS = 16
CLIENTS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48)
ROUNDS = 10  # of which the one with the most tokens per second counts: others may use the machine, too
INPUT, OUTPUT = 32, 32  # tokens of a request


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [sys.executable, "-m", "mini_infer", "serve", "--port", str(port), "--max-num-seqs", str(SEATS)]
    process = subprocess.Popen(serve, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        server = ready(f"http://127.0.0.1:{port}")
        rounds = [[measure(server, clients) for clients in CLIENTS] for _ in range(ROUNDS)]
    finally:
        process.terminate()
        process.wait()
    rows = [max(same, key=lambda row: row["tokens_per_second"]) for same in zip(*rounds, strict=True)]
    command = "PYTHONPATH=. python tutorials/12_serving/measure.py"
    figures = {"seats": SEATS, "input_tokens": INPUT, "output_tokens": OUTPUT, "rows": rows}
    print(save("load", command, figures, Path(__file__).parent).read_text())


def ready(url: str) -> Server:
    """The server, once it answers."""
    for _ in range(600):
        try:
            return Server.at(url, None, None)
        except MiniInferError:
            time.sleep(0.1)
    raise TimeoutError(url)


def measure(server: Server, clients: int) -> dict[str, float]:
    """So many clients, each of which asks again as soon as it is answered."""
    workload = Workload.draw(3 * clients, (INPUT, INPUT), (OUTPUT, OUTPUT))
    sampling = SamplingParams(temperature=0)
    report = bench_server(server, workload, sampling, clients, None, seed=0)
    return {
        "clients": clients,
        "ttft_ms": report["ttft_seconds"]["mean"] * 1e3,
        "itl_ms": report["itl_seconds"]["mean"] * 1e3,
        "tokens_per_second": report["output_tokens_per_second"],
    }


if __name__ == "__main__":
    main()
