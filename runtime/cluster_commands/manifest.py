"""`trimtab cluster manifest KIND`: a file that starts a cluster and trains on it, checked before it is printed."""

import argparse
import re
import sys
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests.plan import ManifestPlan
from dispatch.errors import InvalidValue
from runtime.choices import Choices, choice_parser, chosen
from runtime.option_types import whole


def write(arguments: Sequence[str]) -> int:
    """Write the manifest that the first argument names and return the exit code."""
    what = "Write a file that starts a cluster; options of `trimtab train` for it go behind --."
    parser = choice_parser("trimtab cluster manifest", "KIND", KINDS, what)
    return KINDS[chosen(parser, arguments)](arguments[1:])


def kuberay(arguments: Sequence[str]) -> int:
    """Kubernetes with KubeRay: a RayJob that trains and ends, or with --stay a RayCluster to submit to."""
    parser = _parser("kuberay", kuberay)
    _add_sizes(parser)
    parser.add_argument("--image", required=True, help="container image with this package")
    parser.add_argument("--claim", required=True, help="PersistentVolumeClaim of the folder that all pods share")
    parser.add_argument("--stay", action="store_true", help="a RayCluster alone, without a job")
    given, train_arguments = _parse(parser, arguments)
    from cluster.manifests.kuberay import ray_cluster, ray_job

    make = ray_cluster if given.stay else ray_job
    return _put(given.out, as_yaml(make(_plan(given, train_arguments), image=given.image, claim=given.claim)))


def slurm(arguments: Sequence[str]) -> int:
    """Slurm: a script for sbatch."""
    parser = _parser("slurm", slurm)
    _add_sizes(parser)
    parser.add_argument("--time", type=_time_limit, default="24:00:00", help="limit of the job (%(default)s)")
    given, train_arguments = _parse(parser, arguments)
    from cluster.manifests.slurm import slurm_script

    return _put(given.out, slurm_script(_plan(given, train_arguments), time_limit=given.time))


def ray_up(arguments: Sequence[str]) -> int:
    """`ray up`: machines that are there and take ssh; submit to the cluster then."""
    parser = _parser("ray-up", ray_up)
    parser.add_argument("--head", required=True, type=_ipv4, metavar="ADDRESS", help="IPv4 address of the head")
    parser.add_argument(
        "--worker", type=_ipv4, action="append", default=[], metavar="ADDRESS", help="another; again for more"
    )
    parser.add_argument("--ssh-user", required=True, help="who logs in there")
    _add_sizes(parser, nodes=False)
    given, train_arguments = _parse(parser, arguments)
    if train_arguments:
        raise InvalidValue("ray-up starts a cluster without a job; train with `trimtab submit -- train ...` afterwards")
    from cluster.manifests.ray_up import ray_up as make

    given.nodes = 1 + len(given.worker)
    plan = _plan(given, train_arguments)
    return _put(given.out, as_yaml(make(plan, head=given.head, workers=given.worker, ssh_user=given.ssh_user)))


KINDS: Choices = {"kuberay": kuberay, "slurm": slurm, "ray-up": ray_up}


def as_yaml(manifest: dict[str, Any]) -> str:
    """The manifest as text, in the order in which it was written."""
    return yaml.safe_dump(manifest, sort_keys=False, width=1000)


def _parser(name: str, kind: object) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"trimtab cluster manifest {name}", description=kind.__doc__, allow_abbrev=False
    )


def _add_sizes(parser: argparse.ArgumentParser, *, nodes: bool = True) -> None:
    if nodes:
        parser.add_argument("--nodes", type=whole(1), required=True, help="machines, the head's among them")
    parser.add_argument("--gpus-per-node", type=whole(0), default=0, help="GPUs of each, a worker for each (none)")
    parser.add_argument("--cpus-per-node", type=whole(1), default=8, help="CPUs of each (%(default)s)")
    parser.add_argument("--memory-per-node", type=whole(4), default=32, help="GiB of memory of each (%(default)s)")
    parser.add_argument("--shared", default="/shared", metavar="DIR", help="folder that all share (%(default)s)")
    parser.add_argument("--name", default="trimtab", help="name of cluster and job (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it (standard output)")


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[argparse.Namespace, tuple[str, ...]]:
    given = list(arguments)
    cut = given.index("--") if "--" in given else len(given)
    return parser.parse_args(given[:cut]), tuple(given[cut + 1 :])


def _plan(given: argparse.Namespace, train_arguments: tuple[str, ...]) -> ManifestPlan:
    """The plan, whose training was read as the nodes will read it: a wrong setting is refused here."""
    plan = ManifestPlan(
        name=given.name,
        num_nodes=given.nodes,
        gpus_per_node=given.gpus_per_node,
        cpus_per_node=given.cpus_per_node,
        memory_gib_per_node=given.memory_per_node,
        shared_dir=given.shared,
        train_arguments=train_arguments,
    )
    from runtime.config_file import parse_train

    parse_train(plan.train_command[2:])
    return plan


def _put(out: Path | None, text: str) -> int:
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text)
        sys.stdout.write(f"{out}\n")
    return 0


def _ipv4(text: str) -> str:
    try:
        return str(IPv4Address(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be an IPv4 address") from error


def _time_limit(text: str) -> str:
    if not re.fullmatch(r"(\d+-)?\d{1,3}:\d\d:\d\d", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be [DAYS-]HOURS:MINUTES:SECONDS")
    return text
