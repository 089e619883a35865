"""Train for many steps under random ragged loads and random evaluations; find what grew and what was left behind.

    python -m benchmarks.soak                      10,000 steps of the tiny preset on two workers
    python -m benchmarks.soak --steps 400 --segments 2

Each segment resumes the run with other intervals of evaluations and checkpoints, with new workers and a new
coordinator, in the same driver and the same Ray. Exit code 1: the memory of a process grew, a token was lost, or
something was left behind.
"""

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from benchmarks.soak.memory import Track, Tracks, wait_until_gone
from cluster.ray.session import RaySession
from runtime.commands.compare.run_pool import last_step
from runtime.job import job
from runtime.report.run_record import RunRecord, headlines
from runtime.settings.config_file import parse_train
from workers.record.run_log import METRICS, read_metrics

ROOT = Path(__file__).parents[2]
MAX_MIB = 1.0  # in 1,000 steps: 1 GiB in a million
MAX_FILES = 0.5  # open files in 1,000 steps


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=10_000, help="in all (%(default)s)")
    parser.add_argument("--segments", type=int, default=2, help="starts of the gang (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the rhythms (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder of the run (a temporary one, removed)")
    given = parser.parse_args(argv)
    # Workers import the law by name, wherever this was started.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    before = _left_behind()
    with tempfile.TemporaryDirectory(prefix="trimtab-soak-") as folder:
        run_dir = (given.out or Path(folder)) / "soak"
        tracks = _soak(run_dir, given)
        grew = _show_memory(tracks)
        lost = _show_run(run_dir)
    left = sorted(map(str, _left_behind() - before))
    running = wait_until_gone(tracks.pids - {os.getpid()}, limit_s=10)
    print(f"left behind: {', '.join([*left, *(f'process {pid}' for pid in running)]) or 'nothing'}")
    return int(bool(grew or lost or left or running))


def _soak(run_dir: Path, given: argparse.Namespace) -> Tracks:
    tracks = Tracks(lambda: last_step(run_dir / METRICS))
    requests = _segments(run_dir, given)  # parsed one by one below: a run must exist to be resumed
    first = parse_train(requests[0]).config
    with RaySession.open(first.cluster), tracks.watching():
        for tracks.segment, arguments in enumerate(requests):
            request = parse_train(arguments)
            job.train(request.config, resume=request.resume, step=None)
    return tracks


def _segments(run_dir: Path, given: argparse.Namespace) -> list[list[str]]:
    """The command line of each segment."""
    draw, found = random.Random(given.seed), []
    for segment in range(given.segments):
        last = given.steps * (segment + 1) // given.segments
        rhythm = [f"--run.eval_every={draw.randint(20, 200)}", f"--run.checkpoint_every={draw.randint(50, 500)}"]
        rhythm += [f"--run.eval_sequences={draw.randint(2, 16)}", f"--steps={last}"]
        start = [
            "--config=tiny",
            f"--run.dir={run_dir.parent}",
            f"--name={run_dir.name}",
            f"--workers={given.workers}",
            f"--run.seed={given.seed}",
            "--device=cpu",
            "--balance.module=benchmarks.soak.ragged_law",
            "--balance.law=ragged",
        ]
        found.append([*(start if segment == 0 else [f"--resume={run_dir}"]), *rhythm])
    return found


def _show_memory(tracks: Tracks) -> list[str]:
    """Print a line for each process; returns the roles of those that grew."""
    grew = []
    for role, of_role in sorted(tracks.by_role().items()):
        for track in of_role:
            memory, files = track.slope(track.mib), track.slope(track.files)
            bad = memory > MAX_MIB or files > MAX_FILES
            grew += [role] * bad
            print(
                f"{role:12} steps {track.steps[0]:>6} to {track.steps[-1]:<6} {_quarters(track)} MiB, "
                f"{_signed(memory)} MiB and {_signed(files)} open files in 1,000 steps{'  GREW' if bad else ''}"
            )
    return grew


def _quarters(track: Track) -> str:
    """The memory of a process at the end of each quarter of its life."""
    ends = [len(track.mib) * quarter // 4 for quarter in (1, 2, 3, 4)]
    return " ".join(f"{track.mib[max(0, end - 1)]:5.0f}" for end in ends)


def _signed(value: float) -> str:
    return "   n/a" if math.isnan(value) else f"{value:+6.2f}"


def _show_run(run_dir: Path) -> bool:
    """Print the run's own headlines; returns whether a token or a step was lost."""
    record = RunRecord.read(run_dir)
    shown = [each for each in headlines(record) if each.label in ("Tokens lost", "Bias checksums equal")]
    for each in shown:
        print(f"{each.label}: {each.value} ({each.note})")
    steps = [line["step"] for line in read_metrics(run_dir)[0]]
    print(f"{len(steps)} steps, {len(record.evals)} evaluations")
    return steps != list(range(1, len(steps) + 1)) or any(each.verdict is False for each in shown)


def _left_behind() -> set[object]:
    """What a run could leave on this machine: shared memory, namespaces, listening ports of its own processes."""
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)  # noqa: S607
    own = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    ports = {each.laddr for each in psutil.net_connections("tcp") if each.status == "LISTEN" and each.pid in own}
    return {*Path("/dev/shm").iterdir(), *spaces.stdout.split("\n"), *ports}  # noqa: S108


if __name__ == "__main__":
    sys.exit(main())
