"""Imports, trains with sharded states and exports a Qwen3-MoE model of 1 to 2 GB; compares its memory with the plan.

    python -m benchmarks.sharded_model [--workers 4] [--steps 20] [--folder DIR]

transformers writes a model of random weights. It is imported and exported: every byte must come back. Then processes
over gloo train it with parallel.shard full, and it is exported, imported and exported again: both exports must be
equal. Each rank's peak resident memory must stay below 1.3 times that of `trimtab plan`. It also prints the memory that
a process had before it built its model, for Python and torch. Exit code 1 if anything is not as said. Linux only.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open

from benchmarks.processes import run_processes
from runtime.cli import main as trimtab
from runtime.commands.bench.dispatch.memory import status_bytes
from runtime.commands.plan.plan import Plan, make_plan
from runtime.commands.plan.subject import Subject
from runtime.job.launch import make_spec
from runtime.runs.run_dir import CONFIG_FILE
from runtime.settings.config_file import config_from_yaml_file
from workers.checkpoints.checkpoint_files import latest
from workers.data.prepare import prepare_dataset
from workers.worker import Worker

BOUND = 1.3  # times the plan
VOCABULARY = 24_000
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "max_position_embeddings": 256,
    "dtype": "float32",
}


def write_model(folder: Path) -> None:
    """Write the model, and a tokenizer with as many words as its vocabulary."""
    import tokenizers
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**MODEL)).save_pretrained(folder, max_shard_size="300MB")
    words = {"[UNK]": 0, "<eos>": 1} | {f"w{index}": index for index in range(2, VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_text(path: Path) -> None:
    """Write sentences whose words follow each other by a rule, so that the model can learn something."""
    draw = random.Random(0)
    lines = []
    for _ in range(4_000):
        word = draw.randrange(2, VOCABULARY)
        lines.append(" ".join(f"w{2 + (word * 7 + step) % (VOCABULARY - 2)}" for step in range(24)))
    path.write_text("\n".join(lines))


@dataclass(frozen=True)
class TrainedRank:
    """Resident memory before there was a model and at its peak; losses and seconds of the steps."""

    before_bytes: int
    peak_bytes: int
    losses: list[float]
    seconds: list[float]


def train_rank(run_dir: Path, rank: int, world_size: int) -> TrainedRank:
    """Train the run to its end as one of its ranks."""
    torch.set_num_threads(1)
    config = config_from_yaml_file(run_dir / CONFIG_FILE)
    worker = Worker(make_spec(config, run_dir, prepare_dataset(config.data)))
    before = status_bytes("VmRSS")
    store = dist.FileStore(str(run_dir / "store"), world_size)
    worker.join(rank=rank, world_size=world_size, store=store, timeout_s=600.0)
    worker.train(latest(run_dir / "checkpoints"))
    lines = [line for line in worker.progress(0) if line.get("kind") == "train"]
    worker.leave()
    seconds = [line["step_s"] for line in lines]
    return TrainedRank(before, status_bytes("VmHWM"), [line["loss"] for line in lines], seconds)


def plan_of(run_dir: Path) -> Plan:
    """The plan of the run, as `trimtab plan` computes it."""
    config = config_from_yaml_file(run_dir / CONFIG_FILE)
    return make_plan(Subject(run_dir.name, config, ranks_per_node=config.cluster.num_workers, notes=()))


def are_equal(first: Path, second: Path) -> bool:
    """Whether two directories hold the same tensors, by their bytes."""
    before, after = _tensors(first), _tensors(second)
    return before.keys() == after.keys() and all(
        one().dtype == after[name]().dtype and torch.equal(one().view(torch.uint8), after[name]().view(torch.uint8))
        for name, one in before.items()
    )


def _tensors(folder: Path) -> dict[str, Callable[[], torch.Tensor]]:
    found = {}
    for path in folder.glob("*.safetensors"):
        opened = safe_open(path, "pt")
        found |= {name: lambda opened=opened, name=name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def _call(*arguments: str | Path) -> None:
    if trimtab([str(argument) for argument in arguments]):
        raise SystemExit(1)


def measure(folder: Path, world_size: int, steps: int) -> bool:
    """Print the results; whether all bytes came back and the memory fits the plan."""
    source, text = folder / "source", folder / "text.txt"
    write_model(source)
    write_text(text)
    num_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    settings = ["--workers", world_size, "--model.max_seq_len", 128, "--run.global_batch_size", 2 * world_size]
    settings += ["--run.steps", steps, "--optim.warmup_steps", 2, "--data.path", text]
    settings += [
        "--data.cache_dir",
        folder / "cache",
        "--parallel.shard",
        "full",
        "--parallel.ep_size",
        world_size // 2,
    ]
    settings += ["--run.memory_checkpoint_every", 0, "--run.eval_every", 0, "--device", "cpu"]
    began = time.perf_counter()
    _call("import", source, folder / "run", *map(str, settings))
    print(f"model of {num_bytes / 1e9:.2f} GB, imported in {time.perf_counter() - began:.0f} s")
    _call("export", folder / "run", folder / "untrained")
    back = are_equal(source, folder / "untrained")
    print(f"imported and exported: {'every byte came back' if back else 'NOT the same'}")
    ranks = run_processes(world_size, train_rank, folder / "run")
    losses, step_s = ranks[0].losses, statistics.median(ranks[0].seconds)
    print(f"{len(losses)} steps, loss {losses[0]:.2f} to {losses[-1]:.2f}, {step_s:.1f} s each")
    _call("export", folder / "run", folder / "trained")
    _call("import", folder / "trained", folder / "run2", *map(str, settings))
    _call("export", folder / "run2", folder / "again")
    again, moved = are_equal(folder / "trained", folder / "again"), not are_equal(source, folder / "trained")
    print(f"trained, exported, imported and exported: {'the same bytes' if again else 'NOT the same'}")
    planned = plan_of(folder / "run").peak_bytes
    for number, rank in enumerate(ranks):
        print(
            f"rank {number}: peak {rank.peak_bytes / 2**30:.2f} GiB, of them {rank.before_bytes / 2**30:.2f} before "
            f"the model; {rank.peak_bytes / planned:.2f} of the plan ({planned / 2**30:.2f} GiB)"
        )
    fits = max(rank.peak_bytes for rank in ranks) < BOUND * planned
    return back and again and moved and len(losses) == steps and fits


def main() -> int:
    """Make, train and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4, help="processes; half of them share experts (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="(%(default)s)")
    parser.add_argument("--folder", type=Path, help="where 10 GB are written for the time (a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        return 0 if measure(Path(name), options.workers, options.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
