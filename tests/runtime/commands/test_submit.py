"""Which job is meant, and where: what is wrong is said before Ray is asked."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from dispatch.errors import InvalidValue
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


def test_a_command_beside_a_question_is_refused(capsys):
    assert main(["submit", "--list", "--", "train"]) == 2
    assert "--list, --logs and --stop run nothing" in capsys.readouterr().err


@pytest.mark.parametrize("resume", [("--resume", "a"), ("--resume=a",)])
def test_the_path_that_resume_needs_is_its_own(resume, tmp_path):
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "__main__.py").touch()
    with pytest.raises(InvalidValue, match="--resume of a job needs the full path"):
        jobs._entrypoint(["train", *resume, "--data.path", "/text"], tmp_path, shares_files=True)
    told = jobs._entrypoint(["train", "--resume", "/runs/a"], tmp_path, shares_files=True)
    assert told == "python -m runtime train --resume /runs/a --cluster.address auto"
