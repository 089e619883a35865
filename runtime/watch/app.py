"""Answers the requests of the page: for its files, for the numbers that it draws, and for a stream of news.

No text of a request becomes part of a path. Runs are asked for by number, and files of the page by a name among those
that were read when the server started.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from runtime.watch.answers import curves_of, expert_curves, last_load, load_map
from runtime.watch.exposition import CONTENT_TYPE, exposition
from runtime.watch.follower import Turns
from runtime.watch.watched_run import WatchedRun

LOOK_S = 0.5  # how often the stream looks for news
KEEP_ALIVE_S = 15.0  # After so long without news a comment is sent, so that no proxy closes the stream.
# Of one answer.
MAX_SPANS = 2_000
MAX_COLUMNS = 512
MAX_CURVES = 1_024
_LAST_STEP = 2**53
_MEDIA_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
    "txt": "text/plain",
}


def make_app(
    runs: Sequence[WatchedRun], turns: Turns | None = None, *, is_ending: Callable[[], bool] = lambda: False
) -> Starlette:
    """The application, without its guard. is_ending: called by streams; once it returns True they end."""
    api = _Api(runs, is_ending)
    static = _static_files()

    turns = turns or Turns()

    def holding_up_reads(answer: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def answer_first(request: Request) -> Response:
            with turns.asking():
                return answer(request)

        return answer_first

    async def page(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in static:
            raise HTTPException(404)
        content, kind = static[name]
        return Response(content, media_type=kind)

    routes = [
        Route("/", page),
        Route("/static/{name}", page),
        Route("/api/runs", api.runs),
        Route("/api/runs/{run:int}", api.facts),
        Route("/api/runs/{run:int}/curves", holding_up_reads(api.curves)),
        Route("/api/runs/{run:int}/events", api.events),
        Route("/api/runs/{run:int}/now", api.now),
        Route("/api/runs/{run:int}/load", holding_up_reads(api.load)),
        Route("/api/runs/{run:int}/last_load", holding_up_reads(api.last_load)),
        Route("/api/runs/{run:int}/expert", holding_up_reads(api.expert)),
        Route("/api/runs/{run:int}/samples", holding_up_reads(api.samples)),
        Route("/api/stream", api.stream),
        Route("/metrics", api.metrics),
    ]
    return Starlette(routes=routes)


class _Api:
    """The handlers of requests. Those that read files are not async: Starlette runs them on a thread pool."""

    def __init__(self, runs: Sequence[WatchedRun], is_ending: Callable[[], bool]) -> None:
        self._runs, self._is_ending = runs, is_ending

    def runs(self, request: Request) -> Response:
        return _json([run.summary() for run in self._runs])

    def facts(self, request: Request) -> Response:
        return _json(self._run(request).facts())

    def curves(self, request: Request) -> Response:
        """Some curves in a window of steps, each as its least, greatest and mean value in every span."""
        metrics = self._run(request).metrics
        names = request.query_params.get("names", "").split(",")[:MAX_CURVES]
        first, last = _window(request, metrics.last_step)
        spans = metrics.spans(names, first, last, _int_parameter(request, "num", 400, 1, MAX_SPANS))
        return _json(curves_of(spans, names))

    def events(self, request: Request) -> Response:
        return _json(self._run(request).events.since(_int_parameter(request, "since", 0, 0, _LAST_STEP)))

    def now(self, request: Request) -> Response:
        """The present activity of each rank."""
        return _json(self._run(request).now)

    def load(self, request: Request) -> Response:
        """The load of a layer as a heat map: expert by span of steps."""
        run = self._run(request)
        first, last = _window(request, run.metrics.last_step)
        found = run.load.columns(_layer(request), first, last, _int_parameter(request, "num", 256, 1, MAX_COLUMNS))
        return _json(found and load_map(found))

    def expert(self, request: Request) -> Response:
        """Load, as a multiple of the mean of the layer, and bias of one expert."""
        run = self._run(request)
        first, last = _window(request, run.metrics.last_step)
        num = _int_parameter(request, "num", 256, 1, MAX_COLUMNS)
        found = run.load.columns(_layer(request), first, last, num, with_bias=True)
        expert = _int_parameter(request, "expert", 0, 0, _LAST_STEP)
        if found is None or expert >= found.counts.shape[1]:
            return _json(None)
        return _json(expert_curves(found, expert))

    def last_load(self, request: Request) -> Response:
        """The load of all layers over the last steps: a row of codes for each, and the experts that stand out."""
        return _json(last_load(self._run(request)))

    def samples(self, request: Request) -> Response:
        """The texts that were continued at a step, by default the last one, and the experts of a layer."""
        step = _int_parameter(request, "step", _LAST_STEP, 0, _LAST_STEP)
        return _json(self._run(request).samples.at_step(step, _layer(request)))

    async def stream(self, request: Request) -> Response:
        """Server-sent events: the summary of a run whenever there is something new."""
        return StreamingResponse(self._news(), media_type="text/event-stream")

    def metrics(self, request: Request) -> Response:
        return PlainTextResponse(exposition(self._runs), media_type=CONTENT_TYPE)

    async def _news(self) -> AsyncIterator[str]:
        seen, quiet_s = [-1] * len(self._runs), 0.0
        while not self._is_ending():
            for index, run in enumerate(self._runs):
                if run.stamp != seen[index]:
                    seen[index], quiet_s = run.stamp, 0.0
                    summary = await asyncio.to_thread(run.summary)
                    yield f"data: {_dumped({'run': index, **summary})}\n\n"
            if quiet_s >= KEEP_ALIVE_S:
                quiet_s = 0.0
                yield ": still here\n\n"
            quiet_s += LOOK_S
            await asyncio.sleep(LOOK_S)

    def _run(self, request: Request) -> WatchedRun:
        index: int = request.path_params["run"]
        if index >= len(self._runs):
            raise HTTPException(404)
        return self._runs[index]


def _static_files() -> dict[str, tuple[bytes, str]]:
    folder = files("runtime.watch") / "static"
    names = [each.name for each in folder.iterdir() if each.name.rpartition(".")[2] in _MEDIA_TYPES]
    return {name: ((folder / name).read_bytes(), _MEDIA_TYPES[name.rpartition(".")[2]]) for name in names}


def _int_parameter(request: Request, name: str, default: int, low: int, high: int) -> int:
    """A query parameter that is a whole number from `low` to `high`. Any other text is answered by 400."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 16 or not low <= int(text) <= high:
        raise HTTPException(400, f"{name} must be a whole number from {low} to {high}")
    return int(text)


def _window(request: Request, last_step: int) -> tuple[int, int]:
    """First and last step that a request asks for; by default all steps."""
    return _int_parameter(request, "first", 0, 0, _LAST_STEP), _int_parameter(request, "last", last_step, 0, _LAST_STEP)


def _layer(request: Request) -> int:
    return _int_parameter(request, "layer", 0, 0, 2**20)


def _dumped(value: Any) -> str:
    return json.dumps(value, allow_nan=False, default=str, separators=(",", ":"))


def _json(value: Any) -> Response:
    return Response(_dumped(value), media_type="application/json")
