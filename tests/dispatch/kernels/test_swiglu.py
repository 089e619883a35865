"""The fused activation and its gradients against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F

from tests.dispatch.kernels.device import DEVICE, assert_close, drawn, where_kernels_run

pytestmark = where_kernels_run()


@pytest.mark.parametrize(
    ("num_rows", "num_inner", "dtype"),
    [
        (37, 48, torch.bfloat16),  # tiles of 16 x 64: not full on either side
        (5, 300, torch.bfloat16),  # two tiles of 256 columns
        (4, 512, torch.float32),  # full tiles
        (1, 5, torch.float32),
        (6, 3, torch.float64),
        (0, 8, torch.float32),
    ],
)
def test_value_and_gradients_equal_autograd(num_rows, num_inner, dtype):
    from dispatch.kernels.swiglu import weighted_swiglu, weighted_swiglu_backward_

    gate_up, grad = drawn(num_rows, 2 * num_inner, dtype=dtype), drawn(num_rows, num_inner, dtype=dtype, seed=1)
    weights = drawn(num_rows, dtype=torch.promote_types(dtype, torch.float32), seed=2)
    leaves = [leaf.double().requires_grad_() for leaf in (gate_up, weights)]
    gate, up = leaves[0].chunk(2, 1)
    want = F.silu(gate) * up * leaves[1][:, None]
    want.backward(grad.double())
    inner = weighted_swiglu(gate_up, weights)
    assert_close(inner, want.detach())
    grad_weights = weighted_swiglu_backward_(gate_up, weights, grad)
    assert_close(gate_up, leaves[0].grad)
    assert torch.equal(grad, inner)  # bit for bit what forward gave
    assert grad_weights.dtype == weights.dtype
    assert_close(grad_weights, leaves[1].grad)


def test_large_gates_do_not_overflow():
    from dispatch.kernels.swiglu import weighted_swiglu, weighted_swiglu_backward_

    gate_up = torch.tensor([[-200.0, 200.0, 3.0, 3.0]], device=DEVICE)
    one, grad = torch.ones(1, device=DEVICE), torch.ones(1, 2, device=DEVICE)
    assert weighted_swiglu(gate_up, one).tolist() == [[0.0, 600.0]]
    assert weighted_swiglu_backward_(gate_up, one, grad).tolist() == [600.0]
    assert gate_up.tolist() == [[0.0, 3.0, 0.0, 200.0]]
