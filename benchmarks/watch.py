"""`python -m benchmarks.watch`: how quickly the live page opens and zooms on a run of 1,000,000 steps, and its memory.

It makes a run directory and starts `trimtab watch` on it as a user does. A step of 61 layers × 256 experts has 2 KB in
metrics.jsonl and 187 KB in load/history.bin, 187 GB in all, more than most disks have room for. So the history is a
sparse file: every record has its step and the load of the first layer, the last ten records are whole, and the rest
reads as zeros. In metrics.jsonl every line has its own step, time, loss and gradient norm; the other values repeat
every 1,000 lines.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

OPEN_S, ZOOM_S, MEMORY_BYTES = 1.0, 0.2, 300e6  # the bounds
REPEATED = 1_000
WHOLE_RECORDS = 10
WIDTHS = (100, 1_000, 4_000, 10_000, 100_000, 1_000_000)
# The curves of the charts that the page shows first.
OVERVIEW = "loss,val_loss,val_bits_per_byte,max_vio_batch,max_vio_floor,tokens_per_s,grad_norm,lr,step_s,mfu"


@dataclass(frozen=True)
class Size:
    """The size of the run."""

    steps: int
    layers: int
    experts: int

    @property
    def record_bytes(self) -> int:
        return 8 + 12 * self.layers * self.experts


def make(folder: Path, size: Size) -> None:
    """Write the run directory."""
    (folder / "load").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"run: {{steps: {size.steps}}}\nbalance: {{law: adaptive}}\n")
    names = [f"layers.{number}.moe" for number in range(size.layers)]
    layout = {"names": names, "num_experts": [size.experts] * size.layers, "balanced": [True] * size.layers}
    (folder / "load" / "layout.json").write_text(json.dumps(layout))
    events = [{"time": 1e9, "event": "started", "step": 0}, {"time": 2e9, "event": "finished", "step": size.steps}]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    _make_metrics(folder / "metrics.jsonl", size)
    _make_history(folder / "load" / "history.bin", size)


def _make_metrics(path: Path, size: Size) -> None:
    rng = np.random.default_rng(0)
    rests = [_rest_of_line(rng, size) for _ in range(REPEATED)]
    noise = rng.normal(0, 0.05, 100_003).tolist()
    with path.open("w", buffering=2**20) as file:
        for step in range(1, size.steps + 1):
            loss = 2 + 6 / (1 + step / 500) + noise[step % 100_003]
            own = f'{{"kind": "train", "time": {1e9 + step}, "step": {step}, "loss": {loss}, "grad_norm": {0.3 + loss}'
            file.write(f"{own}, {rests[step % REPEATED]}\n")
            if step % 1_000 == 0:
                held_out = {"kind": "eval", "time": 1e9 + step, "step": step, "val_loss": loss}
                file.write(json.dumps(held_out | {"val_bits_per_byte": loss / 3}) + "\n")


def _rest_of_line(rng: np.random.Generator, size: Size) -> str:
    tokens = dict.fromkeys(("tokens_routed", "tokens_sent", "tokens_received", "tokens_returned"), 4_194_304)
    phases = ("dispatch_s", "experts_s", "combine_s", "bias_update_s", "control_wait_s")
    values = {
        "aux_loss": None, "z_loss": None, "lr": 3e-4, "skipped": False, "step_s": 1 + rng.random(), "dead_experts": 0,
        "tokens_per_s": 1e6 * rng.random(), "tflops_per_s": 300 * rng.random(), "mfu": 0.3 * rng.random(),
        "max_vio_batch": rng.random(), "max_vio_batch_per_layer": rng.random(size.layers).tolist(),
        "max_vio_floor": 0.1, "max_vio_computation_batch": rng.random(), "bias_min": -rng.random(),
        "bias_max": rng.random(), "sent_bytes": 10**9, "bias_checksum": "0123abcd", "bias_version": 7,
        **tokens, **{name: 0.2 * rng.random() for name in phases},
    }  # fmt: skip
    return json.dumps(values)[1:]


def _make_history(path: Path, size: Size) -> None:
    rng = np.random.default_rng(1)
    loads = rng.poisson(4096, (REPEATED, size.experts)).astype("<i8")
    whole = (
        rng.poisson(4096, size.layers * size.experts).astype("<i8").tobytes() + b"\0" * 4 * size.layers * size.experts
    )
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    os.truncate(path, size.steps * size.record_bytes)
    for step in range(1, size.steps + 1):
        is_whole = step > size.steps - WHOLE_RECORDS
        content = whole if is_whole else loads[step % REPEATED].tobytes()
        os.pwrite(fd, step.to_bytes(8, "little") + content, (step - 1) * size.record_bytes)
    os.fsync(fd)
    for each in (fd, os.open(path.parents[1] / "metrics.jsonl", os.O_RDONLY)):
        os.posix_fadvise(each, 0, 0, os.POSIX_FADV_DONTNEED)  # read from the disk, as after a restart
        os.close(each)


class Server:
    """`trimtab watch` on a run."""

    def __init__(self, process: "subprocess.Popen[str]", url: str) -> None:
        self.process = process
        self._base, _, token = url.partition("?token=")
        self._headers = {"authorization": f"Bearer {token}"}

    def ask(self, path: str) -> tuple[float, bytes]:
        """Seconds that an answer took, and the answer."""
        request = urllib.request.Request(self._base + path, headers=self._headers)  # noqa: S310 - of our own server
        began = time.perf_counter()
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            content = answer.read()
        return time.perf_counter() - began, content

    def share_read(self) -> float:
        return float(json.loads(self.ask("api/runs")[1])[0]["share_read"])

    def peak_bytes(self) -> int:
        """The most memory that the process has had resident."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


