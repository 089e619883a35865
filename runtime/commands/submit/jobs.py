"""Runs a command of this tree on a cluster as a Ray job, with this tree's code, and follows it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import shlex
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.machine.token import default_token_file, token_environment
from cluster.ray.access import Access, find_access, own_variables
from cluster.ray.probe import ClusterUnreachable, TokenRefused, authenticated
from dispatch.errors import InvalidValue, UserError
from runtime.terminal.interrupt import exit_code_of

# What is no code: history, environments, results. Patterns as in .gitignore, which is followed too.
EXCLUDED = (".git", "/.venv*", "/runs", "/data", "/build", "/dist", "__pycache__", ".*_cache", ".hypothesis")
LARGEST_BYTES = 100 * 2**20  # Ray carries it through the head's memory; code is not that large.
OVERRIDING = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # of the address that Ray's client is given
ANSWER_LIMIT_S = 5.0  # of the job API, which answers in milliseconds where it is there
END_LIMIT_S = 30.0  # between the last line of a job and its exit code


class JobsUnavailable(UserError, RuntimeError):
    """The cluster's job API cannot be used from here."""


def submit(given: argparse.Namespace) -> int:
    """Do what the options of `trimtab submit` say. Returns the exit code: of a job that is followed, the job's own."""
    folder = given.working_dir.absolute()
    url, access = _job_api(given.address)
    asks_only = given.list or given.stop or given.logs
    entrypoint = "" if asks_only else _entrypoint(given.command, folder, shares_files=access is not None)
    with _client(url, access) as client:
        if given.list:
            return _list(client)
        if named := given.stop or given.logs:
            _check_known(client, named)
        if given.stop:
            client.stop_job(given.stop)
            return _say(f"stopping {given.stop}")
        job_id = given.logs or _send(client, entrypoint, folder)
        if given.no_wait:
            return _say(f"follow it: trimtab submit --logs {job_id}")
        try:
            return asyncio.run(_follow(client, job_id))
        except KeyboardInterrupt:
            _say(
                f"\n{job_id} goes on; follow it: trimtab submit --logs {job_id}; end it: trimtab submit --stop {job_id}"
            )
            return exit_code_of(signal.SIGINT)


def upload_bytes(folder: Path) -> int:
    """Size of the files that Ray will pack, before it compresses them.

    By Ray's own walk: what .gitignore leaves out must be left out here too, and Ray has no public function for it.
    """
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: list[int] = []

    def count(path: Path) -> None:
        if path.is_file():
            sizes.append(path.stat().st_size)

    _dir_travel(folder, [_get_excludes(folder, list(EXCLUDED))], count, include_gitignore=True)
    return sum(sizes)


def _entrypoint(command: Sequence[str], folder: Path, *, shares_files: bool) -> str:
    """The shell command of the job: `python -m runtime` imports the uploaded code before any that is installed.

    Its working directory ends with the cluster, so a run's folder is named in full.
    """
    words = list(command)
    if not (folder / "runtime" / "__main__.py").exists():
        raise InvalidValue(f"--working-dir {folder} holds no code of trimtab (no runtime/__main__.py); submit from it")
    if words[0] == "train":
        words += _placed(words, shares_files=shares_files)
    return shlex.join(["python", "-m", "runtime", *words])


def _placed(words: Sequence[str], *, shares_files: bool) -> list[str]:
    """The options --cluster.address and --run.dir that a training needs on the cluster, unless the user gave them.

    Raises:
        InvalidValue: a path would not be found from the folder of the job.
    """
    names = [word.partition("=")[0] for word in words]
    more = [] if "--cluster.address" in names else ["--cluster.address", "auto"]
    if "--resume" in names:
        index = names.index("--resume")
        if not (words[index].partition("=")[2] or (*words, "")[index + 1]).startswith("/"):
            raise InvalidValue("--resume of a job needs the full path of the run: the job works in a folder of its own")
        return more
    if "--run.dir" in names:
        return more
    if not shares_files:
        raise InvalidValue("give --run.dir a full path that the cluster's nodes share: this machine is none of them")
    return [*more, "--run.dir", str(Path("runs").absolute())]


