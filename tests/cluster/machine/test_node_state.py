"""The folder that says which processes are ours is ours alone, and short enough for sockets."""

import os
import subprocess
from pathlib import Path

import pytest

from cluster.machine.node_state import (
    DASHBOARD_SOCKET,
    STORE_SOCKET,
    NodeState,
    NodeStillThere,
    _nodes_path,
    check_room_for_sockets,
    forget,
    live_nodes,
    node_folder,
    nodes_folder,
    ray_folder,
    read_nodes,
)
from cluster.machine.processes import Process, process_of
from cluster.ray.ray_folder import check_folder
from dispatch.errors import InvalidValue


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    link = ray_folder() / f"ttt-{os.getpid()}"  # pytest's own path is too long for sockets
    link.symlink_to(tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", str(link))
    yield
    link.unlink()


def node(address: str, leader: Process, *, is_head: bool) -> NodeState:
    node_folder(address).mkdir()
    state = NodeState(
        address=address, gcs_address="10.0.0.1:6379", is_head=is_head, dashboard=None, token_file=None, leader=leader
    )
    state.write()
    return state


def test_nodes_are_read_back_head_first_and_the_crashed_are_not_live():
    crashed = node("10.0.0.1", Process(2**22 - 1, 1), is_head=False)
    head = node("10.0.0.2", process_of(os.getpid()), is_head=True)
    assert read_nodes() == [head, crashed]
    assert live_nodes() == [head]
    forget(crashed)
    assert read_nodes() == [head]


def test_who_only_looks_leaves_no_folder_behind(tmp_path):
    assert read_nodes() == []
    assert list(tmp_path.iterdir()) == []


def test_a_node_with_processes_is_not_forgotten():
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        state = node("10.0.0.3", process_of(process.pid), is_head=True)
        with pytest.raises(NodeStillThere, match=f"{process.pid}.* do not end"):
            forget(state)
        assert read_nodes() == [state]
        process.kill()
    forget(state)
    assert read_nodes() == []


def test_a_folder_that_others_can_write_is_refused():
    nodes_folder().chmod(0o777)
    with pytest.raises(ValueError, match="only you can use"):
        read_nodes()


def test_a_file_that_is_no_state_is_named():
    folder = node_folder("10.0.0.4")
    folder.mkdir()
    (folder / "node.json").write_text('{"address": "10.0.0.4"}')
    with pytest.raises(ValueError, match=r"10\.0\.0\.4/node\.json is not a state file"):
        read_nodes()


def test_a_folder_too_long_for_sockets_is_refused(monkeypatch, tmp_path):
    (long := tmp_path / ("x" * 60)).mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(ValueError, match=f"at least {len(str(long / 'tt-0/10.0.0.1')) - 37} bytes shorter than {long}"):
        node_folder("10.0.0.1")


@pytest.mark.parametrize(("name", "most"), [(STORE_SOCKET, 41), (DASHBOARD_SOCKET, 37)])
def test_the_longest_folder_leaves_the_bytes_that_ray_needs(name, most):
    socket = "/r/session_2026-12-31_23-59-59_999999_4194303/sockets/" + name  # 4194304 is Linux's limit of pids
    assert most + len(socket) == 107
    check_room_for_sockets(Path("/" + "x" * (most - 1)), name)
    for too_long in ("/" + "x" * most, "/" + "é" * (most // 2) + "x"):  # bytes count, not characters
        with pytest.raises(ValueError, match=f"more than the {most} that leave room"):
            check_room_for_sockets(Path(too_long), name)


def test_the_default_folder_has_room_for_any_user_and_address(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "")
    monkeypatch.setattr(os, "getuid", lambda: 2**32 - 2)
    check_room_for_sockets(_nodes_path() / "255.255.255.255", DASHBOARD_SOCKET)


@pytest.mark.parametrize("missing", ["absent", "file"])
def test_a_folder_of_ray_that_is_none_is_refused_with_its_variable(monkeypatch, tmp_path, missing):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / missing))
    for look in (read_nodes, nodes_folder, check_folder):
        with pytest.raises(InvalidValue, match=rf"RAY_TMPDIR \(.*/{missing}\) must be a folder that exists; make it"):
            look()


def test_a_relative_folder_of_ray_is_one_place_whatever_the_current_folder_is(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", ".")
    assert ray_folder() == tmp_path


def test_a_folder_of_ray_that_cannot_be_written_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda _path, mode: mode == os.F_OK)  # root may write everywhere
    with pytest.raises(InvalidValue, match=rf"you cannot write {ray_folder()}, where Ray's files go; set RAY_TMPDIR"):
        check_folder()
