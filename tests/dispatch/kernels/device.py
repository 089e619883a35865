"""Where the tests of the kernels run: on a CUDA device, else on the CPU in Triton's interpreter.

Triton asks for TRITON_INTERPRET once, when it is imported, and torch imports it for its own purposes. So the
interpreter needs a process of its own, which `test_interpreter.py` starts; elsewhere without a device these tests are
skipped.
"""

import os

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def where_kernels_run():
    """The marks of a module of such tests. Skips the module where they do not run."""
    if DEVICE.type == "cuda":
        return pytest.mark.gpu
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("run by tests/dispatch/kernels/test_interpreter.py", allow_module_level=True)
    return []


def drawn(*shape, dtype=torch.float64, seed=0):
    """Normal numbers on the device, rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def assert_close(got, want, limit=None):
    """Within what one rounding to the dtype of `got` allows, of the norm; want: float64."""
    limit = limit or {torch.bfloat16: 5e-3, torch.float32: 5e-7, torch.float64: 1e-14}[got.dtype]
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= limit * want.norm(), (got, want)
