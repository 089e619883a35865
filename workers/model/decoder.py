"""The language model: a decoder in the shape of DeepSeek-V3 (arXiv 2412.19437), first dense, then MoE layers.

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
from workers.model.attention import Documents, KeyValueCache, Seen, rotary_table, visible, within_window
from workers.model.lora import add_adapters
from workers.model.loss import TokenLoss, after_next, linear_cross_entropy
from workers.model.model_config import ModelConfig

Predicted = Tensor | TokenLoss


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
        seen: Seen = None,
        cache: KeyValueCache | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Map x (B, S, hidden) to the same shape. Arguments as of `GroupedQueryAttention` and `MoELayer.forward`."""
        attend = _recomputed(self._attend) if self.recompute == "attention" else self._attend
        x = x + attend(x, rotary, seen, cache)
        feed = _recomputed(self._feed) if self.recompute == "experts" and self.has_moe else self._feed
        return x + feed(x, token_mask, routing)

    def _attend(self, x: Tensor, rotary: Tensor | None, seen: Seen, cache: KeyValueCache | None) -> Tensor:
        y: Tensor = self.attention(self.attention_norm(x), rotary, seen, cache)
        return self.post_attention_norm(y) if self.post_norms else y

    def _feed(self, x: Tensor, token_mask: Tensor | None, routing: Routing | None) -> Tensor:
        normed = self.ffn_norm(x)
        y: Tensor = self.moe(normed, token_mask, routing) if self.has_moe else self.ffn(normed)
        return self.post_ffn_norm(y) if self.post_norms else y


