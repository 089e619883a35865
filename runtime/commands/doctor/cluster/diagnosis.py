"""Examines a cluster, judges what was found, prints it, and records it."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

from cluster.config import ClusterConfig
from cluster.ray.session import RaySession
from dispatch.errors import InvalidValue
from runtime.commands.doctor.cluster.examine import Examination, examine
from runtime.commands.doctor.cluster.judge import judge
from runtime.commands.doctor.cluster.table import as_text
from runtime.commands.results import write_json
from runtime.terminal.progress_line import ProgressLine

JOIN_S = 60.0  # for the ranks to start, and again to join
COLLECTIVE_S = 20.0


def diagnose(
    *,
    address: str | None,
    num_workers: int | None,
    ep_size: int | None,
    device: Literal["auto", "cpu", "cuda"],
    paths: tuple[str, ...],
    record: Path | None,
) -> int:
    """Examine the cluster at `address`, or this machine. Returns the exit code: 1 where something is wrong.

    num_workers: ranks to start, None for one on each GPU, or on each node without GPUs. ep_size: None for all ranks.
    record: a file for everything that was found.
    """
    config = ClusterConfig(
        address=address,
        num_workers=num_workers or 2,
        device=device,
        start_timeout_s=JOIN_S,
        collective_timeout_s=COLLECTIVE_S,
    )
    with ProgressLine(sys.stderr) as progress:
        progress.show("starting or joining Ray")
        with RaySession.open(config):
            if num_workers is None:
                config = replace(config, num_workers=_ranks_for(config))
            ep_size = ep_size or config.num_workers
            if config.num_workers % ep_size:
                raise InvalidValue(f"--ep-size ({ep_size}) must divide the {config.num_workers} ranks; give --workers")
            survey = examine(Examination(config=config, ep_size=ep_size, paths=paths, say=progress.show))
    findings = judge(survey)
    sys.stdout.write(as_text(survey, findings) + "\n")
    if record is not None:
        write_json(record, {"findings": [asdict(finding) for finding in findings], **asdict(survey)}, indent=1)
    return int(any(finding.severity == "error" for finding in findings))


def _ranks_for(config: ClusterConfig) -> int:
    """A rank for each GPU of the joined cluster; without GPUs, one for each node."""
    import ray

    num_gpus = 0 if config.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    return num_gpus or sum(node["Alive"] for node in ray.nodes())
