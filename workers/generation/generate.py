"""Text from a trained model, under the same routing and exchange as in training; no token is dropped."""

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dispatch.errors import InvalidValue
from workers.data.tokenizer import Tokenizer
from workers.distributed.parallel import RankGroups
from workers.generation.decoding import DecodingBatch, DecodingSequence, OnRead, OnToken
from workers.model.decoder import Decoder


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
    batch_size: int = 32
    """Prompts that a worker continues at once: more tokens per second, and more memory for what attention keeps."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidValue(f"{name} ({getattr(self, name)}) must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise InvalidValue(f"temperature ({self.temperature}) must be at least 0 and finite; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise InvalidValue(f"top_p ({self.top_p}) must be above 0 and at most 1")


@dataclass
class Speed:
    """Tokens that this rank read and generated, and the seconds that it took, including waits for other ranks.

    prompt_tokens: read in the first forward of each batch. new_tokens: chosen in the forwards after it.
    """

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    new_tokens: int = 0
    decode_s: float = 0.0

    @classmethod
    def of_all(cls, ranks: Sequence["Speed"]) -> "Speed":
        """The gang's speed: the tokens of all ranks in the time of the slowest."""
        return cls(
            sum(each.prompt_tokens for each in ranks),
            max(each.prefill_s for each in ranks),
            sum(each.new_tokens for each in ranks),
            max(each.decode_s for each in ranks),
        )

    def __str__(self) -> str:
        decode = _rate("decode", self.new_tokens, self.decode_s)
        return f"{_rate('prefill', self.prompt_tokens, self.prefill_s)}; {decode}"


@dataclass(frozen=True)
class Generated:
    """New tokens by index of the prompt, for this rank's share of the prompts."""

    new_ids: dict[int, list[int]]
    speed: Speed


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of each prompt. An empty prompt becomes the end-of-document token, after which a new document begins."""
    return [tokenizer.encode(prompt).tolist() or [tokenizer.eod_id] for prompt in prompts]


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    groups: RankGroups,
    *,
    eod_id: int,
    autocast: AbstractContextManager[None],
    on_token: OnToken | None = None,
    on_read: OnRead | None = None,
) -> Generated:
    """Continue this rank's share of the prompts, every world_size-th. A prompt has one token or more.

    on_token, on_read: as of DecodingBatch. autocast: entered around all forwards. Leaves the model in training mode.

    Collective: all ranks make the same number of forwards. A rank whose prompts are finished, or that has none, takes
    part with an empty batch, so that its experts serve the others.
    """
    model.eval()
    mine = [
        DecodingSequence(index, list(prompts[index]), _generator(sampling.seed, index))
        for index in range(groups.rank, len(prompts), groups.world_size)
    ]
    speed = Speed()
    for first in range(0, -(-len(prompts) // groups.world_size), sampling.batch_size):
        batch = DecodingBatch(
            mine[first : first + sampling.batch_size],
            max_new_tokens=sampling.max_new_tokens,
            max_seq_len=model.config.max_seq_len,
            eod_id=eod_id,
            on_token=on_token,
            on_read=on_read,
        )
        with autocast:  # around all forwards of a batch: bf16 copies of the weights are kept until it is left
            _continue(model, batch, sampling, groups, speed)
    model.train()
    return Generated({sequence.index: sequence.new_ids for sequence in mine}, speed)


def _continue(
    model: Decoder,
    batch: DecodingBatch,
    sampling: SamplingConfig,
    groups: RankGroups,
    speed: Speed,
) -> None:
    """Add tokens until every sequence of every rank has ended; add tokens and seconds to `speed`."""
    began = time.perf_counter()
    speed.prompt_tokens += batch.num_prompt_tokens
    prefilled = False
    while _any_rank(bool(batch.running), groups):
        logits = model(**batch.next_inputs(groups.device))
        speed.new_tokens += prefilled * len(batch.running)
        batch.append(_choose_all(logits, batch.running, sampling))
        if not prefilled:
            prefilled, now = True, time.perf_counter()
            speed.prefill_s, began = speed.prefill_s + now - began, now
    speed.decode_s += time.perf_counter() - began


def _generator(seed: int, index: int) -> torch.Generator:
    """A generator for each prompt, so that its text does not depend on how prompts are divided over ranks."""
    # A factor above any number of prompts: else prompt 1 under seed 0 would draw as prompt 0 does under seed 1. Taken
    # modulo 2^64, as torch refuses larger seeds.
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**64)


def _choose_all(logits: Tensor, sequences: Sequence[DecodingSequence], sampling: SamplingConfig) -> list[int]:
    """The next token of each sequence from its logits (B, vocab_size). Waits for the device once."""
    if sampling.temperature == 0:
        ids: list[int] = logits.argmax(-1).tolist()
        return ids
    rows = zip(logits.cpu(), sequences, strict=True)  # on the CPU a seed gives the same samples on every machine
    return [_sample(row, sampling, sequence.generator) for row, sequence in rows]


def _sample(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    probabilities, order = (logits.double() / sampling.temperature).softmax(0).sort(descending=True, stable=True)
    # Keep a token while the likelier ones before it hold less than top_p together: the likeliest one always stays.
    probabilities[probabilities.cumsum(0) - probabilities >= sampling.top_p] = 0.0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _any_rank(flag: bool, groups: RankGroups) -> bool:
    total = torch.tensor([int(flag)])
    groups.tracker.run(dist.all_reduce, total, dist.ReduceOp.MAX, group=groups.control_group)
    return bool(total)


def _rate(what: str, num_tokens: int, seconds: float) -> str:
    return f"{what} {num_tokens:,} tokens in {seconds:.2f} s ({num_tokens / max(seconds, 1e-9):,.0f} tokens/s)"
