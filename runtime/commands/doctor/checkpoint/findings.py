"""Findings on a checkpoint, and the checks of its tensors: finite values, experts saved twice, biases."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.commands.doctor.cluster.judge import Severity
from runtime.terminal.quantities import byte_size

BIAS = ".router.expert_bias_E"  # how the name of a selection bias ends, in our state

# Of the largest bias. A law centres biases in float64 and then rounds each to fp32, which shifts the mean a little.
CENTRE_TOLERANCE = 2**-22


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One finding. tensor: empty if it concerns the whole file. An error would spoil a run, a warning may."""

    severity: Severity = "error"
    file: str
    tensor: str = ""
    problem: str


@dataclass(frozen=True)
class TensorPlace:
    """The file that holds a tensor, and the name of the tensor there."""

    file: str
    tensor: str


@dataclass
class TensorChecker:
    """Checks one tensor after the other without keeping it, and collects what is wrong."""

    found: list[Damage] = field(default_factory=list)
    num_tensors: int = 0
    num_bytes: int = 0
    num_experts: int = 0
    bias_range: tuple[float, float] | None = None
    _digests: dict[tuple[torch.Size, bytes], TensorPlace] = field(default_factory=dict)

    def check(self, tensor: Tensor, place: TensorPlace) -> None:
        """Check a tensor of weights or moments: its values must be finite."""
        self.num_tensors += 1
        self.num_bytes += tensor.nbytes
        if not tensor.is_floating_point():
            return
        finite = (tensor.float() if tensor.itemsize == 1 else tensor).isfinite()  # fp8 has no isfinite
        if not bool(finite.all()):
            count = finite.numel() - int(finite.sum())
            self.damage(place, f"has NaN or infinite values: {count} of {finite.numel()}")

    def check_expert(self, tensor: Tensor, place: TensorPlace) -> None:
        """Check a weight of one expert: no other expert of any layer may have the same bytes.

        Two experts are equal where ranks saved theirs under local ids, and one overwrote the other (KempnerForge #202).
        """
        self.num_experts += 1
        data = tensor.contiguous().view(-1).view(torch.uint8)
        first = self._digests.setdefault((tensor.shape, hashlib.sha256(data.numpy().data).digest()), place)
        if first is not place:
            self.damage(place, f"has the same bytes as {first.tensor}: one expert was saved for both")

    def check_biases(
        self, biases: dict[TensorPlace, Tensor], *, moved: bool, centred: bool, narrow: Severity = "error"
    ) -> None:
        """Check the selection biases of all layers.

        moved: a law has moved them, so that none can be zero. centred: the law keeps their mean at zero. narrow: the
        severity of a bias that is not fp32.
        """
        for place, bias in biases.items():
            if bias.dtype != torch.float32:
                name = str(bias.dtype).removeprefix("torch.")
                problem = f"is {name}; a bias must be float32, or steps of 0.001 are lost in rounding"
                self.damage(place, problem, narrow)
            wide = bias.double()
            if not bool(wide.isfinite().all()):
                continue
            low, high = self.bias_range or (0.0, 0.0)
            self.bias_range = (min(low, float(wide.min())), max(high, float(wide.max())))
            if moved and not bool(wide.any()):
                self.damage(place, "is zero for every expert, in a model whose bias was trained: it was lost or reset")
            elif centred and abs(float(wide.mean())) > CENTRE_TOLERANCE * float(wide.abs().max()):
                self.damage(place, f"has the mean {float(wide.mean()):.3g}; the law keeps it at zero")

    def damage(self, place: TensorPlace, problem: str, severity: Severity = "error") -> None:
        """Record a finding."""
        self.found.append(Damage(severity=severity, file=place.file, tensor=place.tensor, problem=problem))

    def facts(self, expert_names: Iterable[str]) -> dict[str, str]:
        """Figures of all checked tensors, for people to read. expert_names: names of all weights of experts."""
        num_layers = len({name.rpartition(".experts.")[0] for name in expert_names})
        facts = {
            "tensors": str(self.num_tensors),
            "size": byte_size(self.num_bytes),
            "experts": f"{self.num_experts} weights in {num_layers} layers",
        }
        if self.bias_range is not None:
            facts["biases"] = "from {:.4g} to {:.4g}".format(*self.bias_range)
        return facts


@dataclass(frozen=True)
class CheckpointReport:
    """What was examined and found. facts: figures of the whole checkpoint by name, for people to read."""

    subject: str
    facts: dict[str, str]
    found: list[Damage]

    @property
    def is_sound(self) -> bool:
        """Whether there is no error; warnings are allowed."""
        return not any(damage.severity == "error" for damage in self.found)
