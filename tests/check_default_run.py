"""Looks at the newest run of runs/, which `make train` made, as a user looks at its report: what is not well?"""

import sys
from pathlib import Path

from runtime.report.run_record import RunRecord, headlines

GOOD = ("Held-out bits per byte", "Tokens lost", "Bias checksums equal")


def complaints(run_dir: Path) -> list[str]:
    """What is not as it should be after a run without disturbance."""
    record = RunRecord.read(run_dir)
    good = {figure.label for figure in headlines(record) if figure.verdict}
    problems = [f"{label}: not good, or not there" for label in GOOD if label not in good]
    steps = [line["step"] for line in record.train]
    if steps != list(range(1, (record.total_steps or 0) + 1)):
        problems.append(
            f"steps of metrics.jsonl: {len(steps)}, not each of 1 to {record.total_steps} once and in order"
        )
    if list(record.history.steps) != steps:
        problems.append("the load history has other steps than metrics.jsonl")
    if record.state != "finished":
        problems.append(f"state: {record.state}")
    if not (run_dir / "report.html").is_file():
        problems.append("there is no report.html")
    return problems


def main() -> int:
    """Print what is wrong, or that nothing is."""
    run_dir = max((path.parent for path in Path("runs").glob("*/metrics.jsonl")), key=lambda path: path.stat().st_mtime)
    problems = complaints(run_dir)
    sys.stdout.write("".join(f"{run_dir}: {problem}\n" for problem in problems) or f"{run_dir}: as it should be\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
