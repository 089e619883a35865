"""The kernels as they are launched, compiled for sm_90 by the ptxas inside Triton: no device is needed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="Triton is built for Linux")]
triton = pytest.importorskip("triton")

FEW, WIDTHS = 5, (768, 2048, 7168)


class _Recorder:
    """Stands for a kernel: keeps what it is launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((args, options))


def _launches(module, kernel, monkeypatch, call):
    recorder = _Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(module, kernel, recorder)
        call()
    return [(getattr(module, kernel), *launch) for launch in recorder.launches]


def _compile(kernel, args, options):
    """Its PTX."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def type_of(value):
        if isinstance(value, torch.Tensor):
            return (
                "*"
                + {"bfloat16": "bf16", "float32": "fp32", "float64": "fp64", "int64": "i64", "int32": "i32"}[
                    str(value.dtype)[6:]
                ]
            )
        return "i32"

    constants = {(i,): args[i] for i, param in enumerate(kernel.params) if param.is_constexpr}
    signature = {
        p.name: "constexpr" if p.is_constexpr else type_of(arg) for p, arg in zip(kernel.params, args, strict=True)
    }
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)
    }  # torch allocates on multiples of 512 bytes
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def _ptxas(ptx, folder):
    (folder / "kernel.ptx").write_text(ptx)
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    command = [ptxas, "-v", "-arch=sm_90a", "-o", "/dev/null", folder / "kernel.ptx"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def _kernels_as_launched(monkeypatch):
    from dispatch.kernels import few_rows, rows, swiglu

    index, half = torch.zeros(FEW, dtype=torch.int64), torch.bfloat16
    for width, dtype in [*((width, half) for width in WIDTHS), (768, torch.float32)]:
        x, gate_up, weights = (torch.zeros(FEW, n, dtype=dtype) for n in (width, 2 * width, 1))
        for module, kernel, call in (
            (rows, "_sum", lambda: rows.sum_rows(x, index, index)),  # noqa: B023 - called at once, here and below
            (rows, "_copy", lambda: rows.copy_rows(x, index, index)),  # noqa: B023
            (swiglu, "_forward", lambda: swiglu.weighted_swiglu(gate_up, weights[:, 0].float())),  # noqa: B023
            (swiglu, "_backward", lambda: swiglu.weighted_swiglu_backward_(gate_up, weights[:, 0].float(), x)),  # noqa: B023
        ):
            yield from _launches(module, kernel, monkeypatch, call)
    x, stack, ends = torch.zeros(FEW, 256), torch.zeros(4, 192, 256), torch.zeros(4, dtype=torch.int32)
    yield from _launches(few_rows, "_mm", monkeypatch, lambda: few_rows.few_rows_mm(x, index, ends, stack))


def test_no_kernel_spills_and_rows_are_moved_16_bytes_at_once(monkeypatch, tmp_path):
    for kernel, args, options in _kernels_as_launched(monkeypatch):
        ptx = _compile(kernel, args, options)
        assert " 0 bytes spill stores, 0 bytes spill loads" in _ptxas(ptx, tmp_path), kernel.__name__
        accesses = {"".join(found) for found in re.findall(r"(ld|st)\.global(?:\.\w+)*?((?:\.v\d)?\.b\d+)", ptx)}
        rows = {access for access in accesses if ".v" in access}
        # The rest are indexes, weights of rows and their gradients, and the few outputs of `_mm`: one element a row.
        assert rows == ({"ld.v4.b32"} if kernel.__name__ == "_mm" else {"ld.v4.b32", "st.v4.b32"}), accesses
        assert accesses - rows <= {"ld.b64", "ld.b32", "st.b32"}, accesses


def test_kernels_compile_in_float64(monkeypatch):
    from dispatch.kernels import swiglu

    gate_up, weights, grad = (torch.zeros(FEW, n, dtype=torch.float64) for n in (10, 1, 5))
    (launch,) = _launches(
        swiglu,
        "_backward",
        monkeypatch,
        lambda: swiglu.weighted_swiglu_backward_(gate_up, weights[:, 0], grad),
    )
    assert "mul.f64" in _compile(*launch) or "mul.rn.f64" in _compile(*launch)
