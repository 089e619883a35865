"""Where the kernels serve, and that nothing asks for Triton elsewhere."""

import sys

import pytest
import torch

from dispatch.config import MoEConfig
from dispatch.exchange.local import LocalDispatcher
from dispatch.kernels import availability
from dispatch.kernels.availability import use_triton
from dispatch.layer import MoELayer


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # to import it raises ImportError
    availability._is_installed.cache_clear()
    yield
    availability._is_installed.cache_clear()


def _step(monkeypatch, wanted):
    monkeypatch.setenv("TRITON_INTERPRET", wanted)
    torch.manual_seed(0)
    layer = MoELayer(16, MoEConfig(num_experts=4, top_k=2, ffn_hidden=8), LocalDispatcher(4))
    x = torch.randn(9, 16, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    return y, x.grad


def test_without_triton_the_layer_takes_the_path_without_kernels(without_triton, monkeypatch):
    assert all(map(torch.equal, _step(monkeypatch, "1"), _step(monkeypatch, "0")))


def test_kernels_serve_floats_on_a_cpu_only_where_the_interpreter_is_asked_for(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton(torch.zeros(1, dtype=torch.bfloat16))
    assert not use_triton(torch.zeros(1, dtype=torch.uint8))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not use_triton(torch.zeros(1))
