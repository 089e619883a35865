"""The process in which a chat template runs. A template is untrusted code: its time and memory are bounded.

`workers.data.chat.ChatTemplate` starts the process, and exchanges lines of JSON with it. This module imports no torch,
so that the process starts fast and small.
"""

import contextlib
import itertools
import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

ASSISTANT = "assistant"
MAX_ERROR_CHARACTERS = 1000


def serve() -> None:
    """Compile the template in the first line of stdin, and answer each line after it.

    The answer to the first line is {}; to a conversation it is {"pieces": [[text, is_learned], ...]}, and to
    {"asks": conversation} it is {"text": ...}. Instead of any of them there may be {"error": reason}. The kernel ends
    the process by SIGPROF when one line takes too much processor time, also inside C code.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to every process; the parent ends this one
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    first = json.loads(sys.stdin.readline())
    max_bytes, max_cpu_s = first["max_bytes"], first["max_cpu_s"]
    with contextlib.suppress(ValueError, OSError):  # macOS does not have this limit
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    environment = _environment()
    compiled: list[jinja2.Template] = []

    def answer(line: str) -> dict[str, Any]:
        if not compiled:
            compiled.append(environment.from_string(first["source"]))
            return {}
        question, tokens = json.loads(line), first["special_tokens"]
        if isinstance(question, dict):
            return {"text": compiled[0].render(messages=question["asks"], add_generation_prompt=True, **tokens)}
        return {"pieces": _pieces(question, compiled[0], tokens)}

    for line in itertools.chain([""], sys.stdin):
        signal.setitimer(signal.ITIMER_PROF, max_cpu_s)
        text = _guarded(answer, line, max_bytes)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _guarded(answer: Callable[[str], dict[str, Any]], line: str, max_bytes: int) -> str:
    try:
        return json.dumps(answer(line))
    except MemoryError:
        return json.dumps({"error": f"it took more than {max_bytes >> 20} MB of memory"})
    except Exception as error:  # noqa: BLE001 - The template is a program of others, and this is its boundary.
        return json.dumps({"error": _reason(error)[:MAX_ERROR_CHARACTERS]})


def _pieces(
    messages: list[dict[str, Any]], template: jinja2.Template, special_tokens: dict[str, str]
) -> list[tuple[str, bool]]:
    """See `workers.data.chat.ChatTemplate.pieces`."""

    def render(count: int, *, asks: bool = False) -> str:
        return template.render(messages=messages[:count], add_generation_prompt=asks, **special_tokens)

    full_text, done, pieces = render(len(messages)), "", []  # done: the text that is in `pieces`
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT:
            continue
        asked, answered = render(index, asks=True), render(index + 1)
        if not (asked.startswith(done) and answered.startswith(asked) and full_text.startswith(answered)):
            raise _RefusedError(
                f"it does not write message {index + 1} as a continuation of those before it, so that what is learned "
                "cannot be told; give another by --data.chat_template FILE"
            )
        pieces += [(asked[len(done) :], False), (answered[len(asked) :], True)]
        done = answered
    return [*pieces, (full_text[len(done) :], False)]


def _environment() -> ImmutableSandboxedEnvironment:
    extensions = [_GenerationTag, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment


class _GenerationTag(Extension):
    """Accepts and ignores Hugging Face's tag {% generation %}, by which templates mark what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _RefusedError(Exception):
    """The template's own raise_exception, or ours: its text is the reason."""


def _refuse(message: object) -> None:
    raise _RefusedError(message)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, jinja2.TemplateError | _RefusedError) else f"{type(error).__name__}: {error}"
