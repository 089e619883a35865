"""The token file: made once, private, refused where it cannot be a secret."""

from pathlib import Path

import pytest

from cluster.machine.token import check_token, default_token_file, ensure_token, token_environment
from dispatch.errors import InvalidValue


def test_a_new_token_is_private_and_stays_the_same(tmp_path):
    path = ensure_token(tmp_path / "new" / "token")
    token = path.read_text()
    assert len(token) == 64 and int(token, 16)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert ensure_token(path).read_text() == token
    assert ensure_token(tmp_path / "other").read_text() != token


@pytest.mark.parametrize(
    ("content", "mode", "message"),
    [
        ("a" * 64, 0o644, "chmod 600"),
        ("a" * 64, 0o660, "chmod 600"),
        ("short", 0o600, "5 characters"),
        (None, 0, "ssh"),
    ],
)
def test_a_token_that_is_no_secret_is_refused(tmp_path, content, mode, message):
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
        path.chmod(mode)
    with pytest.raises(ValueError, match=message):
        check_token(path)


@pytest.mark.parametrize("place", ["/proc/no-such-place", "/proc/no-such-place/token", "/dev/null/token"])
def test_a_place_where_no_token_can_be_made_is_refused(place):
    with pytest.raises(InvalidValue, match=f"the token file {place} cannot be "):
        ensure_token(Path(place))


def test_the_secret_itself_is_in_no_variable(tmp_path):
    path = ensure_token(tmp_path / "token")
    assert path.read_text() not in str(token_environment(path))
    assert token_environment(None) == {"RAY_AUTH_MODE": "disabled"}


def test_rays_own_variable_names_the_default_place(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "mine"))
    assert default_token_file() == tmp_path / "mine"
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_token_file() == tmp_path / ".trimtab" / "token"
