"""The command `trimtab`: choose a subcommand, read its options, hand over, turn what happened into an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 70 a bug in Trimtab, 130, 143 or 129 stopped by Ctrl-C,
SIGTERM or SIGHUP. torch and Ray are imported by the subcommands alone, and only after their options were read, so that
help and mistakes are answered at once.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dispatch.errors import InvalidValue
from dispatch.own_packages import check_not_hidden
from runtime.choices import Choices, choice_parser, chosen
from runtime.consent import import_named
from runtime.failure import told
from runtime.interrupt import Stopped, stop_signals_raise
from runtime.lasting_output import lasting_output
from runtime.option_types import number, whole
from runtime.run_dir import RUNS_DIR_VARIABLE, find_run, place_of_run

OF_RUNS = ("eval", "generate", "export", "report", "replay", "plan", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, that of the process by default, and return its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    with lasting_output():
        return _main(arguments)


def _main(arguments: Sequence[str]) -> int:
    try:
        with stop_signals_raise():
            check_not_hidden()
            command = chosen(_command_parser(), arguments)
            # Here it is consent for what a run names; to those that train it is a setting too.
            given = import_named(arguments[1:]) if command in OF_RUNS else arguments[1:]
            return COMMANDS[command](given)
    except SystemExit as stop:  # argparse has answered --help, or said what is wrong
        return int(stop.code or 0)
    except Stopped as stop:
        sys.stderr.write("trimtab: stopped\n")
        return stop.exit_code
    except Exception as error:  # noqa: BLE001 the boundary of the process: whatever it is must be told
        text, code = told(error, arguments)
        sys.stderr.write(text)
        return code


def _train(arguments: Sequence[str]) -> int:
    """Train a model, or go on with a run."""
    from runtime.config_file import parse_train

    request = parse_train(arguments)
    from runtime import job

    return job.train(request.config, resume=request.resume, step=request.step)


def _evaluate(arguments: Sequence[str]) -> int:
    """Measure a run's model on the held-out text."""
    parser = _run_parser("eval", _evaluate)
    parser.add_argument("--sequences", type=whole(1), help="sequences to evaluate (as in training)")
    _add_worker_options(parser)
    parser.add_argument("--data.path", metavar="PATH", help="where the run's text lies now; it is compared by content")
    parser.add_argument("--data.cache_dir", metavar="DIR", help="where its prepared tokens are kept")
    run, options = _parse(parser, arguments)
    places = {name: options.pop(name) for name in ("data.path", "data.cache_dir")}
    from runtime import inference

    settings = [f"--{name}={value}" for name, value in places.items() if value is not None]
    return inference.evaluate(run, settings=settings, **options)


def _generate(arguments: Sequence[str]) -> int:
    """Continue texts with a run's model."""
    parser = _run_parser("generate", _generate)
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--prompt", action="append", dest="prompts", help="text to continue; again for more")
    texts.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="texts to continue, one a line; - or neither: standard input"
    )
    parser.add_argument("--max-new-tokens", type=whole(1), default=200, help="tokens to add at most (%(default)s)")
    parser.add_argument(
        "--temperature", type=number(0, 100), default=0.8, help="divides the logits; 0: greedy (%(default)s)"
    )
    parser.add_argument(
        "--top-p",
        type=number(0.01, 1),
        default=0.95,
        help="sample from the likeliest of this sum (%(default)s)",
    )
    parser.add_argument("--seed", type=whole(0), default=0, help="seed of the samples (%(default)s)")
    parser.add_argument(
        "--batch-size", type=whole(1), default=32, help="prompts that a worker continues at once (%(default)s)"
    )
    _add_worker_options(parser)
    run, options = _parse(parser, arguments)
    path = options.pop("prompts_file")
    if options["prompts"] is None:
        options["prompts"] = _read_prompts(path)
    from runtime import inference
    from workers.generation import SamplingConfig

    sampling = SamplingConfig(**{field: options.pop(field) for field in SamplingConfig.__dataclass_fields__})
    return inference.generate(run, sampling=sampling, **options)


