"""The frame of a chaos run, without machines."""

import os
import signal
from contextlib import contextmanager

from runtime.cli import main
from runtime.commands.chaos import campaign, namespaces


def test_sigterm_ends_it_with_the_exit_code_of_every_command(monkeypatch):
    @contextmanager
    def struck(_preset):
        os.kill(os.getpid(), signal.SIGTERM)
        yield None

    monkeypatch.setattr(namespaces, "why_not", lambda: None)
    monkeypatch.setattr(campaign, "open_testbed", struck)
    assert main(["chaos", "quick"]) == 128 + signal.SIGTERM
