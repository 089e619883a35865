"""samples.jsonl of one run: the offset of each line is kept in memory, and its content is read for each request."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from runtime.watch.regular_file import read_between
from runtime.watch.tail import LineFile
from workers.record.record_lines import Line, parse_line
from workers.record.sample_log import is_sample

MAX_STEPS = 5_000  # with samples, of which the last ones are kept
MAX_SAMPLES = 16  # of a step; a run writes no more
MAX_TOKENS = 2_048  # of a sample
MAX_LAYERS = 1_024
MAX_CHARACTERS = 200  # of a token or a name
MAX_EXPERTS = 64  # of a token


class SampleFile(LineFile):
    """The samples of a run."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._path = path
        self._places: dict[int, list[tuple[int, int]]] = defaultdict(list)  # by step: where its lines start and stop
        self.num = 0

    def at_step(self, step: int | None, layer: int) -> dict[str, Any] | None:
        """The samples of a step, with the experts of one layer. None, and a step without samples, take the last step.

        Returns:
            `steps`, all that are kept; `step`, that of the samples; `layers`, their names; `samples`, each with
            `tokens`, `num_prompt_tokens`, and `experts`, which has a list of expert ids or None for each token. None if
            there are no samples.
        """
        places = {key: list(each) for key, each in list(self._places.items())}
        if not places:
            return None
        shown = max(places) if step not in places else step
        texts = (read_between(self._path, *place) for place in places[shown])
        found = [line for text in texts if (line := _parsed(text)) is not None]
        names = list(_experts(found[0]))[:MAX_LAYERS] if found else []
        name = names[layer] if layer < len(names) else None
        samples = [_sample(line, name) for line in found]
        return {"steps": sorted(places), "step": shown, "layers": [_cut(each) for each in names], "samples": samples}

    def _take(self, offset: int, text: bytes) -> None:
        if (line := _parsed(text)) is not None:
            self._add(line["step"], (offset, offset + len(text)))

    def _add(self, step: int, place: tuple[int, int]) -> None:
        self.num += 1
        if len(self._places[step]) < MAX_SAMPLES:
            self._places[step].append(place)
        if len(self._places) > MAX_STEPS:
            del self._places[min(self._places)]


def _parsed(text: bytes) -> Line | None:
    line = parse_line(text)
    return line if line is not None and is_sample(line) else None


def _experts(line: Line) -> dict[str, Any]:
    found = line.get("experts")
    return found if isinstance(found, dict) else {}


def _sample(line: Line, layer: str | None) -> dict[str, Any]:
    tokens = line.get("tokens")
    tokens = [_cut(token) for token in tokens[:MAX_TOKENS]] if isinstance(tokens, list) else []
    rows = _experts(line).get(layer) if layer is not None else None
    rows = rows[: len(tokens)] if isinstance(rows, list) else []
    num_prompt = line.get("num_prompt_tokens")
    return {
        "tokens": tokens,
        "num_prompt_tokens": min(max(num_prompt, 0), len(tokens)) if type(num_prompt) is int else 0,
        "experts": [_ids(row) for row in rows] + [None] * (len(tokens) - len(rows)),
    }


def _ids(row: Any) -> list[int] | None:
    """The expert ids of a token; None for any other value, which no run of ours writes."""
    if not isinstance(row, list) or len(row) > MAX_EXPERTS:
        return None
    return row if all(type(each) is int and 0 <= each < 2**20 for each in row) else None


def _cut(value: Any) -> str:
    return str(value)[:MAX_CHARACTERS]