def _recomputed(part: Callable[..., Any]) -> Callable[..., Any]:
    """The same function under activation recompute: only its inputs are kept for backward."""
    # A function and not a wrapper module, which would change parameter names (torchtitan #3861). No layer draws random
    # numbers, so the state of the generator need not be kept.
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

    def forward(
        self, normed: Tensor, embedded: Tensor, rotary: Tensor, seen: Seen, routing: Routing | None = None
    ) -> Tensor:
        """Map the decoder's normalised output and the next tokens' embeddings to the same shape, (B, S, hidden)."""
        x = self.proj(torch.cat([self.token_norm(embedded), self.hidden_norm(normed)], dim=-1))
        y: Tensor = self.norm(self.block(x, rotary, None, seen, routing=routing))
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
        """Build the model, or those layers of it that stages of a pipeline hold.

        Args:
            make_dispatcher: called once for each MoE layer.
            schedule: the order of work in a layer.
            layers: the layers to build, by index in the whole model, which their names have too. The first layer of
                the model brings the embedding; the last one brings last norm, head and MTP layer, and the embedding if
                these need it. Such a model has only `run_layers`, `loss` and `loss_after_next`. None builds all layers.
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
    ) -> Predicted | tuple[Predicted, Predicted]:
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
            cache: keeps the keys and values of these tokens, and shows these tokens all that it holds. Without
                positions they are the first tokens of their sequences; with positions, which are then places in the
                cache, padding comes last in its sequence.
            logits_at: int64 (B,), the only index in each row whose logits are wanted.
            document_starts: int64 (B, S), the index in its row at which the document of each token begins: attention
                does not reach beyond it. Not with padding, positions or cache. None: a row is one document.
            context: the ranks that share these rows. The other arguments are then of this rank's tokens, except for
                document_starts, which must be given and is of whole rows.
            next_ids: int64 (B, S), the token that follows each of token_ids, for a MTP layer; only with `targets` and
                `routings`.
            targets: int64 (B, S), the token that each token is to predict, -100 for none.
            further_targets: the targets of the MTP layer. By default `after_next(targets)`, if rows are whole.
            routings: one for each MoE layer in order, with next_ids for the MTP layer too: the experts that all B * S
                tokens take; None for a layer that chooses by its router. Recomputes take the same experts.

        Collective: every rank of the dispatcher's group must call it, in backward and recompute too.
        """
        x = self._embedded(token_ids)
        rotary, seen = self._places(x, token_mask, positions, cache, document_starts, context)
        near = self._near(x, seen, positions, cache) if self.config.sliding_window else None
        num_dense, num_blocks = self.config.num_dense_layers, self.config.num_layers + (next_ids is not None)
        given = routing_by_block(routings, num_dense, num_blocks - num_dense)
        whole = range(self.config.num_layers)
        normed = self._through(whole, x, rotary, token_mask, (seen, near), cache, given)
        predicted = self._head(normed if logits_at is None else _taken(normed, logits_at), targets)
        if next_ids is None:
            return predicted
        # The MTP layer sees whole rows, as the settings refuse it together with packed documents. With `context`,
        # `seen` is what gathers these rows from all ranks.
        shared = seen if context is not None else None
        further = self._whole(self.mtp)(normed, self.token_embedding(next_ids), rotary, shared, given[-1])
        if targets is not None and further_targets is None:
            further_targets = after_next(targets)
        return predicted, self._head(further, further_targets)

    def run_layers(self, layers: range, x: Tensor, *, document_starts: Tensor | None = None) -> Tensor:
        """Part of `forward`, for a stage of a pipeline: some layers in a row, with embedding and last norm at the ends.

        Args:
            x: token ids (B, S) where the first layer of the model is among them, else what the layer before returned.
            document_starts: as in `forward`.
        Returns:
            (B, S, hidden), normalised after the last layer of the model, for `loss`.

        Collective, as `forward`.
        """
        x = self._embedded(x) if layers.start == 0 else x
        rotary, seen = self._places(x, None, None, None, document_starts, None)
        near = self._near(x, seen, None, None) if self.config.sliding_window else None
        return self._through(layers, x, rotary, None, (seen, near), None, [None] * self.config.num_layers)

    def loss(self, normed: Tensor, targets: Tensor) -> TokenLoss:
        """The loss of targets (B, S), from the normalised output of the last layer."""
        head = self.token_embedding if self.config.tie_embeddings else self.lm_head
        return linear_cross_entropy(normed, head.weight, targets)

    def loss_after_next(self, normed: Tensor, next_ids: Tensor) -> TokenLoss:
        """The loss of the MTP layer, as of `forward` with next_ids (B, S) and without documents.

        Collective, as `forward`.
        """
        rotary = self._rotary(normed, normed.shape[1])
        further = self._whole(self.mtp)(normed, self.token_embedding(next_ids), rotary, None, None)
        return self.loss(further, after_next(next_ids))

    def _embedded(self, token_ids: Tensor) -> Tensor:
        x: Tensor = self.token_embedding(token_ids)
        return x if self.config.embedding_scale == 1 else x * self.config.embedding_scale

    def _through(
        self,
        layers: range,
        x: Tensor,
        rotary: Tensor,
        token_mask: Tensor | None,
        seen_and_near: tuple[Seen, Seen],
        cache: KeyValueCache | None,
        given: Sequence[Routing | None],
    ) -> Tensor:
        everywhere = self.config.rotate_full_attention or not self.config.sliding_window
        for index in layers:
            block = self.layers.get_submodule(str(index))
            window = self.config.has_window(index)
            known = rotary if window or everywhere else None
            x = self._whole(block)(x, known, token_mask, seen_and_near[window], cache, given[index])
        return self.norm(x) if layers.stop == self.config.num_layers else x

    def _whole(self, block: nn.Module) -> Callable[..., Any]:
        return _recomputed(block) if self.config.recompute == "full" else block

    def _places(
        self,
        x: Tensor,
        token_mask: Tensor | None,
        positions: Tensor | None,
        cache: KeyValueCache | None,
        document_starts: Tensor | None,
        context: Context | None,
    ) -> tuple[Tensor, Seen]:
        """The rotary table of these tokens, and what attention reaches; None for causal order alone."""
        if context is not None and document_starts is None:
            raise ValueError("ranks that share rows need document_starts, of whole rows")
        if document_starts is not None:
            # Attention scores depend on distances of rotary positions alone: these need not restart in each document.
            seq_len = document_starts.shape[1]
            first = 0 if context is None else context.chunk(seq_len).start
            return self._rotary(x, seq_len)[first : first + x.shape[1]], Documents.of(document_starts, context)
        rotary = self._rotary(x, x.shape[1] if positions is None else positions)
        if cache is not None:
            places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1) if positions is None else positions
            seen = cache.begin(places)
            # None, which means causal order, has faster kernels than a mask. A window needs the mask.
            return rotary, None if positions is None and not self.config.sliding_window else seen
        if positions is None:
            return rotary, None
        mask = torch.ones_like(positions, dtype=torch.bool) if token_mask is None else token_mask
        return rotary, visible(positions, positions, mask)

    def _near(self, x: Tensor, seen: Seen, positions: Tensor | None, cache: KeyValueCache | None) -> Seen:
        """`seen`, limited to the window of blocks that have one."""
        window, places = self.config.sliding_window, partial(torch.arange, device=x.device)
        if seen is None:
            return Documents.whole_rows(len(x), x.shape[1], x.device).within(window) if window < x.shape[1] else None
        if isinstance(seen, Documents):
            return seen.within(window)
        queries = places(seen.shape[-2]).unsqueeze(0) if positions is None else positions
        return within_window(seen, queries, queries if cache is None else places(seen.shape[-1]).unsqueeze(0), window)

    def _rotary(self, x: Tensor, positions: int | Tensor) -> Tensor:
        config = self.config
        seq_len = positions if isinstance(positions, int) else x.shape[1]
        if seq_len > config.max_seq_len:
            raise ValueError(f"sequence of {seq_len} tokens is longer than max_seq_len ({config.max_seq_len})")
        return rotary_table(
            positions, config.rotary_dim, config.rope_theta, device=x.device, dtype=x.dtype, yarn=config.yarn
        )

    def _head(self, normed: Tensor, targets: Tensor | None) -> Predicted:
        """The logits, or the loss of targets."""
        if targets is not None:
            return self.loss(normed, targets)
        head = self.token_embedding if self.config.tie_embeddings else self.lm_head
        logits = F.linear(normed, head.weight)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _taken(x: Tensor, index_B: Tensor) -> Tensor:
    """Select position index_B[b] of each row b of x (B, S, hidden): (B, hidden)."""
    return x[torch.arange(len(x), device=x.device), index_B]
