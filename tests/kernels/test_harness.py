"""The tools of these tests, tested: what finds a mistake finds one, and the report says what was measured."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import kernel_report
from mini_infer import kernels
from mini_infer.kernels import registry

from .truth import check, on_device


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend that never writes the last row of a SwiGLU."""
    monkeypatch.setattr(registry, "_table", dict(registry._table))

    @kernels.register("silu_and_mul", backend="forgetful")
    def forgetful(x: Tensor) -> Tensor:
        gate, up = x[:-1].chunk(2, dim=-1)
        y = torch.empty(x.shape[0], up.shape[1])
        y[:-1] = torch.nn.functional.silu(gate) * up
        return y

    return "forgetful"


def test_a_row_that_is_never_written_is_found(forgetful: str) -> None:
    x = torch.zeros(3, 8)  # zeros, as fresh memory often is: without the poison this would pass
    with kernels.use_backend(forgetful):
        out = on_device("silu_and_mul", forgetful, "cpu")(x)
    with pytest.raises(
        pytest.fail.Exception, match=r"silu_and_mul on backend 'forgetful' \(cpu\): row \[2\] has .* inf"
    ):
        check(out, torch.zeros(3, 4), torch.float32)
    registry._resolve.cache_clear()


def test_the_report_of_a_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib draws the plot")
    monkeypatch.setattr(kernel_report, "copy_bandwidth", lambda: 1e10)
    monkeypatch.setattr(kernel_report, "matrix_peak", lambda dtype: 2e11)
    row = {"op": "rmsnorm", "shape": "a", "dtype": "float32", "bytes": 10**6, "flops": 10**9, "compute": False}
    timed = [row | {"backend": "reference", "seconds": 1e-3}, row | {"backend": "mine", "seconds": 2e-4}]
    timed.append(row | {"op": "paged_prefill_attention", "compute": True, "backend": "reference", "seconds": 0.01})
    path, plot = kernel_report.write(kernel_report.report(timed), tmp_path)
    assert plot.read_bytes().startswith(b"\x89PNG")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert {"command", "date", "hardware", "figures"} <= saved.keys() and "torch" in saved["hardware"]
    reference, mine, prompt = saved["figures"]["kernels"]
    assert (reference["rate"], reference["unit"], reference["percent_of_peak"]) == (1.0, "GB/s", 10.0)
    assert (mine["speedup_over_reference"], mine["rate"], mine["percent_of_peak"]) == (5.0, 5.0, 50.0)
    assert (prompt["rate"], prompt["unit"], prompt["percent_of_peak"]) == (0.1, "TFLOP/s", 50.0)
