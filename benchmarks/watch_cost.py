"""`python -m benchmarks.watch_cost`: whether a step takes longer while the run is watched, and while it is logged.

Short runs on two workers take turns: alone, with an open page (`--watch`), and with all loggers (`run.log_to`). Each
round has one run of each kind, in another order. It prints the ratio of the lower quartile of a run's steps to that of
the run alone in the same round; a quartile, since a step that other programs delay says nothing about ours. A second
run alone in each round shows how much the machine itself varies.
"""

import argparse
import contextlib
import io
import json
import re
import statistics
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from cluster.ray.session import RaySession
from runtime.job import job
from runtime.settings.config_file import parse_train
from workers.record.run_log import read_metrics

ALONE, AGAIN, WATCHED, LOGGED = "alone", "alone again", "a page is open", "all loggers"
KINDS = (ALONE, WATCHED, LOGGED, AGAIN)
WARM_STEPS = 50
CURVES = "loss,val_loss,max_vio_batch,max_vio_floor,tokens_per_s,grad_norm,lr,step_s"
LOOK_S = 1.0  # an open page asks again after this time


class Viewer(io.StringIO):
    """Receives what the run prints. Once that has a URL, it requests what an open page draws, until `leave`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_drawn = 0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def write(self, text: str) -> int:
        """Look for the URL."""
        found = re.search(r"(http://127\S+)\?token=(\S+)", text)
        if found and self._thread is None:
            self._thread = threading.Thread(target=self._look, args=found.groups(), daemon=True)
            self._thread.start()
        return super().write(text)

    def leave(self) -> None:
        """Close the page."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _look(self, url: str, token: str) -> None:
        with contextlib.suppress(OSError):  # the run is over
            while not self._closed.wait(LOOK_S):
                for path in (
                    "api/runs/0",
                    f"api/runs/0/curves?num=400&names={CURVES}",
                    "api/runs/0/load?layer=0&num=256",
                ):
                    request = urllib.request.Request(url + path, headers={"authorization": f"Bearer {token}"})  # noqa: S310
                    urllib.request.urlopen(request).read()  # noqa: S310 - of our own server
                self.num_drawn += 1


def step_s(folder: Path, name: str, kind: str, steps: int) -> float:
    """The lower quartile of the steps of one run, in seconds."""
    loggers = "[tensorboard,wandb,mlflow]" if kind == LOGGED else "[]"
    how = [f"--run.dir={folder}", f"--name={name}", f"--steps={steps}", f"--run.log_to={loggers}"]
    rest = ["--config=tiny", "--device=cpu", "--run.eval_every=0", "--run.checkpoint_every=0"]
    request = parse_train([*rest, *how, *(["--watch"] if kind == WATCHED else [])])
    viewer = Viewer()
    with contextlib.redirect_stdout(viewer):
        job.train(request.config, resume=None, step=None, watch=request.watch)
    viewer.leave()
    if kind == WATCHED and not viewer.num_drawn:
        raise RuntimeError("the run ended before the page was requested; give more --steps")
    return statistics.quantiles([line["step_s"] for line in read_metrics(folder / name)[0][WARM_STEPS:]])[0]


def rounds(folder: Path, num: int, steps: int) -> Iterator[dict[str, float]]:
    """Seconds of a step of each kind, round by round."""
    config = parse_train(["--config=tiny", "--device=cpu"]).config
    with RaySession.open(config.cluster):
        for number in range(num):
            order = KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)]
            yield {kind: step_s(folder, f"{number}-{kind.replace(' ', '-')}", kind, steps) for kind in order}


def table(found: list[dict[str, float]]) -> str:
    """Medians over the rounds, and the ratios of each kind to the run alone in the same round."""
    lines = [f"{'':16}{'ms a step':>10}  ratio to alone: median (least to greatest) of {len(found)} rounds"]
    for kind in KINDS:
        ratios = [each[kind] / each[ALONE] for each in found]
        ms = 1e3 * statistics.median(each[kind] for each in found)
        lines.append(f"{kind:16}{ms:10.1f}  {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    return "\n".join(lines)


def main() -> int:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watch_cost", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="of a run")
    parser.add_argument("--samples", type=Path, help="file to add the rounds to; the table is of all that it holds")
    options = parser.parse_args()
    found = []
    if options.samples and options.samples.exists():
        found = [json.loads(line) for line in options.samples.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        for each in rounds(Path(folder), options.rounds, options.steps):
            found.append(each)
            if options.samples:
                options.samples.write_text("".join(json.dumps(one) + "\n" for one in found))
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
