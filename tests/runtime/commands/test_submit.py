"""Which job is meant, and where: what is wrong is said before Ray is asked."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from runtime.cli import main
from runtime.commands.submit import jobs

pytest.importorskip("aiohttp")


@pytest.mark.parametrize("option", ["--logs", "--stop"])
def test_a_job_that_is_not_there_is_refused_with_those_that_are(option, monkeypatch, capsys):
    @contextmanager
    def client(url, access):
        known = [SimpleNamespace(submission_id=name, start_time=time) for name, time in (("b", 2), ("a", 1), (None, 0))]
        yield SimpleNamespace(list_jobs=lambda: known)

    monkeypatch.setattr(jobs, "_client", client)
    assert main(["submit", "--address", "http://127.0.0.1:1", option, "c"]) == 2
    assert capsys.readouterr().err == "trimtab submit: error: the cluster has no job 'c'; it has a, b\n"


def test_without_a_cluster_it_says_how_to_get_one(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["submit", "--list"]) == 1
    assert "no node of a cluster; start one with `trimtab cluster up`" in capsys.readouterr().err
