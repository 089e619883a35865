"""One rank of a race, started by `launch`. Rank 0 writes JSON lines to standard output: progress, then the result."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any, TextIO

import torch.distributed as dist

from benchmarks.peers.case import Case
from benchmarks.peers.race import run_case
from benchmarks.peers.registry import ENTRANTS

COLLECTIVE_LIMIT_S = 600.0  # far above any step: a rank that waits longer waits for one that has died


def main() -> None:
    """Take part in the race that the only argument describes."""
    job = json.loads(sys.argv[1])
    case, rank = Case.from_json(job["case"]), job["rank"]
    send = _sender(_own_output(), silent=rank != 0)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(job["store"], case.ep_size),
        rank=rank,
        world_size=case.ep_size,
        timeout=timedelta(seconds=COLLECTIVE_LIMIT_S),
    )
    builders = {name: ENTRANTS[name] for name in job["names"]}
    outcome = run_case(case, builders, dist.group.WORLD, lambda text: send({"say": text}))
    send({"result": asdict(outcome)})
    dist.destroy_process_group()


def _own_output() -> TextIO:
    """The standard output, for our messages alone: from here on what peers print there goes to standard error."""
    ours = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return ours


def _sender(output: TextIO, *, silent: bool) -> Callable[[dict[str, Any]], None]:
    def send(message: dict[str, Any]) -> None:
        if not silent:
            print(json.dumps(message), file=output, flush=True)

    return send


if __name__ == "__main__":
    main()
