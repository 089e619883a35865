"""What the server answers, to whom, and that hostile runs stay text."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from runtime.watch.app import make_app
from runtime.watch.guard import Guard, names_of
from runtime.watch.watched_run import WatchedRun
from tests.runtime.watch.text_run import LAYERS, SOURCES, make_text_run, sample
from tests.synthetic_run import SyntheticRun, make_run
from workers.record.run_log import append_event, read_load_history, read_metrics

TOKEN, COOKIE, BASE = "the-token", "trimtab_watch_1", "http://127.0.0.1:1"
STATIC = Path(__file__).parents[3] / "runtime" / "watch" / "static"
SIGNED = {"cookie": f"{COOKIE}={TOKEN}"}


def client_of(*paths: Path, **how: object) -> TestClient:
    runs = [WatchedRun(path) for path in paths]
    for run in runs:
        while run.poll():
            pass
    guard = Guard(make_app(runs, **how), token=TOKEN, cookie=COOKIE, hosts=names_of("127.0.0.1"))
    return TestClient(guard, base_url=BASE, follow_redirects=False)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("app") / "run", SyntheticRun(steps=100, total_steps=100))


@pytest.fixture(scope="module")
def client(path: Path) -> Iterator[TestClient]:
    with client_of(path) as client:
        yield client


PATHS = ["/", "/static/main.js", "/api/runs", "/api/runs/0", "/api/runs/0/curves", "/api/runs/0/load", "/api/stream",
         "/api/runs/0/now", "/api/runs/0/events", "/api/runs/0/samples", "/metrics", "/nothing",
         "/../config.yaml"]  # fmt: skip


@pytest.mark.parametrize("where", PATHS)
def test_without_the_token_everything_is_refused(client: TestClient, where: str) -> None:
    for headers in ({}, {"cookie": f"{COOKIE}=wrong"}, {"cookie": f"other={TOKEN}"}, {"authorization": "Bearer x"}):
        answer = client.get(where, headers=headers)
        assert answer.status_code == 401
        assert "run" not in answer.text.replace("trimtab watch", "").split()
    assert client.get(where, params={"token": "wrong"}).status_code == 401
    assert client.get("/api/runs", params={"token": TOKEN}).status_code == 401  # only the page takes it from the URL


def test_the_token_in_the_url_becomes_a_cookie_that_no_script_and_no_other_site_has(client: TestClient) -> None:
    answer = client.get("/", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"{COOKIE}={TOKEN};")
    assert {"HttpOnly", "SameSite=strict"} <= set(cookie.split("; "))
    assert client.get("/", headers=SIGNED).status_code == 200
    client.cookies.clear()


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:1"},
        {"host": "127.0.0.1.evil.example"},
        {"host": ""},
        {"host": "[::1"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:2"},
        {"origin": "https://127.0.0.1:1"},
    ],
)
def test_another_host_or_origin_is_refused_even_with_the_token(client: TestClient, headers: dict[str, str]) -> None:
    for where in ("/", "/api/runs", f"/?token={TOKEN}"):
        assert client.get(where, headers=SIGNED | headers).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:1", "localhost:9000", "[::1]:1", "LOCALHOST"])
def test_this_machine_by_its_names_and_through_a_tunnel_is_let_in(client: TestClient, host: str) -> None:
    assert client.get("/api/runs", headers=SIGNED | {"host": host}).status_code == 200
    same = {"host": host, "origin": f"http://{host}"}
    assert client.get("/api/runs", headers=SIGNED | same).status_code == 200


def test_an_address_of_a_network_is_called_by_itself_or_through_loopback() -> None:
    assert names_of("10.0.0.1") == {"10.0.0.1", "127.0.0.1", "localhost", "::1"}


@pytest.mark.parametrize(
    "where",
    ["/static/../app.py", "/static/..%2fapp.py", "/static/%2e%2e/app.py", "/../../etc/passwd", "/static//etc/passwd",
     "/static/", "/static/app.py", "/api/runs/1", "/api/runs/-1", "/api/runs/..", "/api/runs/0/../../x",
     "/api/runs/99999999999999999999", "/api/runs/0/config.yaml"],
)  # fmt: skip
def test_there_is_no_way_to_another_file(client: TestClient, where: str) -> None:
    assert client.get(where, headers=SIGNED).status_code == 404


@pytest.mark.parametrize(
    "query", ["num=0", "num=x", "num=99999", "first=-1", "last=1e9", "num=%D9%A3", "last=" + "9" * 99]
)
def test_a_question_that_makes_no_sense_is_refused(client: TestClient, query: str) -> None:
    assert client.get(f"/api/runs/0/curves?{query}", headers=SIGNED).status_code == 400


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_nothing_can_be_changed(client: TestClient, method: str) -> None:
    assert client.request(method, "/api/runs", headers=SIGNED).status_code == 405


def test_every_answer_forbids_what_the_page_does_not_need(client: TestClient) -> None:
    for answer in (client.get("/"), client.get("/", headers=SIGNED), client.get("/x", headers=SIGNED)):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
        assert (answer.headers["x-content-type-options"], answer.headers["referrer-policy"]) == (
            "nosniff",
            "no-referrer",
        )
        assert answer.headers["cache-control"] == "no-store"


def test_the_page_is_whole_and_has_no_inline_script_or_style(client: TestClient) -> None:
    page = client.get("/", headers=SIGNED).text
    assert "<style" not in page
    assert page.count("<script") == page.count("<script src=")
    names = sorted(each.name for each in STATIC.iterdir())
    assert "uplot.LICENSE.txt" in names
    for name in names:
        answer = client.get(f"/static/{name}", headers=SIGNED)
        assert (answer.status_code, answer.content) == (200, (STATIC / name).read_bytes())
    assert client.get("/static/main.js", headers=SIGNED).headers["content-type"].startswith("text/javascript")


def test_nothing_on_the_page_reads_text_as_markup_or_code() -> None:
    for script in STATIC.glob("*.js"):
        text = script.read_text()
        for danger in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "srcdoc",
        ):
            assert danger not in text, script.name


def test_curves_are_those_of_the_run(client: TestClient, path: Path) -> None:
    losses = {line["step"]: line["loss"] for line in read_metrics(path)[0]}
    answer = client.get("/api/runs/0/curves", headers=SIGNED, params={"names": "loss,lr,none", "first": 20, "last": 39})
    found = answer.json()
    assert found["first"] == found["last"] == list(range(20, 40))
    assert found["curves"]["loss"]["mean"] == pytest.approx([losses[step] for step in range(20, 40)], rel=1e-6)
    assert found["curves"]["none"]["mean"] == [None] * 20


def test_loads_are_those_of_the_run(client: TestClient, path: Path) -> None:
    _, counts, bias, layout = read_load_history(path)
    found = client.get("/api/runs/0/load", headers=SIGNED, params={"layer": 2, "first": 1, "last": 50}).json()
    codes = base64.b64decode(found["codes"])
    loads = counts[:50, layout.slices[2]]
    for step in range(50):
        for expert in range(8):
            share = loads[step, expert] / loads[step].mean()
            shown = 4 ** ((codes[step * 8 + expert] - 128) / 127) if codes[step * 8 + expert] else 0
            assert shown == pytest.approx(min(max(share, 0.25 * (share > 0)), 4), rel=0.01)
    one = client.get(
        "/api/runs/0/expert", headers=SIGNED, params={"layer": 2, "expert": 3, "first": 1, "last": 50}
    ).json()
    assert one["load"] == pytest.approx((loads[:, 3] / loads.mean(1)).tolist(), abs=1e-4)
    assert one["bias"] == pytest.approx(bias[:50, layout.slices[2]][:, 3].tolist(), rel=1e-6)
    last = client.get("/api/runs/0/last_load", headers=SIGNED).json()
    assert (last["first"], last["last"], len(last["layers"])) == (91, 100, 3)
    total = counts[-10:, layout.slices[1]].sum(0)
    assert last["layers"][1]["max_vio"] == pytest.approx(total.max() / total.mean() - 1)
    assert client.get("/api/runs/0/load", headers=SIGNED, params={"layer": 9}).json() is None
    assert client.get("/api/runs/0/expert", headers=SIGNED, params={"expert": 8}).json() is None


def test_samples_come_by_step_and_layer(tmp_path: Path) -> None:
    with client_of(make_text_run(tmp_path / "run"), make_run(tmp_path / "none")) as client:
        found = client.get("/api/runs/0/samples", headers=SIGNED, params={"step": 40, "layer": 1}).json()
        assert (found["step"], found["samples"][1]["experts"]) == (40, sample(40, 1)["experts"][LAYERS[1]])
        assert client.get("/api/runs/0/samples", headers=SIGNED).json()["step"] == 60
        assert client.get("/api/runs/0/samples", headers=SIGNED, params={"layer": 9}).status_code == 200
        assert client.get("/api/runs/0/samples", headers=SIGNED, params={"step": "x"}).status_code == 400
        assert client.get("/api/runs/1/samples", headers=SIGNED).json() is None
        assert client.get("/api/runs/2/samples", headers=SIGNED).status_code == 404
        facts = [client.get(f"/api/runs/{run}", headers=SIGNED).json() for run in (0, 1)]
        assert [each["data"] and each["data"]["sources"] for each in facts] == [SOURCES, None]
        assert [each["num_samples"] for each in client.get("/api/runs", headers=SIGNED).json()] == [8, 0]


def test_the_stream_tells_what_is_new(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    looks = iter([False, False, True])
    with client_of(path, is_ending=lambda: next(looks)) as client:
        answer = client.get("/api/stream", headers=SIGNED)
    assert answer.headers["content-type"].startswith("text/event-stream")
    [told] = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    assert (told["run"], told["name"], told["state"], told["step"]) == (0, "run", "finished", 60)


def test_a_run_with_hostile_names_events_and_settings_is_told_as_text(tmp_path: Path) -> None:
    name = '<img src=x onerror="alert(1)">'
    path = make_run(tmp_path / name)
    (path / "config.yaml").write_text(f"run: {{'{name}': '{name}', steps: {name}, a: .nan, b: [.inf, 2020-01-01]}}\n")
    layout = json.loads((path / "load" / "layout.json").read_text()) | {"names": [name] * 3}
    (path / "load" / "layout.json").write_text(json.dumps(layout))
    append_event(path, "started", rank_map=[{"rank": [[[[[[[[[name]]]]]]]]]}], exchange=name)
    append_event(path, name, reason=name, diagnosis=name, rank_map=[{name: name}], time=1.0)
    with client_of(path) as client:
        for where in ("/api/runs", "/api/runs/0", "/api/runs/0/events", "/api/runs/0/last_load"):
            answer = client.get(where, headers=SIGNED)
            assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
            json.loads(answer.text)
        assert client.get("/api/runs", headers=SIGNED).json()[0]["name"] == name
        [family] = [each for each in text_string_to_metric_families(client.get("/metrics", headers=SIGNED).text)
                    if each.name == "trimtab_step"]  # fmt: skip
        assert family.samples[0].labels["run"] == name


def test_a_run_whose_files_are_noise_is_answered(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    for name in ("metrics.jsonl", "events.jsonl", "config.yaml", "load/layout.json", "load/history.bin",
                 "data.json", "samples.jsonl"):  # fmt: skip
        (path / name).write_bytes(bytes(range(256)) * 300)
    with client_of(path) as client:
        for where in ("/api/runs", "/api/runs/0", "/api/runs/0/events", "/api/runs/0/curves?names=loss",
                      "/api/runs/0/load", "/api/runs/0/last_load", "/api/runs/0/expert", "/metrics",
                      "/api/runs/0/samples"):  # fmt: skip
            assert client.get(where, headers=SIGNED).status_code == 200


def test_prometheus_reads_the_last_numbers(client: TestClient, path: Path) -> None:
    text = client.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"}).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    last = read_metrics(path)[0][-1]
    assert families["trimtab_loss"].samples[0].value == last["loss"]
    assert families["trimtab_step"].samples[0].labels == {"run": "run", "number": "0"}
    assert families["trimtab_recoveries"].type == "counter"
    states = {sample.labels["state"]: sample.value for sample in families["trimtab_state"].samples}
    assert [state for state, value in states.items() if value] == ["finished"]
