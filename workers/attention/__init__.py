"""Self-attention, one file a kind, and the positions and masks that all of them share."""

from workers.attention.grouped_query import GroupedQueryAttention
from workers.attention.latent import LatentAttention, LatentConfig
from workers.attention.mask import positions_of, visible
from workers.attention.rotary import YarnConfig, rotary_table, rotate

__all__ = [
    "GroupedQueryAttention",
    "LatentAttention",
    "LatentConfig",
    "YarnConfig",
    "positions_of",
    "visible",
    "rotary_table",
    "rotate",
]
