"""What a chaos run found, as a table and as JSON."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.commands.chaos.plan import Preset
from runtime.commands.chaos.trial import Trial
from runtime.commands.results import write_json

SHOWN_ENDS = 130  # characters at each end of a long text
# Rows of the table of a recovery from a killed worker, and the `seconds` of the event `recovered` that each sums.
PARTS = {
    "detection": ("noticing", "others ended"),
    "back-off": ("back-off",),
    "others leave": ("leave",),
    "process start": ("process start",),
    "torch import": ("of these imports",),
    "rendezvous": ("join",),
    "load": ("load",),
    "first step": ("first step",),
}


@dataclass(frozen=True, kw_only=True)
class Results:
    """All trials of a chaos run.

    calm_step_s: median of the calm run, NaN before it is done. missed: number of faults that were not reached.
    mismatches: records that differ from the calm run's, are missing, or are there twice. num_compared: how many were
    compared, by kind. leftovers: processes, files and memory that should have been gone. end: why the run did not end
    well; empty if it did.
    """

    preset: str
    settings: Preset
    seed: int
    command: str
    machine: str
    calm_step_s: float
    minutes: float
    trials: Sequence[Trial]
    missed: int
    mismatches: Sequence[str]
    num_compared: Mapping[str, int]
    leftovers: Sequence[str]
    end: str

    @property
    def failed(self) -> bool:
        """True if any fault ended other than its kind promises, or anything differs or was left behind."""
        wrong = self.missed or self.mismatches or self.leftovers or self.end
        return bool(wrong) or any(t.verdict == "FAILED" for t in self.trials)

    def summary(self) -> list[str]:
        """Sum the results up in a few sentences, for the terminal and above the table."""
        count = {
            verdict: sum(t.verdict == verdict for t in self.trials) for verdict in ("survived", "refused", "FAILED")
        }
        kinds = len({t.fault.kind.name for t in self.trials})
        compared = ", ".join(f"{number} {what}" for what, number in self.num_compared.items())
        lines = [
            f"{len(self.trials)} faults of {kinds} kinds in {self.minutes:.0f} min: {count['survived']} survived, "
            f"{count['refused']} refused with the promised error and resumed, {count['FAILED']} FAILED"
            + (f", {self.missed} not reached" if self.missed else ""),
            f"{compared} compared with the calm run, bit for bit: "
            + (f"{len(self.mismatches)} differ" if self.mismatches else "all the same"),
            f"left behind: {'; '.join(self.leftovers) or 'no process, file, port or shared memory'}",
        ]
        if self.end:
            lines.append(f"the run did not end well: {self.end}")
        killed = killed_workers(self.trials)
        if killed:
            lines.append(
                f"a killed worker: median {statistics.median(t.recovered_s for t in killed):.1f} s from the kill to "
                f"the next new step ({len(killed)} kills, {min(t.recovered_s for t in killed):.1f} to "
                f"{max(t.recovered_s for t in killed):.1f} s)"
            )
        return lines

    def write(self, out: Path) -> None:
        """Write `chaos.md` and `chaos.json` into a folder."""
        out.mkdir(parents=True, exist_ok=True)
        (out / "chaos.md").write_text(self.as_markdown())
        write_json(out / "chaos.json", asdict(self), indent=1)

    def as_markdown(self) -> str:
        """Format the page of results."""
        size = f"{self.settings.num_machines} machines × {self.settings.workers_per_machine} workers"
        setting = (
            f"`{self.command}`, {size} in network namespaces of one host ({self.machine}); a step of the calm run took "
            f"{self.calm_step_s:.2f} s (median). How to read it: [chaos.md](../chaos.md)."
        )
        head = [
            "# Chaos",
            "",
            setting,
            "",
            *(f"- {line}" for line in self.summary()),
            "",
            "![timeline](chaos.png)",
            "",
            "| # | step | fault | struck | verdict | detected after | recovered after | steps redone |",
            "|---|---|---|---|---|---|---|---|",
        ]
        rows = [_row(trial) for trial in self.trials]
        return "\n".join([*head, *rows, *_parts_table(self.trials), *_quotations(self)]) + "\n"


def killed_workers(trials: Sequence[Trial]) -> list[Trial]:
    """Select the trials in which a worker was killed and the gang formed again."""
    return [t for t in trials if t.fault.kind.action in ("kill", "kill_worker") and not math.isnan(t.recovered_s)]


def parts_of(trial: Trial) -> dict[str, float]:
    """Sum the seconds of a recovery by the names of PARTS."""
    given = dict(trial.parts)
    if "processes and imports" in given:
        # A new process starts while the others leave: an import may have begun before these seconds do.
        given["of these imports"] = min(given.get("of these imports", 0.0), given["processes and imports"])
        given["process start"] = given["processes and imports"] - given["of these imports"]
    return {name: sum(given.get(part, 0.0) for part in parts) for name, parts in PARTS.items()}


def target_of(trial: Trial) -> str:
    """Name the machine or rank that was struck."""
    fault = trial.fault
    if fault.kind.strikes_node:
        return f"machine {fault.machine}"
    return f"rank {fault.rank}" if fault.kind.is_planned or "worker" in fault.kind.action else ""


def _row(trial: Trial) -> str:
    fault = trial.fault
    cells = (
        str(fault.number + 1),
        str(fault.step),
        fault.kind.name,
        target_of(trial),
        trial.verdict,
        _seconds(trial.detected_s),
        _seconds(trial.recovered_s),
        str(trial.redone),
    )
    return f"| {' | '.join(cells)} |"


def _parts_table(trials: Sequence[Trial]) -> list[str]:
    killed = killed_workers(trials)
    if not killed:
        return []
    parts = [parts_of(trial) for trial in killed]
    rows = [
        f"| {name} | {statistics.median(p[name] for p in parts):.2f} | {min(p[name] for p in parts):.2f} | "
        f"{max(p[name] for p in parts):.2f} |"
        for name in PARTS
    ]
    title = f"## From the kill of a worker to the next new step, s ({len(killed)} kills)"
    return ["", title, "", "| part | median | least | most |", "|---|---|---|---|", *rows]


def _quotations(results: Results) -> list[str]:
    said = [f"{t.fault.number + 1}. {t.fault.kind.name}: `{_shortened(t.said)}`" for t in results.trials if t.said]
    lines = ["", "## What the run said", "", *said]
    failures = [f"{t.fault.number + 1}. {t.fault.kind.name}: {t.reason}" for t in results.trials if t.reason]
    if failures or results.mismatches:
        lines += ["", "## FAILED", "", *failures, *(f"- {text}" for text in results.mismatches)]
    return lines


def _shortened(text: str) -> str:
    """Leave out the middle of a long text, where Ray lists what a process can die of."""
    return text if len(text) <= 2 * SHOWN_ENDS else f"{text[:SHOWN_ENDS]} … {text[-SHOWN_ENDS:]}"


def _seconds(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1f} s"
