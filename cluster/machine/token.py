"""The token that a cluster's nodes, drivers and job submitters share: Ray refuses everyone without it.

It is sent unencrypted: anyone who can read the network can read it. Keep Ray's ports on a private network.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from dispatch.errors import InvalidValue

NO_AUTHENTICATION = {"RAY_AUTH_MODE": "disabled"}
MIN_TOKEN_CHARS = 32  # 128 bits of a token in hexadecimal. A new token has 64 characters.


def default_token_file() -> Path:
    """Path of the token file, to read or to make: RAY_AUTH_TOKEN_PATH, else a file of ours in the user's home.

    Not Ray's own `~/.ray/auth_token`: its presence alone changes how every other Ray of this user starts.
    """
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".trimtab" / "token").absolute()


def ensure_token(path: Path) -> Path:
    """Make the token file, readable by its owner alone, unless there is a good one. Returns `path`.

    Raises:
        InvalidValue: the file that is there cannot serve, or none can be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        check_token(path)
        return path
    except OSError as error:
        raise InvalidValue(f"the token file {path} cannot be made ({error.strerror}); name another place") from error
    with os.fdopen(file, "w") as opened:
        opened.write(secrets.token_hex(32))
    return path


def check_token(path: Path) -> None:
    """Refuse a token file that is missing, readable by others, or too short to be a secret.

    Raises:
        InvalidValue: names the file, what is wrong and what to do.
    """
    try:
        mode, token = path.stat().st_mode, path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue(
            f"the token file {path} cannot be read ({error}); copy it from the head of the cluster, which printed its "
            f"place: ssh THERE cat TOKEN_FILE | (umask 077; mkdir -p {path.parent}; cat > {path}), or name another "
            "with --token-file"
        ) from error
    if mode & 0o077:
        raise InvalidValue(f"the token file {path} can be read by others (mode {mode & 0o777:o}); chmod 600 {path}")
    if len(token) < MIN_TOKEN_CHARS:
        raise InvalidValue(
            f"the token in {path} has {len(token)} characters, fewer than {MIN_TOKEN_CHARS}; remove the file so that "
            "`trimtab cluster up` makes a new one, or copy that of the cluster's head"
        )


def token_environment(path: Path | None) -> dict[str, str]:
    """The variables under which Ray demands and sends the token of this file; without one, no authentication."""
    return dict(NO_AUTHENTICATION) if path is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
