"""Several ways to multiply with one weight: each gives the product, and the quickest here is taken."""

import functools
import io
import json
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

import numba
from rich.console import Console

from mini_infer import kernels
from mini_infer.cli.kernels import measure_products
from mini_infer.kernels.cpu import amx, choice, linear, onednn, paged_attention, prefill_attention, tile
from mini_infer.kernels.cpu.jit import FIRST, kernel, observer, tasks
from mini_infer.kernels.cpu.recording import cpu_capture
from mini_infer.kernels.cpu.tile import COLUMNS, LANES, VECTORS, tiles

from .tiles_in_software import CONFIG, FAULTS, amx_in_software, bfmmla
from .truth import PagedCase, check, draw

HERE = linear.candidates(torch.empty(512, 512, dtype=torch.bfloat16))


def product(name: str, weight: Tensor, bias: Tensor | None = None) -> tuple[linear._Product, object]:
    return onednn.pack(weight, bias) if name == "onednn" else linear._in_panels(weight, bias, {1: name})  # type: ignore


def check_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Against float64; a single output may cancel to almost nothing, so the size of its terms is what counts."""
    truth = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    terms = x.double().abs() @ weight.double().abs().T + (0 if bias is None else bias.double().abs())
    assert y.dtype is torch.bfloat16 and y.shape == truth.shape
    assert ((y.double() - truth).abs() <= 1e-2 * terms).all()


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("tokens", [1, 6, 7, 16, 33, 385])
@pytest.mark.parametrize("features", [(96, 200), (32, 65)], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_every_candidate_gives_the_product(name: str, tokens: int, features: tuple[int, int], biased: bool) -> None:
    inputs, outputs = features
    x = draw(1, tokens, inputs, dtype=torch.bfloat16)
    weight = draw(2, outputs, inputs, dtype=torch.bfloat16)
    bias = draw(3, outputs, dtype=torch.bfloat16) if biased else None
    multiply, rows = product(name, weight, bias)
    check_product(multiply(x), x, weight, bias)
    ids = torch.tensor([outputs - 1, 0, 5])
    assert torch.equal(rows(ids), weight[ids])  # type: ignore[operator]


@pytest.mark.parametrize("name", HERE)
@torch.inference_mode()
def test_every_candidate_can_be_recorded(name: str) -> None:
    weight, x = draw(1, 128, 96, dtype=torch.bfloat16), draw(2, 5, 96, dtype=torch.bfloat16)
    multiply, _ = product(name, weight)
    replay, result = cpu_capture()(lambda: multiply(x))
    x.copy_(draw(3, 5, 96, dtype=torch.bfloat16))
    result.fill_(torch.nan)
    replay()
    assert torch.equal(result, multiply(x))


@pytest.fixture
def software(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """AMX's instructions are routines; their code must not be taken for the real kernel's."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    module = amx_in_software()
    monkeypatch.setattr(linear, "amx", module)
    monkeypatch.setattr(prefill_attention, "amx", module)
    monkeypatch.setattr(prefill_attention, "_kernel", functools.cache(prefill_attention._kernel.__wrapped__))
    monkeypatch.setattr(linear, "_kernel", functools.cache(linear._kernel.__wrapped__))
    FAULTS[:] = 0
    yield
    assert FAULTS[0] == 0, "the processor would refuse, or do what nobody defined"
    assert CONFIG[0] == 0, "tiles are still in use"


@pytest.mark.skipif(COLUMNS != 64, reason="processors with AMX have AVX-512, and panels of 64")
def test_the_amx_kernel_gives_the_product(software: None) -> None:
    for tokens, inputs, outputs in ((1, 32, 64), (16, 96, 70), (17, 64, 64), (31, 32, 130), (32, 64, 64), (75, 32, 3)):
        x, weight = draw(1, tokens, inputs, dtype=torch.bfloat16), draw(2, outputs, inputs, dtype=torch.bfloat16)
        multiply, _ = linear._in_panels(weight, None, {1: "amx"})
        check_product(multiply(x), x, weight, None)


