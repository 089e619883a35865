"""The language model: a decoder with the architecture of DeepSeek-V3 (arXiv 2412.19437): dense, then MoE layers.

Shapes: B sequences, S tokens of a sequence.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dispatch.config import ScheduleConfig
from dispatch.exchange.dispatcher import Dispatcher
from dispatch.experts.dense import SwiGLU
from dispatch.layer import MoELayer
from dispatch.routing.replay import Routing, routing_by_block
from workers.distributed.context import Context
from workers.model.attention import AttentionMask, Documents, KeyValueCache, causal_mask, limit_to_window, rotary_table
from workers.model.lora import add_adapters
from workers.model.loss import TokenLoss, after_next, linear_cross_entropy
from workers.model.model_config import ModelConfig

Prediction = Tensor | TokenLoss


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
        attn_mask: AttentionMask = None,
        cache: KeyValueCache | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Map x (B, S, hidden) to the same shape. Arguments as of `GroupedQueryAttention` and `MoELayer.forward`."""
        x = x + _checkpointed(self._attend, self.recompute == "attention")(x, rotary, attn_mask, cache)
        feed_forward = _checkpointed(self._feed_forward, self.recompute == "experts" and self.has_moe)
        y: Tensor = x + feed_forward(x, token_mask, routing)
        return y

    def _attend(
        self, x: Tensor, rotary: Tensor | None, attn_mask: AttentionMask, cache: KeyValueCache | None
    ) -> Tensor:
        y: Tensor = self.attention(self.attention_norm(x), rotary, attn_mask, cache)
        return self.post_attention_norm(y) if self.post_norms else y

    def _feed_forward(self, x: Tensor, token_mask: Tensor | None, routing: Routing | None) -> Tensor:
        normed = self.ffn_norm(x)
        y: Tensor = self.moe(normed, token_mask, routing) if self.has_moe else self.ffn(normed)
        return self.post_ffn_norm(y) if self.post_norms else y


def _checkpointed(part: Callable[..., Any], enabled: bool) -> Callable[..., Any]:
    """The same function, if enabled under activation checkpointing: only its inputs are kept for backward."""
    # A function and not a wrapper module, which would change parameter names (torchtitan #3861). No layer draws random
    # numbers, so the state of the generator need not be kept.
    return partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False) if enabled else part


class NextTokenBlock(nn.Module):
    """One more block that predicts the token after the next one: multi-token prediction (MTP) of depth 1.

    Its input is the decoder's output at a token and the embedding of the token that follows. It uses the decoder's
    embedding and output projection. Source: arXiv 2412.19437, section 2.2.
    """

    def __init__(self, config: ModelConfig, moe: MoELayer) -> None:
        super().__init__()
        self.token_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.hidden_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.proj = nn.Linear(2 * config.hidden, config.hidden, bias=False)
        self.block = Block(config, moe)
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)

    def forward(
        self,
        normed: Tensor,
        embedded: Tensor,
        rotary: Tensor,
        attn_mask: AttentionMask,
        routing: Routing | None = None,
    ) -> Tensor:
        """Map the decoder's normalised output and the next tokens' embeddings to the same shape, (B, S, hidden)."""
        x = self.proj(torch.cat([self.token_norm(embedded), self.hidden_norm(normed)], dim=-1))
        y: Tensor = self.norm(self.block(x, rotary, None, attn_mask, routing=routing))
        return y