@contextmanager
def served(run_dir: Path) -> Iterator[tuple[Server, float]]:
    """The server, and the seconds until it has printed its URL."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "runtime", "watch", str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 - our own
        try:
            url = next(found[0] for line in process.stdout or () if (found := re.search(r"http://\S+", line)))
            yield Server(process, url), time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def open_page(server: Server) -> float:
    """Seconds until the page has got all that it requests when it opens, one request after the other."""
    paths = ["", "static/main.js", "static/uplot.min.js", "api/runs", "api/runs/0", "api/runs/0/events"]
    paths += [f"api/runs/0/curves?num=400&names={OVERVIEW}"]
    return sum(server.ask(path)[0] for path in paths)


def zooms(server: Server, size: Size, rng: random.Random, rounds: int) -> dict[str, list[float]]:
    """Seconds of zooms to windows at random places, by what is requested and the width of the window."""
    found: dict[str, list[float]] = {}
    questions = {"curves": f"curves?num=400&names={OVERVIEW}", "heat map": "load?layer=0&num=256"}
    for width in [width for width in WIDTHS if width <= size.steps]:
        for what, question in questions.items():
            for _ in range(rounds):
                first = rng.randint(0, size.steps - width)
                took = server.ask(f"api/runs/0/{question}&first={first}&last={first + width}")[0]
                found.setdefault(f"{what}, {width:,} steps", []).append(took)
    return found


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watch", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10, help="zooms of each kind")
    parser.add_argument("--folder", type=Path, help="where to make the run, 9 GB at the default size (a temporary one)")
    options = parser.parse_args()
    size = Size(options.steps, options.layers, options.experts)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return measure(Path(folder) / "run", size, options.rounds)


def measure(run_dir: Path, size: Size, rounds: int) -> int:
    """Make the run, measure, print; the exit code is 1 where a bound was not kept."""
    began = time.perf_counter()
    make(run_dir, size)
    metrics_gb = (run_dir / "metrics.jsonl").stat().st_size / 1e9
    history = (run_dir / "load" / "history.bin").stat()
    print(
        f"{size.steps:,} steps x {size.layers} layers x {size.experts} experts: metrics.jsonl {metrics_gb:.2f} GB, "
        f"load/history.bin {history.st_size / 1e9:.0f} GB with holes, "
        f"{history.st_blocks * 512 / 1e9:.1f} GB on the disk; made in {time.perf_counter() - began:.0f} s"
    )
    with served(run_dir) as (server, start_s):
        rng, started = random.Random(0), time.perf_counter()
        open_s = open_page(server)
        early = zooms(server, size, rng, max(rounds // 5, 1))
        early_share = server.share_read()
        while server.share_read() < 1:
            time.sleep(0.5)
        read_s = time.perf_counter() - started
        late = zooms(server, size, rng, rounds)
        peak = server.peak_bytes()
    print(f"URL printed after {start_s:.2f} s; page open {open_s:.2f} s later; all read after {read_s:.0f} s")
    print(f"peak resident memory {peak / 1e6:.0f} MB\n\n{'zoom to':30} {'while reading':>22} {'all read':>22}")
    for name, times in late.items():
        print(f"{name:30} {_told(early[name]):>22} {_told(times):>22}")
    print(f"median, worst; the reading was at {early_share:.0%} when the first ones ended")
    worst = max(max(times) for times in [*early.values(), *late.values()])
    kept = {"open": start_s + open_s <= OPEN_S, "zoom": worst <= ZOOM_S, "memory": peak <= MEMORY_BYTES}
    print("bounds:", ", ".join(f"{name} {'kept' if is_kept else 'NOT kept'}" for name, is_kept in kept.items()))
    return int(not all(kept.values()))


def _told(times: list[float]) -> str:
    return f"{statistics.median(times) * 1e3:.0f} ms, {max(times) * 1e3:.0f} ms"


if __name__ == "__main__":
    sys.exit(main())
