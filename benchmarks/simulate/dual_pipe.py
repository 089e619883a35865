"""Computes how long DualPipe takes: each rank starts its chunks in order, as soon as their inputs are there.

Source: arXiv 2412.19437, figure 5, and the order of chunks in github.com/deepseek-ai/DualPipe (README and the eight
steps of dualpipe.py). Micro-batches enter at both ends. A forward and a backward of the other direction are computed
as one chunk, which hides its exchanges. While the pipeline fills and drains, nothing hides them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Seconds of the layers of one stage. both: a forward and a backward together. weights: a part of `backward`."""

    forward: float
    backward: float
    weights: float
    both: float


@dataclass(frozen=True)
class Part:
    """One pass over a stage's layers. way: 0 if its micro-batch enters at the first rank, 1 at the last.

    late: a backward that leaves the gradients of weights to a later part of kind "weights".
    """

    kind: Literal["forward", "backward", "weights"]
    way: int = 0
    late: bool = False


def makespan(chunk: Chunk, num_ranks: int, num_micro: int) -> float:
    """Seconds from the first forward to the last gradient, without the messages between stages.

    num_ranks must be even, num_micro even and at least twice as large.

    Raises:
        ValueError: they are not.
    """
    if num_ranks % 2 or num_micro % 2 or num_micro < 2 * num_ranks:
        raise ValueError(f"DualPipe needs even numbers, at least 2 x {num_ranks} micro-batches; {num_micro} are given")
    waiting = [list(order(rank, num_ranks, num_micro)) for rank in range(num_ranks)]
    clocks, done = [0.0] * num_ranks, dict[tuple[str, int, int, int], float]()
    counts = [dict[tuple[str, int], int]() for _ in range(num_ranks)]
    while any(waiting):
        for rank, queue in enumerate(waiting):
            while queue and (start := _start(queue[0], rank, num_ranks, counts[rank], done)) is not None:
                clocks[rank] = max(clocks[rank], start) + _seconds(queue[0], chunk)
                for part in queue.pop(0):
                    index = counts[rank].get((part.kind, part.way), 0)
                    counts[rank][part.kind, part.way] = index + 1
                    done[part.kind, part.way, index, rank] = clocks[rank]
    return max(clocks)


def order(rank: int, num_ranks: int, num_micro: int) -> Iterator[tuple[Part, ...]]:
    """The parts that a rank computes, in order; two parts in one tuple hide each other's exchanges."""
    inner = min(rank, num_ranks - 1 - rank)  # 0 at both ends
    outward, near = num_ranks // 2 - inner - 1, int(rank >= num_ranks // 2)
    first, second = near, 1 - near  # ways; a micro-batch from the nearer end arrives first
    forwards = [Part("forward", way) for way in (first, second)]
    backwards, later = ([Part("backward", way, late) for way in (first, second)] for late in (False, True))
    weights = (Part("weights"),)
    yield from [(forwards[0],)] * (2 * outward)
    yield from [(forwards[0],), (forwards[1],)] * (inner + 1)
    yield from [(later[1],), weights, (forwards[1],)] * outward
    for turn in range(num_micro // 2 - num_ranks + inner + 1):
        pair = (forwards[0], backwards[1])
        # The two ranks in the middle do not wait for each other's first.
        yield from [(part,) for part in pair] if turn == 0 and outward == 0 else [pair]
        yield forwards[1], backwards[0]
    yield from [(backwards[1],), (forwards[1], backwards[0])] * outward
    # The second half of the last backwards leaves its weight gradients until the rank has nothing else to do.
    last = [backwards[1], backwards[0]] * (inner + 1)
    yield from [(part,) if turn <= inner else (Part(part.kind, part.way, late=True),) for turn, part in enumerate(last)]
    yield from [weights, (later[0],)] * outward
    yield from [weights] * (inner + 1)


def _start(
    parts: tuple[Part, ...],
    rank: int,
    num_ranks: int,
    counts: dict[tuple[str, int], int],
    done: dict[tuple[str, int, int, int], float],
) -> float | None:
    """The time at which all inputs of these parts are there; None while one has not been computed."""
    needed = [
        key
        for part in parts
        if part.kind != "weights"
        and (key := _before(part, counts.get((part.kind, part.way), 0), rank, num_ranks)) is not None
    ]
    return max((done[key] for key in needed), default=0.0) if all(key in done for key in needed) else None


def _before(part: Part, index: int, rank: int, num_ranks: int) -> tuple[str, int, int, int] | None:
    """The pass whose result this part takes; None where the micro-batch enters the pipeline."""
    onward = 1 if part.way == 0 else -1
    source = rank - onward if part.kind == FORWARD else rank + onward
    if 0 <= source < num_ranks:
        return part.kind, part.way, index, source
    return (FORWARD, part.way, index, rank) if part.kind == BACKWARD else None


def _seconds(parts: tuple[Part, ...], chunk: Chunk) -> float:
    if len(parts) == 2:
        return chunk.both
    (part,) = parts
    return float(getattr(chunk, part.kind)) - part.late * chunk.weights
