"""Multi-head latent attention: queries, keys and values from narrow latents (DeepSeek-V2, arXiv 2405.04434)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dispatch.errors import InvalidValue
from workers.model.attention.attend import AttentionMask, attend, gather_rows
from workers.model.attention.cache import KeyValueCache
from workers.model.attention.rotary import rotate
from workers.model.lora import effective_weight

# DeepSeek-V3's code has this epsilon in the norms of the latents, whatever the model's norm_eps is.
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Sizes of latent attention; only read where model.attention is latent."""

    query_rank: int = 0
    """Width of the latent that queries come from; 0: they come from the token itself."""
    kv_rank: int = 64
    """Width of the latent that keys and values come from: what a cache holds of a token, besides the rotated key."""
    nope_dim: int = 32
    """Dimensions of a query or key head that are not rotated by position."""
    rope_dim: int = 16
    """Dimensions of a query head that are rotated; the rotated key is shared by all heads."""
    value_dim: int = 32
    """Width of a value head."""

    def __post_init__(self) -> None:
        for name in ("kv_rank", "nope_dim", "rope_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"latent.{name} ({getattr(self, name)}) must be at least 1")
        if self.query_rank < 0:
            raise InvalidValue(f"latent.query_rank ({self.query_rank}) must be at least 0")
        for name in ("kv_rank", "nope_dim", "rope_dim"):
            if getattr(self, name) % 2:
                raise InvalidValue(
                    f"latent.{name} ({getattr(self, name)}) must be even: rotary positions turn pairs of dimensions, "
                    "and the pairs begin where the others end"
                )


class LatentAttention(nn.Module):
    """Causal latent attention (arXiv 2412.19437, section 2.1.1).

    The rows of `query_proj` go head by head: the nope_dim dimensions of its query, then the rope_dim ones. So do those
    of `kv_proj`: the nope_dim dimensions of its key, then its value. The last rope_dim rows of `kv_latent_proj` make
    the rotated key that all heads share.
    """

    def __init__(self, hidden: int, num_heads: int, config: LatentConfig, *, score_factor: float = 1.0) -> None:
        super().__init__()
        self.num_heads, self.config = num_heads, config
        head_dim = config.nope_dim + config.rope_dim
        self.scale = score_factor * head_dim**-0.5
        if config.query_rank:
            self.query_latent_proj = nn.Linear(hidden, config.query_rank, bias=False)
            self.query_norm = nn.RMSNorm(config.query_rank, eps=LATENT_NORM_EPS)
        self.query_proj = nn.Linear(config.query_rank or hidden, num_heads * head_dim, bias=False)
        self.kv_latent_proj = nn.Linear(hidden, config.kv_rank + config.rope_dim, bias=False)
        self.kv_norm = nn.RMSNorm(config.kv_rank, eps=LATENT_NORM_EPS)
        self.kv_proj = nn.Linear(config.kv_rank, num_heads * (config.nope_dim + config.value_dim), bias=False)
        self.out_proj = nn.Linear(num_heads * config.value_dim, hidden, bias=False)

    def forward(
        self, x: Tensor, rotary: Tensor, attn_mask: AttentionMask = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Map x (B, S, hidden) to the same shape; arguments as of `GroupedQueryAttention.forward`."""
        latent, shared_key = torch.split(self.kv_latent_proj(x), [self.config.kv_rank, self.config.rope_dim], dim=-1)
        rotated_key = rotate(shared_key.unsqueeze(2), rotary).squeeze(2)
        latent, queries = self.kv_norm(latent), self._queries(x, rotary)
        if cache is None:
            # The latents travel between ranks, as they are a fraction of the keys and values of all heads. Each rank
            # then expands them.
            latent, rotated_key = gather_rows(attn_mask, latent, rotated_key)
            attended = self._attend(queries, latent, rotated_key, attn_mask)
        else:
            (kept,) = cache.update(self, torch.cat([latent, rotated_key], dim=-1))
            if x.shape[1] == 1:
                attended = self._attend_to_latents(queries, kept, attn_mask)
            else:  # for many queries it is less work to expand the latents once
                latent, rotated_key = torch.split(kept, [self.config.kv_rank, self.config.rope_dim], dim=-1)
                attended = self._attend(queries, latent, rotated_key, attn_mask)
        y: Tensor = self.out_proj(attended.flatten(2))
        return y

    def _attend(self, queries: Tensor, latent: Tensor, rotated_key: Tensor, attn_mask: AttentionMask) -> Tensor:
        """Attention output of every head, (B, S, heads, value_dim), computed with keys and values per head.

        Args:
            queries: (B, S, heads, nope_dim + rope_dim).
            latent: (B, K, kv_rank), normalised.
            rotated_key: (B, K, rope_dim).
        """
        keys, values = self._expand(latent, rotated_key)
        return attend(queries, keys, values, attn_mask, scale=self.scale)

    def _attend_to_latents(self, queries: Tensor, kept: Tensor, attn_mask: AttentionMask) -> Tensor:
        """As `_attend` for S = 1, without expanding keys and values per head (arXiv 2405.04434, section 2.1.2).

        kept (B, K, kv_rank + rope_dim): the latent and the rotated key of each token. The queries are multiplied by the
        projection to keys and the outputs by that to values, so that all heads have the kept vectors as their keys and
        values. As S is 1, the heads can take the place of the query positions in `attend`.
        """
        config = self.config
        heads = effective_weight(self.kv_proj).unflatten(0, (self.num_heads, -1))
        to_key, to_value = torch.split(heads, [config.nope_dim, config.value_dim], dim=1)
        unrotated, rotated = torch.split(queries, [config.nope_dim, config.rope_dim], dim=-1)
        absorbed = torch.cat([torch.einsum("bshn,hnr->bshr", unrotated, to_key), rotated], dim=-1)
        keys = kept.unsqueeze(2)
        attended = attend(absorbed.transpose(1, 2), keys, keys[..., : config.kv_rank], attn_mask, scale=self.scale)
        return torch.einsum("bshr,hvr->bshv", attended.transpose(1, 2), to_value)

    def _queries(self, x: Tensor, rotary: Tensor) -> Tensor:
        if self.config.query_rank:
            x = self.query_norm(self.query_latent_proj(x))
        heads = self.query_proj(x).unflatten(-1, (self.num_heads, -1))
        unrotated, rotated = torch.split(heads, [self.config.nope_dim, self.config.rope_dim], dim=-1)
        return torch.cat([unrotated, rotate(rotated, rotary)], dim=-1)

    def _expand(self, latent: Tensor, rotated_key: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, (B, K, heads, width), from the normalised latent and the shared key."""
        heads = self.kv_proj(latent).unflatten(-1, (self.num_heads, -1))
        unrotated, values = torch.split(heads, [self.config.nope_dim, self.config.value_dim], dim=-1)
        rotated = rotated_key.unsqueeze(2).expand(*unrotated.shape[:-1], -1)
        return torch.cat([unrotated, rotated], dim=-1), values
