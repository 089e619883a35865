"""What the directory of a run says of a run that lost a node."""

from pathlib import Path

from workers.record.run_log import METRICS, read_events, read_metrics

ACCOUNTS = ("tokens_sent", "tokens_received", "tokens_returned")


def steps_done(run_dir: Path) -> int:
    """How many steps are recorded."""
    return len(read_metrics(run_dir)[0]) if (run_dir / METRICS).exists() else 0


def nodes_of_ranks(run_dir: Path) -> list[list[str]]:
    """The address of each rank's node, for each time that the run began or went on."""
    return [[row["node"] for row in event["rank_map"]] for event in read_events(run_dir) if "rank_map" in event]


def check_every_step_once(run_dir: Path, num_steps: int) -> None:
    """Every step is recorded once, and none of its tokens was lost."""
    lines = read_metrics(run_dir)[0]
    assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
    lost = {line["step"]: line for line in lines for name in ACCOUNTS if line[name] != line["tokens_routed"]}
    assert lost == {}
