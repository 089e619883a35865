"""The numbers that a report holds for its charts, down-sampled by the code of `trimtab watch`.

For a run of any length, with any number of layers, these are at most MAX_NUMBERS of curves and MAX_CELLS of heat maps.
"""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.report.run_record import RunRecord, clip, floats
from runtime.watch.answers import curves_of, encoded, finite_values, last_load, load_map, shares_of
from runtime.watch.load_file import LAST_RECORDS
from runtime.watch.watched_run import WatchedRun

MAX_SPANS = 800  # of steps in a curve: a chart is no more pixels wide
MAX_NUMBERS = 2**18  # of all curves: some 2 MB
MAX_COLUMNS = 256  # of a heat map
MIN_COLUMNS = 16  # Layers are left out, from the last one on, until each map has so many columns.
MAX_CELLS = 2**20  # of the heat maps of all layers: 7 MB in base64, as a cell has a code, a load and a bias (5 bytes)
MAX_SOURCES = 4  # with a curve in the chart of held-out loss by source
MAX_OWN_POINTS = 240  # of a curve in a chart that the live page does not have
_SUMMARY_FIELDS = ("step", "latest", "mean", "last_eval")  # those that the charts use
COLOURS = ("blue", "orange", "green", "pink")


def held_json(record: RunRecord) -> str:
    """All numbers of the report's charts, as JSON that can stand inside an element of the page."""
    run = WatchedRun(record.path)
    run.poll()
    while run.is_behind:
        run.poll()
    held = {
        "run": {name: value for name, value in run.summary().items() if name in _SUMMARY_FIELDS},
        "curves": _curves(run),
        "charts": list(_own_charts(record)),
        **_loads(record, run),
    }
    # Without "<", no text of the run (a name, a setting) can end the script element or begin another one.
    return json.dumps(held, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _curves(run: WatchedRun) -> dict[str, Any]:
    names = run.metrics.names
    num = min(MAX_SPANS, MAX_NUMBERS // (3 * max(len(names), 1)))
    answer = curves_of(run.metrics.spans(names, 0, run.metrics.last_step, num), names)
    answer["curves"] = {name: _slim(each) for name, each in answer["curves"].items() if set(each["mean"]) - {None}}
    return answer


def _slim(curve: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    """The curve without its least and greatest values if each span is one step, so that they equal the mean."""
    return {"mean": curve["mean"]} if curve["low"] == curve["high"] else curve


def _loads(record: RunRecord, run: WatchedRun) -> dict[str, Any]:
    """Heat maps of as many layers as fit, and the load of these layers at the beginning and at the end of the run."""
    layout, steps = record.history.layout, record.history.steps
    num_experts = np.cumsum(layout.num_experts)
    num_layers = int((num_experts * MIN_COLUMNS <= MAX_CELLS).sum())
    facts = {
        "layers": [name[:200] for name in layout.names[:num_layers]],
        "settings": {"balance.law": record.law},
        **{name: value for name, value in run.facts().items() if name in ("balance", "own_metrics")},
    }
    found: dict[str, Any] = {"facts": facts}
    if not num_layers or not len(steps):
        return found | {"layers": [], "first_load": None, "last_load": None}
    columns = min(MAX_COLUMNS, MAX_CELLS // int(num_experts[num_layers - 1]))
    num = min(LAST_RECORDS, max(1, len(steps) // 2))
    ends = {"first_load": last_load(run, int(steps[num - 1])), "last_load": last_load(run)}
    for each in filter(None, ends.values()):
        each["layers"] = each["layers"][:num_layers]
    return found | {"layers": [_layer(run, layer, columns) for layer in range(num_layers)]} | ends


def _layer(run: WatchedRun, layer: int, columns: int) -> dict[str, Any] | None:
    found = run.load.columns(layer, 0, run.metrics.last_step, columns, with_bias=True)
    if found is None:
        return None
    return {**load_map(found), "share": _float16_text(shares_of(found)), "bias": _float16_text(found.bias)}


def _float16_text(values: NDArray[Any]) -> str:
    """Numbers as float16 in base64: three digits, as many as a chart shows."""
    return encoded(np.nan_to_num(values).clip(-65504, 65504).astype("<f2"))  # 65504: the largest float16


def _own_charts(record: RunRecord) -> Iterator[dict[str, Any]]:
    """Charts that the live page has no numbers for."""
    if len(record.evals) > 1:
        yield from _bits_per_source(record)
    if len(record.history.steps) > 1 and record.has_moe and record.history.bias[-1].any():
        yield _bias_spread(record)


def _bits_per_source(record: RunRecord) -> Iterator[dict[str, Any]]:
    evals = [record.evals[n] for n in _sample(len(record.evals))]
    per_source = [line.get("val_bits_per_byte_per_source") or {} for line in evals]
    names = list(per_source[-1])[:MAX_SOURCES]
    if names:
        yield {
            "title": "Held-out bits per byte by source",
            "note": "compression of text that training never saw; comparable between tokenizers",
            "lines": [{"label": clip(name), "colour": COLOURS[n], "points": True} for n, name in enumerate(names)],
            "steps": [line["step"] for line in evals],
            "curves": [{"mean": finite_values(floats(bits.get(name) for bits in per_source))} for name in names],
        }


def _bias_spread(record: RunRecord) -> dict[str, Any]:
    # A sample of steps: the array is mapped from the disk, and a long run's whole history does not fit into memory.
    sample = _sample(len(record.history.steps))
    lowest, low, middle, high, highest = np.quantile(record.history.bias[sample], [0, 0.1, 0.5, 0.9, 1], axis=1)
    return {
        "title": "Spread of the bias",
        "note": "what the law adds to the router's scores when experts are chosen; never in a weight or a gradient",
        "lines": [
            {"label": "median, and the middle 80 %", "colour": "blue", "band": True},
            {"label": "least", "colour": "grey"},
            {"label": "greatest", "colour": "grey"},
        ],
        "steps": record.history.steps[sample].tolist(),
        "curves": [
            {"mean": finite_values(middle), "low": finite_values(low), "high": finite_values(high)},
            {"mean": finite_values(lowest)},
            {"mean": finite_values(highest)},
        ],
    }


def _sample(num: int) -> NDArray[np.int64]:
    """At most MAX_OWN_POINTS indices below `num`, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, num - 1, min(num, MAX_OWN_POINTS)).astype(np.int64))
