"""How this process connects to a cluster: address and token, checked quickly, with errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.machine.node_state import NodeState, live_nodes
from cluster.machine.token import token_environment
from cluster.ray.probe import AUTH_VARIABLES, ClusterUnreachable, TokenRefused, authenticated, connect, demands_token


@dataclass(frozen=True, kw_only=True)
class Access:
    """Address of a cluster, and the authentication to use there."""

    gcs_address: str
    """HOST:PORT of the head, or "auto": Ray searches for a node on this machine by itself."""
    node: NodeState | None
    """The node of this cluster that `trimtab cluster` started on this machine; None if there is none."""
    variables: Mapping[str, str]
    """RAY_AUTH_*: the authentication to use."""

    @property
    def on_loopback(self) -> bool:
        """Whether nobody outside this machine reaches the head. For 127.0.0.2 Ray listens on all interfaces."""
        return self.gcs_address.rpartition(":")[0] in ("127.0.0.1", "localhost")


def find_access(address: str) -> Access:
    """The cluster at HOST:PORT. "auto": the one of RAY_ADDRESS, else the one of a node that was started here.

    RAY_AUTH_MODE, RAY_AUTH_TOKEN and RAY_AUTH_TOKEN_PATH of the user's environment win over the token of that node.
    """
    nodes = live_nodes()
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or (nodes[0].gcs_address if nodes else "auto")
    node = next((node for node in nodes if node.gcs_address == _as_announced(address)), None)
    variables = own_variables()
    if node is not None and not variables:
        variables = token_environment(None if node.token_file is None else Path(node.token_file))
    return Access(gcs_address=address, node=node, variables=variables)


def own_variables() -> dict[str, str]:
    """Ray's authentication variables in the user's environment; empty if none is set.

    A token without RAY_AUTH_MODE is taken as mode `token`.
    """
    variables = {name: os.environ[name] for name in AUTH_VARIABLES if os.environ.get(name)}
    return {"RAY_AUTH_MODE": "token"} | variables if variables else {}


def check_access(access: Access, *, allow_open: bool = False) -> None:
    """Check quickly that a head answers and takes our token; Ray itself would retry for 20 s.

    Raises:
        ClusterUnreachable: nothing answers.
        TokenRefused: the head demands another token than ours.
        OpenCluster: the head demands no token, is not on loopback, and `allow_open` is false.
    """
    if access.gcs_address == "auto":
        return
    try:
        with authenticated(dict(access.variables)):
            connect(access.gcs_address)
    except TokenRefused as error:
        had = "the one in " + ", ".join(sorted(access.variables)) if access.variables else "none"
        raise TokenRefused(
            f"the cluster at {access.gcs_address} demands its token, and this process has {had}: copy the token file "
            "of the head (`trimtab cluster status` names it there), chmod 600, and set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH to it; on a machine that joined with `trimtab cluster join` nothing needs to be set"
        ) from error
    if not allow_open and not access.on_loopback and not demands_token(access.gcs_address):
        raise OpenCluster(access.gcs_address)


class OpenCluster(ClusterUnreachable):
    """The cluster demands no token: it runs code for everybody who reaches it."""

    def __init__(self, gcs_address: str) -> None:
        super().__init__(gcs_address)
        self.gcs_address = gcs_address

    def __str__(self) -> str:
        return (
            f"the cluster at {self.gcs_address} demands no token: whoever reaches its ports runs code on all its "
            "machines. Start it with `trimtab cluster up` or with RAY_AUTH_MODE=token on every node; on a network that "
            "you trust, say --cluster.allow_without_token true (train) or --without-token (cluster join)"
        )


def _as_announced(address: str) -> str:
    return address.replace("localhost:", "127.0.0.1:")