def _import(arguments: Sequence[str]) -> int:
    """Make a run from a model of Hugging Face."""
    parser = argparse.ArgumentParser(
        prog="trimtab import",
        description=_import.__doc__,
        allow_abbrev=False,
        usage="trimtab import DIR RUN [--SECTION.SETTING VALUE ...]",
        epilog="Settings are those of `trimtab train`, such as --model.max_seq_len 512 or --data.path TEXT.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="directory with config.json and safetensors files")
    parser.add_argument("run", metavar="RUN", help="the run to make: its directory, or its name in the folder of runs")
    _add_runs_dir(parser)
    places, settings = parser.parse_known_args(arguments)
    from runtime.hf.import_command import import_model

    return import_model(places.folder, place_of_run(places.run, places.runs_dir), settings)


def _export(arguments: Sequence[str]) -> int:
    """Write an imported run as a model of Hugging Face."""
    parser = _run_parser("export", _export)
    parser.add_argument("folder", metavar="DIR", type=Path, help="directory to make")
    parser.add_argument("--step", type=whole(0), help="checkpoint to export (the newest)")
    parser.add_argument("--drop-bias", action="store_true", help="leave out a selection bias that the family lacks")
    parser.add_argument(
        "--max-file-gb", type=number(0.001, 1000), default=5.0, help="tensors of one file in GB (%(default)s)"
    )
    run, options = _parse(parser, arguments)
    from runtime.hf.export_command import export_model

    max_file_bytes = int(options.pop("max_file_gb") * 1e9)
    return export_model(run, options.pop("folder"), max_file_bytes=max_file_bytes, **options)


def _report(arguments: Sequence[str]) -> int:
    """Write the report of a run again."""
    run, _ = _parse(_run_parser("report", _report), arguments)
    from runtime.report import write_report

    sys.stdout.write(f"{write_report(run)}\n")
    return 0


def _replay(arguments: Sequence[str]) -> int:
    """Compute a run's bias again, and try other laws on the router scores that it recorded."""
    parser = _run_parser("replay", _replay)
    parser.add_argument(
        "--law",
        action="append",
        default=[],
        metavar="SPEC",
        help="law to play beside the run's own, as newton or sign:u=0.003; again for more (sign:u=0.001 and adaptive)",
    )
    parser.add_argument(
        "--threshold", type=number(0, 1e6), help="MaxVio_batch that counts as balance (1.5 times the practical floor)"
    )
    parser.add_argument(
        "--shift",
        type=whole(1),
        metavar="STEP",
        help="training step from which the text is another (as in data.shift_at)",
    )
    parser.add_argument(
        "--first",
        type=whole(1),
        metavar="STEP",
        help="training step at which the laws begin, without bias (the first)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of replay.json and replay.png (the run's)")
    run, options = _parse(parser, arguments)
    from runtime.replay.command import replay

    return replay(run, laws=options.pop("law"), **options)


def _bench(arguments: Sequence[str]) -> int:
    """Measure a part of Trimtab on this machine."""
    from runtime.bench.command import bench

    return bench(arguments)


def _doctor(arguments: Sequence[str]) -> int:
    """Examine a cluster, or a checkpoint: what is wrong, before a run finds out."""
    from runtime.doctor.command import doctor

    return doctor(arguments)


def _compare(arguments: Sequence[str]) -> int:
    """Train under several ways of balancing from the same seeds, and compare them."""
    from runtime.compare.options import parse_options

    options = parse_options(arguments)
    import_named(options.settings)
    from runtime.compare.command import compare

    return compare(options)


def _cluster(arguments: Sequence[str]) -> int:
    """Make machines a Ray cluster; look at it; end it; write manifests."""
    from runtime.cluster_commands.command import cluster

    return cluster(arguments)


def _submit(arguments: Sequence[str]) -> int:
    """Run a command on a cluster as a job, with this folder's code."""
    from runtime.submit import submit

    return submit(arguments)


def _chaos(arguments: Sequence[str]) -> int:
    """Strike a run with faults by a plan, and see whether it comes through."""
    from runtime.chaos.options import parse_options

    options = parse_options(arguments)
    from runtime.chaos.command import chaos

    return chaos(options)


def _plan(arguments: Sequence[str]) -> int:
    """Tell the memory of each rank and the bytes of a step before anything starts."""
    from runtime.plan.options import plan_parser

    given = plan_parser().parse_args(arguments)
    from runtime.plan.command import plan

    return plan(given)


COMMANDS: Choices = {
    "train": _train,
    "eval": _evaluate,
    "generate": _generate,
    "import": _import,
    "export": _export,
    "report": _report,
    "replay": _replay,
    "bench": _bench,
    "compare": _compare,
    "cluster": _cluster,
    "submit": _submit,
    "plan": _plan,
    "doctor": _doctor,
    "chaos": _chaos,
}


def _command_parser() -> argparse.ArgumentParser:
    what = "Train mixture-of-experts language models with expert parallelism and bias-based load balancing."
    parser = choice_parser("trimtab", "COMMAND", COMMANDS, what)
    parser.add_argument("--version", action="version", version=f"trimtab {importlib.metadata.version('trimtab')}")
    return parser


def _run_parser(name: str, command: Callable[[Sequence[str]], int]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"trimtab {name}", description=command.__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="the run: its directory, or its name in the folder of runs")
    _add_runs_dir(parser)
    return parser


def _add_runs_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs-dir",
        "--run.dir",
        dest="runs_dir",
        metavar="DIR",
        help=f"the folder of runs (the environment variable {RUNS_DIR_VARIABLE}, or runs)",
    )


def _add_worker_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=whole(0), help="checkpoint to load (the newest)")
    parser.add_argument("--workers", type=whole(1), help="expert workers, with Ray (one, in this process)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where they compute (as in training)")


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> tuple[Path, dict[str, Any]]:
    options = vars(parser.parse_args(arguments))
    return find_run(options.pop("run"), options.pop("runs_dir")), options


def _read_prompts(path: Path | None) -> list[str]:
    """The lines of a file, or of standard input, that are not empty. Raises InvalidValue where there are none."""
    if path is None and sys.stdin.isatty():
        raise InvalidValue("there is nothing to continue; give --prompt TEXT, --prompts-file FILE, or pipe lines in")
    is_piped = path is None or str(path) == "-"
    try:
        text = sys.stdin.buffer.read().decode() if is_piped else Path(str(path)).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidValue(f"--prompts-file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{'standard input' if is_piped else path} is not UTF-8 text: {error}") from error
    lines = [line for line in text.splitlines() if line]
    if not lines:
        place = "standard input" if is_piped else path
        raise InvalidValue(f"{place} has no text to continue; write one prompt a line, or give --prompt TEXT")
    return lines
