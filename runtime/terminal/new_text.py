"""The text of a generation while it is generated: shown as it grows, and kept in case the user interrupts it."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.status import Status

from workers.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what the first bytes of a character decode to


class NewText:
    """Takes the new tokens of each prompt one by one.

    out: the stream to which prompt and continuation are written as they come; for a single prompt. None shows only a
    count of tokens, on `console` if that is a terminal.
    """

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[str], out: TextIO | None, console: Console) -> None:
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._ids: dict[int, list[int]] = {index: [] for index in range(len(prompts))}
        self._prompts = prompts
        self._out = out
        self._status: Status | None = console.status("loading the model") if out is None else None
        # Tokens before `_num_shown` are on the screen. Those from `_first_decoded` on are decoded together: a tokenizer
        # may decode a token differently, for example without its leading space, if it comes first.
        self._first_decoded, self._num_shown = 0, 0

    def __enter__(self) -> Self:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def add(self, index: int, token_id: int) -> None:
        """Take one more token of a prompt."""
        self.num_tokens += 1
        self._ids[index].append(token_id)
        if self._out is not None:
            if self.num_tokens == 1:
                self._out.write(self._prompts[index])
            self._show(self._out, self._ids[index], is_last=False)
        if self._status is not None:
            begun = sum(map(bool, self._ids.values()))
            self._status.update(f"{self.num_tokens:,} new tokens; {begun} of {len(self._ids)} prompts begun")

    def finish(self) -> None:
        """Say that no more tokens will come."""
        if self._out is None:
            return
        if not self.num_tokens:
            self._out.write(self._prompts[0])
        self._show(self._out, self._ids[0], is_last=True)
        self._out.write("\n")
        self._out.flush()

    def texts(self) -> dict[int, str]:
        """The continuations so far."""
        return {index: self._tokenizer.decode(ids) for index, ids in self._ids.items()}

    def _show(self, out: TextIO, ids: list[int], *, is_last: bool) -> None:
        """Write the text that the tokens since the last call add.

        A character may take several tokens. Text that ends in an unfinished character waits for the next token, unless
        `is_last`.
        """
        before = self._tokenizer.decode(ids[self._first_decoded : self._num_shown])
        text = self._tokenizer.decode(ids[self._first_decoded :])
        if is_last or (len(text) > len(before) and not text.endswith(UNFINISHED)):
            out.write(text[len(before) :])
            out.flush()
            self._first_decoded, self._num_shown = self._num_shown, len(ids)
