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


@pytest.mark.parametrize("name", ['a "quoted" name', "a\\backslash", "two\nlines", "{curly}, # and = signs", "ünïcode"])
def test_a_run_of_any_name_is_read_back_under_it(tmp_path: Path, name: str) -> None:
    run = WatchedRun(make_run(tmp_path / "plain", SyntheticRun(steps=3)).rename(tmp_path / name))
    while run.poll():
        pass
    families = {family.name: family for family in text_string_to_metric_families(exposition([run]))}
    assert [sample.labels["run"] for sample in families["trimtab_loss"].samples] == [name]
    assert {sample.labels["run"] for sample in families["trimtab_state"].samples} == {name}


def test_no_metric_is_there_twice_and_every_one_has_its_kind_and_help(text: str) -> None:
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families)
    counters = {family.name for family in families if family.type == "counter"}
    assert counters == {"trimtab_recoveries", "trimtab_failures"}  # the parser takes _total off
    samples = [(sample.name, tuple(sample.labels.items())) for family in families for sample in family.samples]
    assert len(set(samples)) == len(samples)


def test_the_page_of_the_documentation_and_the_dashboard_name_what_there_is(text: str) -> None:
    there = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    # Without a value here: the run is over, and its device has no known peak.
    there |= {"trimtab_left_seconds", "trimtab_model_flop_utilisation"}
    assert set(re.findall(r"`(trimtab_\w+)`", (DOCS / "watch.md").read_text())) == there
    dashboard = json.loads((DOCS / "watch-grafana.json").read_text())
    asked = {target["expr"].split("{")[0] for panel in dashboard["panels"] for target in panel["targets"]}
    assert asked <= there
