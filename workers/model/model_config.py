"""Size and shape of the decoder, and the rules that hold between them."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import nn

from dispatch.config import MoEConfig
from dispatch.errors import InvalidValue
from workers.model.attention import GroupedQueryAttention, LatentAttention, LatentConfig, YarnConfig
from workers.model.lora import LoraConfig

Recompute = Literal["none", "attention", "experts", "full"]
# Settings that latent attention does not have.
GROUPED_QUERY_ONLY = (
    *("qkv_bias", "out_bias", "attention_sinks", "attention_gate", "query_key_norm", "clip_qkv"),
    "partial_rotary_factor",
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Size and shape of the decoder."""

    vocab_size: int = 257
    """Token ids the model knows: 257 for bytes and an end-of-document token; the tokenizer's size otherwise."""
    hidden: int = 192
    """Width of a token between layers."""
    num_layers: int = 4
    """Blocks of attention and feed-forward."""
    num_dense_layers: int = 1
    """First blocks whose feed-forward is dense; the others are mixtures of experts."""
    num_heads: int = 6
    """Query heads of attention; divides hidden."""
    num_kv_heads: int = 2
    """Key and value heads, each shared by num_heads / num_kv_heads query heads."""
    head_dim: int = 0
    """Width of a head; 0 takes hidden / num_heads."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values add a bias."""
    out_bias: bool = False
    """Whether the output projection of grouped queries adds a bias (gpt-oss)."""
    attention_sinks: bool = False
    """Whether each head of grouped queries has a learned score of no token, which takes a share of the attention
    (gpt-oss)."""
    partial_rotary_factor: float = 1.0
    """Share of a head's dimensions, its first ones, that are rotated by position; the others are not rotated."""
    attention: Literal["grouped_query", "latent"] = "grouped_query"
    """Kind of attention: grouped queries, or the latent attention (MLA) of DeepSeek-V3."""
    latent: LatentConfig = field(default_factory=LatentConfig)
    """Sizes of latent attention, in place of num_kv_heads and head_dim."""
    query_key_norm: Literal["none", "head", "all"] = "none"
    """RMSNorm of queries and keys: none, of each head (Qwen3), of all heads together (OLMoE)."""
    clip_qkv: float = 0.0
    """Bound of every element of queries, keys and values; 0 for none."""
    attention_gate: bool = False
    """Whether a sigmoid of the token gates what attention hands to its output projection (Trinity)."""
    sliding_window: int = 0
    """Tokens that a token attends to, itself and those before it; 0 for all."""
    full_attention_every: int = 0
    """Every so many blocks, one is without the window; 0 for none."""
    rotate_full_attention: bool = True
    """Whether blocks without the window rotate queries and keys by position too."""
    dense_ffn_hidden: int = 512
    """Inner width of the feed-forward of a dense block."""
    max_seq_len: int = 256
    """Longest sequence in tokens, in training and generation."""
    rope_theta: float = 1e4
    """Base of the rotary position angles."""
    yarn: YarnConfig = field(default_factory=YarnConfig)
    """Stretching of rotary positions beyond the length of pre-training."""
    tie_embeddings: bool = False
    """Take the token embedding for the output projection too."""
    post_norms: bool = False
    """Whether the output of attention and of the feed-forward is normalised too, before it is added (Trinity)."""
    embedding_scale: float = 1.0
    """Factor on the token embedding."""
    norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    num_mtp_layers: int = 0
    """Blocks that predict the token after the next one in training, 0 or 1 (multi-token prediction, DeepSeek-V3)."""
    recompute: Recompute = "none"
    """Activations computed again in backward, not kept: of attention, of MoE layers, or all (a third more time)."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """The mixture-of-experts layers."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters, which are trained in place of the model."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden", "num_layers", "num_heads", "num_kv_heads", "dense_ffn_hidden", "max_seq_len")
        for name in sizes:
            if getattr(self, name) < 1:
                raise InvalidValue(f"{name} ({getattr(self, name)}) must be at least 1")
        if not 0 <= self.num_dense_layers <= self.num_layers:
            raise InvalidValue(
                f"num_dense_layers ({self.num_dense_layers}) must be between 0 and num_layers ({self.num_layers})"
            )
        if self.num_mtp_layers not in (0, 1):
            raise InvalidValue(f"num_mtp_layers ({self.num_mtp_layers}) must be 0 or 1: only depth 1 is supported")
        if self.head_dim % 2 or self.head_dim < 0:
            raise InvalidValue(f"head_dim ({self.head_dim}) must be even, or 0 for hidden / num_heads")
        if self.attention == "grouped_query" and not self.head_dim and self.hidden % (2 * self.num_heads):
            raise InvalidValue(
                f"hidden ({self.hidden}) must be a multiple of 2 * num_heads (2 * {self.num_heads}): rotary positions "
                "turn pairs of a head's dimensions; change hidden or num_heads"
            )
        if self.num_heads % self.num_kv_heads:
            raise InvalidValue(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise InvalidValue(f"{name} ({getattr(self, name)}) must be above 0")
        self._check_attention()
        self._check_adapters()

    def _check_attention(self) -> None:
        if not 0 < self.partial_rotary_factor <= 1 or self.rotary_dim % 2 or not self.rotary_dim:
            raise InvalidValue(
                f"partial_rotary_factor ({self.partial_rotary_factor}) must be above 0, at most 1, and rotate an even "
                f"number of a head's {self.head_width} dimensions, at least 2"
            )
        for name, allowed in (
            ("attention", ("grouped_query", "latent")),
            ("query_key_norm", ("none", "head", "all")),
            ("recompute", get_args(Recompute)),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidValue(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        if self.sliding_window < 0 or self.full_attention_every < 0:
            raise InvalidValue(
                f"sliding_window ({self.sliding_window}) and full_attention_every ({self.full_attention_every}) must "
                "be at least 0; 0 turns them off"
            )
        if self.sliding_window and (self.num_mtp_layers or self.attention == "latent"):
            raise InvalidValue(
                f"sliding_window ({self.sliding_window}) must be 0 with latent attention or num_mtp_layers: only "
                "grouped queries of the decoder's own blocks have a window"
            )
        for name in GROUPED_QUERY_ONLY if self.attention == "latent" else ():
            if getattr(self, name) != getattr(ModelConfig, name):
                raise InvalidValue(
                    f"{name} ({getattr(self, name)}) has no effect on latent attention; leave it out, or set attention "
                    "to grouped_query"
                )
        if not self.clip_qkv >= 0:
            raise InvalidValue(f"clip_qkv ({self.clip_qkv}) must be at least 0; 0 turns it off")

    def _check_adapters(self) -> None:
        has = {"dense_ffn": self.num_dense_layers, "shared_experts": self.moe.num_shared_experts}
        absent = [part for part in self.lora.targets if self.lora.rank and not has.get(part, True)]
        if absent:
            raise InvalidValue(
                f"lora.targets names {', '.join(absent)}, which this model does not have; leave it out of "
                "--model.lora.targets"
            )
        if self.lora.adapts_experts and not self.moe.has_plain_experts:
            raise InvalidValue(
                f"lora.targets names experts, and those of this model have biases (moe.expert_biases "
                f"{self.moe.expert_biases}) or a clamped activation (moe.swiglu_limit {self.moe.swiglu_limit}), which "
                "adapters do not know; leave experts out of --model.lora.targets"
            )

    @property
    def shares_embedding(self) -> bool:
        """Whether the last stage of a pipeline needs the embedding too: as the head, or for multi-token prediction."""
        return self.tie_embeddings or self.num_mtp_layers > 0

    @property
    def num_moe_layers(self) -> int:
        """Number of MoE layers of the whole model, including that of multi-token prediction."""
        return self.num_layers - self.num_dense_layers + self.num_mtp_layers

    @property
    def head_width(self) -> int:
        """Width of a head of grouped-query attention."""
        return self.head_dim or self.hidden // self.num_heads

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return self.latent.rope_dim if self.attention == "latent" else int(self.head_width * self.partial_rotary_factor)

    def has_window(self, index: int) -> bool:
        """Whether the attention of a block reaches back `sliding_window` tokens only."""
        every = self.full_attention_every
        return self.sliding_window > 0 and not (every and (index + 1) % every == 0)

    def make_attention(self) -> nn.Module:
        """Build the attention of one block."""
        if self.attention == "latent":
            return LatentAttention(self.hidden, self.num_heads, self.latent, score_factor=self.yarn.score_factor)
        return GroupedQueryAttention(
            self.hidden,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim or None,
            bias=self.qkv_bias,
            out_bias=self.out_bias,
            sinks=self.attention_sinks,
            gate=self.attention_gate,
            norm=self.query_key_norm,
            norm_eps=self.norm_eps,
            clip=self.clip_qkv,
            score_factor=self.yarn.score_factor,
        )
