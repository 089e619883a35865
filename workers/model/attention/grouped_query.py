"""Causal attention with grouped queries, plain or with biases, sinks, or normalised queries and keys."""

from typing import Literal

import torch
from torch import Tensor, nn

from workers.model.attention.attend import AttentionMask, attend, gather_rows
from workers.model.attention.cache import KeyValueCache
from workers.model.attention.rotary import rotate

QueryKeyNorm = Literal["none", "head", "all"]


class GroupedQueryAttention(nn.Module):
    """Causal attention in which num_heads / num_kv_heads query heads share one key and value head (arXiv 2305.13245).

    The rows of `qkv_proj` are all query heads, then key heads, then value heads.

    Args:
        hidden: width of a token.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of a head, hidden / num_heads by default.
        bias: whether queries, keys and values have one.
        out_bias: whether `out_proj` has one.
        sinks: whether each head has an attention sink: a learned score that stands for no token (gpt-oss).
        gate: whether a sigmoid of the token gates each element of the output, before `out_proj`.
        norm: RMSNorm of queries and keys before they are rotated: none, of each head (Qwen3), or of all heads
            together (OLMoE).
        norm_eps: of that norm.
        clip: bound of every element of queries, keys and values, 0 for none (OLMoE).
        score_factor: on the scores, besides 1 / sqrt(head_dim).
    """

    def __init__(
        self,
        hidden: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        *,
        bias: bool = False,
        out_bias: bool = False,
        sinks: bool = False,
        gate: bool = False,
        norm: QueryKeyNorm = "none",
        norm_eps: float = 1e-6,
        clip: float = 0.0,
        score_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim or hidden // num_heads
        self.norm, self.clip = norm, clip
        self.scale = None if score_factor == 1 else score_factor * self.head_dim**-0.5
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        self.qkv_proj = nn.Linear(hidden, (num_heads + 2 * num_kv_heads) * self.head_dim, bias=bias)
        if norm != "none":
            widths = [self.head_dim * (1 if norm == "head" else heads) for heads in (num_heads, num_kv_heads)]
            self.query_norm, self.key_norm = (nn.RMSNorm(width, eps=norm_eps) for width in widths)
        self.gate_proj = nn.Linear(hidden, num_heads * self.head_dim, bias=False) if gate else None
        self.out_proj = nn.Linear(num_heads * self.head_dim, hidden, bias=out_bias)

    def forward(
        self, x: Tensor, rotary: Tensor | None, attn_mask: AttentionMask = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Attend within each sequence to this and earlier positions.

        Args:
            x: (B, S, hidden).
            rotary: `rotary_table` of the S positions, for all dimensions of a head or its first ones; None rotates
                nothing.
            attn_mask: bool (B, 1, S, K) from `causal_mask`, or the documents that fill the rows; None: each token sees
                itself and all tokens before it.
            cache: keeps the rotated keys and values. The tokens then also see those that it has from earlier calls.
        """
        num_rotated = self.num_heads + self.num_kv_heads
        heads = self.qkv_proj(x).view(*x.shape[:-1], num_rotated + self.num_kv_heads, self.head_dim)
        rotated, values = torch.split(heads, [num_rotated, self.num_kv_heads], dim=2)
        if self.norm != "none":
            rotated = self._normalise(rotated)
        if self.clip:
            rotated, values = rotated.clamp(-self.clip, self.clip), values.clamp(-self.clip, self.clip)
        rotated = rotated if rotary is None else rotate(rotated, rotary)
        queries, keys = torch.split(rotated, [self.num_heads, self.num_kv_heads], dim=2)
        if cache is not None:
            keys, values = cache.update(self, keys, values)
        keys, values = gather_rows(attn_mask, keys, values)
        outputs = attend(queries, keys, values, attn_mask, scale=self.scale, sinks=self.sinks).flatten(2)
        y: Tensor = self.out_proj(outputs if self.gate_proj is None else outputs * self.gate_proj(x).sigmoid())
        return y

    def _normalise(self, rotated: Tensor) -> Tensor:
        queries, keys = torch.split(rotated, [self.num_heads, self.num_kv_heads], dim=2)
        if self.norm == "head":
            return torch.cat([self.query_norm(queries), self.key_norm(keys)], dim=2)
        normed = [self.query_norm(queries.flatten(2)), self.key_norm(keys.flatten(2))]
        return torch.cat([part.unflatten(2, (-1, self.head_dim)) for part in normed], dim=2)
