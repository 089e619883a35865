"""One rank's part of an import: it reads its shard of a Hugging Face directory, and saves it as a checkpoint."""

from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore  # torch.distributed hides it from type checkers

from dispatch.balance import layout_of, routers_of
from dispatch.exchange.factory import make_dispatcher
from dispatch.layout import LoadLayout
from workers.checkpoints import checkpoint
from workers.checkpoints.checkpoint_files import CHECKPOINTS
from workers.checkpoints.shares import all_gather_specs, divide
from workers.checkpoints.state import canonical_state
from workers.distributed.agreement import together
from workers.model.decoder import Decoder
from workers.model.hugging_face.filling import fill
from workers.model.hugging_face.source import ModelDirectory, SourceError, open_source
from workers.model.lora import LoraConfig
from workers.model.meta_device import meta_device
from workers.model.model_config import ModelConfig

# A rank that dies ends the import at once, as its connections close. This bounds the wait for a rank whose disk hangs.
TIMEOUT_S = 6 * 3600.0
RENDEZVOUS = ".import"


@dataclass(frozen=True)
class ImportedShard:
    """What a rank imported. peak_bytes: its peak memory, less the memory in use before it built its shard."""

    layout: LoadLayout
    shard_bytes: int
    peak_bytes: int


def import_shard(folder: Path, run_dir: Path, config: ModelConfig, rank: int, world_size: int) -> ImportedShard:
    """Read this rank's experts and its share of the dense tensors, and save them as step 0 of `run_dir`, as fp32.

    config: read from the directory, with the run's own max_seq_len and recompute.

    Raises:
        SourceError: on all ranks, where one of them cannot read its shard.
        CheckpointError: on all ranks, where one of them cannot save it.

    Collective: every rank runs in a process of its own, and meets the others over the file RENDEZVOUS in run_dir.
    """
    dist.init_process_group(
        "gloo",
        store=FileStore(str(run_dir / RENDEZVOUS), world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        return _import(open_source(folder), run_dir, config, dist.new_group())
    finally:
        dist.destroy_process_group()


def _import(source: ModelDirectory, run_dir: Path, config: ModelConfig, group: dist.ProcessGroup) -> ImportedShard:
    before = _reset_peak()
    state, layout = _empty_shard(config, group)
    together(
        group,
        f"reading {source.folder}",
        lambda: fill(state, source),
        kinds={"SourceError": SourceError},
        explain=_explain,
    )
    checkpoint.save(run_dir / CHECKPOINTS, 0, state, _extra(config, layout), group)
    shard_bytes = sum(tensor.nbytes for tensor in state.values())
    return ImportedShard(layout, shard_bytes, _peak_bytes() - before)


def _explain(error: Exception) -> SourceError | None:
    if isinstance(error, SourceError):
        return error
    return SourceError(str(error)) if isinstance(error, OSError) else None


def _empty_shard(config: ModelConfig, group: dist.ProcessGroup) -> tuple[dict[str, Tensor], LoadLayout]:
    """The tensors that this rank fills and saves, by canonical name: empty, but selection biases are zero.

    Each tensor is in the share of one rank, so that no rank holds all dense tensors. Experts are single tensors here,
    and not parts of a stack.
    """
    moe = config.moe
    dispatcher = make_dispatcher(moe.num_experts, group, hidden=config.hidden, top_k=moe.top_k)
    with meta_device():
        model = Decoder(replace(config, lora=LoraConfig()), lambda: dispatcher)  # adapters are not imported
    share = divide(all_gather_specs(canonical_state(model), group))[dist.get_rank(group)]
    state = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in share.items()}
    for bias in state.keys() & {f"model.{name}.expert_bias_E" for name in routers_of(model)}:
        state[bias].zero_()
    return state, layout_of(routers_of(model))


def _extra(config: ModelConfig, layout: LoadLayout) -> dict[str, Any]:
    """Extra values of the checkpoint. `imported`: it has no optimizer state and no position in the data."""
    return {"step": 0, "imported": True, "load_since_eval": [0] * layout.total, "model": asdict(config)}


def _reset_peak() -> int:
    """Reset the process's peak memory, where the system can, and return the memory in use now, in bytes."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _peak_bytes()
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none, as on macOS."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
