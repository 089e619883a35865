"""A pipeline as a user runs it: real Ray, real workers; its run goes on in another shape."""

from pathlib import Path
from typing import Any

from runtime.job import job
from runtime.settings.config_file import parse_train
from workers.record.run_log import read_events, read_metrics

ROOT = Path(__file__).parents[3]


def test_a_pipeline_trains_and_its_run_goes_on_without_one(tmp_path: Path, ray_session: Any) -> None:
    arguments = [
        "--config=tiny",
        "--name=stages",
        f"--run.dir={tmp_path / 'runs'}",
        f"--data.path=[{ROOT / 'LICENSE'}]",
        f"--data.cache_dir={tmp_path / 'cache'}",
        "--device=cpu",
        "--workers=2",
        "--parallel.pipeline.size=2",
        "--run.global_batch_size=8",
        "--run.micro_batch_size=2",
        "--run.eval_every=2",
        "--steps=4",
    ]
    assert job.train(parse_train(arguments).config, resume=None, step=None) == 0
    run_dir = tmp_path / "runs" / "stages"
    request = parse_train([f"--resume={run_dir}", "--steps=6", "--parallel.pipeline.size=1"])
    assert job.train(request.config, resume=run_dir, step=None) == 0
    train, evals = read_metrics(run_dir)
    assert [line["step"] for line in train] == list(range(1, 7))
    assert [line["step"] for line in evals] == [0, 2, 4, 6]
    assert train[-1]["loss"] < train[0]["loss"]
    assert evals[-1]["val_loss"] < evals[0]["val_loss"]
    started, resumed = (event["rank_map"] for event in read_events(run_dir) if event["event"] in ("started", "resumed"))
    assert request.config.model.num_layers == 3
    assert [(row["stages"], row["layers"]) for row in started] == [([0], [[0, 1]]), ([1], [[2, 2]])]
    assert not any("stages" in row for row in resumed)
