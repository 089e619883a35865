"""Self-attention, one file a kind, and the positions and masks that all of them share."""

from workers.attention.cache import KeyValueCache
from workers.attention.grouped_query import GroupedQueryAttention
from workers.attention.latent import LatentAttention, LatentConfig
from workers.attention.mask import positions_of, visible, visible_in_documents
from workers.attention.rotary import YarnConfig, rotary_table, rotate

__all__ = [
    "GroupedQueryAttention",
    "KeyValueCache",
    "LatentAttention",
    "LatentConfig",
    "YarnConfig",
    "positions_of",
    "visible",
    "visible_in_documents",
    "rotary_table",
    "rotate",
]
