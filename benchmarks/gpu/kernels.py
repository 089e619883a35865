"""Each kernel of `dispatch/kernels` around the matmuls, held against the speed at which the device copies memory."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.section import Figures, Setting, head, row
from benchmarks.gpu.sizes import Sizes
from benchmarks.gpu.timing import elapsed_ms
from runtime.commands.bench.dispatch.limits import Shape


def measure(setting: Setting) -> None:
    """All shapes in bf16, each told when it is done."""
    found: Figures = {}
    for name, shape in setting.sizes.shapes.items():
        found[name] = measure_kernels(shape, torch.bfloat16, setting.device, setting.sizes)
        setting.tell(found)


def measure_kernels(
    shape: Shape, dtype: torch.dtype, device: torch.device, sizes: Sizes
) -> dict[str, dict[str, float]]:
    """Milliseconds and GB/s of each kernel at one shape, and of a copy."""
    found = {}
    for name, (num_bytes, call) in _calls(shape, dtype, device, sizes.copy_bytes).items():
        samples = [elapsed_ms(call, device) for _ in range(sizes.warm_up + sizes.rounds)][sizes.warm_up :]
        found[name] = {"ms": statistics.median(samples), "gb_per_s": num_bytes / statistics.median(samples) / 1e6}
    return found


def _calls(
    shape: Shape, dtype: torch.dtype, device: torch.device, copy_bytes: int
) -> dict[str, tuple[int, Callable[[], object]]]:
    """By name the bytes that a call reads and writes, and the call."""
    from dispatch.kernels.rows import copy_rows, sum_rows
    from dispatch.kernels.swiglu import weighted_swiglu, weighted_swiglu_backward_

    tokens, hidden, inner, rows = shape.tokens, shape.hidden, shape.ffn_hidden, shape.tokens * shape.top_k

    def tensor(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=dtype, device=device)

    # The copies of a token lie as far apart as those for different experts do.
    order = torch.arange(rows, device=device).view(shape.top_k, tokens).t().flatten()
    first = torch.arange(0, rows, shape.top_k, device=device)
    x, copies, gate_up, grad = (
        tensor(rows // k, n) for k, n in ((shape.top_k, hidden), (1, hidden), (1, 2 * inner), (1, inner))
    )
    weights, size = torch.rand(rows, device=device), dtype.itemsize
    moved = size * (rows + tokens) * hidden + 8 * rows
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {
        "a copy of memory": (2 * copy_bytes, lambda: target.copy_(source)),
        "copies of rows": (moved, lambda: copy_rows(x, order, first)),
        "sums of rows": (moved, lambda: sum_rows(copies, order, first)),
        "SwiGLU": (rows * (3 * size * inner + 4), lambda: weighted_swiglu(gate_up, weights)),
        # Over what it read: the numbers become other numbers, which costs the same time.
        "SwiGLU, backward": (rows * (6 * size * inner + 8), lambda: weighted_swiglu_backward_(gate_up, weights, grad)),
    }


def show(figures: Figures) -> list[str]:
    """A table of all shapes."""
    lines = head("shape", "kernel", "ms", "GB/s")
    for name, kernels in figures.items():
        lines += [row(name, each, f"{found['ms']:.3f}", f"{found['gb_per_s']:.0f}") for each, found in kernels.items()]
    return lines
