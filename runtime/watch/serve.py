"""Binds the address, prints the URL, and serves until a signal ends it."""

import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import uvicorn

from dispatch.errors import InvalidValue
from runtime.watch.app import make_app
from runtime.watch.follower import Follower, Turns
from runtime.watch.guard import Guard, names_of
from runtime.watch.watched_run import WatchedRun

TOKEN_BYTES = 24
MAX_CONNECTIONS = 64
CLOSE_S = 2  # longest wait at the end for answers that are being sent


def serve(
    run_dirs: Sequence[Path],
    *,
    address: str,
    port: int,
    token: str | None,
    tell_url: Callable[[str], None],
    until_eof: BinaryIO | None = None,
) -> None:
    """Serve the page of these runs until Ctrl-C, SIGTERM or SIGHUP. The signal is raised again at the end.

    Args:
        port: 0 takes a free one.
        token: None makes a new one.
        tell_url: called with the URL, which holds the token, once the server listens.
        until_eof: a stream that is read; serving ends when it ends.
    Raises:
        InvalidValue: the address is not one of this machine, or the port is taken.
    """
    listening = _listen(address, port)
    port, token = listening.getsockname()[1], token or secrets.token_urlsafe(TOKEN_BYTES)
    runs, turns = [WatchedRun(path) for path in run_dirs], Turns()
    guard = Guard(
        make_app(runs, turns, is_ending=lambda: server.should_exit),
        token=token,
        cookie=f"trimtab_watch_{port}",
        hosts=names_of(address),
    )
    config = uvicorn.Config(
        guard,
        log_config=None,  # the log of a request would show the token
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=CLOSE_S,
        limit_concurrency=MAX_CONNECTIONS,
    )
    server = uvicorn.Server(config)
    with listening, Follower(runs, turns):
        host = f"[{address}]" if ":" in address else address
        tell_url(f"http://{host}:{port}/?token={token}")
        if until_eof is not None:
            threading.Thread(target=_stop_at_eof, args=(until_eof, server), name="end of input", daemon=True).start()
        with _hangup_ends(server):
            server.run(sockets=[listening])


def _stop_at_eof(stream: BinaryIO, server: uvicorn.Server) -> None:
    stream.read()
    server.should_exit = True


@contextmanager
def _hangup_ends(server: uvicorn.Server) -> Iterator[None]:
    """Let SIGHUP end the server, and raise it again afterwards. uvicorn does so for SIGINT and SIGTERM only."""
    before, received = signal.getsignal(signal.SIGHUP), list[int]()

    def end(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        server.should_exit = True

    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
        for number in received:
            signal.raise_signal(number)


def _listen(address: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(where)
    except OSError as error:
        raise InvalidValue(
            f"cannot listen at {address}:{port} ({error}); choose another --port, or --bind an address of this machine"
        ) from error
    listening.listen()
    return listening
