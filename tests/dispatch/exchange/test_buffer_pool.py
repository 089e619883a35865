"""Memory is handed out again only when nothing refers to it any more."""

import pytest
import torch
from torch import nn

from dispatch.exchange.buffer_pool import BufferPool

LIKE = torch.empty(0)
SHAPE = (512, 512)  # 1 MiB, above what the buffer_pool leaves to glibc


def _empty(buffer_pool, *shape, dtype=None):
    return buffer_pool.empty(*(shape or SHAPE), like=LIKE, dtype=dtype)


def test_a_dead_tensor_leaves_its_memory_to_the_next():
    buffer_pool = BufferPool()
    place = _empty(buffer_pool).data_ptr()
    assert _empty(buffer_pool).data_ptr() == place
    assert _empty(buffer_pool, 512, 1020, dtype=torch.bfloat16).data_ptr() == place  # fits, of another shape and dtype


@pytest.mark.parametrize(
    "keep", [lambda t: t, lambda t: t[3:, :1], lambda t: t.detach(), lambda t: t.untyped_storage()]
)
def test_whatever_still_refers_to_it_keeps_it(keep):
    buffer_pool = BufferPool()
    tensor = _empty(buffer_pool)
    place, held = tensor.data_ptr(), keep(tensor)
    del tensor
    assert _empty(buffer_pool).data_ptr() != place
    del held
    assert _empty(buffer_pool).data_ptr() == place


class _GradOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parameter, buffer_pool):
        ctx.buffer_pool = buffer_pool
        return parameter.sum()

    @staticmethod
    def backward(ctx, _grad):
        return _empty(ctx.buffer_pool).fill_(7.0), None


def test_a_gradient_that_a_parameter_took_over_is_not_handed_out():
    buffer_pool, parameter = BufferPool(), nn.Parameter(torch.zeros(SHAPE))
    _GradOf.apply(parameter, buffer_pool).backward()
    for _ in range(3):
        _empty(buffer_pool).fill_(-1.0)
    assert (parameter.grad == 7.0).all()
    place = parameter.grad.data_ptr()
    parameter.grad = None
    assert place in {_empty(buffer_pool).data_ptr() for _ in range(2)}


def test_shape_dtype_and_zeros():
    buffer_pool = BufferPool()
    _empty(buffer_pool, 512, 600).fill_(3.0)
    zeros = buffer_pool.zeros(511, 600, like=LIKE, dtype=torch.float64)
    assert zeros.shape == (511, 600)
    assert zeros.dtype == torch.float64
    assert zeros.is_contiguous()
    assert not zeros.any()
    assert buffer_pool.empty(0, 7, like=LIKE).shape == (0, 7)


def test_memory_that_nothing_fits_into_is_given_back():
    buffer_pool = BufferPool()
    _empty(buffer_pool, 4096, 4096)
    for _ in range(600):
        _empty(buffer_pool)
    assert sum(block.storage.nbytes() for block in buffer_pool._blocks) < 2 * 2**20


def test_sizes_that_change_a_little_share_their_memory():
    buffer_pool = BufferPool()
    places = {_empty(buffer_pool, 1000 + step % 50, 512).data_ptr() for step in range(200)}
    assert len(places) <= 2
