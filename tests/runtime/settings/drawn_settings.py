"""Whole configurations of tiny models, drawn at random: settings that nobody would think of together."""

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dispatch.errors import InvalidValue
from runtime.settings.cautions import cautions
from runtime.settings.config import TrainConfig, cross_check, feasible_sizes
from runtime.settings.size import model_size
from runtime.settings.states import training_bytes
from workers.distributed.parallel import ParallelConfig

STEPS = 3
PARTS = ("embedding", "attention", "dense_ffn", "router", "experts", "shared_experts", "norms")
ALWAYS = {
    "run.steps": STEPS,
    "run.checkpoint_every": STEPS - 1,
    "run.eval_sequences": 3,
    "model.num_kv_heads": 1,
    "model.dense_ffn_hidden": 10,
    "model.moe.ffn_hidden": 6,
    "model.latent.kv_rank": 4,
    "model.latent.nope_dim": 2,
    "model.latent.rope_dim": 2,
    "model.latent.value_dim": 3,
    "optim.warmup_steps": 2,
    "cluster.device": "cpu",
}
# Each is one of these.
SIZES: dict[str, tuple[Any, ...]] = {
    "run.global_batch_size": (4, 6, 8, 12),
    "run.micro_batch_size": (0, 1, 2),
    "run.eval_every": (0, 2),
    "run.seed": (0, 1, 2),
    "model.hidden": (4, 8),
    "model.num_heads": (1, 2),
    "model.num_layers": (1, 2, 3, 4, 5),
    "model.num_dense_layers": (0, 1, 2),
    "model.max_seq_len": (1, 3, 8, 13),
    "model.moe.num_experts": (1, 3, 5, 8),
    "model.moe.top_k": (1, 2, 3),
    "balance.law": ("none", "sign", "adaptive", "quantile", "newton", "smebu", "multiplicative", "warm"),
}
# How often each is another than by default, and what then.
CHANCES: dict[str, tuple[float, tuple[Any, ...]]] = {
    "run.memory_checkpoint_every": (0.5, (1, 2)),
    "run.async_checkpoints": (0.3, (False,)),
    "model.head_dim": (0.2, (2, 6)),
    "model.qkv_bias": (0.2, (True,)),
    "model.attention_sinks": (0.2, (True,)),
    "model.attention_gate": (0.2, (True,)),
    "model.attention": (0.15, ("latent",)),
    "model.query_key_norm": (0.2, ("head", "all")),
    "model.sliding_window": (0.2, (1, 3, 100)),
    "model.full_attention_every": (0.2, (2,)),
    "model.rotate_full_attention": (0.2, (False,)),
    "model.tie_embeddings": (0.3, (True,)),
    "model.post_norms": (0.2, (True,)),
    "model.num_mtp_layers": (0.3, (1,)),
    "model.recompute": (0.5, ("attention", "experts", "full")),
    "model.moe.score": (0.3, ("softmax",)),
    "model.moe.num_shared_experts": (0.3, (0, 2)),
    "model.moe.shared_gate": (0.2, (True,)),
    "model.moe.gate_bias": (0.2, (True,)),
    "model.moe.expert_biases": (0.2, (True,)),
    "model.moe.swiglu_limit": (0.2, (0.5,)),
    "model.lora.rank": (0.2, (1, 5)),
    "model.lora.targets": (0.5, (("experts",), ("attention", "experts"), ("dense_ffn", "shared_experts"))),
    "parallel.ep_size": (0.6, (1, 2, 4)),
    "parallel.exchange": (0.4, ("rank", "assignment", "node")),
    "parallel.ranks_per_node": (0.2, (1, 2)),
    "parallel.shard": (0.5, ("optimizer", "full")),
    "parallel.replicate": (0.25, (2,)),
    "parallel.context": (0.2, (2, 4)),
    "parallel.expert_copies": (0.2, (1, 3)),
    "parallel.copies_every": (0.5, (1, 2)),
    "parallel.schedule.num_chunks": (0.3, (2, 5)),
    "parallel.schedule.overlap": (0.2, (False,)),
    "parallel.schedule.max_rows": (0.2, (9, 30)),
    "parallel.pipeline.size": (0.25, (2, 4)),
    "parallel.pipeline.schedule": (0.4, ("interleaved_1f1b",)),
    "optim.name": (0.3, ("muon",)),
    "optim.offload": (0.2, ("states",)),
    "optim.grad_clip": (0.5, (0.0, 0.1)),
    "optim.mtp_weight": (0.3, (0.0, 0.3)),
    "optim.freeze": (0.2, (PARTS[:1], PARTS[3:4], PARTS[4:5], PARTS[1:6], PARTS)),
    "aux.loss": (0.15, ("global_batch", "sequence")),
    "aux.alpha": (0.5, (0.1,)),
    "aux.z_alpha": (0.15, (0.01,)),
    "balance.rate": (0.3, (0.0, 0.05)),
    "balance.schedule": (0.2, ("linear", "cosine")),
    "balance.record": (0.1, (1, 2)),
    "data.pack_documents": (0.3, (True,)),
    "cluster.min_workers": (0.1, (1, 2)),
}
# What goes with so little else that it would hardly be drawn: one seed after the other has these.
SELDOM: tuple[dict[str, Any], ...] = (
    {},
    {"parallel.pipeline.size": 2},
    {"parallel.context": 2},
    {"parallel.expert_copies": 2, "parallel.copies_every": 1},
)


