"""Attention sinks: one more score in each head's softmax, learned, that belongs to no token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model.attention.mask import sdpa_mask

# Dimensions added to queries and keys. One would do, but fused kernels want heads of a multiple of 16 bytes.
SINK_DIMS = 8


def attend_with_sinks(
    queries: Tensor, keys: Tensor, values: Tensor, sinks: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention whose softmax has one more score in each row, that of the head's sink, whose value is zero.

    The sink is one more key, before the others. Queries and keys get one more dimension, in which the sink's key is 1,
    all other keys are 0, and each query is the sink's score. So fused kernels can be used, and no matrix of scores is
    made (gpt-oss, arXiv 2508.10925, section 2.3).

    Args:
        queries: (B, heads, S, head_dim).
        keys, values: (B, kv_heads, K, head_dim).
        sinks: (heads,), scores to which `scale` is not applied.
        mask: bool (B or 1, 1, S, K) or (S, K); None for causal order alone, where S = K.
        scale: factor on the scores.
    Returns:
        (B, heads, S, head_dim).
    """
    head_dim = queries.shape[-1]
    score = F.pad((sinks / scale).to(queries.dtype).view(-1, 1, 1), (0, SINK_DIMS - 1))
    queries = torch.cat([queries, score.expand(*queries.shape[:-1], SINK_DIMS)], dim=-1)
    keys, values = (F.pad(each, (0, SINK_DIMS, 1, 0)) for each in (keys, values))
    keys[:, :, 0, head_dim] = 1
    if mask is None:
        # One more query in front as well, so that in causal order each query still sees the sink and its own key.
        queries = F.pad(queries, (0, 0, 1, 0))
    else:
        mask = F.pad(mask, (1, 0), value=True)
    attended = F.scaled_dot_product_attention(queries, keys, values, scale=scale, enable_gqa=True, **sdpa_mask(mask))
    return attended[:, :, mask is None :, :head_dim]
