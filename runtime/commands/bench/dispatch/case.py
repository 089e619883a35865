"""What `trimtab bench dispatch` measures, from options and a training configuration, checked before anything starts."""

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch

from dispatch.config import MoEConfig
from dispatch.errors import InvalidValue
from dispatch.exchange.payload import Payload
from dispatch.exchange.placement import ExpertPlacement
from dispatch.exchange.registry import BACKENDS
from dispatch.parity.launch import launched_ranks_per_node, launched_world_size
from dispatch.parity.workloads import Workload
from runtime.commands.bench.dispatch.choices import DTYPES
from runtime.commands.bench.dispatch.limits import Shape
from runtime.settings.config import TrainConfig
from runtime.settings.config_file import load_config
from workers.actor import usable_cores

DEFAULT_WORKERS = 2
DEFAULT_SHAPE = Shape(tokens=4096, hidden=512, ffn_hidden=256, num_experts=64, top_k=8)


@dataclass(frozen=True, kw_only=True)
class LayerCase:
    """Everything that the figures depend on. All ranks form one EP group; ranks_per_node divides it into nodes."""

    workers: int
    threads: int
    device: str
    dtypes: tuple[str, ...]
    tokens: int
    hidden: int
    moe: MoEConfig
    exchange: str
    ranks_per_node: int
    payload: Payload
    num_chunks: int
    workload: str | None
    skew: float | None
    rounds: int

    def __post_init__(self) -> None:
        ExpertPlacement(self.moe.num_experts, self.workers)  # raises where a rank would hold no expert
        if self.exchange != "auto" and not BACKENDS[self.exchange].replayable:
            others = ["auto", *(name for name, backend in BACKENDS.items() if backend.replayable)]
            raise InvalidValue(
                f"exchange {self.exchange!r} has messages of its own, which the bare all-to-all cannot repeat; choose "
                f"--exchange {', '.join(others)}"
            )
        if self.workers % self.ranks_per_node:
            raise InvalidValue(
                f"--ranks-per-node ({self.ranks_per_node}) must divide the number of workers ({self.workers}); use one "
                f"of {[size for size in range(1, self.workers + 1) if self.workers % size == 0]}"
            )
        if not self.shape.rows_per_expert(self.workers):
            raise InvalidValue(
                f"{self.workers} x {self.tokens} tokens, {self.moe.top_k} experts each, leave {self.moe.num_experts} "
                "experts without a row on average; raise --tokens"
            )
        self._check_workload()

    def _check_workload(self) -> None:
        if self.workload is None:
            if self.skew is not None:
                raise InvalidValue(f"--skew ({self.skew:g}) belongs to a workload; add --workload W1, or leave it out")
            return
        if self.hidden < self.moe.num_experts:
            raise InvalidValue(
                f"--workload {self.workload} needs --hidden ({self.hidden}) of at least --num-experts "
                f"({self.moe.num_experts}), else there are no tokens that make these choices"
            )
        if self.moe.num_groups > 1:
            raise InvalidValue(
                f"--workload {self.workload} decides every choice, and so does model.moe.num_groups "
                f"({self.moe.num_groups}) of the configuration; leave one out"
            )
        self.make_workload()  # raises where name or skew are out of range

    @property
    def shape(self) -> Shape:
        """Sizes of the layer."""
        moe = self.moe
        return Shape(self.tokens, self.hidden, moe.ffn_hidden, moe.num_experts, moe.top_k)

    def make_workload(self) -> Workload | None:
        """The workload that chooses the experts of all tokens; None leaves the choice to the router."""
        if self.workload is None:
            return None
        return Workload(
            name=self.workload,
            num_experts=self.moe.num_experts,
            top_k=self.moe.top_k,
            ep_size=self.workers,
            num_tokens=self.tokens,
            skew=self.skew,
        )


def case_of(given: argparse.Namespace) -> LayerCase:
    """The case that the options ask for; what they leave out comes from --config, then from the defaults.

    Raises:
        InvalidValue: a value that is impossible, or does not fit this machine or another value.
    """
    workers = _workers(given.workers)
    base = _from_config(load_config(given.config), workers) if given.config else _default(workers)
    chosen = {
        "tokens": given.tokens,
        "hidden": given.hidden,
        "dtypes": given.dtype and tuple(dict.fromkeys(given.dtype)),
        "exchange": given.exchange,
        "ranks_per_node": given.ranks_per_node,
        "payload": given.payload,
        "num_chunks": given.chunks,
    }
    moe = {name: getattr(given, name) for name in ("ffn_hidden", "num_experts", "top_k")}
    # Shared experts are dense: neither dispatched nor combined.
    moe_config = replace(base.pop("moe"), num_shared_experts=0, **_present(moe))
    return LayerCase(
        workers=workers,
        threads=given.threads or _share_of_cores(workers),
        device=_device(given.device, workers),
        moe=moe_config,
        workload=given.workload,
        skew=given.skew,
        rounds=given.rounds,
        **(base | _present(chosen)),
    )


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _default(workers: int) -> dict[str, Any]:
    shape = DEFAULT_SHAPE
    return {
        "tokens": shape.tokens,
        "hidden": shape.hidden,
        "moe": MoEConfig(num_experts=shape.num_experts, top_k=shape.top_k, ffn_hidden=shape.ffn_hidden),
        "dtypes": DTYPES,
        "exchange": "auto",
        "ranks_per_node": launched_ranks_per_node() or workers,
        "payload": "compute",
        "num_chunks": 1,
    }


def _from_config(config: TrainConfig, workers: int) -> dict[str, Any]:
    run, model, parallel = config.run, config.model, config.parallel
    # Per rank of the training: the benchmark may have fewer ranks, each with as much work as one of the training.
    sequences = run.micro_batch_size or config.sequences_per_rank
    return _default(workers) | {
        "tokens": sequences * -(-model.max_seq_len // parallel.context),
        "hidden": model.hidden,
        "moe": model.moe,
        "dtypes": (run.dtype,),
        "exchange": parallel.exchange,
        "payload": parallel.payload,
        "num_chunks": parallel.schedule.num_chunks,
        **({"ranks_per_node": parallel.ranks_per_node} if parallel.ranks_per_node else {}),
    }


def _workers(given: int | None) -> int:
    world_size = launched_world_size()
    if world_size is not None and given not in (None, world_size):
        raise InvalidValue(f"--workers ({given}) must be the world size of the launcher ({world_size}); leave it out")
    return world_size or given or DEFAULT_WORKERS


def _share_of_cores(workers: int) -> int:
    return max(1, usable_cores() // (launched_ranks_per_node() or workers))


def _device(given: str, workers: int) -> str:
    num_local_ranks = launched_ranks_per_node() or workers
    num_devices = torch.cuda.device_count()
    if given == "auto":
        return "cuda" if num_devices >= num_local_ranks else "cpu"
    if given == "cuda" and num_devices < num_local_ranks:
        raise InvalidValue(
            f"--device cuda needs a CUDA device for each of {num_local_ranks} ranks of this machine and torch sees "
            f"{num_devices}; lower --workers or take --device cpu"
        )
    return given
