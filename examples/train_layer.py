"""Train one MoE layer under plain torchrun, without Ray: dispatch/ in a training loop of your own.

    torchrun --nproc-per-node 2 examples/train_layer.py

Each rank has tokens of its own; the experts are spread over all ranks. The task is to imitate a fixed random network on
clustered inputs, of which some clusters are far more common than others, so that experts would be loaded unevenly.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn

from dispatch import (
    BalanceConfig,
    LossFreeBalancer,
    MoEConfig,
    MoELayer,
    expert_parameters,
    make_dispatcher,
    max_vio,
)

HIDDEN, TOKENS = 32, 512


def make_batch(generator: torch.Generator, centres: torch.Tensor) -> torch.Tensor:
    """Tokens around the centres; the i-th centre is more common than the next."""
    share = 0.7 ** torch.arange(len(centres))
    chosen = torch.multinomial(share, TOKENS, replacement=True, generator=generator)
    return centres[chosen] + torch.randn(TOKENS, HIDDEN, generator=generator)


def sum_gradients(layer: nn.Module) -> None:
    """Dense gradients are summed over the ranks; an expert's gradient is whole on the rank that holds it."""
    experts = expert_parameters(layer)
    for name, parameter in layer.named_parameters():
        if name not in experts:
            dist.all_reduce(parameter.grad)


def main() -> None:
    """Train, and print loss and balance from rank 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--law", default="sign", help="balancing law: sign or none")
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it by torchrun: torchrun --nproc-per-node 2 examples/train_layer.py")

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    world_size, rank = dist.get_world_size(), dist.get_rank()

    torch.manual_seed(0)  # the same router on all ranks; experts differ, as each rank draws its own share
    centres = torch.randn(8, HIDDEN)
    teacher = nn.Sequential(nn.Linear(HIDDEN, 64), nn.Tanh(), nn.Linear(64, HIDDEN)).to(device)
    config = MoEConfig(num_experts=16, top_k=2, ffn_hidden=32)
    dispatcher = make_dispatcher(config.num_experts, dist.group.WORLD, hidden=HIDDEN, top_k=config.top_k)
    layer = MoELayer(HIDDEN, config, dispatcher).to(device)
    for name, parameter in layer.named_parameters():
        if name not in expert_parameters(layer):
            dist.broadcast(parameter.data, src=0)

    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    balancer = LossFreeBalancer(layer, BalanceConfig(law=arguments.law, rate=0.02), dist.group.WORLD)
    generator = torch.Generator().manual_seed(1 + rank)
    for step in range(1, arguments.steps + 1):
        x = make_batch(generator, centres).to(device)
        error = (layer(x) - teacher(x).detach()).square().mean(1).sum()
        (error / (TOKENS * world_size)).backward()  # divided by the tokens of all ranks: gradients are summed
        sum_gradients(layer)
        optimizer.step()
        optimizer.zero_grad()
        load = balancer.step()  # once per optimizer step: counts of all ranks in, the next bias out
        if rank == 0 and (step == 1 or step % 10 == 0):
            print(f"step {step:3}  error {error.item() / TOKENS:.4f}  MaxVio {max_vio(load):.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