def _send(client: Any, entrypoint: str, folder: Path) -> str:
    size = upload_bytes(folder)
    if size > LARGEST_BYTES:
        raise InvalidValue(
            f"--working-dir {folder} has {size / 1e6:,.0f} MB to upload, more than {LARGEST_BYTES / 1e6:,.0f}; put "
            "what is not code into its .gitignore"
        )
    _say(f"uploading {size / 1e6:.1f} MB of code from {folder}")
    environment = {"working_dir": str(folder), "excludes": list(EXCLUDED)}
    job_id: str = client.submit_job(entrypoint=entrypoint, runtime_env=environment)
    _say(f"job {job_id}: {entrypoint}")
    return job_id


async def _follow(client: Any, job_id: str) -> int:
    """Print what the job prints until it ends. Returns its exit code; 1 where it was stopped or could not start."""
    async for text in client.tail_job_logs(job_id):
        sys.stdout.write(text)
        sys.stdout.flush()
    deadline = time.monotonic() + END_LIMIT_S
    while not (job := client.get_job_info(job_id)).status.is_terminal():
        if time.monotonic() > deadline:
            raise JobsUnavailable(f"{job_id} says no more, but has not ended ({job.status}); see trimtab submit --list")
        await asyncio.sleep(0.2)
    if job.status == "SUCCEEDED":
        return 0
    sys.stderr.write(f"trimtab submit: {job_id} {job.status}: {job.message}\n")
    # Negative where a signal ended the driver, None where it never ran.
    return job.driver_exit_code if job.driver_exit_code and job.driver_exit_code > 0 else 1


def _list(client: Any) -> int:
    for job in (jobs := _jobs(client)):
        _say(f"{job.submission_id}  {job.status:9}  {job.entrypoint}")
    return 0 if jobs else _say("no job was submitted to this cluster")


def _jobs(client: Any) -> list[Any]:
    """All that were submitted, the oldest first; the others are drivers."""
    return sorted((job for job in client.list_jobs() if job.submission_id), key=lambda each: each.start_time or 0)


def _check_known(client: Any, job_id: str) -> None:
    known = [job.submission_id for job in _jobs(client)]
    if job_id not in known:
        raise InvalidValue(f"the cluster has no job {job_id!r:.60}; it has {', '.join(known[-5:]) or 'none'}")


def _job_api(address: str) -> tuple[str, Access | None]:
    """URL of the job API, and this machine's access to the cluster; None where only the URL is known."""
    if "://" in address:
        return address.rstrip("/"), None
    access = find_access(address)
    if access.node is not None and access.node.dashboard is not None:
        return access.node.dashboard, access
    if access.node is not None and access.node.is_head:
        raise JobsUnavailable(
            "the head was started without ray[default]: pip install 'trimtab[cluster]', then down and up"
        )
    if access.gcs_address == "auto":
        raise JobsUnavailable(
            "this machine is no node of a cluster; start one with `trimtab cluster up`, or give --address URL of the "
            "job API of another"
        )
    raise JobsUnavailable(
        f"the job API of {access.gcs_address} listens on its head alone: submit there, or open a tunnel, ssh -N -L "
        "8265:127.0.0.1:8265 HEAD, and give --address http://127.0.0.1:8265"
    )


@contextlib.contextmanager
def _client(url: str, access: Access | None) -> Iterator[Any]:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    with authenticated(_token_variables(access)):
        _check_answers(url)
        overriding = {name: os.environ.pop(name) for name in OVERRIDING if name in os.environ}
        logging.disable(logging.WARNING)  # Ray logs each folder that it does not upload, several times
        try:
            yield JobSubmissionClient(url)
        except AuthenticationError as error:
            raise TokenRefused(
                f"the job API at {url} demands the cluster's token: copy the head's token file here, chmod 600, and "
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to it"
            ) from error
        except RuntimeError as error:
            raise JobsUnavailable(f"the job API at {url} refused: {error}") from error
        finally:
            logging.disable(logging.NOTSET)
            os.environ.update(overriding)


def _token_variables(access: Access | None) -> dict[str, str]:
    if access is not None:
        return dict(access.variables)
    file = default_token_file()
    return own_variables() or (token_environment(file) if file.exists() else {})


def _check_answers(url: str) -> None:
    try:
        urllib.request.urlopen(f"{url}/api/version", timeout=ANSWER_LIMIT_S).close()  # noqa: S310 what the user named
    except urllib.error.HTTPError:
        return  # it is there
    except (OSError, ValueError) as error:
        raise ClusterUnreachable(f"no job API answers at {url} ({error})") from error


def _say(text: str) -> int:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    return 0
