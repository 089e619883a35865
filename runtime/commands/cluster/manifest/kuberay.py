"""`trimtab cluster manifest kuberay`."""

import argparse
import re

from runtime.commands.cluster.manifest.options import add_sizes, as_yaml, plan_of, write
from runtime.commands.command import CommandParser

HELP = "Kubernetes with KubeRay: a RayJob that trains and ends, or with --stay a RayCluster to submit to."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    add_sizes(parser)
    parser.add_argument("--image", required=True, help="container image with this package")
    parser.add_argument(
        "--claim", type=_name, required=True, help="PersistentVolumeClaim of the folder that all pods share"
    )
    parser.add_argument("--stay", action="store_true", help="a RayCluster alone, without a job")


def run(options: argparse.Namespace) -> int:
    """Write the manifest and return the exit code."""
    from cluster.nodes.manifests.kuberay import ray_cluster, ray_job

    make = ray_cluster if options.stay else ray_job
    return write(options.out, as_yaml(make(plan_of(options), image=options.image, claim=options.claim)))


def _name(text: str) -> str:
    if len(text) > 253 or not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", text):  # RFC 1123
        raise argparse.ArgumentTypeError(
            f"{text!r:.60} must be at most 253 small letters, digits, hyphens and dots, as Kubernetes wants it"
        )
    return text
