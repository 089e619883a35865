"""`trimtab cluster manifest ray-up`."""

import argparse
from ipaddress import IPv4Address

from dispatch.errors import InvalidValue
from runtime.commands.cluster.manifest.options import add_sizes, as_yaml, plan_of, write
from runtime.commands.command import CommandParser

HELP = "`ray up`: machines that are there and take ssh; submit to the cluster then."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    parser.add_argument("--head", required=True, type=_ipv4, metavar="ADDRESS", help="IPv4 address of the head")
    parser.add_argument(
        "--worker", type=_ipv4, action="append", default=[], metavar="ADDRESS", help="another; again for more"
    )
    parser.add_argument("--ssh-user", required=True, help="who logs in there")
    parser.add_argument(
        "--ssh-key", metavar="FILE", help="private key for all of them, copied to the head, which starts the workers"
    )
    add_sizes(parser, nodes=False)


def run(options: argparse.Namespace) -> int:
    """Write the file and return the exit code."""
    if options.train_arguments:
        raise InvalidValue("ray-up starts a cluster without a job; train with `trimtab submit -- train ...` afterwards")
    from cluster.nodes.manifests.ray_up import ray_up

    options.nodes = 1 + len(options.worker)
    login = {"ssh_user": options.ssh_user, "ssh_key": options.ssh_key}
    manifest = ray_up(plan_of(options), head=options.head, workers=options.worker, **login)
    return write(options.out, as_yaml(manifest))


def _ipv4(text: str) -> str:
    try:
        return str(IPv4Address(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.60} must be an IPv4 address") from error
