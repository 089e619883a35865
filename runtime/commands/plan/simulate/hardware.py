"""What the simulation assumes of a machine: rates that are achieved, not those of data sheets, each with its source.

Data sheets: NVIDIA H100 (SXM5), H200, B200; H800 is an H100 with NVLink of 400 instead of 900 GB/s in both directions.
MEASURED_ON_H100: one H100 80 GB SXM, torch 2.11, measured by this project on 2026-11-28: dense matmuls inside a
training step 775 TFLOP/s, fused attention there 506 (forward and backward, only the half of the scores that causal
order needs), grouped matmuls 677, a copy 3.0 TB/s. The shares of the data sheet (989 TFLOP/s, 3.35 TB/s) are carried
over to the other devices, on which nothing was measured.
LINKS: DeepEP's README (github.com/deepseek-ai/DeepEP, docs/legacy.md): all-to-all on H800 153 GB/s over NVLink, which
is 0.77 of the 200 GB/s of the data sheet in one direction, and 51 GB/s over 400 Gb/s InfiniBand with 64 ranks, 8 a
node; these contain what stays at home, 1/8 of it, so that 45 GB/s cross the network.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from dispatch.errors import InvalidValue
from dispatch.registry import is_number

MatmulKind = Literal["dense", "grouped", "attention"]

MEASURED_ON_H100 = {"dense": 775 / 989, "grouped": 677 / 989, "attention": 506 / 989, "memory": 3.0 / 3.35}
NVLINK_SHARE = 153 / 200
INFINIBAND_BYTES_PER_S = 51e9 * 7 / 8
# Of one message. No source that was measured under load: an order of magnitude, whose weight `sensitivity.py` shows.
NVLINK_ALPHA_S, INFINIBAND_ALPHA_S = 2e-6, 4e-6
# Counts and bias travel over TCP, whatever the devices have: docs/control-path.md, one hop between two processes.
CONTROL_ALPHA_S, CONTROL_BYTES_PER_S = 1e-4, 1e9
# Norm of the gradients, clipping and AdamW in fp32: 4 + 8 + 28 bytes are read or written for an element.
UPDATE_BYTES = 40


@dataclass(frozen=True, kw_only=True)
class LinkCost:
    """Seconds of a message: alpha_s + bytes / bytes_per_s."""

    alpha_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float, num_messages: float) -> float:
        """Seconds of so many bytes in so many messages, one after the other."""
        return num_messages * self.alpha_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Rates of one rank's device, and its links.

    *_flops_per_s: of matmuls in the compute dtype, by their kind. memory_bytes_per_s: of all else, read and written.
    update_s: of the norm, the clipping and the optimizer, and of new memory for gradients, for an element.
    reduce_factor: how many times longer than an all-to-all of as many bytes a sum over ranks takes. host_s: what a
    layer takes whatever its sizes, in both directions, where no device hides it. cores: of the machine that all ranks
    share, each rank on one of them at a time; 0 where each has its own device.
    """

    name: str
    dense_flops_per_s: float
    grouped_flops_per_s: float
    attention_flops_per_s: float
    memory_bytes_per_s: float
    update_s: float
    node: LinkCost
    network: LinkCost
    control: LinkCost
    reduce_factor: float = 1.0
    host_s: float = 0.0
    cores: int = 0

    def flops_per_s(self, kind: MatmulKind) -> float:
        """Rate of matmuls of this kind."""
        rates = {
            "dense": self.dense_flops_per_s,
            "grouped": self.grouped_flops_per_s,
            "attention": self.attention_flops_per_s,
        }
        return rates[kind]

    def crowding(self, num_ranks: int) -> float:
        """How many times longer `num_ranks` alike take side by side than one alone."""
        return max(1.0, num_ranks / self.cores) if self.cores else 1.0


