"""The inner loops compile for Arm, to its own multiply-adds, without an Arm processor."""

import os
import platform
import re
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("numba")

PROGRAM = """
    import sys

    import llvmlite.binding as llvm
    from llvmlite import ir

    from mini_infer.kernels.cpu import tile

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    number = ir.IntType(64)
    for kind in ("fma", "widen", "split"):
        for rows in (1, tile.ROWS):
            function = ir.Function(module, ir.FunctionType(ir.VoidType(), [number] * 9), f"{kind}_{rows}")
            builder = ir.IRBuilder(function.append_basic_block())
            tile._write_tile(builder, kind, rows, tile.VECTORS, 0, 1, function.args)
            builder.ret_void()
    for rows in (1, tile.ROWS):
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [number] * 9), f"bfmmla_{rows}")
        builder = ir.IRBuilder(function.append_basic_block())
        tile._write_matrix_tile(builder, rows, tile.VECTORS, 0, 1, function.args)
        builder.ret_void()
    compiled = llvm.parse_assembly(str(module))
    compiled.verify()
    machine = llvm.Target.from_triple(module.triple).create_target_machine(features="+neon,+bf16", opt=3)
    print(tile.LANES, machine.emit_assembly(compiled))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="an Arm processor runs the other tests")
def test_tiles_compile_for_arm() -> None:
    as_there = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+sse4.2"}  # no feature that the tiles ask for
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM)],
        env=os.environ | as_there,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    lanes, assembly = done.stdout.split(" ", 1)
    assert lanes == "8"
    matrices = {"bfmmla_1": 8, "bfmmla_6": 24}  # sums of two by two in a tile of 16 columns
    for name, count in matrices.items():
        code = assembly.split(f"{name}:\n", 1)[1].split(".cfi_endproc", 1)[0]
        assert code.count("bfmmla\tv") == count and "bl\t" not in code
        assert len(re.findall(r"\tst[rp]\tq.*\[sp", code)) <= 1, "sums must stay in registers; LLVM gives one away"
    for name in ("fma_1", "fma_6", "widen_6", "split_1", "split_6"):
        code = assembly.split(f"{name}:\n", 1)[1].split(".cfi_endproc", 1)[0]
        assert "fmla\tv" in code and "bl\t" not in code, f"{name} must multiply in vectors and call nothing"
