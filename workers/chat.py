"""Conversations as training text: lines of JSON, the template that writes them out, and what of them is learned.

A line is one of {"messages": [{"role": ..., "content": ...}, ...]}, of which the assistant's turns are learned,
{"prompt": ..., "completion": ...}, of which the completion is, and {"text": ...}, of which all is.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dispatch.errors import InvalidValue
from workers.text import Document, read_pieces
from workers.tokenizer import SETTINGS_FILE, read_settings

ASSISTANT = "assistant"
TEMPLATE_FILE = "chat_template.jinja"
# For models that bring no template.
PLAIN_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MAX_PRODUCT = 10**6
KINDS = '{"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


@dataclass(frozen=True)
class Piece:
    """A part of a conversation's text, and whether its tokens are learned."""

    text: str
    is_learned: bool


class ChatTemplate:
    """Writes messages out as the model knows them, with a template of Jinja as Hugging Face's tokenizers have it.

    It runs in a sandbox: a template comes with a model, from wherever that is.

    Raises:
        ValueError: the template is not valid.
    """

    def __init__(self, source: str, place: str, special_tokens: dict[str, str] | None = None) -> None:
        extensions = [_GenerationTag, "jinja2.ext.loopcontrols"]
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals["raise_exception"] = _refuse
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        self.name = hashlib.sha256(json.dumps([source, special_tokens or {}]).encode()).hexdigest()[:16]
        self._special_tokens = special_tokens or {}
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, MemoryError, OverflowError, SyntaxError, ValueError) as error:
            problem = f"the chat template of {place} is not valid: {_reason(error)}"
            raise InvalidValue(f"{problem}; give another by --data.chat_template FILE") from error

    def pieces(self, messages: Sequence[dict[str, Any]]) -> list[Piece]:
        """The text of a conversation, cut where what is learned begins and ends.

        What the assistant writes is what a turn of it adds to the text that asks for it (add_generation_prompt): with
        the token that ends the turn, without its header.

        Raises:
            ValueError: the template refuses the messages, or writes earlier turns otherwise once later ones follow.
        """
        whole, done, pieces = self._render(messages), "", []
        for index, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            asked = self._render(messages[:index], asks=True)
            answered = self._render(messages[: index + 1])
            if not (asked.startswith(done) and answered.startswith(asked) and whole.startswith(answered)):
                raise InvalidValue(
                    f"the chat template does not write message {index + 1} as a continuation of those before it, so "
                    "that what is learned cannot be told; give another by --data.chat_template FILE"
                )
            pieces += [Piece(asked[len(done) :], False), Piece(answered[len(asked) :], True)]
            done = answered
        return [*pieces, Piece(whole[len(done) :], False)]

    def _render(self, messages: Sequence[dict[str, Any]], *, asks: bool = False) -> str:
        try:
            return self._template.render(messages=messages, add_generation_prompt=asks, **self._special_tokens)
        except InvalidValue as error:  # its own raise_exception
            raise InvalidValue(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # The template is a program of others, and this is its boundary.
            raise InvalidValue(f"the chat template refuses these messages: {_reason(error)}") from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """Products and powers are bounded: 'a' * 10**10 would take all memory, and no template needs either."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [abs(value) if isinstance(value, int | float) else len(value) for value in (left, right)]
        if operator == "**" or sizes[0] * sizes[1] > MAX_PRODUCT:
            raise InvalidValue(f"it computes {left!r:.20} {operator} {right!r:.20}; at most {MAX_PRODUCT} is allowed")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """Lets templates mark what the assistant writes, as those of Hugging Face may; it is found without that here."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def load_template(path: str | None, tokenizer: str | None) -> ChatTemplate:
    """The template of data.chat_template; else the one beside the tokenizer's file; else a plain one.

    Raises:
        ValueError: a file cannot be read, or its template is not valid.
    """
    folder = None if tokenizer is None else Path(tokenizer).expanduser().parent
    settings = {} if folder is None else read_settings(folder / SETTINGS_FILE)
    tokens = {name: _content(settings[name]) for name in ("bos_token", "eos_token") if settings.get(name)}
    file = Path(path).expanduser() if path else folder and folder / TEMPLATE_FILE
    if path or (file and file.is_file()):
        try:
            return ChatTemplate(Path(str(file)).read_text(encoding="utf-8"), str(file), tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidValue(f"data.chat_template {file} cannot be read: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {each["name"]: each["template"] for each in template}.get("default")
    if template:
        return ChatTemplate(template, str(folder), tokens)
    return ChatTemplate(PLAIN_TEMPLATE, "Trimtab", tokens)


def read_conversations(document: Document, template: ChatTemplate) -> Iterator[list[Piece]]:
    """The conversations of a file, or of a part of it, line by line; empty lines are passed over.

    Raises:
        ValueError: a line is none of the three kinds; names the file and the line.
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
    except ValueError as error:
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


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"


def _refuse(message: str) -> None:
    raise InvalidValue(message)
