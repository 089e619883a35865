"""A router without a model: scores with the statistics that make balancing hard, from a seed alone.

Tokens come in sequences of one kind of text and one topic, so that a batch holds few independent samples; the router's
weights walk at random, as training moves them; and the mix of the kinds changes once. There is no training in it: it
ranks laws, not models.

Shapes: T tokens, E experts, H hidden, D kinds of text, S steps.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dispatch.config import RouterConfig
from dispatch.layout import LoadLayout

# The part of a token's direction that its kind of text, its sequence and the token itself decide. The three are nearly
# orthogonal unit vectors, and the squares of the parts sum to about 1: so does the square of a token's length.
_KIND, _TOPIC, _TOKEN = 0.7, 0.35, 0.62
_SEQ_LEN, _HIDDEN = 64, 32
_DRIFT = 0.01  # relative random step of the router's weights, a step
_LOGIT_STD = 1.5
# Shares of the kinds of text before the shift and from it on.
_MIX, _MIX_AFTER = (0.4, 0.3, 0.2, 0.1), (0.05, 0.05, 0.1, 0.8)


@dataclass(frozen=True, kw_only=True)
class RouterSimulation:
    """A trace (runtime.commands.replay.trace) of one MoE layer. shift_step: from which the mix of text is another."""

    seed: int
    num_steps: int = 400
    shift_step: int | None = 250
    router: RouterConfig = RouterConfig(num_experts=64, top_k=6)  # noqa: RUF009 - frozen
    num_sequences: int = 128

    @property
    def name(self) -> str:
        return f"simulation, seed {self.seed}"

    @property
    def layout(self) -> LoadLayout:
        return LoadLayout(("simulated",), (self.router.num_experts,), (True,))

    @property
    def steps(self) -> range:
        return range(1, self.num_steps + 1)

    def scores(self, step: int) -> list[Tensor]:
        x_TH = self._tokens(step)
        logits_TE = x_TH @ self._weights_SEH[step - 1].T * (_LOGIT_STD * _HIDDEN**0.5)
        return [logits_TE.softmax(1) if self.router.score == "softmax" else logits_TE.sigmoid()]

    @cached_property
    def _weights_SEH(self) -> Tensor:  # noqa: N802 - the shape is part of the name
        steps_SEH = self._random(0, self.num_steps, self.router.num_experts, _HIDDEN)
        steps_SEH[1:] *= _DRIFT
        walk_SEH = steps_SEH.cumsum(0)
        # A walk alone would grow the logits with its length.
        return _unit(walk_SEH)

    @cached_property
    def _kinds_DH(self) -> Tensor:  # noqa: N802
        return _unit(self._random(1, len(_MIX), _HIDDEN))

    def _tokens(self, step: int) -> Tensor:
        after = self.shift_step is not None and step >= self.shift_step
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step + 2)
        shares = torch.tensor(_MIX_AFTER if after else _MIX)
        kinds_B = torch.multinomial(shares, self.num_sequences, replacement=True, generator=generator)
        topics_BH = _unit(torch.randn(self.num_sequences, _HIDDEN, generator=generator))
        tokens_BSH = _unit(torch.randn(self.num_sequences, _SEQ_LEN, _HIDDEN, generator=generator))
        about_BH = _KIND * self._kinds_DH[kinds_B] + _TOPIC * topics_BH
        x_TH: Tensor = (about_BH.unsqueeze(1) + _TOKEN * tokens_BSH).flatten(0, 1)
        return x_TH

    # 1_000_003 is more than the steps of any trace, so that no two seeds draw from the same stream.
    def _random(self, stream: int, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + stream))


def _unit(vectors: Tensor) -> Tensor:
    unit: Tensor = vectors / vectors.norm(dim=-1, keepdim=True)
    return unit
