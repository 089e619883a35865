"""Start a Ray node on this machine, as the head of a cluster or joined to one, and end it again.

`ray start --block` runs in a session of its own. `stop` ends the processes of that session; `ray stop` would end every
Ray process of the machine that it may signal.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from cluster.machine.deferred_signals import stop_signals_deferred
from cluster.machine.node_state import LOG_FILE, NodeState, forget, live_nodes, node_folder, read_nodes
from cluster.machine.processes import end, process_of
from cluster.machine.token import check_token, ensure_token, token_environment
from cluster.ray.access import Access, check_access
from cluster.ray.local_ray import OBJECT_STORE_BYTES, WORKER_PRIORITY
from cluster.ray.probe import check_answers, host_and_port
from dispatch.errors import InvalidValue, UserError

START_LIMIT_S = 120.0
LOG_LINES = 15  # shown of a node that failed
STOP_PATIENCE_S = 10.0  # `ray start` itself asks its processes to end, and kills them after some seconds.

# The user's environment overrides these. With them a head declares a silent node dead after about 8 s; with Ray's
# defaults it takes a minute.
NODE_DEFAULTS = {
    **WORKER_PRIORITY,
    "RAY_health_check_initial_delay_ms": "5000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}


class NodeFailed(UserError, RuntimeError):
    """Ray did not come up on this machine; the message ends with its log."""


class AlreadyRunning(InvalidValue):
    """A node runs already where this one would. same: it has the address and the role that were asked for."""

    def __init__(self, node: NodeState, same: bool) -> None:
        super().__init__(node, same)
        self.node = node
        self.same = same

    def __str__(self) -> str:
        what = "the head of a cluster" if self.node.is_head else f"a node of the cluster of {self.node.gcs_address}"
        return (
            f"this machine runs already, as {what}, at {self.node.address}; see `trimtab cluster status`, or end it "
            "with `trimtab cluster down`"
        )


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """How to start a node."""

    address: str = "127.0.0.1"
    """IPv4 address by which the other machines reach this one; with the default no other machine can join."""
    head: str | None = None
    """HOST:PORT of the head to join; None makes this node the head."""
    port: int = 6379
    """Port of the head; the next port is for Ray's client server, which Ray always starts."""
    dashboard_port: int = 8265
    """Port of dashboard and job API, on loopback only."""
    num_cpus: int | None = None
    """CPUs that Ray may hand out; None: all."""
    num_gpus: int | None = None
    """GPUs that Ray may hand out; None: all."""
    object_store_bytes: int = OBJECT_STORE_BYTES
    """Shared memory for Ray's objects; tokens and weights never travel through it."""
    token_file: Path | None
    """The cluster's token; None starts or joins a cluster that runs code for everybody who reaches it."""
    ray_arguments: tuple[str, ...] = ()
    """More options for `ray start`."""

    def __post_init__(self) -> None:
        if not _is_ipv4(self.address):
            raise InvalidValue(
                f"the address of a node ({self.address!r:.60}) must be an IPv4 address of this machine that the others "
                "reach it by, such as 10.0.0.1; see `ip -4 -br address`"
            )
        for name in ("port", "dashboard_port"):
            if not 1024 <= getattr(self, name) <= 65534:
                raise InvalidValue(f"{name} ({getattr(self, name)}) must be from 1024 to 65534")
        if self.object_store_bytes < OBJECT_STORE_BYTES:
            raise InvalidValue(
                f"object_store_bytes ({self.object_store_bytes}) must be at least {OBJECT_STORE_BYTES}, Ray's minimum"
            )
        if "--dashboard-host" in {argument.partition("=")[0] for argument in self.ray_arguments}:
            raise InvalidValue(
                "--dashboard-host would open the job API beyond this machine; use a tunnel: ssh -L "
                f"{self.dashboard_port}:127.0.0.1:{self.dashboard_port} HEAD"
            )

    @property
    def gcs_address(self) -> str:
        return self.head or f"{self.address}:{self.port}"

    @property
    def only_loopback(self) -> bool:
        """Whether sockets are opened on 127.0.0.1 alone. Any other address makes Ray listen on all interfaces."""
        return self.head is None and self.address == "127.0.0.1"


def start(options: NodeOptions, on_wait: Callable[[str], None] = lambda _: None) -> NodeState:
    """Start a node, and return once it takes work. `on_wait` is called with the part that is still missing.

    Raises:
        AlreadyRunning: a node of this machine has that address, or is the head of another cluster.
        InvalidValue: the token file, an address or a port cannot be used.
        ClusterUnreachable: no head answers, or it refuses the token.
        NodeFailed: Ray ended, or was not usable within START_LIMIT_S; nothing is left of it then.
    """
    _check_free(options)
    _prepare_token(options)
    for crashed in read_nodes():
        if crashed.address == options.address:
            stop(crashed)
    folder = node_folder(options.address)
    shutil.rmtree(folder, ignore_errors=True)  # an interrupted start may have left one without a state
    folder.mkdir(mode=0o700)
    with stop_signals_deferred():  # until its state file is there, by which `trimtab cluster down` finds it
        node = _launch(options)
    try:
        _wait_usable(node, on_wait)
    except BaseException:  # Ctrl-C included
        stop(node)
        raise
    return node


