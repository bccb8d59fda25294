"""After `pytest --benchmark`: the report of the kernels' speed, in the terminal and in `benchmarks/results/`."""

import pytest
from rich.console import Console

from benchmarks import kernel_report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    if session is None or not config.option.benchmark:
        return
    done = [bench for bench in session.benchmarks if bench and not bench.has_error]
    kernels = [bench.extra_info | {"seconds": bench.stats.median} for bench in done if "op" in bench.extra_info]
    others = {bench.name: bench.stats.median for bench in done if "op" not in bench.extra_info}
    console = Console(width=max(112, terminalreporter._tw.fullwidth), highlight=False)
    if others:
        console.print(kernel_report.table_of_others(others))
    if kernels:
        report = kernel_report.report(kernels)
        kernel_report.show(report, console)
        if config.option.keyword or config.option.kernel_backend:
            console.print("Part of the table was timed: the results file of this machine stays as it is.")
        else:
            for path in kernel_report.write(report, kernel_report.RESULTS):
                console.print(f"written to {path}", soft_wrap=True)
