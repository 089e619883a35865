"""The model FLOPs of a token are what torch counts in a forward, three times; peaks are found by the device's name."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dispatch.config import MoEConfig
from dispatch.exchange.local import LocalDispatcher
from workers.model.attention import LatentConfig
from workers.model.decoder import Decoder
from workers.model.flops import ModelFlops, bf16_peak, peak_by_name, train_flops_per_token
from workers.model.model_config import ModelConfig

MOE = MoEConfig(num_experts=8, top_k=2, ffn_hidden=24, num_shared_experts=1)
GROUPED = ModelConfig(
    vocab_size=61, hidden=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, max_seq_len=16, moe=MOE
)
LATENT = LatentConfig(query_rank=12, kv_rank=10, nope_dim=4, rope_dim=2, value_dim=8)


@pytest.mark.parametrize(
    "config",
    [
        GROUPED,
        replace(GROUPED, attention="latent", latent=LATENT, tie_embeddings=True),
        replace(GROUPED, num_mtp_layers=1, attention_gate=True),
        replace(GROUPED, num_mtp_layers=1, tie_embeddings=True, moe=replace(MOE, num_shared_experts=0)),
    ],
    ids=["grouped", "latent and tied", "predicts two tokens", "tied, predicts two tokens"],
)
def test_a_token_costs_three_times_what_torch_counts_in_its_forward(config):
    model = Decoder(config, lambda: LocalDispatcher(MOE.num_experts))
    ids = torch.randint(config.vocab_size, (3, config.max_seq_len))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, next_ids=ids if config.num_mtp_layers else None)
    # torch does not count matmuls that write into a given tensor, as those of the routed experts.
    routed = ids.numel() * config.num_moe_layers * MOE.top_k * 3 * 2 * config.hidden * MOE.ffn_hidden
    assert train_flops_per_token(model) * ids.numel() == 3 * (counter.get_total_flops() + routed)


def test_a_device_is_known_by_its_name_and_a_cpu_has_no_peak():
    assert peak_by_name("NVIDIA H100 PCIe") == 756e12
    assert peak_by_name("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_by_name("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_by_name("Tesla K80") is None
    assert bf16_peak(torch.device("cpu")) is None


def test_the_utilisation_is_that_of_one_rank():
    flops = ModelFlops(per_token=6 * 10**9, peak_per_s=3e14, num_ranks=4)
    assert flops.fields(80_000.0) == {"tflops_per_s": 120.0, "mfu": 0.4}
    assert ModelFlops(per_token=1, peak_per_s=None, num_ranks=1).fields(1e12) == {"tflops_per_s": 1.0, "mfu": None}
