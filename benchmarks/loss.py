"""Compares the chunked cross entropy with one of whole logits: time of forward and backward, and most bytes held.

    python -m benchmarks.loss [--tokens 4096] [--hidden 512] [--vocab 32768] [--pairs 7]

One thread, fp32. It prints medians, and the median ratio inside a pair.
"""

import argparse
import sys

import torch
import torch.nn.functional as F

from benchmarks.paired import compare_steps
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

    compare_steps({"whole": whole, "chunked": chunked}, given.pairs)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
