"""The optimizer of a run: its settings, and how one is registered. `lr_schedule` has the learning rate of a step."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from dispatch.errors import InvalidValue
from dispatch.registry import Registry, checked_options, options_of
from workers.model.freezing import check_parts, part_of

Build = TypeVar("Build", bound=Callable[..., torch.optim.Optimizer])
MakeState = Callable[[Tensor], dict[str, Tensor]]  # from a parameter, its state by the optimizer's own keys
Offload = Literal["none", "states"]
# Bytes of offloaded state that come to the device at once. A copy of 256 MiB takes about 5 ms over PCIe 5, so that the
# time to start it does not count.
PIECE_BYTES = 256 * 2**20
PIECES_AT_ONCE = 2  # on the device: the one that is updated, and its neighbour that arrives or leaves


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry:
    """An optimizer as registered, see `register_optimizer`. options: its constants by name, with their defaults."""

    build: Callable[..., torch.optim.Optimizer]
    initial_matrix_state: MakeState
    initial_other_state: MakeState
    state_label: str
    gathers_matrices: bool
    check: Callable[..., None] | None
    options: Mapping[str, float]

    def initial_state(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """What the optimizer holds of the parameter of this name before its first step."""
        make = self.initial_matrix_state if is_hidden_matrix(name, parameter) else self.initial_other_state
        return make(parameter)

    def state_bytes(self, num_in_matrices: int, num_other: int) -> int:
        """Bytes of state for so many fp32 elements of hidden matrices, and of all other parameters."""
        matrix_bytes, other_bytes = map(_bytes_an_element, (self.initial_matrix_state, self.initial_other_state))
        return num_in_matrices * matrix_bytes + num_other * other_bytes


def _bytes_an_element(make_state: MakeState) -> int:
    """Bytes of state for each element of an fp32 matrix, so large that scalars such as `step` round to nothing."""
    matrix = torch.empty(1024, 1024, dtype=torch.float32, device="meta")
    return sum(each.nbytes for each in make_state(matrix).values()) // matrix.numel()


# Each with the module that registers it.
OPTIMIZERS: Registry[OptimizerEntry] = Registry(
    "optim.name",
    {
        "adamw": "workers.training.adamw",
        "adamw_bf16": "workers.training.adamw_bf16",
        "muon": "workers.training.muon",
    },
)


def register_optimizer(
    name: str,
    *,
    initial_state: MakeState,
    matrix_state: MakeState | None = None,
    state_label: str = "optimizer state",
    gathers_matrices: bool = False,
    check: Callable[..., None] | None = None,
) -> Callable[[Build], Build]:
    """Make a function an optimizer that `optim.name` can name; its keyword-only arguments become `optim.options`.

    It is called once on each rank, with the model in its place and frozen parameters without gradient:

        build(model: nn.Module, config: OptimConfig, *, option: float = 1.0) -> torch.optim.Optimizer

    Before each step the learning rate of the schedule is set in every parameter group, times the group's "lr_scale"
    where it has one. Ranks that hold the same parameter must update it alike. With `optim.offload` a training step is
    several calls of `step`, each with gradients of some parameters only: parameters without a gradient must stay.

    Args:
        initial_state: what the optimizer holds of a parameter before its first step, by its own keys. Checkpoints are
            loaded into it. A tensor of the parameter's shape is saved expert by expert, and any number of ranks can
            read it again; one without dimensions is saved once for a stack of experts. Its size is what `trimtab plan`
            reckons with.
        matrix_state: as initial_state, for hidden matrices (`is_hidden_matrix`); by default they have the same.
        state_label: what `trimtab plan` calls the state.
        gathers_matrices: whether a step gathers each dense hidden matrix that is sharded, in bf16 on CUDA.
        check: called with all options by name before anything starts; raises InvalidValue where one is out of range.
    """

    def register(build: Build) -> Build:
        entry = OptimizerEntry(
            build=build,
            initial_matrix_state=matrix_state or initial_state,
            initial_other_state=initial_state,
            state_label=state_label,
            gathers_matrices=gathers_matrices,
            check=check,
            options=options_of(build),
        )
        OPTIMIZERS.register(name, entry, build)
        return build

    return register


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, with linear warm-up and cosine decay of its learning rate."""

    name: Annotated[str, OPTIMIZERS] = "adamw"
    """The rule of the update; 'adamw_bf16' keeps AdamW's moments in bfloat16, rounded stochastically; 'muon' makes the
    update of a hidden matrix orthogonal."""
    options: Mapping[str, float] = field(default_factory=dict)
    """Further constants of the optimizer, such as {"momentum": 0.9} of 'muon' or of one of your own."""
    module: str | None = None
    """Python module that registers optimizers of your own; imported in every process, on every node."""
    offload: Offload = "none"
    """What lies in host memory between steps: nothing ('none'), or the optimizer's state ('states'), which comes to the
    device in pieces. Results are the same bit for bit."""
    lr: float = 2e-3
    """Highest learning rate, reached at the end of the warm-up."""
    min_lr_ratio: float = 0.1
    """Learning rate of the last step, as a fraction of lr."""
    warmup_steps: int = 20
    """Steps in which the learning rate rises to lr."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms are not decayed."""
    grad_clip: float = 1.0
    """Largest global gradient norm, larger gradients are scaled down to it; 0 turns it off."""
    freeze: tuple[str, ...] = ()
    """Parts that stay as they are: embedding, attention, dense_ffn, router, experts, shared_experts, norms."""
    mtp_weight: float = 0.1
    """Factor on the loss of the multi-token-prediction layer, where there is one (0.3, then 0.1 in DeepSeek-V3)."""

    def __post_init__(self) -> None:
        OPTIMIZERS.check(self.name, self.module)
        options = checked_options("optim.options", f"optimizer {self.name!r}", self.options, self.entry.options)
        object.__setattr__(self, "options", options)
        if self.entry.check is not None:
            self.entry.check(**{**self.entry.options, **options})
        if self.offload not in get_args(Offload):
            choices = ", ".join(get_args(Offload))
            raise InvalidValue(f"optim.offload is {self.offload!r:.60}; it must be one of {choices}")
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidValue(f"{name} ({getattr(self, name)}) must be above 0 and finite")
        for name in ("warmup_steps", "weight_decay", "grad_clip", "mtp_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidValue(f"{name} ({getattr(self, name)}) must be at least 0 and finite")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidValue(f"{name} ({getattr(self, name)}) must be in [0, 1)")
        if not 0 <= self.min_lr_ratio <= 1:
            raise InvalidValue(f"min_lr_ratio ({self.min_lr_ratio}) must be in [0, 1]")
        check_parts(self.freeze)

    @property
    def entry(self) -> OptimizerEntry:
        """The registered optimizer."""
        return OPTIMIZERS.find(self.name, self.module)

    def initial_state(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        """As `OptimizerEntry.initial_state`, in host memory if it is offloaded."""
        state = self.entry.initial_state(name, parameter)
        if self.offload == "none":
            return state
        # Imported here, as it takes half a second (DTensor), which the driver, who only reads settings, can do without.
        from workers.training.offload import move_to_host

        return move_to_host(state)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix between hidden layers, or a stack of them: not embedding, head or router.

    A matrix of one row or column, such as the gate of shared experts, counts as a vector.
    """
    is_matrix = _decays(name, parameter) and min(parameter.shape[-2:]) > 1
    return is_matrix and part_of(name) not in ("embedding", "router")


def _decays(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix or a stack of them; the stacked biases of experts are vectors."""
    return parameter.ndim > 1 and not name.endswith("bias")


def decay_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: matrices with weight decay, vectors without."""
    trainable = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    return [
        {"params": [each for name, each in trainable if _decays(name, each)], "weight_decay": config.weight_decay},
        {"params": [each for name, each in trainable if not _decays(name, each)], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that the settings name, over the trainable parameters of a model."""
    return config.entry.build(model, config, **config.options)
