"""Compares attention by packed documents with attention by a mask of the whole row: alone, and in a small model's step.

    python -m benchmarks.documents [--seq-len 2048] [--documents 16] [--window 0] [--sinks] [--pairs 5]

One row, one thread, fp32. The model has 4 layers of width 512 with 8 query and 2 key heads, and 8 experts. The lengths
of the documents are random. It prints medians, their ratio, and the most bytes held above weights and inputs.
"""

import argparse
import sys
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.paired import Step, compare_steps
from dispatch.config import MoEConfig
from dispatch.exchange.local import LocalDispatcher
from workers.model.attention import Documents, causal_mask, limit_to_window
from workers.model.attention.attend import AttentionMask, attend
from workers.model.decoder import Decoder
from workers.model.init import init_weights
from workers.model.model_config import ModelConfig

HEADS, KV_HEADS, HIDDEN, VOCAB = 8, 2, 512, 2048


def main(argv: list[str]) -> int:
    """Run the benchmark of a command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.documents", description=__doc__)
    for name, default in {"seq-len": 2048, "documents": 16, "window": 0, "pairs": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default: {default})")
    parser.add_argument("--sinks", action="store_true", help="with a score of no token in each head")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    starts = _drawn_starts(given.seq_len, given.documents)
    for subject, steps in (
        ("attention", _attention(starts, given.window, given.sinks)),
        ("step", _model(starts, given.window, given.sinks)),
    ):
        names = (f"{subject} by mask", f"{subject} by documents")
        compare_steps(dict(zip(names, steps, strict=True)), given.pairs)
    return 0


def _attention(starts: Tensor, window: int, has_sinks: bool) -> tuple[Step, Step]:
    """Forward and backward of attention alone: by the mask, and by documents."""
    shapes = [(*starts.shape, heads, HIDDEN // HEADS) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    sinks = torch.zeros(HEADS, requires_grad=True) if has_sinks else None

    def step(attn_mask: AttentionMask) -> None:
        attend(*leaves, attn_mask, sinks=sinks).sum().backward()

    return lambda: step(_mask(starts, window)), lambda: step(Documents.from_starts(starts).with_window(window))


def _model(starts: Tensor, window: int, has_sinks: bool) -> tuple[Step, Step]:
    config = ModelConfig(
        vocab_size=VOCAB,
        hidden=HIDDEN,
        num_layers=4,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        dense_ffn_hidden=1024,
        max_seq_len=starts.shape[1],
        sliding_window=window,
        attention_sinks=has_sinks,
        moe=MoEConfig(num_experts=8, top_k=2, ffn_hidden=256),
    )
    model = Decoder(config, lambda: LocalDispatcher(config.moe.num_experts))
    init_weights(model, seed=0)
    ids, targets = torch.randint(VOCAB, (2, *starts.shape)).unbind(0)

    def by_documents() -> None:
        model.zero_grad()
        model(ids, document_starts=starts, targets=targets).total.backward()

    def by_mask() -> None:
        # The decoder makes `Documents` for its attention itself; here it gets a mask of the whole row in their place.
        with patch.object(Documents, "from_starts", lambda starts, _context: _mask(starts, 0)):
            by_documents()

    return by_mask, by_documents


def _drawn_starts(seq_len: int, number: int) -> Tensor:
    """For each place the first place of its document, int64 (1, S); the documents have random lengths."""
    firsts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(seq_len - 1)[: number - 1].sort().values + 1])
    ends = torch.cat([firsts[1:], torch.tensor([seq_len])])
    return firsts.repeat_interleave(ends - firsts).unsqueeze(0)


def _mask(starts: Tensor, window: int) -> Tensor:
    places = torch.arange(starts.shape[1]).unsqueeze(0)
    seen = causal_mask(places, places, torch.ones_like(starts, dtype=torch.bool)) & (places >= starts.unsqueeze(2))
    return limit_to_window(seen, places, places, window) if window else seen


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
