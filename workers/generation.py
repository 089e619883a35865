"""Text from a trained model, under the same routing and exchange as in training; no token is dropped."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from workers.model import Decoder
from workers.parallel import RankGroups


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 200
    """Tokens to add to each prompt, unless the document ends before."""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples from the model's distribution."""
    top_p: float = 1.0
    """Sample only among the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Seed of the sampling; the text does not depend on the number of workers."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens ({self.max_new_tokens}) must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature ({self.temperature}) must be at least 0; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p ({self.top_p}) must be above 0 and at most 1")


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    groups: RankGroups,
    *,
    eod_id: int,
    autocast: AbstractContextManager[None],
) -> dict[int, list[int]]:
    """Continue this rank's share of the prompts (every world_size-th); new tokens by index of the prompt.

    Collective: all ranks make the same number of forwards. A rank whose prompts are finished, or that has none, takes
    part with an empty batch, so that its experts serve the others.
    """
    model.eval()
    mine = [
        _Sequence(index, list(prompts[index]), torch.Generator().manual_seed(sampling.seed * 1_000_003 + index))
        for index in range(groups.rank, len(prompts), groups.world_size)
    ]
    for _ in range(sampling.max_new_tokens):
        running = [sequence for sequence in mine if not sequence.ended]
        if not _any_rank(bool(running), groups):
            break
        token_ids, token_mask = _right_padded(running, model.config.max_seq_len)
        with autocast:
            logits = model(token_ids.to(groups.device), token_mask=token_mask.to(groups.device))
        for sequence, row, mask in zip(running, logits.cpu(), token_mask, strict=True):
            sequence.append(_choose(row[int(mask.sum()) - 1], sampling, sequence.generator), eod_id)
    model.train()
    return {sequence.index: sequence.new_ids for sequence in mine}


@dataclass
class _Sequence:
    index: int
    ids: list[int]
    generator: torch.Generator
    num_new: int = 0
    ended: bool = False

    def append(self, token_id: int, eod_id: int) -> None:
        self.ended = token_id == eod_id
        if not self.ended:
            self.ids.append(token_id)
            self.num_new += 1

    @property
    def new_ids(self) -> list[int]:
        return self.ids[len(self.ids) - self.num_new :]


def _right_padded(sequences: Sequence[_Sequence], max_seq_len: int) -> tuple[Tensor, Tensor]:
    """The last max_seq_len tokens of each, (B, S), and which of them are real. Causal attention hides what follows."""
    windows = [sequence.ids[-max_seq_len:] for sequence in sequences]
    longest = max((len(window) for window in windows), default=1)
    token_ids = torch.zeros(len(windows), longest, dtype=torch.int64)
    token_mask = torch.zeros(len(windows), longest, dtype=torch.bool)
    for row, window in enumerate(windows):
        token_ids[row, : len(window)] = torch.tensor(window)
        token_mask[row, : len(window)] = True
    return token_ids, token_mask


def _choose(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits.double() / sampling.temperature).softmax(0).sort(descending=True, stable=True)
    # Keep a token while the ones before it hold less than top_p: the likeliest always stays.
    probabilities[probabilities.cumsum(0) - probabilities >= sampling.top_p] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _any_rank(flag: bool, groups: RankGroups) -> bool:
    total = torch.tensor([int(flag)])
    groups.board.run(dist.all_reduce, total, dist.ReduceOp.MAX, group=groups.control_group)
    return bool(total)
