"""`trimtab watch RUN [RUN ...]`."""

import argparse
import ipaddress
import os
import re
import sys
from pathlib import Path

from dispatch.errors import InvalidValue
from runtime.commands.command import CommandParser
from runtime.commands.options import add_runs_dir, int_from
from runtime.runs.run_dir import find_run, place_of_run
from runtime.watch.packages import check_installed

HELP = "Show runs in a browser while they train, and afterwards."
MAX_RUNS = 16
TOKEN_VARIABLE = "TRIMTAB_WATCH_TOKEN"  # noqa: S105 - its name
_TOKEN = re.compile(r"[\w.~-]{16,128}", re.ASCII)  # as it may stand in a URL and in a cookie


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    parser.description = (
        "Serve a live page of one run or of several side by side, on loopback. It reads the run directories alone, so "
        "that it can begin and end at any time, without the run noticing. Prints the URL to open."
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a run: its directory, or its name in the folder of runs"
    )
    parser.add_argument("--wait", action="store_true", help="also for runs that are yet to begin")
    parser.add_argument("--port", type=int_from(0), default=0, help="the port to serve at (a free one)")
    parser.add_argument(
        "--bind",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="an address of this machine to serve at; whoever reaches it and has the token sees the runs, and the "
        "network sees the token (127.0.0.1: this machine alone)",
    )
    parser.add_argument(
        "--until-input-ends",
        action="store_true",
        help="print the URL alone, and end when standard input does, as that of a program that starts it",
    )
    add_runs_dir(parser)
    parser.epilog = f"The token in the URL is a new one at every start, or what {TOKEN_VARIABLE} holds."


def run(options: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    run_dirs = [_place(name, options.runs_dir, wait=options.wait) for name in options.runs]
    _check(options)
    from runtime.watch.serve import serve

    def tell_url(url: str) -> None:
        names = ", ".join(map(str, run_dirs))
        around = "{}" if options.until_input_ends else f"watching {names}\n\n  {{}}\n\nCtrl-C ends it; the run goes on"
        sys.stdout.write(around.format(url) + "\n")
        sys.stdout.flush()

    serve(
        run_dirs,
        address=options.bind,
        port=options.port,
        token=os.environ.get(TOKEN_VARIABLE) or None,
        tell_url=tell_url,
        until_eof=sys.stdin.buffer if options.until_input_ends else None,
    )
    return 0


def _place(name: str, runs_dir: str | None, *, wait: bool) -> Path:
    try:
        return find_run(name, runs_dir)
    except InvalidValue as error:
        if wait:
            return place_of_run(name, runs_dir)
        raise InvalidValue(f"{error}; to watch a run that is yet to begin, add --wait") from error


def _check(options: argparse.Namespace) -> None:
    check_installed("trimtab watch")
    if len(options.runs) > MAX_RUNS:
        raise InvalidValue(f"{len(options.runs)} runs are more than a page shows; name at most {MAX_RUNS}")
    if (token := os.environ.get(TOKEN_VARIABLE)) and not _TOKEN.fullmatch(token):
        raise InvalidValue(f"{TOKEN_VARIABLE} must have 16 to 128 letters, digits, or . _ ~ -; or leave it out")
    if options.port > 65535:
        raise InvalidValue(f"--port {options.port} is no port; choose one from 1 to 65535, or 0 for a free one")
    try:
        is_any = ipaddress.ip_address(options.bind).is_unspecified
    except ValueError as error:
        raise InvalidValue(f"--bind {options.bind!r:.60} must be an address, as 10.0.0.1") from error
    if is_any:
        raise InvalidValue(f"--bind {options.bind} is every address at once; name the one that you will open")
