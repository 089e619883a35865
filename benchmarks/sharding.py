"""Compares steps with sharded states to steps without: their time, and the bytes that they send, with those planned.

    python -m benchmarks.sharding [--workers 4] [--pairs 10] [--micro-batches 1] [--dtype float32]

Each gloo rank holds a trainer for each value of parallel.shard. They take turns, in alternating order, so that a time
in which the machine is slow meets all of them. It prints the median over rounds of a mode's time over that of `none`.
Bytes are those of gradients and weights that a rank would send in a ring, computed from the arguments of the
collectives of one step.
"""

import argparse
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.processes import run_processes
from cluster.config import ClusterConfig
from dispatch.config import MoEConfig
from runtime.commands.plan.plan import make_plan
from runtime.commands.plan.subject import Subject
from runtime.job.launch import make_spec
from runtime.settings.config import TrainConfig
from workers.data.prepare import prepare_dataset
from workers.data.text import DataConfig
from workers.distributed.parallel import ParallelConfig, RankGroups, Shard, join_groups
from workers.model.model_config import ModelConfig
from workers.run_config import RunConfig
from workers.training.rank_state import build_rank
from workers.training.step import Trainer
from workers.training.worker_spec import WorkerSpec

DType = Literal["float32", "bfloat16"]

WARM_UP = 2
MODEL = ModelConfig(
    hidden=256,
    num_layers=6,
    num_dense_layers=1,
    num_heads=8,
    num_kv_heads=4,
    dense_ffn_hidden=1024,
    max_seq_len=128,
    vocab_size=8192,
    moe=MoEConfig(num_experts=16, top_k=2, ffn_hidden=512),
)

# For each collective: the index, among its arguments, of the tensor whose bytes travel, the index of the group, and how
# often a ring sends these bytes.
COLLECTIVES = {
    "c10d::allreduce_": (0, 1, 2),
    "c10d::_allgather_base_": (0, 2, 1),
    "c10d::_reduce_scatter_base_": (1, 2, 1),
}


class RingBytes(TorchDispatchMode):
    """Counts the bytes that a ring would send from this rank in this thread's collectives, by the size of the group."""

    def __init__(self) -> None:
        super().__init__()
        self.by_group_size: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count, then call."""
        if func.name() in COLLECTIVES:
            tensor, group, times = COLLECTIVES[func.name()]
            size = dist.ProcessGroup.unbox(args[group]).size()
            tensors = args[tensor] if isinstance(args[tensor], list) else [args[tensor]]
            self.by_group_size[size] += sum(times * each.nbytes * (size - 1) // size for each in tensors)
        return func(*args, **(kwargs or {}))


def config_of(shard: Shard, world_size: int, num_micro: int, dtype: DType, text: Path) -> TrainConfig:
    """Settings of a run in which half of the ranks share the experts of a layer."""
    batch = 2 * world_size * num_micro
    return TrainConfig(
        # Far more steps than are made: the learning rate's schedule hardly moves.
        run=RunConfig(global_batch_size=batch, micro_batch_size=2, steps=10_000, eval_every=0, dtype=dtype),
        model=MODEL,
        data=DataConfig(path=str(text), cache_dir=str(text.parent / "cache")),
        parallel=ParallelConfig(shard=shard, ep_size=max(1, world_size // 2), exchange="rank"),
        cluster=ClusterConfig(num_workers=world_size, device="cpu"),
    )


def trainer_of(spec: WorkerSpec, groups: RankGroups) -> Trainer:
    """A trainer with a new model on these groups."""
    state = build_rank(spec, groups)
    return state.trainer(state.open_control())


def measure(
    specs: Mapping[Shard, WorkerSpec], num_rounds: int, rank: int, world_size: int
) -> tuple[dict[Shard, Counter[int]], dict[Shard, list[float]]]:
    """For each mode the bytes of a step by the size of the group, and the seconds of the steps."""
    torch.set_num_threads(1)
    spec = specs["none"]
    store = dist.FileStore(str(spec.run_dir / "store"), world_size)
    groups = join_groups(
        rank=rank,
        world_size=world_size,
        store=store,
        config=spec.parallel,
        device=torch.device("cpu"),
        timeout_s=300.0,
    )
    trainers = {shard: trainer_of(each, groups) for shard, each in specs.items()}
    sent: dict[Shard, Counter[int]] = {}
    seconds: dict[Shard, list[float]] = {shard: [] for shard in trainers}
    for index in range(WARM_UP + num_rounds):
        order = list(trainers.items())
        for shard, trainer in order if index % 2 else reversed(order):
            if index:
                step_s = trainer.step(index + 1).step_s
                seconds[shard] += [step_s] * (index >= WARM_UP)
            else:
                with RingBytes() as counted:
                    trainer.step(1)
                sent[shard] = counted.by_group_size
    for trainer in trainers.values():
        trainer.control.close()
    dist.destroy_process_group()
    return sent, seconds


def planned_bytes(config: TrainConfig) -> Counter[int]:
    """The bytes that the plan computes, by the size of the group."""
    world_size = config.cluster.num_workers
    gradients = make_plan(Subject("benchmark", config, ranks_per_node=world_size, notes=())).gradients
    ranks = {"dense": world_size, "experts": world_size // config.parallel.resolve(world_size)}
    found: Counter[int] = Counter()
    for name, size in gradients.items():
        found[ranks[name]] += round(size)
    return found


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, help="processes (%(default)s)")
    parser.add_argument("--pairs", type=int, default=10, help="rounds that are timed (%(default)s)")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step (%(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="run.dtype (%(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = folder / "text.txt"
        text.write_text("".join(f"{n} green bottles hanging on the wall;\n" for n in range(40_000)))
        settings = (options.workers, options.micro_batches, options.dtype, text)
        configs = {shard: config_of(shard, *settings) for shard in get_args(Shard)}
        dataset = prepare_dataset(configs["none"].data)
        specs = {shard: make_spec(config, folder, dataset) for shard, config in configs.items()}
        results = run_processes(options.workers, measure, specs, options.pairs)
    sent, seconds = results[0]
    print("| shard | seconds of a step | of `none` | MB counted | MB planned |\n|---|---|---|---|---|")
    for shard, config in configs.items():
        ratio = statistics.median(one / base for one, base in zip(seconds[shard], seconds["none"], strict=True))
        counted, planned = sent[shard].total() / 1e6, planned_bytes(config).total() / 1e6
        print(f"| `{shard}` | {statistics.median(seconds[shard]):.2f} | {ratio:.2f} | {counted:.1f} | {planned:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
