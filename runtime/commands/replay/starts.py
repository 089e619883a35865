"""Finds the balance settings that were in force at a step; they may change when a run is resumed."""

from dataclasses import dataclass
from pathlib import Path

from dispatch.errors import InvalidValue
from dispatch.laws import BalanceConfig
from runtime.job.launch import balance_of
from runtime.runs.run_dir import CONFIG_FILE
from runtime.settings.config_file import config_from_yaml_file
from runtime.settings.consent import check_consent
from workers.record.record_lines import Line
from workers.record.run_log import read_events


@dataclass(frozen=True)
class BalanceStart:
    """A start or a resume of a run. first_step: the first step that it trained. balance: with its horizon."""

    first_step: int
    balance: BalanceConfig


def read_starts(run: Path) -> list[BalanceStart]:
    """Every start of a run, oldest first; one that went back further supersedes those before it.

    A run whose events do not tell its law is taken to have kept that of its configuration.
    """
    starts = [event for event in read_events(run) if event["event"] in ("started", "resumed")]
    return [BalanceStart(event.get("step", 0) + 1, _balance_of(event, run)) for event in starts]


def balance_at(starts: list[BalanceStart], step: int) -> BalanceConfig:
    """The settings at a step: those of the newest start that trained it. Raises InvalidValue where none did."""
    for start in reversed(starts):
        if start.first_step <= step:
            return start.balance
    raise InvalidValue(f"the events of the run do not tell of the start that trained step {step}")


def _balance_of(event: Line, run: Path) -> BalanceConfig:
    if "balance" in event:
        check_consent({"balance.module": event["balance"].get("module")})
        return BalanceConfig(**event["balance"])
    return balance_of(config_from_yaml_file(run / CONFIG_FILE))
