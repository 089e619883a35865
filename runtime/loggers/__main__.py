"""`python -m runtime.loggers RUN NAME...`: feeds loggers beside a run, until standard input ends.

`trimtab train` starts it and holds the other end of its standard input, so that it also ends when the driver is killed.
It writes its messages to standard output, one line each.
"""

import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from runtime.loggers.feed import FOLDER, Feed, follow
from runtime.loggers.logger import LoggedRun, MetricsLogger
from runtime.loggers.mlflow_run import MlflowRun
from runtime.loggers.tensorboard_file import TensorBoardFile
from runtime.loggers.wandb_run import WandbRun
from runtime.watch.event_log import EventLog
from workers.record.run_log import EVENTS

OPENERS: dict[str, Callable[[LoggedRun], MetricsLogger]] = {
    "tensorboard": TensorBoardFile,
    "wandb": WandbRun,
    "mlflow": MlflowRun,
}  # each imports its package only when it is called
FINAL_SEND_S = 600  # Longest time to send what is left once the run is over.


def main(run_dir: Path, names: list[str]) -> int:
    """Feed the loggers until standard input ends. First wait for the process of an earlier start, if it still sends."""
    (run_dir / FOLDER).mkdir(exist_ok=True)
    ended = threading.Event()
    with (run_dir / FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        feeds = [Feed(run_dir, name, OPENERS[name], os.environ) for name in names]
        rest = (ended, lambda: _state(run_dir), _tell)
        # A thread for each logger: one that waits for its server does not delay the others.
        threads = [threading.Thread(target=follow, name=feed.name, args=(feed, *rest)) for feed in feeds]
        for thread in threads:
            thread.start()
        sys.stdin.buffer.read()
        signal.alarm(FINAL_SEND_S)  # SIGALRM ends this process if a logger hangs: the driver may be gone already.
        ended.set()
        for thread in threads:
            thread.join()
    return 0


def _state(run_dir: Path) -> str:
    events = EventLog(run_dir / EVENTS)
    while events.poll():
        pass
    return events.state


def _tell(text: str) -> None:
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError:  # the driver was killed
        return


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
