"""Conversations as training text: read from JSON lines, rendered by a chat template, with the learned parts marked.

A line is one of three kinds. Of {"messages": [{"role": ..., "content": ...}, ...]} the assistant's turns are learned
(have a loss), of {"prompt": ..., "completion": ...} the completion, and of {"text": ...} all.
"""

import hashlib
import json
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from dispatch.errors import InvalidValue
from workers.data.chat_rendering import ASSISTANT
from workers.data.text import Document, read_pieces
from workers.data.tokenizer import SETTINGS_FILE, read_settings, special_token

TEMPLATE_FILE = "chat_template.jinja"
# For models that bring no template.
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Limits for one conversation, whose rendering takes milliseconds, and memory of a few times its own size.
MAX_CPU_S = 5.0
MAX_BYTES = 2**30
RENDERING = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from workers.data.chat_rendering import serve; serve()"
)
KINDS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


@dataclass(frozen=True)
class Piece:
    """A part of a conversation's text, and whether its tokens are learned."""

    text: str
    is_learned: bool


class ChatTemplate:
    """Renders messages by a chat template, written in Jinja as for Hugging Face's tokenizers.

    A template comes with a model and is not trusted. It runs in Jinja's sandbox, in its own process, whose memory and
    whose processor time for each conversation are bounded.

    Args:
        source: the text of the template.
        place: where it comes from, for errors.
        special_tokens: variables of the template, such as eos_token, by name.
    Raises:
        InvalidValue: the template is not valid.
    """

    def __init__(
        self,
        source: str,
        place: str,
        special_tokens: dict[str, str] | None = None,
        *,
        max_bytes: int = MAX_BYTES,
        max_cpu_s: float = MAX_CPU_S,
    ) -> None:
        tokens = special_tokens or {}
        self.name = hashlib.sha256(json.dumps([source, tokens]).encode()).hexdigest()[:16]
        self._max_cpu_s = max_cpu_s
        self._process = subprocess.Popen(  # noqa: S603 - our own module
            # With the import path of this process, however it came about, so that the same modules are found.
            [sys.executable, "-P", "-c", RENDERING, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        weakref.finalize(self, _end, self._process)
        self._requests, self._answers = cast("IO[bytes]", self._process.stdin), cast("IO[bytes]", self._process.stdout)
        first = {"source": source, "special_tokens": tokens, "max_bytes": max_bytes, "max_cpu_s": max_cpu_s}
        if problem := self._request(first).get("error"):
            problem = f"the chat template of {place} is not valid: {problem}"
            raise InvalidValue(f"{problem}; give another by --data.chat_template FILE")

    def pieces(self, messages: Sequence[dict[str, Any]]) -> list[Piece]:
        """The text of a conversation, cut where the learned parts begin and end.

        A learned part is an assistant's turn without its header, which the template writes for add_generation_prompt;
        the token that ends the turn is learned too.

        Raises:
            InvalidValue: the template refuses the messages, takes too much time or memory, or changes the text of
                earlier turns when later ones follow.
        """
        return [Piece(text, is_learned) for text, is_learned in self._render(messages)["pieces"]]

    def render_prompt(self, messages: Sequence[dict[str, Any]]) -> str:
        """The text of a conversation up to where the assistant is to write (add_generation_prompt).

        Raises:
            InvalidValue: the template refuses the messages, or takes too much time or memory.
        """
        return str(self._render({"asks": messages})["text"])

    def _render(self, request: object) -> dict[str, Any]:
        answer = self._request(request)
        if problem := answer.get("error"):
            raise InvalidValue(f"the chat template refuses these messages: {problem}")
        return answer

    def _request(self, request: object) -> dict[str, Any]:
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError:
            pass  # the process has ended; `_why_it_ended` says why
        answer = self._answers.readline()
        return json.loads(answer) if answer else {"error": self._why_it_ended()}

    def _why_it_ended(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGPROF:
            return f"it took more than {self._max_cpu_s:g} s"
        if code < 0:
            return f"it ended its process by {signal.Signals(-code).name}"
        raise RuntimeError(f"the process of the chat template ended with exit code {code}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


def load_template(path: str | None, tokenizer: str | None) -> ChatTemplate:
    """The template of data.chat_template, or the one beside the tokenizer's file, or PLAIN_TEMPLATE.

    Raises:
        InvalidValue: a file cannot be read, or its template is not valid.
    """
    folder = None if tokenizer is None else Path(tokenizer).expanduser().parent
    settings = {} if folder is None else read_settings(folder / SETTINGS_FILE)
    names = ("bos_token", "eos_token")
    tokens = {name: token for name in names if (token := special_token(settings, name))}
    file = Path(path).expanduser() if path else folder and folder / TEMPLATE_FILE
    if path or (file and file.is_file()):
        try:
            return ChatTemplate(Path(str(file)).read_text(encoding="utf-8"), str(file), tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidValue(f"data.chat_template {file} cannot be read: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, each an object with name and template
        named = [each for each in template if isinstance(each, dict)]
        template = next((each.get("template") for each in named if each.get("name") == "default"), None)
    if template:
        return ChatTemplate(template, str(folder), tokens)
    return ChatTemplate(PLAIN_TEMPLATE, "Trimtab", tokens)


def read_conversations(document: Document, template: ChatTemplate) -> Iterator[list[Piece]]:
    """The conversations of a file, or of a part of it, line by line; empty lines are skipped.

    Raises:
        InvalidValue: a line is none of the three kinds; the message names file and line.
    """
    for index, line in enumerate(_lines(document)):
        if line.strip():
            try:
                yield _parse(line, template)
            except InvalidValue as error:
                where = f"{document.file.path}, line {_lines_before(document) + index + 1}"
                raise InvalidValue(f"{where}: {error}") from None


def _parse(line: bytes, template: ChatTemplate) -> list[Piece]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidValue(f"this is not JSON ({error}); data.format chat reads one JSON object a line") from None
    if not isinstance(value, dict):
        raise InvalidValue(f"this is {type(value).__name__}, not an object; a line must be {KINDS}")
    if "messages" in value:
        return template.pieces(_checked_messages(value["messages"]))
    if "prompt" in value and "completion" in value:
        return [Piece(_text(value, "prompt"), False), Piece(_text(value, "completion"), True)]
    if "text" in value:
        return [Piece(_text(value, "text"), True)]
    raise InvalidValue(f"this has the fields {', '.join(value) or 'none'}; a line must be {KINDS}")


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise InvalidValue(f"messages must be a list of at least one message, not {messages!r:.40}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise InvalidValue(f"message {number} must be an object with role and content, not {message!r:.40}")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise InvalidValue(f"message {number} must have a text as its {name}, not {message.get(name)!r:.40}")
    if not any(message["role"] == ASSISTANT for message in messages):
        raise InvalidValue(f"no message has the role {ASSISTANT}, so that nothing is learned; leave the line out")
    return messages


def _text(value: dict[str, Any], name: str) -> str:
    if not isinstance(value[name], str):
        raise InvalidValue(f"{name} must be a text, not {value[name]!r:.40}")
    return str(value[name])


def _lines(document: Document) -> Iterator[bytes]:
    rest = b""
    for piece in read_pieces(document):
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
    yield rest


def _lines_before(document: Document) -> int:
    with document.file.path.open("rb") as stream:
        return stream.read(document.start).count(b"\n")
