"""The chunked cross entropy beside that of whole logits: forward and backward in turns, and the bytes held at most.

    python -m benchmarks.loss [--tokens 4096] [--hidden 512] [--vocab 32768] [--pairs 7]

One thread, fp32. Told are medians, and the ratio of each pair.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from runtime.commands.bench.dispatch.memory import peak_allocated_bytes
from workers.model.loss import MAX_LOGITS, linear_cross_entropy


def main(argv: list[str]) -> int:
    """Run the benchmark of a command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    for name, default in (("tokens", 4096), ("hidden", 512), ("vocab", 32768), ("pairs", 7)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--max-logits", type=int, default=MAX_LOGITS, help=f"elements at once (default: {MAX_LOGITS})")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    x = torch.randn(given.tokens, given.hidden, requires_grad=True)
    weight = (torch.randn(given.vocab, given.hidden) * given.hidden**-0.5).requires_grad_()
    targets = torch.randint(given.vocab, (given.tokens,))

    def chunked() -> None:
        linear_cross_entropy(x, weight, targets, given.max_logits).total.backward()

    def whole() -> None:
        F.cross_entropy(F.linear(x, weight), targets, reduction="sum").backward()

    steps = (whole, chunked)
    seconds = [[_seconds(step) for step in steps] for _ in range(given.pairs + 1)][1:]
    peaks = [peak_allocated_bytes(step) for step in steps]
    print(f"{'':8}{'ms':>10}{'MiB at most':>14}")
    for name, times, peak in zip(("whole", "chunked"), zip(*seconds, strict=True), peaks, strict=True):
        print(f"{name:8}{1000 * statistics.median(times):10.1f}{peak / 2**20:14.1f}")
    print(f"time of chunked over whole, median of pairs: {statistics.median(b / a for a, b in seconds):.2f}")
    return 0


def _seconds(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