class Decoder(nn.Module):
    """The whole language model: token ids in, logits of the next token out.

    Its weights are drawn by `workers.model.init.init_weights`, also after building on the meta device and `to_empty`.
    """

    def __init__(
        self,
        config: ModelConfig,
        make_dispatcher: Callable[[], Dispatcher],
        schedule: ScheduleConfig | None = None,
        layers: Sequence[range] | None = None,
    ) -> None:
        """Build the model, or those layers of it that this rank's stages of a pipeline hold.

        Args:
            make_dispatcher: called once for each MoE layer.
            schedule: the order of work in a MoE layer; None: the default one.
            layers: the layers to build, by index in the whole model; their parameters have the same names as there.
                With the first layer of the model comes the embedding; with the last one come last norm, head and MTP
                layer, and the embedding if one of these needs it. Only `run_layers`, `loss` and `loss_after_next` can
                be called on a part of the model. None builds all layers.
        """
        super().__init__()
        self.config = config
        built = [index for part in layers or [range(config.num_layers)] for index in part]
        has_last = config.num_layers - 1 in built
        if 0 in built or (has_last and config.shares_embedding):
            self.token_embedding = nn.Embedding(config.vocab_size, config.hidden)

        def make_moe() -> MoELayer:
            return MoELayer(config.hidden, config.moe, make_dispatcher(), schedule)

        self.layers = nn.ModuleList()
        for index in built:
            self.layers.add_module(str(index), Block(config, make_moe() if index >= config.num_dense_layers else None))
        if has_last:
            self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        if has_last and not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)
        if has_last and config.num_mtp_layers:
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
        context: Context | None = None,
        next_ids: Tensor | None = None,
        targets: Tensor | None = None,
        further_targets: Tensor | None = None,
        routings: Sequence[Routing | None] | None = None,
    ) -> Prediction | tuple[Prediction, Prediction]:
        """Logits (B, S, vocab_size), or (B, vocab_size) with logits_at, at least fp32, also under autocast.

        With targets it returns the loss instead, for which the logits never exist all at once. With next_ids it returns
        a pair: logits or loss of the next token, and those of the token after it, by the MTP layer.

        Args:
            token_ids: int64 (B, S), S <= max_seq_len. B may be 0 and may differ between ranks.
            token_mask: bool (B, S), False for padding, which is not counted as load. Padding must come last in its
                sequence, where causal attention hides it from every real token, unless positions are given.
            positions: int64 (B, S), of each token in its sequence, as by `workers.model.attention.positions_of`. With
                positions, padding may be anywhere: a token sees the real tokens at or before its own position. None:
                positions count from 0.
            cache: keeps the keys and values of these tokens, which also see the tokens that it already holds. Without
                positions they are the first tokens of their sequences. With positions, which are then the slots of the
                cache, padding must come last in its sequence.
            logits_at: int64 (B,), the only index in each row whose logits are wanted.
            document_starts: int64 (B, S), the index in its row at which the document of each token begins: attention
                does not reach back beyond it. Not with padding, positions or cache. None: a row is one document.
            context: the ranks that share these rows. document_starts must then be given, and has whole rows; the other
                arguments have this rank's tokens.
            next_ids: int64 (B, S), the token that follows each of token_ids: asks for the prediction of the MTP layer.
                Not with padding, positions, cache or logits_at.
            targets: int64 (B, S), the token that each token is to predict, -100 for none.
            further_targets: int64 (B, S), the targets of the MTP layer. By default `after_next(targets)`, which needs
                whole rows: with `context` they must be given.
            routings: the experts that all B * S tokens take, one for each MoE layer in order, and with next_ids one for
                the MTP layer too. None for a layer whose router chooses. Recomputed layers take the same experts.

        Collective: every rank of the dispatcher's group must call it, in backward and recompute too.
        """
        x = self._embed(token_ids)
        rotary, attn_mask = self._rotary_and_mask(x, token_mask, positions, cache, document_starts, context)
        layers, num_dense = range(self.config.num_layers), self.config.num_dense_layers
        block_routings = routing_by_block(routings, num_dense, len(layers) + (next_ids is not None) - num_dense)
        normed = self._run_blocks(layers, x, rotary, attn_mask, token_mask, positions, cache, block_routings)
        predicted = self._predict(normed if logits_at is None else _select_positions(normed, logits_at), targets)
        if next_ids is None:
            return predicted
        # Attention of the MTP layer is causal over whole rows, as the settings refuse it with packed documents. With
        # `context` it still needs `attn_mask`, by which keys and values are gathered from the ranks that share rows.
        mtp_mask = attn_mask if context is not None else None
        mtp_normed = self._run_mtp(normed, next_ids, rotary, mtp_mask, block_routings[-1])
        if targets is not None and further_targets is None:
            further_targets = after_next(targets)
        return predicted, self._predict(mtp_normed, further_targets)

    def run_layers(self, layers: range, x: Tensor, *, document_starts: Tensor | None = None) -> Tensor:
        """Run some consecutive layers, for a stage of a pipeline; the first one embeds, the last one applies `norm`.

        Args:
            layers: indices in the whole model.
            x: token ids (B, S) if the first layer of the model is among `layers`, else what the layer before returned.
            document_starts: as in `forward`.
        Returns:
            (B, S, hidden); after the last layer of the model it is normalised, as `loss` needs it.

        Collective, as `forward`.
        """
        x = self._embed(x) if layers.start == 0 else x
        rotary, attn_mask = self._rotary_and_mask(x, None, None, None, document_starts, None)
        return self._run_blocks(layers, x, rotary, attn_mask, None, None, None, [None] * self.config.num_layers)

    def loss(self, normed: Tensor, targets: Tensor) -> TokenLoss:
        """The loss of targets (B, S), from the normalised output of the last layer."""
        return linear_cross_entropy(normed, self._head_weight, targets)

    def loss_after_next(self, normed: Tensor, next_ids: Tensor) -> TokenLoss:
        """The loss of the MTP layer, as of `forward` with next_ids (B, S) and without documents.

        Collective, as `forward`.
        """
        mtp_normed = self._run_mtp(normed, next_ids, self._rotary_table(normed, normed.shape[1]), None, None)
        return self.loss(mtp_normed, after_next(next_ids))

    def _embed(self, token_ids: Tensor) -> Tensor:
        x: Tensor = self.token_embedding(token_ids)
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale

    def _run_blocks(
        self,
        layers: range,
        x: Tensor,
        rotary: Tensor,
        attn_mask: AttentionMask,
        token_mask: Tensor | None,
        positions: Tensor | None,
        cache: KeyValueCache | None,
        routings: Sequence[Routing | None],
    ) -> Tensor:
        """Run layers, and the last norm after the last one. attn_mask: of blocks without a window."""
        window_mask = self._window_mask(x, attn_mask, positions, cache) if self.config.sliding_window else None
        rotates_all = self.config.rotate_full_attention or not self.config.sliding_window
        for index in layers:
            block = _checkpointed(self.layers.get_submodule(str(index)), self.config.recompute == "full")
            has_window = self.config.has_window(index)
            block_rotary, mask = rotary if has_window or rotates_all else None, window_mask if has_window else attn_mask
            x = block(x, block_rotary, token_mask, mask, cache, routings[index])
        return self.norm(x) if layers.stop == self.config.num_layers else x

    def _run_mtp(self, normed: Tensor, next_ids: Tensor, *arguments: Any) -> Tensor:
        """The MTP layer's output. arguments: further ones of `NextTokenBlock.forward`."""
        mtp = _checkpointed(self.mtp, self.config.recompute == "full")
        y: Tensor = mtp(normed, self.token_embedding(next_ids), *arguments)
        return y

    def _rotary_and_mask(
        self,
        x: Tensor,
        token_mask: Tensor | None,
        positions: Tensor | None,
        cache: KeyValueCache | None,
        document_starts: Tensor | None,
        context: Context | None,
    ) -> tuple[Tensor, AttentionMask]:
        """The rotary table of these tokens, and the mask of attention without a window; None for causal order alone."""
        if context is not None and document_starts is None:
            raise ValueError("ranks that share rows need document_starts, of whole rows")
        if document_starts is not None:
            # Attention scores depend on distances of rotary positions alone: these need not restart in each document.
            seq_len = document_starts.shape[1]
            first = 0 if context is None else context.chunk(seq_len).start
            return self._rotary_table(x, seq_len)[first : first + x.shape[1]], Documents.from_starts(
                document_starts, context
            )
        rotary = self._rotary_table(x, x.shape[1] if positions is None else positions)
        if cache is not None:
            slots = torch.arange(x.shape[1], device=x.device).expand(len(x), -1) if positions is None else positions
            attn_mask = cache.begin(slots)
            # None, which means causal order, has faster kernels than a mask. A window needs the mask.
            return rotary, None if positions is None and not self.config.sliding_window else attn_mask
        if positions is None:
            return rotary, None
        mask = torch.ones_like(positions, dtype=torch.bool) if token_mask is None else token_mask
        return rotary, causal_mask(positions, positions, mask)

    def _window_mask(
        self, x: Tensor, attn_mask: AttentionMask, positions: Tensor | None, cache: KeyValueCache | None
    ) -> AttentionMask:
        """`attn_mask`, limited to the sliding window of the blocks that have one."""
        window, arange = self.config.sliding_window, partial(torch.arange, device=x.device)
        if attn_mask is None:
            rows = Documents.whole_rows(len(x), x.shape[1], x.device)
            return rows.with_window(window) if window < x.shape[1] else None
        if isinstance(attn_mask, Documents):
            return attn_mask.with_window(window)
        query_positions = arange(attn_mask.shape[-2]).unsqueeze(0) if positions is None else positions
        key_positions = query_positions if cache is None else arange(attn_mask.shape[-1]).unsqueeze(0)
        return limit_to_window(attn_mask, query_positions, key_positions, window)

    def _rotary_table(self, x: Tensor, positions: int | Tensor) -> Tensor:
        config = self.config
        seq_len = positions if isinstance(positions, int) else x.shape[1]
        if seq_len > config.max_seq_len:
            raise ValueError(f"sequence of {seq_len} tokens is longer than max_seq_len ({config.max_seq_len})")
        return rotary_table(
            positions, config.rotary_dim, config.rope_theta, device=x.device, dtype=x.dtype, yarn=config.yarn
        )

    def _predict(self, normed: Tensor, targets: Tensor | None) -> Prediction:
        """The logits, or the loss of targets."""
        if targets is not None:
            return self.loss(normed, targets)
        logits = F.linear(normed, self._head_weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @property
    def _head_weight(self) -> Tensor:
        return (self.token_embedding if self.config.tie_embeddings else self.lm_head).weight


def _select_positions(x: Tensor, index_B: Tensor) -> Tensor:
    """Select position index_B[b] of each row b of x (B, S, hidden): (B, hidden)."""
    return x[torch.arange(len(x), device=x.device), index_B]
