"""Small real runs on several ranks, for the tests of training, resuming and generating."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from dispatch.config import MoEConfig
from dispatch.laws import BalanceConfig
from runtime.job.coordinator import CoordinatorPolicy
from workers.checkpoints.slices import Slice
from workers.checkpoints.state import canonical_state
from workers.data.prepare import prepare_dataset
from workers.data.text import DataConfig
from workers.distributed.parallel import ParallelConfig
from workers.model.model_config import ModelConfig
from workers.run_config import RunConfig
from workers.training.optimizer import OptimConfig
from workers.training.worker_spec import WorkerSpec
from workers.worker import Worker

LINES = [
    f"{n} green bottles hanging on the wall, and if one should fall there'd be {n - 1};\n" for n in range(400, 0, -1)
]


def make_spec(folder: Path, **run) -> WorkerSpec:
    """A run of a few milliseconds a step, on text that it makes; run: fields of RunConfig."""
    text = folder / "bottles.txt"
    if not text.exists():
        text.write_text("".join(LINES))
    dataset = prepare_dataset(DataConfig(path=(str(text),), cache_dir=str(folder / "cache")))
    model = ModelConfig(
        hidden=16,
        num_layers=3,
        num_dense_layers=1,
        num_heads=2,
        num_kv_heads=1,
        dense_ffn_hidden=24,
        max_seq_len=16,
        moe=MoEConfig(num_experts=8, top_k=2, ffn_hidden=8),
    )
    settings = {"steps": 5, "global_batch_size": 12, "eval_every": 0, "eval_sequences": 8, "checkpoint_every": 0} | run
    return WorkerSpec(
        run_dir=folder / "run",
        run_id="test",
        data_dir=dataset.path,
        tokenizer=None,
        run=RunConfig(**settings),
        model=model,
        balance=BalanceConfig(law="sign", rate=0.01),
        optim=OptimConfig(lr=3e-3, warmup_steps=2),
        parallel=ParallelConfig(),
        device="cpu",
        control_timeout_s=20.0,
    )


class StoppingWorker(Worker):
    """Asks for a stop when it has published the line of a step, as Ctrl-C would."""

    def __init__(self, spec, stop_after=None):
        super().__init__(spec)
        if stop_after is not None:
            worker = self

            class Lines(list):
                def append(self, line):
                    super().append(line)
                    # Seen at the start of the next step, which is then the last.
                    if line.get("kind") == "train" and line["step"] == stop_after - 1:
                        worker.request_stop()

            self._lines = Lines()


def join_worker(spec, rank, world_size, name, *, float64=False, stop_after=None, nodes=(), timeout_s=20.0) -> Worker:
    """A joined worker; `name` keeps the rendezvous of the gangs of one process apart."""
    if dist.is_initialized():
        dist.barrier()  # else a rank closes connections that another one is still making
        dist.destroy_process_group()
    torch.set_default_dtype(torch.float64 if float64 else torch.float32)
    if rank == 0 and spec.call_coordinator is None:
        spec = replace(spec, call_coordinator=CoordinatorPolicy().handle)
    worker = StoppingWorker(spec, stop_after)
    spec.run_dir.mkdir(parents=True, exist_ok=True)
    # With run and size, as a store whose processes were killed keeps the addresses of that gang.
    store = dist.FileStore(str(spec.run_dir.parent / f"store-{spec.run_dir.name}-{name}-{world_size}"), world_size)
    worker.join(rank=rank, world_size=world_size, store=store, timeout_s=timeout_s, nodes=nodes)
    return worker


def assert_same_state(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: object) -> None:
    """Equal but for the rounding of float64. Elements near zero are judged by the size of their tensor."""
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        atol = 1e-11 * value.abs().max().item() if value.ndim else 0  # rounding differs with the order of sums
        torch.testing.assert_close(state[key], value, rtol=1e-10, atol=atol, msg=lambda m, k=key: f"{name} {k}: {m}")


def whole_state(worker) -> dict[str, torch.Tensor]:
    """Parameters, biases and moments of all ranks by canonical name, the same on every rank."""
    state = worker._state
    tensors = canonical_state(state.model, state.optimizer, state.spec.optim.entry.initial_state)
    mine = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
    parts = [None] * state.groups.world_size
    dist.all_gather_object(parts, mine, group=state.groups.control_group)
    held = {Slice.of_key(key): tensor for part in parts for key, tensor in part.items()}
    whole: dict[str, list[torch.Tensor]] = {}
    for part, tensor in sorted(held.items(), key=lambda each: each[0][:2]):
        whole.setdefault(part.name, []).append(tensor)
    return {name: tensors[0] if len(tensors) == 1 else torch.cat(tensors) for name, tensors in whole.items()}


class InfiniteGradient(torch.autograd.Function):
    """Passes a tensor through; its gradient makes the optimizer skip the step."""

    @staticmethod
    def forward(_ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(_ctx, grad):
        return grad * float("inf")
