"""Self-attention, one file a kind, and what all kinds share.

`grouped_query` and `latent` (multi-head latent attention) are the kinds; begin with `grouped_query`. `rotary` has the
rotary positions and their stretching by YaRN. `attend` computes attention and chooses the kernel; `documents` and
`mask` say which tokens see which; `sinks` has attention sinks; `cache` is the key-value cache of generation.
"""

from workers.model.attention.attend import AttentionMask
from workers.model.attention.cache import KeyValueCache
from workers.model.attention.documents import Documents
from workers.model.attention.grouped_query import GroupedQueryAttention
from workers.model.attention.latent import LatentAttention, LatentConfig
from workers.model.attention.mask import causal_mask, limit_to_window, positions_of
from workers.model.attention.rotary import YarnConfig, rotary_table, rotate

__all__ = [
    "Documents",
    "GroupedQueryAttention",
    "KeyValueCache",
    "LatentAttention",
    "LatentConfig",
    "AttentionMask",
    "YarnConfig",
    "positions_of",
    "causal_mask",
    "limit_to_window",
    "rotary_table",
    "rotate",
]
