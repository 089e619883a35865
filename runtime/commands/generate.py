"""`trimtab generate RUN`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dispatch.errors import InvalidValue
from runtime.commands.command import CommandParser
from runtime.commands.options import add_run, add_worker_options, float_in, int_from, positive, run_of

HELP = "Continue texts with a run's model."


def add_arguments(parser: CommandParser) -> None:
    """Declare the options."""
    add_run(parser)
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--prompt", action="append", dest="prompts", help="text to continue; again for more")
    texts.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="texts to continue, one a line; - or neither: standard input"
    )
    add = parser.add_argument
    add(
        "--chat",
        action="store_true",
        help="each text is a user's message: write it by the chat template, print replies",
    )
    add("--system", metavar="TEXT", help="with --chat: a system message before each")
    add("--max-new-tokens", type=positive, default=200, help="tokens to add at most (%(default)s)")
    add("--temperature", type=float_in(0, 100), default=0.8, help="divides the logits; 0: greedy (%(default)s)")
    add("--top-p", type=float_in(0.01, 1), default=0.95, help="sample from the likeliest of this sum (%(default)s)")
    add("--seed", type=int_from(0), default=0, help="seed of the samples (%(default)s)")
    add("--batch-size", type=positive, default=32, help="prompts that a worker continues at once (%(default)s)")
    add_worker_options(parser)


def run(options: argparse.Namespace) -> int:
    """Generate and return the exit code."""
    run_dir = run_of(options)
    if options.system is not None and not options.chat:
        raise InvalidValue("--system is the first message of a conversation; add --chat")
    prompts = read_prompts(options.prompts_file) if options.prompts is None else options.prompts
    _check_texts([*prompts, options.system or ""])
    system = [] if options.system is None else [{"role": "system", "content": options.system}]
    from runtime.commands import inference
    from workers.generation.generate import SamplingConfig

    return inference.generate(
        run_dir,
        prompts=prompts,
        before=system if options.chat else None,
        sampling=SamplingConfig(**{field: getattr(options, field) for field in SamplingConfig.__dataclass_fields__}),
        step=options.step,
        workers=options.workers,
        device=options.device,
    )


def _check_texts(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are no text
            raise InvalidValue(f"{text!r:.60} is not UTF-8 text; give it in UTF-8, or by --prompts-file") from error


def read_prompts(path: Path | None) -> list[str]:
    """The lines that are not empty, of a file, or of standard input where the path is None or "-".

    Raises:
        InvalidValue: there is no such line, or no text to read.
    """
    if path is None and sys.stdin.isatty():
        raise InvalidValue("there is nothing to continue; give --prompt TEXT, --prompts-file FILE, or pipe lines in")
    place = "standard input" if path is None or str(path) == "-" else path
    try:
        text = place.read_text(encoding="utf-8") if isinstance(place, Path) else sys.stdin.buffer.read().decode()
    except OSError as error:
        raise InvalidValue(f"--prompts-file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidValue(f"{place} is not UTF-8 text: {error}") from error
    lines = [line for line in text.splitlines() if line]
    if not lines:
        raise InvalidValue(f"{place} has no text to continue; write one prompt a line, or give --prompt TEXT")
    return lines
