"""Self-attention, one file a kind, and what all kinds share.

`grouped_query` and `latent` (multi-head latent attention) are the kinds; begin with `grouped_query`. `rotary` has the
rotary positions and their stretching by YaRN, `attend` the scores and the kernel that serves them, `documents` and
`mask` which tokens see which, `sinks` the score of no token, `cache` the keys and values that generation keeps.
"""

from workers.model.attention.attend import Seen
from workers.model.attention.cache import KeyValueCache
from workers.model.attention.documents import Documents
from workers.model.attention.grouped_query import GroupedQueryAttention
from workers.model.attention.latent import LatentAttention, LatentConfig
from workers.model.attention.mask import positions_of, visible, within_window
from workers.model.attention.rotary import YarnConfig, rotary_table, rotate

__all__ = [
    "Documents",
    "GroupedQueryAttention",
    "KeyValueCache",
    "LatentAttention",
    "LatentConfig",
    "Seen",
    "YarnConfig",
    "positions_of",
    "visible",
    "within_window",
    "rotary_table",
    "rotate",
]
