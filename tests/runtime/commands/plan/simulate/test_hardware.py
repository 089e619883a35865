"""Assumptions: named, scaled one at a time, and carried by a file."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from dispatch.errors import InvalidValue
from runtime.commands.plan.simulate.hardware import PRESETS, assumptions, from_json, hardware_of, scaled
from workers.model.flops import peak_by_name


def test_every_assumption_can_be_scaled_alone() -> None:
    hardware = PRESETS["h800"]
    before = assumptions(hardware)
    assert {"dense_flops_per_s", "network.alpha_s", "node.bytes_per_s"} <= before.keys()
    for name, value in before.items():
        after = assumptions(scaled(hardware, name, 1.2))
        assert after[name] == pytest.approx(1.2 * value)
        assert {other: each for other, each in after.items() if each != before[other]}.keys() == {name}


def test_a_file_of_rates_gives_the_same_hardware(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(asdict(PRESETS["b200"])))
    assert hardware_of(str(file)) == from_json(json.loads(file.read_text())) == PRESETS["b200"]


def test_whole_numbers_in_a_file_are_assumptions_too() -> None:
    values = asdict(PRESETS["b200"]) | {"dense_flops_per_s": 10**15, "host_s": 0}
    assert assumptions(from_json(values))["dense_flops_per_s"] == 1e15


@pytest.mark.parametrize(
    ("name", "value"), [("dense_flops_per_s", 0), ("update_s", -1e-9), ("memory_bytes_per_s", "fast"), ("cores", True)]
)
def test_a_value_that_is_no_rate_is_refused(tmp_path: Path, name: str, value: object) -> None:
    file = tmp_path / "rates.json"
    file.write_text(json.dumps(asdict(PRESETS["b200"]) | {name: value}))
    with pytest.raises(InvalidValue, match=f"nor a file of rates .{name} is "):
        hardware_of(str(file))


@pytest.mark.parametrize("text", ["{}", "[]", "no json"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rates.json"
    file.write_text(text)
    with pytest.raises(InvalidValue, match="neither h100, h800, h200, b200, cpu nor a file of rates"):
        hardware_of(str(file))


def test_no_preset_is_faster_than_the_data_sheet() -> None:
    for name, hardware in PRESETS.items():
        if hardware.cores:
            continue  # measured itself
        peak = peak_by_name(name.upper())
        assert peak is not None
        assert max(hardware.dense_flops_per_s, hardware.grouped_flops_per_s) < peak
