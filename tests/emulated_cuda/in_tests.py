"""A plugin of pytest, `-p tests.emulated_cuda.in_tests`: the whole session has emulated devices, from collection on."""

from contextlib import ExitStack
from unittest import mock

import torch

NUM_DEVICES = 2  # of the machine; each process has its own as cuda:0
_SESSION = ExitStack()


def pytest_configure() -> None:
    """Enter the emulation."""
    from tests.emulated_cuda.device import emulated_cuda

    _SESSION.enter_context(emulated_cuda())
    _SESSION.enter_context(mock.patch.object(torch.cuda, "device_count", lambda: NUM_DEVICES))


def pytest_unconfigure() -> None:
    """Leave it."""
    _SESSION.close()
