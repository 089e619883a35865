"""Times steps in turns, so that a time in which the machine is slow meets all; and prints values over seeds."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from runtime.commands.bench.dispatch.memory import peak_allocated_bytes

Step = Callable[[], object]


def seconds_of(step: Step) -> float:
    """Wall-clock seconds of one call."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def compare_steps(steps: Mapping[str, Step], num_pairs: int) -> None:
    """Time two steps in turns and print, for each, its median milliseconds and the most bytes held; then their ratio.

    The first pair only warms up. The ratio is the median of the ratios inside a pair.
    """
    pairs = [[seconds_of(step) for step in steps.values()] for _ in range(num_pairs + 1)][1:]
    width = max(map(len, steps))
    print(f"{'':{width}}{'ms':>10}{'MiB at most':>14}")
    for (name, step), seconds in zip(steps.items(), zip(*pairs, strict=True), strict=True):
        print(f"{name:{width}}{1e3 * statistics.median(seconds):10.1f}{peak_allocated_bytes(step) / 2**20:14.1f}")
    first, second = steps
    print(f"time of {second} over {first}, median of pairs: {statistics.median(b / a for a, b in pairs):.2f}\n")


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """0.123 ± 0.004, or the value alone where there is one."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
