"""The language model: a decoder in the shape of DeepSeek-V3 (arXiv 2412.19437), first dense, then MoE layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dispatch.config import MoEConfig, ScheduleConfig
from dispatch.errors import InvalidValue
from dispatch.exchange.dispatcher import Dispatcher
from dispatch.experts.dense import SwiGLU
from dispatch.layer import MoELayer
from dispatch.routing.replay import Routing, by_block
from workers.model.attention import (
    GroupedQueryAttention,
    KeyValueCache,
    LatentAttention,
    LatentConfig,
    YarnConfig,
    rotary_table,
    visible,
    visible_in_documents,
    within_window,
)
from workers.model.lora import LoraConfig, add_adapters
from workers.model.loss import TokenLoss, after_next, linear_cross_entropy

Predicted = Tensor | TokenLoss
Recompute = Literal["none", "attention", "experts", "full"]


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
    partial_rotary_factor: float = 1.0
    """Share of a head's dimensions, its first ones, that are rotated by position; the others do not know it."""
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
    """Tokens that a token attends to, itself and those before it; 0 for all. All scores are computed either way."""
    full_attention_every: int = 0
    """Every so many blocks, one is without the window; 0 for none."""
    rotate_full_attention: bool = True
    """Whether blocks without the window know positions too."""
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
            gate=self.attention_gate,
            norm=self.query_key_norm,
            norm_eps=self.norm_eps,
            clip=self.clip_qkv,
            score_factor=self.yarn.score_factor,
        )


class Block(nn.Module):
    """Attention, then a feed-forward (`ffn`, or `moe` when one is given), each on normalised input and added to x."""

    def __init__(self, config: ModelConfig, moe: MoELayer | None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.attention = config.make_attention()
        self.ffn_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        if config.post_norms:
            self.post_attention_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
            self.post_ffn_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.post_norms, self.has_moe, self.recompute = config.post_norms, moe is not None, config.recompute
        if moe is not None:
            self.moe = moe
        else:
            self.ffn = SwiGLU(config.hidden, config.dense_ffn_hidden)

    def forward(
        self,
        x: Tensor,
        rotary: Tensor | None,
        token_mask: Tensor | None,
        seen: Tensor | None = None,
        cache: KeyValueCache | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Map x (B, S, hidden) to the same shape. seen: the mask of attention, None for causal order alone."""
        attend = _recomputed(self._attend) if self.recompute == "attention" else self._attend
        x = x + attend(x, rotary, seen, cache)
        feed = _recomputed(self._feed) if self.recompute == "experts" and self.has_moe else self._feed
        return x + feed(x, token_mask, routing)

    def _attend(self, x: Tensor, rotary: Tensor | None, seen: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        y: Tensor = self.attention(self.attention_norm(x), rotary, seen, cache)
        return self.post_attention_norm(y) if self.post_norms else y

    def _feed(self, x: Tensor, token_mask: Tensor | None, routing: Routing | None) -> Tensor:
        normed = self.ffn_norm(x)
        y: Tensor = self.moe(normed, token_mask, routing) if self.has_moe else self.ffn(normed)
        return self.post_ffn_norm(y) if self.post_norms else y


def _recomputed(part: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, of whose work only the inputs are kept for backward."""
    # A call, not a wrapper module: parameter names must not change (torchtitan #3861). No layer draws random numbers,
    # so their state need not be kept.
    return partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)


class NextTokenBlock(nn.Module):
    """One more block that predicts the token after the next one: multi-token prediction of depth 1.

    It sees the decoder's output at a token and the embedding of the token that follows. Embedding and output projection
    are the decoder's. Source: arXiv 2412.19437, section 2.2.
    """

    def __init__(self, config: ModelConfig, moe: MoELayer) -> None:
        super().__init__()
        self.token_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.proj = nn.Linear(2 * config.hidden, config.hidden, bias=False)
        self.block = Block(config, moe)
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)

    def forward(self, normed: Tensor, embedded: Tensor, rotary: Tensor, routing: Routing | None = None) -> Tensor:
        """Map the decoder's normalised output and the next tokens' embeddings to the same shape, (B, S, hidden)."""
        x = self.proj(torch.cat([self.token_norm(embedded), self.hidden_norm(normed)], dim=-1))
        y: Tensor = self.norm(self.block(x, rotary, None, routing=routing))
        return y


