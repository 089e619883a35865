"""What the manifests share: the options, the plan that they describe, and where they are written."""

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from cluster.nodes.manifests.plan import ManifestPlan
from runtime.commands.command import CommandParser
from runtime.commands.options import file_to_write, int_from, positive


def add_sizes(parser: CommandParser, *, nodes: bool = True) -> None:
    """Declare what all manifests need; the options of `trimtab train` behind -- are left."""
    if nodes:
        parser.add_argument("--nodes", type=positive, required=True, help="machines, the head's among them")
    parser.add_argument("--gpus-per-node", type=int_from(0), default=0, help="GPUs of each, a worker for each (none)")
    parser.add_argument("--cpus-per-node", type=positive, default=8, help="CPUs of each (%(default)s)")
    parser.add_argument("--memory-per-node", type=int_from(4), default=32, help="GiB of memory of each (%(default)s)")
    parser.add_argument("--shared", default="/shared", metavar="DIR", help="folder that all share (%(default)s)")
    parser.add_argument("--name", default="trimtab", help="name of cluster and job (%(default)s)")
    parser.add_argument("--out", type=file_to_write, metavar="FILE", help="where to write it (standard output)")
    parser.leave("train_arguments", "behind --")


def plan_of(options: argparse.Namespace) -> ManifestPlan:
    """The plan of the options. Those of `trimtab train` are parsed too, so that a wrong setting is refused."""
    plan = ManifestPlan(
        name=options.name,
        num_nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        cpus_per_node=options.cpus_per_node,
        memory_gib_per_node=options.memory_per_node,
        shared_dir=options.shared,
        train_arguments=tuple(options.train_arguments),
    )
    from runtime.settings.config_file import parse_train

    parse_train(plan.train_command[2:])
    return plan


def as_yaml(manifest: dict[str, Any]) -> str:
    """The manifest as text, in the order in which it was written."""
    return yaml.safe_dump(manifest, sort_keys=False, width=1000)


def write(out: Path | None, text: str) -> int:
    """Write a manifest to a file, whose name is printed, or to standard output. Returns the exit code."""
    if out is None:
        sys.stdout.write(text)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
        sys.stdout.write(f"{out}\n")
    return 0
