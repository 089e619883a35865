"""Quick checks of a Ray head: does it demand a token, accept ours, know a node? Ray itself would retry for 20 s.

Ray's client reads the authentication mode and the token only once in a process. `authenticated` makes it read them
again, so that one process can ask several clusters.
"""

from __future__ import annotations

import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.machine.node_state import NodeState
from cluster.machine.token import NO_AUTHENTICATION, token_environment
from dispatch.errors import InvalidValue, UserError

ANSWER_LIMIT_S = 3.0
AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class ClusterUnreachable(UserError, ConnectionError):
    """No Ray answers at the address that was asked for."""


class TokenRefused(ClusterUnreachable):
    """The cluster demands a token, and this process has none or another."""


def check_answers(address: str, timeout_s: float = ANSWER_LIMIT_S) -> None:
    """Check that something listens at HOST:PORT. Ray itself would retry for half a minute.

    Raises:
        ClusterUnreachable: nothing does; raised within `timeout_s`.
        InvalidValue: the address is neither "auto", which is not checked, nor HOST:PORT.
    """
    if address == "auto":
        return
    host, port = host_and_port(address)
    try:
        socket.create_connection((host.strip("[]"), port), timeout_s).close()
    except OSError as error:
        raise ClusterUnreachable(
            f"nothing answers at {address} ({error}): see with `trimtab cluster status` on the head that it is up, and "
            "that this machine reaches its port. Training without --cluster.address starts a Ray on this machine"
        ) from error


def host_and_port(address: str) -> tuple[str, int]:
    """Divide HOST:PORT. Raises InvalidValue where it has another form, or no such port can be."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 2**16:
        raise InvalidValue(
            f'the address of a Ray head ({address!r:.60}) must be HOST:PORT, with a port from 1 to 65535, or "auto"'
        )
    return host, int(port)


@contextmanager
def authenticated(variables: dict[str, str]) -> Iterator[None]:
    """Have Ray's client in this process use these authentication variables, and no others, within the block."""
    before = {name: os.environ.pop(name) for name in AUTH_VARIABLES if name in os.environ}
    os.environ.update(variables)
    reload_authentication()
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)
        reload_authentication()


def reload_authentication() -> None:
    """Have Ray's client read authentication mode and token from the environment again."""
    # A Cython module, without types. Ray has no public function for it.
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def connect(gcs_address: str) -> Any:
    """A client of the head's control store (Ray's GcsClient), with the environment's token. Takes milliseconds.

    Raises:
        TokenRefused: the head demands another token.
        ClusterUnreachable: nothing listens there, or something other than Ray.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.exceptions import AuthenticationError, RpcError

    check_answers(gcs_address)
    try:
        return GcsClient(address=gcs_address)
    except AuthenticationError as error:
        raise TokenRefused(f"the cluster at {gcs_address} demands its token") from error
    except RpcError as error:
        raise ClusterUnreachable(f"what listens at {gcs_address} is no Ray head: {error}") from error


def demands_token(gcs_address: str) -> bool:
    """Whether the cluster refuses clients without a token."""
    with authenticated(NO_AUTHENTICATION):
        try:
            connect(gcs_address)
        except TokenRefused:
            return True
        return False


def missing_part(node: NodeState) -> str | None:
    """Which part of a starting node is still missing, as a sentence; None once the node takes work."""
    from ray.exceptions import RpcError

    with authenticated(token_environment(None if node.token_file is None else Path(node.token_file))):
        try:
            nodes = connect(node.gcs_address).get_all_node_info(timeout=ANSWER_LIMIT_S).values()
        except (ClusterUnreachable, RpcError):
            return f"the head at {node.gcs_address} does not answer"
    # ALIVE is 0 in Ray's GcsNodeInfo.
    if not any(each.node_manager_address == node.address and each.state == 0 for each in nodes):
        return f"node {node.address} has not registered at {node.gcs_address}"
    if node.dashboard is not None and not _answers(f"{node.dashboard}/api/version"):
        return f"the job API does not answer at {node.dashboard}"
    return None


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=ANSWER_LIMIT_S).close()  # noqa: S310 http, built by us
    except urllib.error.HTTPError as refusal:
        return refusal.code == 401  # it is there, and demands a token
    except OSError:
        return False
    return True
