"""A state on the device: how long training stops for its copy, and its checkpoint beside a plain write with fsync."""

import statistics
from functools import partial

import torch

from benchmarks.checkpoint import Timed, drawn_tensors, pairs
from benchmarks.gpu.section import Figures, Setting, head, row
from benchmarks.paired import seconds_of
from workers.checkpoints.shares import TensorBlock, specs_of

NUM_COPIES = 3


def measure(setting: Setting) -> None:
    """The copies first; the disk cannot disturb them."""
    sizes = setting.sizes
    tensors = drawn_tensors(sizes.checkpoint_gigabytes, sizes.checkpoint_tensors, setting.device)
    found: Figures = {"gigabytes": sizes.checkpoint_gigabytes, "copy": _copies(tensors, setting.device)}
    setting.tell(found)
    timed = pairs(tensors, setting.folder, sizes.checkpoint_pairs)
    found["disk"] = {part: statistics.median(getattr(each, part) for each in timed) for part in Timed._fields}
    found["save_over_plain"] = [each.save / each.plain for each in timed]
    setting.tell(found)


def _copies(tensors: dict[str, torch.Tensor], device: torch.device) -> Figures:
    """Seconds of a block's making; and of a copy into it: those that stop the host, and all until it has arrived."""
    blocks: list[TensorBlock] = []
    made_s = seconds_of(lambda: blocks.append(TensorBlock(specs_of(tensors), device)))
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    samples = []
    for _ in range(NUM_COPIES):
        stopped_s = seconds_of(partial(blocks[0].fill, tensors, stream))
        samples.append((stopped_s, stopped_s + seconds_of(blocks[0].wait)))
    stopped_s, arrived_s = (statistics.median(column) for column in zip(*samples, strict=True))
    return {"made_s": made_s, "stopped_s": stopped_s, "arrived_s": arrived_s}


def show(figures: Figures) -> list[str]:
    """The copy, then the disk."""
    size, copy = figures["gigabytes"], figures["copy"]
    lines = [f"{size:g} GB of tensors on the device.", "", *head("", "s", "GB/s")]
    lines += [row("pinned memory for the copies, once a run", f"{copy['made_s']:.2f}", "")]
    lines += [row("the copy stops training for", f"{copy['stopped_s']:.4f}", "")]
    lines += [row("the copy has arrived after", f"{copy['arrived_s']:.3f}", f"{size / copy['arrived_s']:.1f}")]
    for part, seconds in figures.get("disk", {}).items():
        what = {"plain": "a plain write of host memory, with fsync", "save": "save, from the device", "load": "load"}
        lines.append(row(what[part], f"{seconds:.2f}", f"{size / seconds:.2f}"))
    if "save_over_plain" in figures:
        ratios = " ".join(f"{ratio:.2f}" for ratio in figures["save_over_plain"])
        lines += ["", f"Save over the plain write, each pair: {ratios}"]
    return lines
