"""The cases that are measured: models, numbers of tokens and ranks, with balanced and with skewed routing."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cluster.config import ClusterConfig
from dispatch.config import MoEConfig
from runtime.commands.plan.subject import Subject
from runtime.settings.config import RunBalanceConfig, TrainConfig
from workers.data.text import DataConfig
from workers.distributed.parallel import ParallelConfig
from workers.model.model_config import ModelConfig
from workers.run_config import RunConfig

WIDE = ModelConfig(
    hidden=384,
    num_layers=3,
    num_heads=6,
    num_kv_heads=6,
    dense_ffn_hidden=1024,
    max_seq_len=256,
    moe=MoEConfig(num_experts=16, top_k=4, ffn_hidden=384, num_shared_experts=1),
)
NARROW = replace(
    WIDE,
    hidden=256,
    num_heads=4,
    num_kv_heads=4,
    dense_ffn_hidden=512,
    moe=MoEConfig(num_experts=32, top_k=4, ffn_hidden=192, num_shared_experts=0),
)
MODELS = {"wide": WIDE, "narrow": NARROW}
MODELS |= {
    f"tiny {name}": replace(
        model, hidden=32, num_heads=2, num_kv_heads=2, dense_ffn_hidden=32, max_seq_len=8,
        moe=replace(model.moe, ffn_hidden=16),
    )
    for name, model in MODELS.items()
}  # fmt: skip
# The bias of the first rank's experts in a skewed case, which then get most tokens.
HOT_BIAS = 0.5


@dataclass(frozen=True)
class Case:
    """One configuration. sequences: of each rank."""

    model: str
    ep_size: int
    sequences: int
    skewed: bool = False

    @property
    def name(self) -> str:
        """The name in the table."""
        return f"{self.model}, {self.sequences * MODELS[self.model].max_seq_len} tokens{', skewed' * self.skewed}"

    def config(self, text: Path) -> TrainConfig:
        """Settings of a run. The law moves no bias, so that routing depends on the new router and `hot_bias` alone."""
        return TrainConfig(
            run=RunConfig(global_batch_size=self.sequences * self.ep_size, steps=1000, eval_every=0),
            model=MODELS[self.model],
            data=DataConfig(path=str(text), cache_dir=str(text.parent / "cache")),
            balance=RunBalanceConfig(law="none"),
            parallel=ParallelConfig(exchange="rank"),
            cluster=ClusterConfig(num_workers=self.ep_size, device="cpu"),
        )

    @property
    def twin(self) -> "Case":
        """The same layers, experts and ranks with tiny sizes: its step takes the time that does not depend on sizes."""
        return replace(self, model=f"tiny {self.model}", sequences=1, skewed=False)

    def subject(self, text: Path) -> Subject:
        """The subject of the simulation: this case with all ranks on one machine."""
        return Subject(self.name, self.config(text), self.ep_size, ())

    def hot_bias(self, num_experts: int) -> Tensor:
        """The selection bias, fp32 (E,); in a skewed case it draws tokens to the experts of the first rank."""
        bias = torch.zeros(num_experts)
        bias[: num_experts // self.ep_size] = HOT_BIAS * self.skewed
        return bias


def cases_of(ep_size: int) -> list[Case]:
    """Two models with two numbers of tokens each, and where experts are shared each model with skewed routing too."""
    models = ("wide", "narrow")
    found = [Case(model, ep_size, sequences) for model in models for sequences in (1, 2)]
    return found + [Case(model, ep_size, 2, skewed=True) for model in models if ep_size > 1]
