"""Floating-point operations of training (model FLOPs), and what a device can do at most."""

from dataclasses import dataclass

import torch
from torch import nn

from workers.model.decoder import Decoder

# FLOP/s of dense bf16 matmuls on tensor cores, from NVIDIA's data sheets, without sparsity. The first key that occurs
# in the device's name counts: longer names come before shorter ones that they contain (H200, H20).
BF16_PEAKS = {
    "B300": 2.25e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


def bf16_peak(device: torch.device) -> float | None:
    """FLOP/s of a CUDA device's dense bf16 matmuls by its data sheet; None where it is not known, as on a CPU."""
    if device.type != "cuda":
        return None
    return peak_by_name(torch.cuda.get_device_name(device))


def peak_by_name(name: str) -> float | None:
    """The peak of a device of this name, as torch gives it."""
    return next((peak for part, peak in BF16_PEAKS.items() if part in name), None)


def linear_weights(model: nn.Module) -> int:
    """The number of weights in the linear layers, with all of which each token is multiplied."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def train_flops_per_token(model: Decoder, num_linear: int | None = None) -> int:
    """FLOPs of forward and backward that one token costs, as PaLM counts them (arXiv 2204.02311, appendix B).

    Six for each weight that the token is multiplied with (of routed experts, those of its top-k), and those of
    attention over `max_seq_len` tokens, masked ones too. Recomputed activations are not counted again.

    num_linear: `linear_weights` of the whole model, where `model` is a stage of a pipeline; None: those of `model`.
    """
    config = model.config
    weights = linear_weights(model) if num_linear is None else num_linear
    # A tied head is no nn.Linear, and is added here; multi-token prediction uses the decoder's head a second time.
    weights += (config.tie_embeddings + config.num_mtp_layers) * config.vocab_size * config.hidden
    moe = config.moe
    weights += config.num_moe_layers * config.hidden * (3 * moe.top_k * moe.ffn_hidden + moe.num_experts)
    widths = 2 * config.head_width
    if config.attention == "latent":
        widths = config.latent.nope_dim + config.latent.rope_dim + config.latent.value_dim
    scores = (config.num_layers + config.num_mtp_layers) * config.num_heads * widths * config.max_seq_len
    return 6 * (weights + scores)


@dataclass(frozen=True)
class ModelFlops:
    """Converts the speed of a run from tokens/s to FLOP/s.

    per_token: FLOPs of a token. peak_per_s: FLOP/s of a rank's device by its data sheet, None where it is not known.
    """

    per_token: int
    peak_per_s: float | None
    num_ranks: int

    @classmethod
    def of(cls, model: Decoder, device: torch.device, num_ranks: int, num_linear: int | None = None) -> "ModelFlops":
        """The FLOPs of training `model` on `num_ranks` such devices. num_linear: see `train_flops_per_token`."""
        return cls(train_flops_per_token(model, num_linear), bf16_peak(device), num_ranks)

    def fields(self, tokens_per_s: float) -> dict[str, float | None]:
        """Fields of a line of metrics.jsonl: TFLOP/s of a rank, and the share of its device's peak (MFU)."""
        per_s = tokens_per_s * self.per_token / self.num_ranks
        return {"tflops_per_s": per_s / 1e12, "mfu": per_s / self.peak_per_s if self.peak_per_s else None}