def stop(node: NodeState) -> int:
    """End a node and remove its folder. Returns how many of its processes had to be killed. May be repeated."""
    killed = end(node.leader, STOP_PATIENCE_S)
    forget(node)
    return len(killed)


def ray_command(options: NodeOptions) -> list[str]:
    """The command line of `ray start` for a node."""
    place = [f"--address={options.head}"]
    if options.head is None:
        place = ["--head", f"--port={options.port}", f"--ray-client-server-port={options.port + 1}"]
        place += ["--dashboard-host=127.0.0.1", f"--dashboard-port={options.dashboard_port}"]
    counts = {"--num-cpus": options.num_cpus, "--num-gpus": options.num_gpus}
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *place),
        # Ray's own guess, by the default route, may be an address that the other machines do not reach.
        f"--node-ip-address={options.address}",
        f"--temp-dir={node_folder(options.address) / 'r'}",
        f"--object-store-memory={options.object_store_bytes}",
        *(f"{name}={count}" for name, count in counts.items() if count is not None),
        # Chosen by the system: the defaults are fixed, and two nodes on one machine would fight for them.
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
        *options.ray_arguments,
    ]


def node_environment(options: NodeOptions) -> dict[str, str]:
    """Environment of a node's processes, and so of every job. PATH begins with the folder of this Python."""
    environment = NODE_DEFAULTS | dict(os.environ)
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        environment.pop(name, None)
    environment |= token_environment(options.token_file)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', os.defpath)}"
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # `down` ends a node at once, without draining it
    if options.only_loopback:
        environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's one switch for sockets on loopback alone
    return environment


def local_address_to(head: str) -> str:
    """The address of this machine from which packets to HOST:PORT leave. Sends nothing.

    Raises:
        InvalidValue: it is no HOST:PORT, there is no route, or the host name is unknown.
    """
    address = host_and_port(head)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unsent:
            unsent.connect(address)
            return str(unsent.getsockname()[0])
    except OSError as error:
        raise InvalidValue(f"there is no way from this machine to the head at {head} ({error})") from error


def _launch(options: NodeOptions) -> NodeState:
    with (node_folder(options.address) / LOG_FILE).open("w") as log:
        started = subprocess.Popen(  # noqa: S603 Ray of this Python
            ray_command(options),
            env=node_environment(options),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C at this terminal does not reach it, and `stop` knows its processes by it
        )
    leader = process_of(started.pid)
    if leader is None:  # Impossible on Linux: a child keeps its entry in /proc until its parent has waited for it.
        raise NodeFailed(f"process {started.pid}, just started, is not in /proc")
    has_jobs = options.head is None and importlib.util.find_spec("aiohttp") is not None
    node = NodeState(
        address=options.address,
        gcs_address=options.gcs_address,
        is_head=options.head is None,
        dashboard=f"http://127.0.0.1:{options.dashboard_port}" if has_jobs else None,
        token_file=None if options.token_file is None else str(options.token_file),
        leader=leader,
    )
    node.write()
    return node


def _wait_usable(node: NodeState, on_wait: Callable[[str], None]) -> None:
    from cluster.ray.probe import missing_part

    deadline = time.monotonic() + START_LIMIT_S
    while (missing := missing_part(node)) is not None:
        on_wait(missing)
        if not node.alive:
            raise NodeFailed(f"Ray ended while it started at {node.address}; {_log_of(node)}")
        if time.monotonic() > deadline:
            raise NodeFailed(f"{missing} after {START_LIMIT_S:.0f} s; {_log_of(node)}")
        time.sleep(0.2)


def _log_of(node: NodeState) -> str:
    lines = (node.folder / LOG_FILE).read_text(errors="replace").splitlines()
    return "its log ends with:\n" + "\n".join(f"  {line}" for line in lines[-LOG_LINES:])


def _check_free(options: NodeOptions) -> None:
    for node in live_nodes():
        if node.address == options.address or (node.is_head and options.head is None):
            raise AlreadyRunning(node, node.address == options.address and node.is_head == (options.head is None))
    if options.head is not None:
        check_answers(options.head)
        return
    for port in (options.port, options.port + 1):
        _check_port(options.address, port)
    _check_port("127.0.0.1", options.dashboard_port)


def _prepare_token(options: NodeOptions) -> None:
    """Make or check the token of a new head; check with its head that a joining node has the cluster's token."""
    if options.head is None:
        if options.token_file is not None:
            ensure_token(options.token_file)
        return
    if options.head.partition(":")[0] in ("127.0.0.1", "localhost"):
        raise InvalidValue(
            f"a head at {options.head} listens on its own machine alone; start it with `trimtab cluster up --bind "
            "ADDRESS`, where ADDRESS is one that this machine reaches"
        )
    if options.token_file is not None:
        check_token(options.token_file)
    variables = token_environment(options.token_file)
    check_access(
        Access(gcs_address=options.head, node=None, variables=variables), allow_open=options.token_file is None
    )


def _is_ipv4(address: str) -> bool:
    try:
        return not IPv4Address(address).is_unspecified
    except ValueError:
        return False


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidValue(
                f"cannot listen at {host}:{port} ({error}); choose other ports with --port and --dashboard-port, or an "
                "address of this machine"
            ) from error
