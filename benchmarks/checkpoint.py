"""Compares saving and loading a checkpoint of one process with a plain write of as many bytes, in turns.

    python -m benchmarks.checkpoint [--gigabytes 4] [--tensors 64] [--pairs 3] [--folder DIR]

`plain` writes the same bytes as one file in blocks of 16 MiB and forces them to the disk, as `dd conv=fsync` does. It
prints medians, and the ratio in each pair. The page cache still has what `load` reads, so its time is not the disk's.
"""

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.paired import seconds_of
from workers.checkpoints.checkpoint import load, save
from workers.checkpoints.checkpoint_files import checkpoint_path

_BLOCK_BYTES = 16 << 20


class Timed(NamedTuple):
    """Seconds of each part of a pair."""

    plain: float
    save: float
    load: float


def drawn_tensors(gigabytes: float, num_tensors: int, device: torch.device) -> dict[str, Tensor]:
    """Random fp32 tensors of one size, so many bytes together."""
    size = int(gigabytes * 1e9 / 4 / num_tensors)
    return {f"model.{index}": torch.rand(size, device=device) for index in range(num_tensors)}


def pairs(tensors: dict[str, Tensor], folder: Path, num_pairs: int) -> list[Timed]:
    """Write, save and load, in turns, in `folder`. Of tensors on a device the plain write writes copies made before."""
    root, on_host = folder / "checkpoints", {name: tensor.cpu() for name, tensor in tensors.items()}

    def plain() -> None:
        _write(folder / "plain", on_host)

    def save_all() -> None:
        save(root, 1, tensors, {}, None)

    def load_all() -> None:
        load(checkpoint_path(root, 1), tensors, None, sections=("model",))

    return [Timed(*map(seconds_of, (plain, save_all, load_all))) for _ in range(num_pairs)]


def main(argv: list[str]) -> int:
    """Run the benchmark of a command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of tensors (default: 4)")
    parser.add_argument("--tensors", type=int, default=64, help="that hold them (default: 64)")
    parser.add_argument("--pairs", type=int, default=3, help="of a plain write and a checkpoint (default: 3)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: that of temporary files)")
    given = parser.parse_args(argv)
    tensors = drawn_tensors(given.gigabytes, given.tensors, torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        seconds = pairs(tensors, Path(name), given.pairs)
    for label, times in zip(Timed._fields, zip(*seconds, strict=True), strict=True):
        middle = statistics.median(times)
        print(f"{label:6}{middle:8.2f} s{given.gigabytes / middle:8.2f} GB/s")
    print(f"save over plain, each pair: {' '.join(f'{each.save / each.plain:.2f}' for each in seconds)}")
    return 0


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    with file.open("wb") as stream:
        for tensor in tensors.values():
            data = memoryview(tensor.numpy()).cast("B")
            for start in range(0, len(data), _BLOCK_BYTES):
                stream.write(data[start : start + _BLOCK_BYTES])
        stream.flush()
        os.fsync(stream.fileno())
    file.unlink()  # the disk need not hold it beside the checkpoint


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
