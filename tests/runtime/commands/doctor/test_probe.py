"""The probe of a node, on loopback: its transfers, whom it serves, and what it says of sources and disks."""

import socket
import threading

import pytest

from runtime.commands.doctor.cluster import probe as probe_module
from runtime.commands.doctor.cluster.probe import Probe
from runtime.commands.doctor.cluster.survey import NodeFacts


def test_a_transfer_is_measured_both_ways_by_who_knows_the_token_alone():
    server = Probe(b"0123456789abcdef")
    port = server.listen("127.0.0.1")
    measured = Probe(b"0123456789abcdef").measure("127.0.0.1", port, 4.0)
    assert 0 < measured["latency_s"] < 0.5
    assert measured["out_bytes_per_s"] > 1e6
    assert measured["in_bytes_per_s"] > 1e6
    refused = Probe(b"another token 16").measure("127.0.0.1", port, 4.0)
    assert refused["error"].startswith(("ConnectionResetError", "BrokenPipeError"))  # as fast as the request is sent


def test_a_port_that_nobody_serves_and_a_peer_that_is_silent_are_errors_within_the_limit():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert Probe(b"t").measure("127.0.0.1", port, 0.4) == {"error": "TimeoutError: timed out"}
    assert "ConnectionRefusedError" in Probe(b"t").measure("127.0.0.1", port, 0.4)["error"]


def test_a_rate_is_that_of_a_paced_link(monkeypatch):
    """Bytes that take their time: 4 MB/s, as the sum of sleeps says."""
    waited = threading.Event()
    rate = probe_module._rate(lambda size: waited.wait(size / 4e6), 0.0, float("inf"))
    assert 2e6 < rate <= 4.01e6


def test_sources_differ_by_content_and_by_name_and_a_missing_package_is_said_so(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for name, path, content in [
        ("one", "a.py", "x"),
        ("two", "a.py", "x"),
        ("three", "b.py", "x"),
        ("four", "a.py", "y"),
    ]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / path).write_text(content)
        digests.append(probe_module._digest(name))
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert probe_module._digest("no_such_package") == "missing"


@pytest.mark.parametrize("path", ["", "not/there/yet"])
def test_facts_of_this_machine_are_complete(path, tmp_path):
    facts = NodeFacts.of(Probe(b"t").facts([str(tmp_path / path)]))
    assert facts.versions["python"].startswith("3.")
    assert "missing" not in [*facts.versions.values(), *facts.sources.values()]
    assert len(facts.sources) == 4
    disk = facts.disks[str(tmp_path / path)]
    for space in (disk, facts.memory, facts.shm):
        assert 0 <= space.free <= space.total
        assert space.total > 0
