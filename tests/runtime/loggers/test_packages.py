"""The real packages, without network: each receives the numbers of metrics.jsonl, also of a run that resumed."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest

from runtime.job import companion
from runtime.loggers.logger import NEEDED
from runtime.loggers.scalars import scalars
from runtime.watch.settings_file import SettingsFile
from tests.runtime.loggers import offline_wandb
from tests.synthetic_run import SyntheticRun, make_run
from workers.record.run_log import RunLog, append_event, read_load_history, read_metrics

MADE = SyntheticRun(steps=6, total_steps=9, eval_every=2, finished=False, skipped_steps=(2,))
OFFLINE = {
    "WANDB_MODE": "offline",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
}
INSTALLED = [name for name, (module, _) in NEEDED.items() if importlib.util.find_spec(module) is not None]


def log_all(run_dir: Path) -> list[str]:
    """Feed the loggers in a process of its own, as beside a run, and say what it told."""
    heard: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(companion, "END_S", 200.0)  # their imports take long on a busy machine
        with companion.Companion("loggers", ["runtime.loggers", str(run_dir), *INSTALLED], heard.append):
            pass
    return heard


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that was logged, resumed from step 4, went on to step 9 and was logged again."""
    path = tmp_path_factory.mktemp("loggers") / "mine"
    make_run(path, MADE)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in OFFLINE.items():
            patch.setenv(name, value)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert log_all(path) == []
        with RunLog(path, MADE.layout, 4) as log:
            for step in range(5, 10):
                log.train({"step": step, "loss": 0.125 * step, "max_vio_batch_per_layer": [0.1, 0.2, float(step)]})
            log.eval({"step": 9, "val_loss": 1.5, "val_bits_per_byte_per_source": {"../plays (1)": 2.5}})
        append_event(path, "finished", step=9)
        assert log_all(path) == []
    return path


def needs(name: str) -> None:
    if name not in INSTALLED:
        pytest.skip(f"{NEEDED[name][1]} is not installed: pip install 'trimtab[{name}]'")


def recorded(run_dir: Path) -> dict[tuple[str, int], float]:
    """The numbers of metrics.jsonl by name and step."""
    lines = [line for kind in read_metrics(run_dir) for line in kind]
    return {(name, line["step"]): value for line in lines for name, value in scalars(line, MADE.layout.names).items()}


def test_tensorboard_shows_what_was_recorded_and_hides_what_was_superseded(run_dir: Path) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / "tensorboard"))
    found.Reload()
    pairs = [(name, each) for name in found.Tags()["scalars"] for each in found.Scalars(name)]
    shown = {(name, each.step): each.value for name, each in pairs}
    assert len(shown) == len(pairs)  # a step has one value
    assert shown == pytest.approx(recorded(run_dir), rel=1e-6)  # float32


def test_tensorboard_shows_the_load_of_each_layer_at_evaluations(run_dir: Path) -> None:
    needs("tensorboard")
    import matplotlib.image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / "tensorboard"), {"images": 0, "histograms": 0})
    found.Reload()
    history = read_load_history(run_dir)
    counts_NE = history.counts[history.steps <= 4][:, history.layout.slices[1]].sum(0)
    [spread] = [each for each in found.Histograms("load/layers.2.moe") if each.step == 4]
    assert (spread.histogram_value.num, spread.histogram_value.sum) == (8, pytest.approx(8))  # 1 is the mean
    assert spread.histogram_value.max == pytest.approx(counts_NE.max() / counts_NE.mean())
    [image] = [each for each in found.Images("load/experts by layer") if each.step == 4]
    pixels = matplotlib.image.imread(io.BytesIO(image.encoded_image_string))
    assert pixels.shape == (image.height, image.width, 3) == (3 * 16, 8 * 16, 3)
    busiest = pixels[24, counts_NE.argmax() * 16 + 8]
    assert busiest[0] > busiest[2]  # red: more than the mean


def test_wandb_offline_receives_the_numbers_under_one_id(run_dir: Path) -> None:
    needs("wandb")
    files = sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({path.name for path in files}) == 1  # two starts, and the same id
    rows = [row for path in files for row in offline_wandb.rows(path)]
    latest = {
        (name, row["step"]): value
        for row in rows
        for name, value in row.items()
        if name.startswith(("train/", "eval/"))
    }
    superseded = {key for key in latest if key[1] in (5, 6)}
    expected = recorded(run_dir)
    assert {key: value for key, value in latest.items() if key not in superseded - expected.keys()} == expected
    times = {line["step"]: line["time"] for line in read_metrics(run_dir)[0]}
    assert [row["_timestamp"] for row in rows if row["step"] == 7] == [times[7]]


def test_wandb_is_told_the_axis_of_the_curves_and_how_the_run_ended(run_dir: Path) -> None:
    needs("wandb")
    first, second = (
        list(offline_wandb.records(path)) for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    )
    metrics = [record.metric for record in first if record.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)
    starts = [record.run for record in first if record.WhichOneof("record_type") == "run"]
    assert (starts[0].display_name, starts[0].project) == ("mine", "trimtab")
    assert "balance.law" in {item.key for item in starts[0].config.update}
    assert [record.exit.exit_code for record in second if record.WhichOneof("record_type") == "exit"] == [0]


def mlflow_run(run_dir: Path) -> Any:
    """The client and the one run of the file store beside the run directory."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(run_dir.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("trimtab")
    [run] = client.search_runs([experiment.experiment_id])
    return client, run


def test_mlflow_receives_the_numbers_in_one_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("mlflow")
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    client, run = mlflow_run(run_dir)
    latest: dict[tuple[str, int], float] = {}
    for name in run.data.metrics:
        for each in sorted(client.get_metric_history(run.info.run_id, name), key=lambda each: each.timestamp):
            latest[name, each.step] = each.value
    source = "eval/val_bits_per_byte_per_source/"
    expected = {
        (name.replace(f"{source}../plays (1)", f"{source}_/plays _1_"), step): value
        for (name, step), value in recorded(run_dir).items()
    }
    superseded = {key for key in latest if key[1] in (5, 6)}
    assert {key: value for key, value in latest.items() if key not in superseded - expected.keys()} == expected
    settings = SettingsFile(run_dir / "config.yaml")
    settings.poll()
    assert run.data.params == {name: str(value) for name, value in settings.flat.items()}
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
