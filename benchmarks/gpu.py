"""Check the layer on one CUDA device, then measure it and its kernels: gpu.md and gpu.json. A few minutes.

    python -m benchmarks.gpu --out docs/results

Checks come first, since the figures of a wrong layer are worth nothing: the tests marked gpu, and the parity kit over
NCCL in each dtype. Times are medians by CUDA events; the layer and its limit, the same matmuls as batched calls, take
turns on fresh tokens. A kernel is held against the speed at which the device copies memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dispatch.config import MoEConfig
from dispatch.exchange.local import LocalDispatcher
from dispatch.layer import MoELayer
from runtime.commands.bench.dispatch.limits import Shape, matmul_flops, matmul_limit
from runtime.commands.bench.dispatch.memory import peak_cuda_bytes

SHAPES = {
    "qwen3": Shape(32768, 2048, 768, 128, 8),
    "olmoe": Shape(16384, 2048, 1024, 64, 8),
    "dsv3-ep8": Shape(8192, 7168, 2048, 32, 8),
    "paper-1b": Shape(16384, 1024, 512, 64, 6),
}
DTYPES = ("float64", "float32", "bfloat16")
WARM_UP, ROUNDS = 3, 15
COPY_BYTES = 1 << 30


def run_checks() -> dict[str, bool]:
    """Whether each check passes; what it prints goes to the terminal."""
    commands = {"pytest -m gpu": ["pytest", "-q", "-m", "gpu", "tests/dispatch"]} | {
        f"parity in {dtype}": ["dispatch.parity", "--device", "cuda", "--ep", "1", "--dtype", dtype] for dtype in DTYPES
    }
    return {
        name: subprocess.run([sys.executable, "-m", *command], check=False).returncode == 0  # noqa: S603 - our own
        for name, command in commands.items()
    }


def elapsed_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call, by events on CUDA."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def measure_layer(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """Forward and backward of a layer beside the limit of its matmuls; memory above weights and input."""
    config = MoEConfig(
        num_experts=shape.num_experts, top_k=shape.top_k, ffn_hidden=shape.ffn_hidden, num_shared_experts=0
    )
    layer = MoELayer(shape.hidden, config, LocalDispatcher(shape.num_experts)).to(device, dtype)
    limit = matmul_limit(shape, shape.num_experts, 1, dtype, device)

    def tokens() -> Tensor:
        return torch.randn(shape.tokens, shape.hidden, dtype=dtype, device=device)

    def step(x: Tensor, grad: Tensor) -> None:
        layer(x.requires_grad_()).backward(grad)
        layer.zero_grad()

    for _ in range(WARM_UP):
        step(tokens(), tokens())
        limit(tokens())
    x, grad = tokens(), tokens()
    peak = peak_cuda_bytes(lambda: step(x, grad)) if device.type == "cuda" else 0
    samples = []
    for _ in range(ROUNDS):
        x, grad = tokens(), tokens()
        samples.append((elapsed_ms(lambda: step(x, grad), device), elapsed_ms(lambda: limit(x), device)))  # noqa: B023
    layer_ms, limit_ms = (statistics.median(column) for column in zip(*samples, strict=True))
    operations = matmul_flops(shape.tokens * shape.top_k, shape.hidden, shape.ffn_hidden)
    return {
        "layer_ms": layer_ms,
        "limit_ms": limit_ms,
        "times_its_limit": statistics.median(layer / least for layer, least in samples),
        "tflops": operations / layer_ms / 1e9,
        "limit_tflops": operations / limit_ms / 1e9,
        "peak_mib": peak / 2**20,
    }


def measure_kernels(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, float]]:
    """Each kernel of `dispatch/kernels` around the matmuls at one shape, and a copy: milliseconds, GB/s."""
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
    moved, source = (
        size * (rows + tokens) * hidden + 8 * rows,
        torch.empty(COPY_BYTES, dtype=torch.uint8, device=device),
    )
    target = torch.empty_like(source)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "a copy of memory": (2 * COPY_BYTES, lambda: target.copy_(source)),
        "copies of rows": (moved, lambda: copy_rows(x, order, first)),
        "sums of rows": (moved, lambda: sum_rows(copies, order, first)),
        "SwiGLU": (rows * (3 * size * inner + 4), lambda: weighted_swiglu(gate_up, weights)),
        # Over what it read: the numbers become other numbers, which costs the same time.
        "SwiGLU, backward": (rows * (6 * size * inner + 8), lambda: weighted_swiglu_backward_(gate_up, weights, grad)),
    }
    found = {}
    for name, (num_bytes, call) in calls.items():
        samples = [elapsed_ms(call, device) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
        found[name] = {"ms": statistics.median(samples), "gb_per_s": num_bytes / statistics.median(samples) / 1e6}
    return found


def report(found: dict[str, Any]) -> str:
    """The figures as a page of Markdown."""
    lines = ["# One CUDA device", "", f"{found['device']}, torch {found['torch']}. `python -m benchmarks.gpu`", ""]
    lines += ["| check | |", "|---|---|"]
    lines += [f"| {name} | {'passed' if passed else 'FAILED'} |" for name, passed in found["checks"].items()]
    lines += ["", "Forward and backward in bf16; limit: the six matmuls as batched calls.", ""]
    lines += [
        "| shape: T, H, F, E, k | layer, ms | TFLOP/s | × its limit | limit, TFLOP/s | peak, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["layers"].items():
        sizes = ", ".join(map(str, vars(SHAPES[name]).values())) if name in SHAPES else ""
        lines.append(
            f"| {name}: {sizes} | {row['layer_ms']:.2f} | {row['tflops']:.0f} | {row['times_its_limit']:.2f} | "
            f"{row['limit_tflops']:.0f} | {row['peak_mib']:.0f} |"
        )
    for name, kernels in found["kernels"].items():
        lines += ["", f"| kernel, {name} | ms | GB/s |", "|---|---|---|"]
        lines += [f"| {kernel} | {row['ms']:.3f} | {row['gb_per_s']:.0f} |" for kernel, row in kernels.items()]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when all checks passed; leaves with 2 where there is no device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Check and measure one CUDA device.")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder for gpu.md and gpu.json")
    parser.add_argument("--no-checks", action="store_true", help="measure only")
    given = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error(f"needs a CUDA device; torch {torch.__version__} sees none on this machine")
    device = torch.device("cuda", 0)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    found["checks"] = {} if given.no_checks else run_checks()
    found["layers"] = {name: measure_layer(shape, torch.bfloat16, device) for name, shape in SHAPES.items()}
    found["kernels"] = {name: measure_kernels(shape, torch.bfloat16, device) for name, shape in SHAPES.items()}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    (given.out / "gpu.md").write_text(report(found))
    sys.stdout.write(report(found))
    return 0 if all(found["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
