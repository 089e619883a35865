import json
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime.watch.exposition import exposition
from runtime.watch.watched_run import WatchedRun
from tests.synthetic_run import SyntheticRun, make_run

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("exposition")
    runs = [WatchedRun(make_run(folder / name, SyntheticRun(steps=5))) for name in ("one", "two")]
    for run in [*runs, WatchedRun(folder / "of tomorrow")]:
        while run.poll():
            pass
    return exposition([*runs, WatchedRun(folder / "of tomorrow")])


def test_each_run_has_its_values_and_one_state(text: str) -> None:
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert [sample.labels["run"] for sample in families["trimtab_loss"].samples] == ["one", "two"]
    now = [(each.labels["run"], each.labels["state"]) for each in families["trimtab_state"].samples if each.value]
    assert now == [("one", "finished"), ("two", "finished"), ("of tomorrow", "not begun")]


def test_the_page_of_the_documentation_and_the_dashboard_name_what_there_is(text: str) -> None:
    there = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    # Without a value here: the run is over, and its device has no known peak.
    there |= {"trimtab_left_seconds", "trimtab_model_flop_utilisation"}
    assert set(re.findall(r"`(trimtab_\w+)`", (DOCS / "watch.md").read_text())) == there
    dashboard = json.loads((DOCS / "watch-grafana.json").read_text())
    asked = {target["expr"].split("{")[0] for panel in dashboard["panels"] for target in panel["targets"]}
    assert asked <= there
