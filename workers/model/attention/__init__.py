"""Self-attention, one file a kind, and what all kinds share.

`grouped_query` and `latent` (multi-head latent attention) are the kinds; begin with `grouped_query`. `rotary` has the
rotary positions and their stretching by YaRN, `mask` which tokens see which, `sinks` the score of no token,
`cache` the keys and values that generation keeps.
"""

from workers.model.attention.cache import KeyValueCache
from workers.model.attention.grouped_query import GroupedQueryAttention
from workers.model.attention.latent import LatentAttention, LatentConfig
from workers.model.attention.mask import positions_of, visible, visible_in_documents, within_window
from workers.model.attention.rotary import YarnConfig, rotary_table, rotate

__all__ = [
    "GroupedQueryAttention",
    "KeyValueCache",
    "LatentAttention",
    "LatentConfig",
    "YarnConfig",
    "positions_of",
    "visible",
    "visible_in_documents",
    "within_window",
    "rotary_table",
    "rotate",
]
