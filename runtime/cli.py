"""The command `trimtab`: runs a subcommand, and turns its outcome or its exception into an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 70 a bug in Trimtab, 130, 143 or 129 stopped by Ctrl-C,
SIGTERM or SIGHUP. A new subcommand is a module as `runtime/commands/command.py` describes it, and a line in COMMANDS.
"""

import importlib.metadata
import os
import sys
from collections.abc import Sequence

from dispatch.own_packages import check_not_hidden
from runtime.commands.command import Group, choose, run_command
from runtime.commands.completion import FIRST_WORD, answer
from runtime.terminal.failure import explain
from runtime.terminal.interrupt import Stopped, stop_signals_raise
from runtime.terminal.lasting_output import lasting_output

BENCH = {
    "dispatch": "runtime.commands.bench.dispatch.command",
    "coordinator": "runtime.commands.bench.coordinator.command",
    "balance": "runtime.commands.bench.balance.command",
}
MANIFEST = {
    "kuberay": "runtime.commands.cluster.manifest.kuberay",
    "slurm": "runtime.commands.cluster.manifest.slurm",
    "ray-up": "runtime.commands.cluster.manifest.ray_up",
}
CLUSTER: dict[str, str | Group] = {
    "up": "runtime.commands.cluster.up",
    "join": "runtime.commands.cluster.join",
    "status": "runtime.commands.cluster.status",
    "down": "runtime.commands.cluster.down",
    "token": "runtime.commands.cluster.token_file",
    "manifest": Group(
        word="KIND",
        help="Write the file that starts a cluster under Kubernetes, Slurm or `ray up`.",
        description="Write a file that starts a cluster; options of `trimtab train` for it go behind --.",
        commands=MANIFEST,
    ),
}
DOCTOR = {
    "cluster": "runtime.commands.doctor.cluster.command",
    "PATH": "runtime.commands.doctor.checkpoint.command",
}
COMMANDS: dict[str, str | Group] = {
    "train": "runtime.commands.train",
    "eval": "runtime.commands.eval",
    "generate": "runtime.commands.generate",
    "import": "runtime.commands.hf.import_command",
    "export": "runtime.commands.hf.export_command",
    "runs": "runtime.commands.runs",
    "stop": "runtime.commands.stop",
    "report": "runtime.commands.report",
    "watch": "runtime.commands.watch",
    "replay": "runtime.commands.replay.command",
    "bench": Group(
        word="TARGET",
        help="Measure a part of Trimtab on this machine.",
        description="Measure a part of Trimtab on this machine.",
        commands=BENCH,
    ),
    "compare": "runtime.commands.compare.command",
    "cluster": Group(
        word="ACTION",
        help="Make machines a Ray cluster; look at it; end it; write manifests.",
        description="Make machines a Ray cluster.",
        commands=CLUSTER,
    ),
    "submit": "runtime.commands.submit.command",
    "plan": "runtime.commands.plan.command",
    "doctor": Group(
        word="TARGET",
        help="Examine a cluster, or a checkpoint: what is wrong, before a run finds out.",
        description="Find what is wrong before a run does.",
        commands=DOCTOR,
        otherwise="PATH",
    ),
    "chaos": "runtime.commands.chaos.command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process, and return the exit code."""
    if FIRST_WORD in os.environ and argv is None:  # the shell asks for completions
        answer(_trimtab())
    arguments = sys.argv[1:] if argv is None else list(argv)
    with lasting_output():
        return _main(arguments)


def _main(arguments: Sequence[str]) -> int:
    try:
        with stop_signals_raise():
            check_not_hidden()  # our package names are common: another distribution may have one of them
            name = choose(_trimtab(), "trimtab", arguments, version=f"trimtab {importlib.metadata.version('trimtab')}")
            return run_command(COMMANDS[name], f"trimtab {name}", arguments[1:])
    except SystemExit as stop:  # raised by argparse, after it has printed the help or an error
        return int(stop.code or 0)
    except Stopped as stop:
        sys.stderr.write("trimtab: stopped\n")
        return stop.exit_code
    except Exception as error:  # noqa: BLE001 The boundary of the process: every exception gets a text and a code.
        text, code = explain(error, arguments)
        sys.stderr.write(text)
        return code


def _trimtab() -> Group:
    what = "Train mixture-of-experts language models with expert parallelism and bias-based load balancing."
    return Group(word="COMMAND", help="", description=what, commands=COMMANDS)
