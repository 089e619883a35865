"""`trimtab doctor TARGET`: a small table of what can be examined."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cluster.config import ClusterConfig
from dispatch.errors import InvalidValue
from runtime.choices import Choices, choice_parser, chosen
from runtime.option_types import whole

if TYPE_CHECKING:
    from runtime.doctor.survey import Survey

JOIN_S = 60.0  # for the ranks to start, and again to join
COLLECTIVE_S = 20.0


def doctor(arguments: Sequence[str]) -> int:
    """Examine what the first argument names and return the exit code: 1 if something is wrong."""
    parser = choice_parser("trimtab doctor", "TARGET", TARGETS, "Find what is wrong before a run does.")
    if not arguments or arguments[0].startswith("-"):
        chosen(parser, arguments)
    if arguments[0] == "cluster":
        return doctor_cluster(arguments[1:])
    return doctor_checkpoint(arguments)


def doctor_cluster(arguments: Sequence[str]) -> int:
    """The nodes of a Ray cluster, or this machine: versions, devices, clocks, disks, network, process groups."""
    options = _cluster_parser().parse_args(arguments)
    config = ClusterConfig(
        address=options.address,
        num_workers=options.workers or 2,
        device=options.device,
        start_timeout_s=JOIN_S,
        collective_timeout_s=COLLECTIVE_S,
    )
    if options.workers and options.ep_size and options.workers % options.ep_size:
        raise InvalidValue(f"--ep-size ({options.ep_size}) must divide --workers ({options.workers})")
    from cluster.session import RaySession
    from runtime.doctor.examine import Examination, examine
    from runtime.doctor.judge import judge
    from runtime.doctor.table import as_text

    console = Console(stderr=True, highlight=False)
    with console.status("starting or joining Ray") as status, RaySession.open(config):
        if options.address is not None and not options.workers:
            config = replace(config, num_workers=_ranks_for(config))
        survey = examine(
            Examination(
                config=config,
                ep_size=options.ep_size or config.num_workers,
                paths=tuple(dict.fromkeys(options.path)),
                say=status.update if console.is_terminal else lambda text: console.print(text, style="dim"),
            )
        )
    findings = judge(survey)
    sys.stdout.write(as_text(survey, findings) + "\n")
    if options.json is not None:
        _write_json(options.json, survey, [asdict(finding) for finding in findings])
    return int(any(finding.severity == "error" for finding in findings))


def doctor_checkpoint(arguments: Sequence[str]) -> int:
    """A run, a checkpoint or a directory of Hugging Face: files, experts, values, biases, configuration."""
    from runtime.doctor.checkpoint_options import checkpoint_parser

    options = checkpoint_parser().parse_args(arguments)
    from runtime.doctor.checkpoint_command import examine

    return examine(options.path, options.step, options.json)


TARGETS: Choices = {"cluster": doctor_cluster, "PATH": doctor_checkpoint}


def _ranks_for(config: ClusterConfig) -> int:
    """A rank for each GPU of the joined cluster; without GPUs, one for each node."""
    import ray

    num_gpus = 0 if config.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    return num_gpus or sum(node["Alive"] for node in ray.nodes())


def _write_json(path: Path, survey: "Survey", findings: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"findings": findings, **asdict(survey)}, indent=1) + "\n")


def _cluster_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trimtab doctor cluster", description=doctor_cluster.__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help='Ray cluster to join, or "auto" for the one this machine belongs to; without, this machine alone',
    )
    parser.add_argument("--workers", type=whole(1), help="ranks to join (one for each GPU, else for each node; here 2)")
    parser.add_argument("--ep-size", type=whole(1), help="ranks that share one set of experts (all)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where they compute (auto)")
    parser.add_argument(
        "--path",
        action="append",
        default=["runs", "~/.cache/trimtab", "/tmp"],  # noqa: S108 Ray's own place, looked at only.
        help="look at the disk of this path on every node; again for more (runs, ~/.cache/trimtab and /tmp always)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found there")
    return parser
