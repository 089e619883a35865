"""Memory is handed out again only when nothing refers to it any more."""

import pytest
import torch
from torch import nn

from dispatch.recycler import Recycler

LIKE = torch.empty(0)
SHAPE = (512, 512)  # 1 MiB, above what the recycler leaves to glibc


def _empty(recycler, *shape, dtype=None):
    return recycler.empty(*(shape or SHAPE), like=LIKE, dtype=dtype)


def test_a_dead_tensor_leaves_its_memory_to_the_next():
    recycler = Recycler()
    place = _empty(recycler).data_ptr()
    assert _empty(recycler).data_ptr() == place
    assert _empty(recycler, 512, 1020, dtype=torch.bfloat16).data_ptr() == place  # fits, of another shape and dtype


@pytest.mark.parametrize(
    "keep", [lambda t: t, lambda t: t[3:, :1], lambda t: t.detach(), lambda t: t.untyped_storage()]
)
def test_whatever_still_refers_to_it_keeps_it(keep):
    recycler = Recycler()
    tensor = _empty(recycler)
    place, held = tensor.data_ptr(), keep(tensor)
    del tensor
    assert _empty(recycler).data_ptr() != place
    del held
    assert _empty(recycler).data_ptr() == place


class _GradOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter, recycler):
        ctx.recycler = recycler
        return parameter.sum()

    @staticmethod
    def backward(ctx, _grad):
        return _empty(ctx.recycler).fill_(7.0), None


def test_a_gradient_that_a_parameter_took_over_is_not_handed_out():
    recycler, parameter = Recycler(), nn.Parameter(torch.zeros(SHAPE))
    _GradOf.apply(parameter, recycler).backward()
    for _ in range(3):
        _empty(recycler).fill_(-1.0)
    assert (parameter.grad == 7.0).all()
    place = parameter.grad.data_ptr()
    parameter.grad = None
    assert place in {_empty(recycler).data_ptr() for _ in range(2)}


def test_shape_dtype_and_zeros():
    recycler = Recycler()
    _empty(recycler, 512, 600).fill_(3.0)
    zeros = recycler.zeros(511, 600, like=LIKE, dtype=torch.float64)
    assert zeros.shape == (511, 600)
    assert zeros.dtype == torch.float64
    assert zeros.is_contiguous()
    assert not zeros.any()
    assert recycler.empty(0, 7, like=LIKE).shape == (0, 7)


def test_memory_that_nothing_fits_into_is_given_back():
    recycler = Recycler()
    _empty(recycler, 4096, 4096)
    for _ in range(600):
        _empty(recycler)
    assert sum(block.storage.nbytes() for block in recycler._blocks) < 2 * 2**20


def test_sizes_that_change_a_little_share_their_memory():
    recycler = Recycler()
    places = {_empty(recycler, 1000 + step % 50, 512).data_ptr() for step in range(200)}
    assert len(places) <= 2
