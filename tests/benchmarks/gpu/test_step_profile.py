"""Kernels into groups, by names that a profile on an H100 had and by made-up events; and one real step on the CPU."""

from types import SimpleNamespace

import pytest
from torch.autograd import DeviceType

from benchmarks.gpu import step_profile
from benchmarks.gpu.step_profile import ATTENTION, DENSE, EXPERTS, OPTIMIZER, OURS, REST, Launch, group_of, launches_of


@pytest.mark.parametrize(
    ("kernel", "operators", "group"),
    [
        ("_backward", ("FusedSwiGLUBackward",), OURS),
        ("_sum", (), OURS),
        ("nvjet_hsh_128x256", ("aten::mm", "aten::linear"), DENSE),
        ("nvjet_hsh_128x256", ("aten::mm", "FusedSwiGLU"), EXPERTS),
        ("void cutlass::device_kernel<GroupProblemShape>", ("aten::_grouped_mm",), EXPERTS),
        ("void cutlass::device_kernel<GroupProblemShape>", (), EXPERTS),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", (), ATTENTION),
        ("sm90_xmma_gemm_bf16", ("aten::bmm", "aten::_scaled_dot_product_attention"), ATTENTION),
        ("void at::native::multi_tensor_apply_kernel", ("aten::_fused_adamw_", "Optimizer.step#AdamW.step"), OPTIMIZER),
        ("void at::native::vectorized_elementwise_kernel", ("aten::mul", "Optimizer.step#Muon.step"), OPTIMIZER),
        ("void at::native::vectorized_elementwise_kernel", ("aten::copy_", "aten::to"), REST),
        ("Memcpy DtoD", (), REST),
    ],
)
def test_a_kernel_belongs_to_one_group(kernel, operators, group):
    assert group_of(Launch(kernel, operators, 1.0)) == group


def _event(name, parent=None, kernels=(), us=0.0, device=DeviceType.CPU, **fields):
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels],
        device_type=device,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
        **fields,
    )


def test_each_kernel_is_counted_once_with_the_operators_that_are_known():
    outer = _event("aten::linear")
    events = [
        outer,
        _event("aten::mm", outer, [("gemm", 5.0)]),
        _event("gemm", us=5.0, device=DeviceType.CUDA),
        _event("gemm", us=2.0, device=DeviceType.CUDA),  # launched by nothing that the profiler knows
        _event("_sum", us=3.0, device=DeviceType.CUDA),
        _event("a range", us=9.0, device=DeviceType.CUDA, is_user_annotation=True),
    ]
    launches = launches_of(events)
    assert launches == [
        Launch("gemm", ("aten::mm", "aten::linear"), 5.0),
        Launch("gemm", (), 2.0),
        Launch("_sum", (), 3.0),
    ]
    found = step_profile.summary(launches)
    assert found["kernels_ms"] == pytest.approx(0.01)
    assert found["groups_ms"][DENSE] == pytest.approx(0.007)
    assert found["rest_ms"] == {}