@pytest.fixture
def matrices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """BFMMLA is written out."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tile, "_multiply_matrices", bfmmla)
    monkeypatch.setattr(prefill_attention, "_kernel", functools.cache(prefill_attention._kernel.__wrapped__))
    monkeypatch.setattr(linear, "_kernel", functools.cache(linear._kernel.__wrapped__))


def test_arms_matrix_instruction_gives_the_product(matrices: None) -> None:
    for tokens, inputs, outputs in ((1, 4, 64), (5, 20, 70), (6, 32, 64), (13, 64, 3)):
        x, weight = draw(1, tokens, inputs, dtype=torch.bfloat16), draw(2, outputs, inputs, dtype=torch.bfloat16)
        multiply, _ = linear._in_panels(weight, None, {1: "bfmmla"})
        check_product(multiply(x), x, weight, None)


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_arms_matrix_instruction_adds_to_what_is_there(matrices: None, rows: int) -> None:
    columns, pairs = VECTORS * LANES, 4
    x = draw(1, rows, 2 * pairs, dtype=torch.bfloat16)
    w = draw(2, columns, 2 * pairs, dtype=torch.bfloat16)
    packed = w.view(columns, pairs, 2).transpose(0, 1).contiguous()
    out = draw(3, rows, columns, dtype=torch.float32)
    wanted = out.double() + x.double() @ w.double().T

    @kernel
    def add(args):
        for _ in tasks(args):
            tiles(
                "bfmmla", rows, VECTORS, 1, 0, args[FIRST], 4 * pairs, args[FIRST + 1], 4 * columns, pairs,
                args[FIRST + 2], 4 * columns, 0, 0,
            )  # fmt: skip

    add(1, x.data_ptr(), packed.data_ptr(), out.data_ptr())
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


def test_arms_matrix_instruction_gives_prompt_attention(matrices: None) -> None:
    check_prompts(PagedCase.make(seed=3, **SMALL, head_dim=64, dtype=torch.bfloat16), "bfmmla")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="compiles for an x86 processor")
@pytest.mark.parametrize(
    "made", ['linear._kernel(np.uint16, "amx")', 'prefill_attention._kernel(np.uint16, np.uint16, "amx", 64)']
)
def test_the_amx_kernels_compile_to_their_instructions(made: str, tmp_path: Path) -> None:
    program = f"""
        import numpy as np
        from mini_infer.kernels.cpu import linear, prefill_attention
        kernel = {made}
        kernel._address
        print(kernel._code._library.get_asm_str())
    """
    features = "+avx2,+fma,+f16c,+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512bf16,+amx-tile,+amx-bf16"
    play = {"NUMBA_CPU_NAME": "sapphirerapids", "NUMBA_CPU_FEATURES": features, "NUMBA_DISABLE_JIT": "0"}
    play["NUMBA_CACHE_DIR"] = str(tmp_path)  # code that comes from the disk has no listing to look at
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | play,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for instruction in ("ldtilecfg", "tilezero", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease"):
        assert f"\t{instruction}" in done.stdout


def test_a_process_that_may_not_have_tiles_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "has_feature", lambda name: True)
    monkeypatch.setattr(amx, "_REQUEST_PERMISSION", 0x7FFF)  # which the system does not know, and refuses
    amx.is_there.cache_clear()
    try:
        assert not amx.is_there()
    finally:
        amx.is_there.cache_clear()


SMALL = {"lengths": [(300, 40), (17, 17), (70, 1), (150, 33)], "block_size": 16, "num_kv_heads": 2, "group": 2}


DECODES = {**SMALL, "lengths": [(300, 1), (17, 1), (1, 1), (64, 1), (150, 1)], "group": 3}
BF16 = torch.bfloat16


def in_either_layout(case: PagedCase) -> list[PagedCase]:
    """The case, and the same with the caches as the kernels lay them out, where copying is quicker."""
    keys, values = kernels.allocate_kv_cache(*case.key_cache.shape, case.key_cache.dtype, "cpu")
    own = keys.copy_(case.key_cache), values.copy_(case.value_cache)
    return [case, replace(case, key_cache=own[0], value_cache=own[1])]


def check_prompts(case: PagedCase, kind: str) -> None:
    for each in in_either_layout(case):
        arguments = each.query, each.key_cache, each.value_cache, each.block_tables, each.context_lens, each.query_start
        out = prefill_attention.attend(kind, *arguments, each.query.shape[2] ** -0.5, each.window, each.span)
        check(out, each.truth(), each.query.dtype)


def check_decodes(case: PagedCase, kind: str) -> None:
    for each in in_either_layout(case):
        arguments = each.query, each.key_cache, each.value_cache, each.block_tables, each.context_lens
        scale = each.query.shape[2] ** -0.5
        if kind != paged_attention.BLOCKS:
            out = prefill_attention.attend(kind, *arguments, None, scale, each.window, 1)
        elif each is case:
            continue  # it reads the kernels' own layout only
        else:
            out = paged_attention._by_blocks(*arguments, scale, each.window, None)
        check(out, each.truth(), each.query.dtype)


@pytest.mark.parametrize("kind", prefill_attention.candidates(torch.bfloat16, 64))
@pytest.mark.parametrize("seen", [{}, {"window": 45}, {"span": 60}], ids=str)
def test_every_candidate_gives_prompt_attention(kind: str, seen: dict[str, int]) -> None:
    check_prompts(PagedCase.make(seed=1, **SMALL, head_dim=64, dtype=torch.bfloat16, **seen), kind)


@pytest.mark.skipif(COLUMNS != 64, reason="processors with AMX have AVX-512, and panels of 64")
def test_the_amx_kernel_gives_prompt_attention(software: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in (4096, 64):
        monkeypatch.setattr(prefill_attention, "CHUNK", chunk)
        check_prompts(PagedCase.make(seed=2, **SMALL, head_dim=64, dtype=torch.bfloat16), "amx")


@pytest.mark.parametrize("kind", paged_attention.candidates(BF16, 64))
@pytest.mark.parametrize("window", [None, 45])
def test_every_candidate_gives_decode_attention(kind: str, window: int | None) -> None:
    check_decodes(PagedCase.make(seed=4, **DECODES, head_dim=64, dtype=BF16, window=window), kind)


@pytest.mark.skipif(COLUMNS != 64, reason="processors with AMX have AVX-512, and panels of 64")
def test_the_amx_kernel_gives_decode_attention(software: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk, window, group in ((4096, None, 3), (64, 45, 3), (64, None, 17)):
        monkeypatch.setattr(prefill_attention, "CHUNK", chunk)
        sizes = {**DECODES, "group": group}
        check_decodes(PagedCase.make(seed=5, **sizes, head_dim=64, dtype=BF16, window=window), "amx")


@torch.inference_mode()
def test_what_is_measured_during_a_recording_is_no_part_of_it(place: Path) -> None:
    case = in_either_layout(PagedCase.make(seed=7, **DECODES, head_dim=64, dtype=BF16))[1]
    paged_attention._kind.cache_clear()
    query, launches = case.query, []
    caches, tables, ends = (case.key_cache, case.value_cache), case.block_tables, case.context_lens
    run = kernels.resolve("cpu", "cpu").paged_attention

    def attend() -> Tensor:
        token = observer.set(launches.append)
        try:
            return run(query, *caches, tables, ends)
        finally:
            observer.reset(token)

    replay, result = cpu_capture()(lambda: run(query, *caches, tables, ends))
    query.copy_(draw(8, *query.shape, dtype=BF16))
    result.fill_(torch.nan)
    replay()
    assert torch.equal(result, attend()) and len(launches) == 1
    paged_attention._kind.cache_clear()
    choice.forget()
    attend()
    assert len(launches) == 2


def test_decode_attention_is_measured_where_heads_share_keys(place: Path) -> None:
    for group in (1, 2):
        case = PagedCase.make(seed=6, **{**DECODES, "group": group}, head_dim=64, dtype=BF16)
        paged_attention._kind.cache_clear()
        with kernels.use_backend("cpu"):
            for each in in_either_layout(case):
                arguments = each.query, each.key_cache, each.value_cache, each.block_tables, each.context_lens
                check(kernels.paged_attention(*arguments), each.truth(), BF16)
        measured = list(place.glob("choices.json"))
        assert len(measured) == (group > 1 and len(paged_attention.candidates(BF16, 64)) > 1)


# ---- the choice ----------------------------------------------------------------------------------------------------


def test_the_first_stays_unless_another_is_clearly_faster() -> None:
    times = {
        "dot": {1: 1.0, 16: 1.0, 64: 1.0},
        "split": {1: 0.97, 16: 0.9, 64: 2.0},
        "amx": {1: 1.0, 16: 0.5, 64: 0.94},
    }
    assert choice.fastest(times) == {1: "dot", 16: "amx", 64: "amx"}


def test_onednn_takes_a_weight_for_all_sizes_or_for_none() -> None:
    panels = {"dot": {1: 1.0, 16: 1.0}, "split": {1: 2.0, 16: 0.5}}
    assert linear.chosen(panels | {"onednn": {1: 1.1, 16: 0.3}}) == {1: "onednn", 16: "onednn"}
    assert linear.chosen(panels | {"onednn": {1: 1.5, 16: 0.4}}) == {1: "dot", 16: "split"}
    assert linear.chosen(panels) == {1: "dot", 16: "split"}


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setattr(choice, "choices_file", lambda: tmp_path / "kernels" / "choices.json")
    choice._known.cache_clear()
    yield tmp_path / "kernels"
    choice._known.cache_clear()


def runs(**seconds: list[int]) -> dict[str, object]:
    """Candidates that note at which sizes they ran."""
    return {name: sizes.append for name, sizes in seconds.items()}


def test_what_was_measured_is_known_to_the_next_process(place: Path) -> None:
    one: list[int] = []
    found = choice.measure("product", {"one": one.append, "two": lambda size: None}, [1, 8])
    assert set(one) == {1, 8} and choice.times("product", ["one", "two"], [1, 8]) == found
    choice._known.cache_clear()  # as another process would begin
    assert choice.times("product", ["one", "two"], [1, 8]) == found
    assert choice.times("product", ["one", "three"], [1, 8]) is None, "another candidate is there"
    assert choice.times("product", ["one", "two"], [1]) is None
    assert choice.times("another", ["one", "two"], [1, 8]) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 3}', '{"a": {"b": {"c": 1}}}', "\x00\xff"])
def test_a_damaged_file_costs_another_measurement_only(place: Path, content: str) -> None:
    choice.measure("product", {"one": lambda size: None}, [1])
    (file,) = place.glob("choices.json")
    file.write_text(content, encoding="latin-1")
    choice._known.cache_clear()
    assert choice.times("product", ["one"], [1]) is None
    choice.measure("product", {"one": lambda size: None}, [1])
    assert len(json.loads(file.read_text())) == 1


def test_where_nothing_can_be_written_the_process_remembers(place: Path) -> None:
    place.touch()  # where a directory would have to be
    found = choice.measure("product", {"one": lambda size: None}, [1])
    assert choice.times("product", ["one"], [1]) == found


def test_a_large_weight_is_measured_once_and_multiplies(place: Path) -> None:
    weight, x = draw(1, 640, 512, dtype=torch.bfloat16), draw(2, 20, 512, dtype=torch.bfloat16)
    with kernels.use_backend("cpu"):
        written = None
        for _ in range(2):
            for tokens in (1, 3, 20):
                check_product(kernels.pack_linear(weight)(x[:tokens]), x[:tokens], weight, None)
            if len(linear.candidates(weight)) > 1:
                (file,) = place.glob("choices.json")
                written = written or file.stat().st_mtime_ns
                assert file.stat().st_mtime_ns == written


def test_the_command_measures_again_and_shows_what_is_taken(place: Path) -> None:
    choice.measure("another", {"one": lambda size: None}, [1])
    console = Console(width=120, record=True, file=io.StringIO())
    measure_products(console, {"small": ((64, 128),)})
    shown = console.export_text()
    assert "small: 64 → 128" in shown and str(linear.SIZES[-1]) in shown and all(name in shown for name in HERE)
    (key,) = json.loads((place / "choices.json").read_text())
    assert key.startswith("pack_linear 64 to 128,"), "what was measured before is forgotten"


def test_each_number_of_tokens_has_its_own_kind() -> None:
    weight, x = draw(1, 128, 64, dtype=torch.bfloat16), draw(2, 40, 64, dtype=torch.bfloat16)
    calls: list[str] = []

    def noting(name: str) -> object:
        return lambda x: calls.append(name)

    by_size = [(1, noting("a")), (8, noting("b")), (16, noting("c"))]
    for tokens in (1, 7, 8, 15, 16, 40):
        linear._multiply(by_size, 64, x[:tokens])  # type: ignore[arg-type]
    assert calls == ["a", "a", "b", "b", "c", "c"]
    multiply, _ = linear._in_panels(weight, None, {1: HERE[0], 8: "split"})
    for tokens in (0, 1, 7, 8, 40):
        check_product(multiply(x[:tokens]), x[:tokens], weight, None)