class Decoder(nn.Module):
    """The whole language model: token ids in, logits of the next token out.

    Its weights are drawn by `workers.model.init.init_weights`, also after building on the meta device and `to_empty`.
    """

    def __init__(
        self, config: ModelConfig, make_dispatcher: Callable[[], Dispatcher], schedule: ScheduleConfig | None = None
    ) -> None:
        """Build the model; calls make_dispatcher once for each MoE layer. `schedule`: the order of work in a layer."""
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden)

        def make_moe() -> MoELayer:
            return MoELayer(config.hidden, config.moe, make_dispatcher(), schedule)

        self.layers = nn.ModuleList(
            Block(config, make_moe() if index >= config.num_dense_layers else None)
            for index in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        if config.num_mtp_layers:
            self.mtp = NextTokenBlock(config, make_moe())
        if config.lora.rank:
            add_adapters(self, config.lora)

    def forward(
        self,
        token_ids: Tensor,
        *,
        token_mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        logits_at: Tensor | None = None,
        document_starts: Tensor | None = None,
        next_ids: Tensor | None = None,
        targets: Tensor | None = None,
        routings: Sequence[Routing | None] | None = None,
    ) -> Predicted | tuple[Predicted, Predicted]:
        """Logits (B, S, vocab_size), or (B, vocab_size) with logits_at, at least fp32, also under autocast.

        With targets the loss instead, for which the logits never exist all at once. With next_ids a pair: what is said
        above, and the same of the token after the next, by the MTP layer.

        Args:
            token_ids: int64 (B, S), S <= max_seq_len. B may be 0 and may differ between ranks.
            token_mask: bool (B, S), False for padding, which is not counted as load. Padding must come last in its
                sequence, where causal attention hides it from every real token, unless positions are given.
            positions: int64 (B, S), of each token in its sequence, as by `workers.model.attention.positions_of`. With
                them padding may stand anywhere: a token sees the real tokens at or before its own position. Without
                them they count from 0.
            cache: keeps these tokens, and shows them those that it holds. Without positions they are the first ones;
                with positions, their places in the cache, padding comes last in its sequence.
            logits_at: int64 (B,), the only place in each row whose logits are wanted.
            document_starts: int64 (B, S), where in its row the document of each token begins: attention does not reach
                beyond it. Without padding, positions and cache. None: a row is one document.
            next_ids: int64 (B, S), the token that follows each of token_ids, for a MTP layer, with `targets` and
                `routings` alone.
            targets: int64 (B, S), the token that each one is to predict, -100 for none.
            routings: of the MoE layers in their order, with next_ids that of the MTP layer too: experts to take, of all
                B * S tokens; None for a layer that chooses itself. Recomputes take the same.

        Collective: every rank of the dispatcher's group must call it, in backward and recompute too.
        """
        x = self.token_embedding(token_ids)
        x = x if self.config.embedding_scale == 1 else x * self.config.embedding_scale
        rotary, seen = self._places(x, token_mask, positions, cache, document_starts)
        near = self._near(x, seen, positions, cache) if self.config.sliding_window else None
        num_dense, num_blocks = self.config.num_dense_layers, self.config.num_layers + (next_ids is not None)
        given = by_block(routings, num_dense, num_blocks - num_dense)
        normed = self._normed(x, rotary, token_mask, (seen, near), cache, given)
        predicted = self._head(normed if logits_at is None else _taken(normed, logits_at), targets)
        if next_ids is None:
            return predicted
        further = self._whole(self.mtp)(normed, self.token_embedding(next_ids), rotary, given[-1])
        return predicted, self._head(further, None if targets is None else after_next(targets))

    def _normed(
        self,
        x: Tensor,
        rotary: Tensor,
        token_mask: Tensor | None,
        seen_and_near: tuple[Tensor | None, Tensor | None],
        cache: KeyValueCache | None,
        given: Sequence[Routing | None],
    ) -> Tensor:
        everywhere = self.config.rotate_full_attention or not self.config.sliding_window
        for index, block in enumerate(self.layers):
            window = self.config.has_window(index)
            known = rotary if window or everywhere else None
            x = self._whole(block)(x, known, token_mask, seen_and_near[window], cache, given[index])
        y: Tensor = self.norm(x)
        return y

    def _whole(self, block: nn.Module) -> Callable[..., Any]:
        return _recomputed(block) if self.config.recompute == "full" else block

    def _places(
        self,
        x: Tensor,
        token_mask: Tensor | None,
        positions: Tensor | None,
        cache: KeyValueCache | None,
        document_starts: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The rotary table of these tokens, and the attention mask; None for causal order alone."""
        if document_starts is not None:
            # Rotary scores depend on distances alone: positions need not begin again with each document.
            return self._rotary(x, x.shape[1]), visible_in_documents(document_starts)
        rotary = self._rotary(x, x.shape[1] if positions is None else positions)
        if positions is None:
            if cache is not None:
                cache.begin(torch.arange(x.shape[1], device=x.device).expand(len(x), -1))
            return rotary, None  # causal order alone, which has the faster kernels
        if cache is not None:
            return rotary, cache.begin(positions)
        mask = torch.ones_like(positions, dtype=torch.bool) if token_mask is None else token_mask
        return rotary, visible(positions, positions, mask)

    def _near(self, x: Tensor, seen: Tensor | None, positions: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        """What tokens see of `seen` in blocks with a window. Without positions places stand for them."""
        places = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        queries = keys = places if positions is None else positions
        if cache is not None and seen is not None:
            keys = torch.arange(seen.shape[-1], device=x.device).unsqueeze(0)
        return within_window(seen, queries, keys, self.config.sliding_window)

    def _rotary(self, x: Tensor, positions: int | Tensor) -> Tensor:
        config = self.config
        if x.shape[1] > config.max_seq_len:
            raise ValueError(f"sequence of {x.shape[1]} tokens is longer than max_seq_len ({config.max_seq_len})")
        return rotary_table(
            positions, config.rotary_dim, config.rope_theta, device=x.device, dtype=x.dtype, yarn=config.yarn
        )

    def _head(self, normed: Tensor, targets: Tensor | None) -> Predicted:
        """The logits, or the loss of targets."""
        head = self.token_embedding if self.config.tie_embeddings else self.lm_head
        if targets is not None:
            return linear_cross_entropy(normed, head.weight, targets)
        logits = F.linear(normed, head.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _taken(x: Tensor, index_B: Tensor) -> Tensor:
    """Select position index_B[b] of each row b of x (B, S, hidden): (B, hidden)."""
    return x[torch.arange(len(x), device=x.device), index_B]