def _device(name: str, bf16_flops_per_s: float, memory: float, nvlink: float) -> Hardware:
    """From the data sheet: FLOP/s of dense bf16 matmuls, bytes/s of memory, and of NVLink in one direction."""
    memory *= MEASURED_ON_H100["memory"]
    return Hardware(
        name=name,
        dense_flops_per_s=bf16_flops_per_s * MEASURED_ON_H100["dense"],
        grouped_flops_per_s=bf16_flops_per_s * MEASURED_ON_H100["grouped"],
        attention_flops_per_s=bf16_flops_per_s * MEASURED_ON_H100["attention"],
        memory_bytes_per_s=memory,
        update_s=UPDATE_BYTES / memory,
        node=LinkCost(alpha_s=NVLINK_ALPHA_S, bytes_per_s=nvlink * NVLINK_SHARE),
        network=LinkCost(alpha_s=INFINIBAND_ALPHA_S, bytes_per_s=INFINIBAND_BYTES_PER_S),
        control=LinkCost(alpha_s=CONTROL_ALPHA_S, bytes_per_s=CONTROL_BYTES_PER_S),
    )


# Two cores of an AMD EPYC (Zen 4) that all ranks share, fp32, gloo over loopback: python -m benchmarks.simulate.
_LOOPBACK = LinkCost(alpha_s=0.0, bytes_per_s=2.7e9)
CPU = Hardware(
    name="cpu",
    dense_flops_per_s=102e9,
    grouped_flops_per_s=92e9,
    attention_flops_per_s=40e9,
    memory_bytes_per_s=16e9,
    update_s=1.4e-9,
    node=_LOOPBACK,
    network=_LOOPBACK,
    control=_LOOPBACK,
    reduce_factor=1.7,
    host_s=5.8e-3,
    cores=2,
)
PRESETS = {
    "h100": _device("h100", 989e12, 3.35e12, 450e9),
    "h800": _device("h800", 989e12, 3.35e12, 200e9),
    "h200": _device("h200", 989e12, 4.8e12, 450e9),
    "b200": _device("b200", 2.25e15, 8e12, 900e9),
    "cpu": CPU,
}


def hardware_of(name: str) -> Hardware:
    """A preset, or a file that `python -m benchmarks.simulate --out FILE` wrote.

    Raises:
        InvalidValue: there is no such preset, or the file is none.
    """
    if name in PRESETS:
        return PRESETS[name]
    try:
        return from_json(json.loads(Path(name).expanduser().read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InvalidValue(
            f"--hardware {name} is neither {', '.join(PRESETS)} nor a file of rates ({error}); measure this machine by "
            "python -m benchmarks.simulate --out FILE"
        ) from error


def from_json(values: Mapping[str, Any]) -> Hardware:
    """The hardware whose `dataclasses.asdict` these values are. Raises ValueError where one is no such number."""
    rates = dict(values)
    name = rates.pop("name")
    links: dict[str, Any] = {link: LinkCost(**_numbers(rates.pop(link))) for link in ("node", "network", "control")}
    return Hardware(name=name, **links, **_numbers(rates))


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, all but `cores` as floats: rates above 0, all else at least 0."""
    for name, value in values.items():
        if not (is_number(value) and value >= 0 and (value or not name.endswith("_per_s"))):
            raise ValueError(f"{name} is {value!r:.60}")
    return {name: value if name == "cores" else float(value) for name, value in values.items()}


def assumptions(hardware: Hardware) -> dict[str, float]:
    """All rates and times by name, as `scaled` takes them; without those that are 0, which have no effect."""
    found: dict[str, float] = {}
    for field in fields(hardware):
        value = getattr(hardware, field.name)
        if isinstance(value, LinkCost):
            found |= {f"{field.name}.{name}": each for name, each in asdict(value).items()}
        elif isinstance(value, float):
            found[field.name] = value
    return {name: value for name, value in found.items() if value}


def scaled(hardware: Hardware, name: str, factor: float) -> Hardware:
    """The hardware with one assumption, named as in `assumptions`, times `factor`."""
    first, _, second = name.partition(".")
    value = getattr(hardware, first)
    if second:
        return replace(hardware, **{first: replace(value, **{second: getattr(value, second) * factor})})
    return replace(hardware, **{first: value * factor})
