"""Routing workloads W0 to W7: which experts tokens choose, without a router. For tests, benchmarks and parity checks.

| name | what it isolates | experts | tokens of the ranks |
|---|---|---|---|
| W0 | balanced | all alike | equal |
| W1 | hot expert set | an eighth of the experts, scattered over the ranks, is hot | equal |
| W2 | hot rank | those of one rank are hot; by default all tokens go there | equal |
| W3 | spread | one of every rank is hot, and each token's experts are on as many ranks as possible | equal |
| W4 | ragged sources | all alike | each rank has a quarter of those of the rank before it |
| W5 | nothing to do | the last rank gets nothing, nor does every second expert, if top_k allows | the first has none |
| W6 | rotating hot spot | a hot eighth, which moves on with every step | equal |
| W7 | burst | all alike; in every eighth step nearly all tokens choose one expert | equal |

The names are those of the token-imbalance benchmark proposed in Megatron-LM #7488; the definitions are ours.

Shapes: T tokens of this rank (may be 0), K top-k, E experts, H hidden, B blocks of E tokens.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dispatch.errors import InvalidValue
from dispatch.exchange.placement import ExpertPlacement

WORKLOADS = {
    "W0": "balanced",
    "W1": "hot expert set",
    "W2": "hot rank",
    "W3": "spread",
    "W4": "ragged sources",
    "W5": "nothing to do",
    "W6": "rotating hot spot",
    "W7": "burst",
}
BURST_EVERY = 8  # steps, the burst last: steps 0 to 6 are calm, step 7 is not
DEFAULT_SKEW = 4.0  # of W1, W3 and W6; less where it would be more than half-way from 1 to the largest possible skew
_GRAIN = 1 << 16  # probabilities are integers in units of 1 / (E * _GRAIN): no rounding lets a token choose one twice


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One of W0 to W7 for one size of layer; the same on every machine for the same arguments.

    name: "W0" to "W7". num_tokens: the mean over ranks; all ranks together have ep_size * num_tokens. skew: load of a
    hot expert over the mean load of all experts, for W1, W2, W3, W6 and the bursts of W7. None is DEFAULT_SKEW; in W2
    it is the largest skew there is, in W7 19 of 20 tokens. Loads are exact to one token in E.
    """

    name: str
    num_experts: int
    top_k: int
    ep_size: int
    num_tokens: int
    skew: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in WORKLOADS:
            raise InvalidValue(f"workload is {self.name!r:.60}; it must be one of {', '.join(WORKLOADS)}")
        if not 1 <= self.top_k <= self.num_experts:
            raise InvalidValue(f"top_k ({self.top_k}) must be between 1 and num_experts ({self.num_experts})")
        if self.num_tokens < 0:
            raise InvalidValue(f"num_tokens ({self.num_tokens}) must be at least 0")
        hot = self._hot_experts(step=BURST_EVERY - 1)
        if self.skew is not None and hot and not 1 <= self.skew <= self._max_skew(hot):
            raise InvalidValue(
                f"skew ({self.skew:g}) must be between 1 and {self._max_skew(hot):g} in {self.name} with "
                f"{self.num_experts} experts, {len(hot)} of them hot, and top_k {self.top_k}: hot "
                "experts cannot take more than all that is chosen, nor one of them more than every token; lower skew"
            )

    def route(self, ep_rank: int, step: int = 0) -> Tensor:
        """The experts that one rank's tokens choose in one step: int64 (T, K) on the CPU, K different ones for each."""
        generator = _generator(self.name, self.seed, step, ep_rank)
        return self._draw(self._heat(step), self.tokens_of_ranks()[ep_rank], generator)

    def tokens_of_ranks(self) -> list[int]:
        """Tokens of each EP rank."""
        total, size = self.ep_size * self.num_tokens, self.ep_size
        if size == 1 or self.name not in ("W4", "W5"):
            return [self.num_tokens] * size
        if self.name == "W5":
            return [0, *_even(total, [total] * (size - 1))]
        parts = [4 ** (size - 1 - rank) for rank in range(size)]
        rest = [total * part // sum(parts) for part in parts[1:]]
        return [total - sum(rest), *rest]

    @property
    def _placement(self) -> ExpertPlacement:
        return ExpertPlacement(self.num_experts, self.ep_size)

    def _hot_experts(self, step: int) -> list[int]:
        num_hot = max(1, self.num_experts // 8)
        if self.name == "W1":
            return torch.randperm(self.num_experts, generator=_generator(self.name, self.seed))[:num_hot].tolist()
        if self.name == "W2":
            return list(self._placement.owned_by(self.seed % self.ep_size))
        if self.name == "W3":
            owned = [self._placement.owned_by(rank) for rank in range(self.ep_size)]
            return [ids[self.seed % len(ids)] for ids in owned]
        if self.name == "W6":
            return [(self.seed + step * num_hot + i) % self.num_experts for i in range(num_hot)]
        if self.name == "W7" and step % BURST_EVERY == BURST_EVERY - 1:
            return [self.seed % self.num_experts]
        return []

    def _max_skew(self, hot: Sequence[int]) -> float:
        return min(self.num_experts / self.top_k, self.num_experts / len(hot))

    def _heat(self, step: int) -> list[int]:
        """The probability that a token chooses each expert, in units of 1 / (E * _GRAIN)."""
        total, hot = self.top_k * self.num_experts * _GRAIN, self._hot_experts(step)
        heat = [0] * self.num_experts
        if self.name == "W3":
            self._heat_rank_by_rank(heat, total, hot)
        elif self.name == "W5":
            self._add(heat, self._used_experts(), total)
        else:
            self._add(heat, hot, self._hot_share(hot, total))
            self._add(heat, [e for e in range(self.num_experts) if e not in hot], total - sum(heat))
        return heat

    def _heat_rank_by_rank(self, heat: list[int], total: int, hot: Sequence[int]) -> None:
        """The same share for every rank, however many experts it has: only then can each token use every rank."""
        full = self.num_experts * _GRAIN
        shares = _even(total, [full * size for size in self._placement.num_local_experts])
        for rank, share in enumerate(shares):
            ids = self._placement.owned_by(rank)
            # An expert can take at most `full`, every token, so the hot one must take what the others cannot.
            minimum = share - full * (len(ids) - 1)
            self._add(heat, [hot[rank]], max(minimum, min(share, self._hot_share([hot[rank]], total))))
            self._add(heat, [e for e in ids if e != hot[rank]], share - heat[hot[rank]])

    def _hot_share(self, hot: Sequence[int], total: int) -> int:
        if not hot:
            return 0
        limit = self._max_skew(hot)
        default = {"W2": limit, "W7": 0.95 * limit}.get(self.name, min(DEFAULT_SKEW, (1 + limit) / 2))
        skew = default if self.skew is None else self.skew
        # With a large top_k the other experts cannot take all the rest, since each can take at most every token.
        minimum = total - self.num_experts * _GRAIN * (self.num_experts - len(hot))
        return max(minimum, min(total, round(skew * len(hot) * total / self.num_experts)))

    def _used_experts(self) -> list[int]:
        """In W5: every second expert of all ranks but the last; more only where top_k needs them."""
        candidates = range(self._placement.owned_by(self.ep_size - 1).start) if self.ep_size > 1 else range(0)
        used = [*candidates[::2], *candidates[1::2], *range(len(candidates), self.num_experts)]
        return used[: max(self.top_k, len(candidates[::2]))]

    def _add(self, heat: list[int], ids: Sequence[int], units: int) -> None:
        for expert, share in zip(ids, _even(units, [self.num_experts * _GRAIN] * len(ids)), strict=True):
            heat[expert] = share

    def _draw(self, heat: list[int], num_tokens: int, generator: torch.Generator) -> Tensor:
        """Experts drawn without replacement, each with exactly its probability (systematic sampling, Madow 1949).

        For a block of E tokens the experts lie side by side in random order, each as long as it is hot. A token's K
        points are one unit apart, so that no expert, at most one unit long, is hit twice; tokens are evenly spaced.

        E=4, K=2, all alike:   | 2   | 0   | 3   | 1   |      token 0 points at 2 and 3, token 1 at 2 and 3,
                               0    0.5    1    1.5    2      token 2 at 0 and 1, token 3 at 0 and 1
        """
        size, full = self.num_experts, self.num_experts * _GRAIN
        num_blocks = -(-num_tokens // size)
        order_BE = self._orders(num_blocks, generator)
        ends_BE = torch.tensor(heat)[order_BE].cumsum(1)
        starts_BE = torch.rand(num_blocks, size, generator=generator).argsort(1) * _GRAIN
        starts_BE += torch.randint(_GRAIN, (num_blocks, 1), generator=generator)
        points = (starts_BE.unsqueeze(2) + torch.arange(self.top_k) * full).flatten(1)
        positions = torch.searchsorted(ends_BE, points, right=True)
        return order_BE.gather(1, positions).view(-1, self.top_k)[:num_tokens]

    def _orders(self, num_blocks: int, generator: torch.Generator) -> Tensor:
        """A random order of the experts for each block, (B, E); in W3 those of a rank stay side by side."""
        keys_BE = torch.rand(num_blocks, self.num_experts, generator=generator)
        if self.name == "W3":
            rank_E = torch.arange(self.ep_size).repeat_interleave(torch.tensor(self._placement.num_local_experts))
            keys_BE += torch.rand(num_blocks, self.ep_size, generator=generator).argsort(1)[:, rank_E]
        return keys_BE.argsort(1)


def tokens_that_choose(topk_ids_TK: Tensor, router_weight_EH: Tensor, seed: int = 0) -> Tensor:
    """Random x_TH in the router's dtype whose top-k under this router is `topk_ids_TK`, in order, best first.

    For layers that route by themselves. The logits of chosen experts are above 1 and 1 / K apart, those of all others
    below -1, so that a small bias changes at most the order of the chosen. Group-limited routing may choose otherwise.

    Raises:
        InvalidValue: hidden is below num_experts, where no such tokens need exist.
    """
    (num_tokens, top_k), (num_experts, hidden) = topk_ids_TK.shape, router_weight_EH.shape
    if hidden < num_experts:
        raise InvalidValue(f"hidden ({hidden}) must be at least num_experts ({num_experts}) to force every choice")
    generator = _generator("tokens", seed)
    weight_EH = router_weight_EH.detach().double().cpu()
    logits_TE = -1 - torch.rand(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    steps_K = 2 - torch.arange(top_k, dtype=torch.float64) / top_k
    logits_TE.scatter_(1, topk_ids_TK.cpu(), steps_K.expand(num_tokens, -1))
    x_TH = torch.randn(num_tokens, hidden, generator=generator, dtype=torch.float64)
    # The nearest tokens to random ones that have these logits.
    x_TH += (logits_TE - x_TH @ weight_EH.t()) @ torch.linalg.pinv(weight_EH).t()
    return x_TH.to(router_weight_EH.device, router_weight_EH.dtype)


def _even(total: int, caps: Sequence[int]) -> list[int]:
    """Shares as equal as the caps allow, exactly `total` together: 10 under caps 1 9 9 is 1 4 5."""
    shares = [0] * len(caps)
    for num_left, i in zip(range(len(caps), 0, -1), sorted(range(len(caps)), key=lambda i: caps[i]), strict=True):
        shares[i] = min(caps[i], total // num_left)
        total -= shares[i]
    return shares


def _generator(*key: object) -> torch.Generator:
    # Not hash(), which differs from process to process.
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
