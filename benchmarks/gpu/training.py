"""`trimtab train` as a real command on one worker: what its own record says."""

import json
import statistics
from pathlib import Path

from benchmarks.gpu.commands import run_module
from benchmarks.gpu.section import Figures, Setting, head, row
from runtime.runs.run_dir import NOW_FILE
from workers.record.run_log import METRICS, read_metrics

RUN = "measured"
PHASES = ("step_s", "dispatch_s", "experts_s", "combine_s", "bias_update_s", "control_wait_s")


def measure(setting: Setting) -> None:
    """Train, and read the record; also that of a run that fails in the end, as where the disk is too small."""
    sizes, run_dir = setting.sizes, setting.folder / RUN
    command = ("runtime", "train", *sizes.training, "--workers", "1", "--device", setting.device.type)
    rhythm = ("--steps", str(sizes.steps), "--run.eval_every", "0", "--run.checkpoint_every", "0")
    place, held = ("--run.dir", str(setting.folder), "--name", RUN), [0]
    try:
        run_module(*command, *rhythm, *place, on_poll=lambda: held.append(_held_bytes(run_dir)))
    finally:
        if found := read_run(run_dir, sizes.warm_up_steps, max(held)):
            setting.tell({"command": f"trimtab {' '.join(command[1:])}", **found})


def read_run(run_dir: Path, warm_up_steps: int, held_bytes: int) -> Figures:
    """Medians of the steps after the warm-up; of the events, how long the start and the last checkpoint took.

    Empty where there is no such step.
    """
    if not (run_dir / METRICS).exists():
        return {}
    lines = [line for line in read_metrics(run_dir)[0] if line["step"] > warm_up_steps]
    if not lines:
        return {}
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return {
        "num_steps": len(lines),
        "tokens_per_s": statistics.median(line["tokens_per_s"] for line in lines),
        "mfu": None if lines[0]["mfu"] is None else statistics.median(line["mfu"] for line in lines),
        "tflops_per_s": statistics.median(line["tflops_per_s"] for line in lines),
        "seconds": {phase: statistics.median(line[phase] for line in lines) for phase in PHASES},
        # What torch's allocator had taken of the device, as the run told it every two seconds. 0: it was never told.
        "held_mib": held_bytes / 2**20,
        "start": _event(events, "started", "ray_s", "gang_s"),
        "last_checkpoint": _event(events, "checkpoint", "bytes", "blocked_s", "write_s"),
    }


def _event(events: list[Figures], name: str, *fields: str) -> Figures:
    """Fields of the first event of this name; empty where there is none."""
    return next(({field: event[field] for field in fields} for event in events if event.get("event") == name), {})


def _held_bytes(run_dir: Path) -> int:
    """What the run says now; 0 where it says nothing yet."""
    try:
        ranks = json.loads((run_dir / NOW_FILE).read_text())["ranks"]
    except OSError:
        return 0
    return sum(rank["memory_bytes"] for rank in ranks)


def show(figures: Figures) -> list[str]:
    """The command and its figures."""
    mfu = "not known: no peak of this device" if figures["mfu"] is None else f"{100 * figures['mfu']:.1f} %"
    held = f"{figures['held_mib'] / 1024:.1f} GiB" if figures["held_mib"] else "not told"
    lines = [f"`{figures['command']}`: medians of {figures['num_steps']} steps after the warm-up.", "", *head("", "")]
    lines += [row("tokens/s", f"{figures['tokens_per_s']:,.0f}"), row("TFLOP/s", f"{figures['tflops_per_s']:.0f}")]
    lines += [row("MFU", mfu), row("memory that torch's allocator took of the device", held)]
    lines += [row(f"`{phase}`, ms", f"{1e3 * seconds:.1f}") for phase, seconds in figures["seconds"].items()]
    start, saved = figures["start"], figures["last_checkpoint"]
    if start:
        lines.append(row("start of Ray and of the worker, s", f"{start['ray_s']:.1f}, {start['gang_s']:.1f}"))
    size = f"{saved['bytes'] / 1e9:.2f} GB in {saved['write_s']:.1f} s" if saved else "not written"
    return [*lines, row("the last checkpoint, for which the run waits", size)]