def draw(rng: random.Random, num_workers: int) -> dict[str, Any]:
    """Settings by dotted name, for so many workers."""
    values = {name: rng.choice(choices) for name, choices in SIZES.items()}
    values |= {name: rng.choice(choices) for name, (chance, choices) in CHANCES.items() if rng.random() < chance}
    return {**ALWAYS, **values, "cluster.num_workers": num_workers}


def with_values(section: Any, values: Mapping[str, Any]) -> Any:
    """A section of the settings, or all of them, with values by dotted name. Raises InvalidValue."""
    parts: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in values.items():
        head, _, rest = name.partition(".")
        parts[head][rest] = value
    changes = {
        head: below[""] if "" in below else with_values(getattr(section, head), below) for head, below in parts.items()
    }
    return replace(section, **changes)


def checked(values: Mapping[str, Any], base: TrainConfig) -> TrainConfig:
    """The configuration, after all checks of `trimtab train --dry-run` that need no machine. Raises InvalidValue."""
    config: TrainConfig = with_values(base, values)
    cross_check(config)
    for size in feasible_sizes(config):
        config.parallel.resized_to(size).resolve(size)
    model_size(config.model, config.optim)
    training_bytes(config)
    cautions(config, is_imported=False)
    return config


def accepted(seed: int, num_workers: int, base: TrainConfig) -> dict[str, Any]:
    """The first draw of this seed that is not refused; several workers have what is drawn seldom in turn."""
    rng, chosen = random.Random(seed), SELDOM[seed % len(SELDOM)] if num_workers > 1 else {}
    while True:
        values = draw(rng, num_workers) | chosen
        try:
            checked(values, base)
        except InvalidValue:
            continue
        return values


def on_one_process(config: TrainConfig) -> TrainConfig:
    """The same model and batches with plain settings: what any other layout has to be equal to."""
    return replace(
        config,
        run=replace(config.run, micro_batch_size=0),
        model=replace(config.model, recompute="none"),
        balance=replace(config.balance, record=0),
        optim=replace(config.optim, offload="none"),
        parallel=ParallelConfig(),
        cluster=replace(config.cluster, num_workers=1, min_workers=0, max_workers=0),
    )


def has_other_loss(config: TrainConfig) -> bool:
    """Whether the loss depends on micro-batches by definition, see `workers.training.aux_losses`."""
    return config.aux.loss == "global_batch" and config.num_micro_batches > 1


def texts(folder: Path) -> tuple[str, ...]:
    """A folder of documents, written once."""
    if not folder.exists():
        folder.mkdir()
        for n in range(60):
            line = f"{n} squared is {n * n}, and cubed {n**3}\n"
            (folder / f"{n}.txt").write_text(line * (1 + n % 4))
    return (str(folder),)
