"""gpt-oss (arXiv 2508.10925): sinks and biases in attention, a window in every second layer, biased clamped experts.

The router has a bias in its linear layer, which is trained like any weight, and no selection bias.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from dispatch.config import MoEConfig
from dispatch.errors import InvalidValue
from workers.model.families.base import Family, MoEParts, Part
from workers.model.families.settings import Settings
from workers.model.families.shapes import decoder_shape, grouped_query_shape, window_shape
from workers.model.families.stacks import item_name
from workers.model.model_config import ModelConfig


def read_config(settings: Settings) -> ModelConfig:
    """Our settings from those of a GptOssConfig."""
    if not (settings.values.get("rope_parameters") or settings.values.get("rope_scaling")):
        # transformers then has defaults for YaRN, which no published model relies on.
        raise InvalidValue(f"{settings.where}: rope_parameters is missing")
    has_biases = settings.flag("attention_bias", default=True)
    return ModelConfig(
        **decoder_shape(settings, rope_theta=150000.0, norm_eps=1e-5),
        **grouped_query_shape(settings, narrow=False),
        **window_shape(settings, default=128, every=2),
        qkv_bias=has_biases,
        out_bias=has_biases,
        attention_sinks=True,
        num_dense_layers=0,
        moe=MoEConfig(
            num_experts=settings.integer("num_local_experts", "num_experts"),
            top_k=settings.integer("num_experts_per_tok", "experts_per_token"),
            ffn_hidden=settings.integer("intermediate_size"),
            num_shared_experts=0,
            # gpt-oss takes the softmax of the chosen logits. Softmax over all experts, normalised over the chosen ones,
            # chooses the same experts with the same weights.
            score="softmax",
            gate_bias=True,
            expert_biases=True,
            swiglu_limit=settings.number("swiglu_limit", default=7.0),
            swiglu_alpha=settings.number("swiglu_alpha", default=1.702),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class StackedParts(MoEParts):
    """The tensors of a layer whose experts are in stacks: matrices are (in, out), and gate and up alternate."""

    has_stacks: ClassVar[bool] = True

    def _experts(self, config: ModelConfig, theirs: str, ours: str) -> Iterator[Part]:
        hidden, inner, num_experts = config.hidden, config.moe.ffn_hidden, config.moe.num_experts
        for name, shape in {
            "gate_up_proj": (hidden, 2 * inner),
            "gate_up_proj_bias": (2 * inner,),
            "down_proj": (inner, hidden),
            "down_proj_bias": (hidden,),
        }.items():
            for expert_id in range(num_experts):
                yield Part(
                    item_name(f"{theirs}.experts.{name}", expert_id),
                    f"{ours}.experts.{expert_id}.{name}",
                    shape,
                    num_items=num_experts,
                    is_transposed=len(shape) == 2,
                    is_interleaved=name.startswith("gate_up"),
                )


FAMILY = Family("gpt_oss", "GptOssForCausalLM", read_config, StackedParts(gate="router"))
