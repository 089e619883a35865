"""Where the Triton kernels run."""

import functools
import importlib.util
import os

from torch import Tensor


def use_triton(tensor: Tensor) -> bool:
    """True for a tensor of a floating-point dtype on CUDA, if Triton is installed.

    TRITON_INTERPRET=1, a variable of Triton's, lets its interpreter serve CPU tensors too: slow, for tests.
    """
    has_device = tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    return has_device and tensor.is_floating_point() and _is_installed()


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None
