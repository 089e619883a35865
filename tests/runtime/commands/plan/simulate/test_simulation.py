"""A simulated step against a slow clock for every rank, against the plan's bytes, and against the model's FLOPs."""

from dataclasses import replace

import numpy as np
import pytest

from cluster.config import ClusterConfig
from dispatch.config import MoEConfig
from dispatch.exchange.local import LocalDispatcher
from runtime.commands.plan.simulate.hardware import PRESETS, Hardware, LinkCost
from runtime.commands.plan.simulate.layer import with_rows
from runtime.commands.plan.simulate.simulation import Schedule, Simulation
from runtime.commands.plan.simulate.sweep import by_max_vio, factors_of, resized_subject
from runtime.commands.plan.simulate.work import attention_work, dense_work, expert_work, head_work, router_work
from runtime.commands.plan.subject import Subject
from runtime.settings.config import TrainConfig
from workers.distributed.parallel import ParallelConfig
from workers.model.attention import LatentConfig
from workers.model.decoder import Decoder
from workers.model.flops import train_flops_per_token
from workers.model.meta_device import meta_device
from workers.model.model_config import ModelConfig
from workers.run_config import RunConfig

MODEL = ModelConfig(
    vocab_size=1000,
    hidden=128,
    num_layers=4,
    num_dense_layers=1,
    num_heads=4,
    num_kv_heads=2,
    dense_ffn_hidden=256,
    max_seq_len=64,
    moe=MoEConfig(num_experts=16, top_k=2, ffn_hidden=96),
)
SLOW = Hardware(
    name="slow",
    dense_flops_per_s=3e9,
    grouped_flops_per_s=2e9,
    attention_flops_per_s=1e9,
    memory_bytes_per_s=4e9,
    update_s=1e-8,
    node=LinkCost(alpha_s=1e-4, bytes_per_s=1e9),
    network=LinkCost(alpha_s=3e-4, bytes_per_s=2e8),
    control=LinkCost(alpha_s=1e-4, bytes_per_s=1e9),
)


def subject(model=MODEL, world=8, ep=8, node=4, **run) -> Subject:
    settings = {"global_batch_size": 4 * world, "micro_batch_size": 2, **run}
    config = TrainConfig(
        run=RunConfig(**settings),
        model=model,
        parallel=ParallelConfig(ep_size=ep, exchange="rank"),
        cluster=ClusterConfig(num_workers=world),
    )
    return Subject("test", config, node, ())


class SlowClocks:
    """Every rank of an EP group with a clock of its own; all wait for the last at each exchange."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.model, self.batch = simulation.config.model, simulation.batch
        self.clocks = [0.0] * simulation.ep_size

    def alone(self, part, direction: str) -> None:
        seconds = getattr(part(self.model, self.batch), direction).seconds(SLOW)
        self.clocks = [clock + seconds for clock in self.clocks]

    def experts(self, row, direction: str) -> None:
        for rank, factor in enumerate(row):
            work = expert_work(self.model, with_rows(self.batch, factor, len(row)))
            self.clocks[rank] += getattr(work, direction).seconds(SLOW)

    def exchange(self, direction: str, row, rounds: int) -> None:
        """Half of a direction's bytes goes to the experts, half back; the fullest rank has most on its links."""
        links = getattr(self.simulation.plan.traffic["rank"], direction)
        share = 0.5 / (self.model.num_moe_layers * self.simulation.num_micro)
        for rank, factor in enumerate(row):
            more = with_rows(self.batch, factor, len(row)).arrived_rows / self.batch.arrived_rows
            sent_s = share * more * (links.node / 1e9 + links.network / 2e8)
            self.clocks[rank] = self.clocks[rank] + sent_s + rounds * (3 * 1e-4 + 4 * 3e-4)
        self.clocks = [max(self.clocks)] * len(row)

    def layer(self, direction: str, row, rounds: int) -> None:
        self.exchange(direction, row, rounds - 1)
        self.experts(row, direction)
        self.clocks = [max(self.clocks)] * len(row)  # the answers of the last rank are waited for
        self.exchange(direction, row, 1)

    def run(self, factors) -> float:
        """Forward and backward of all micro-batches."""
        for direction, rounds in (("forward", 3), ("backward", 2)) * self.simulation.num_micro:
            for layer in range(self.model.num_layers):
                self.alone(attention_work, direction)
                if layer < self.model.num_dense_layers:
                    self.alone(dense_work, direction)
                    continue
                self.alone(router_work, direction)
                self.layer(direction, factors[layer - self.model.num_dense_layers], rounds)
            self.alone(head_work, direction)
        return max(self.clocks)


@pytest.mark.parametrize("max_vio", [0.0, 1.0, 5.0])
def test_a_step_is_the_critical_path_of_ranks_that_wait_for_each_other(max_vio: float) -> None:
    simulation = Simulation(subject(), SLOW)
    factors = factors_of(simulation, max_vio)
    parts = dict(simulation.step(factors).parts)
    for once in ("gradients", "optimizer", "control"):
        del parts[once]
    assert sum(parts.values()) == pytest.approx(SlowClocks(simulation).run(factors), rel=1e-9)


def test_a_balanced_routing_costs_nothing() -> None:
    simulation = Simulation(subject(), SLOW)
    assert by_max_vio(simulation, [0.0]).costs[0].times_balanced == 1.0
    assert simulation.step().peak_bytes == simulation.plan.peak_bytes


@pytest.mark.parametrize("name", PRESETS)
def test_more_imbalance_never_costs_less(name: str) -> None:
    simulation = Simulation(subject(), PRESETS[name])
    costs = by_max_vio(simulation, [0, 0.1, 0.5, 1, 2, 4, 7]).costs
    for values in ([each.step_s for each in costs], [each.peak_bytes for each in costs]):
        assert values == sorted(values)
    assert costs[-1].step_s > costs[0].step_s


def test_bytes_are_those_that_the_plan_counts() -> None:
    # Links of one byte a second and without a delay: seconds are bytes.
    link = LinkCost(alpha_s=0.0, bytes_per_s=1.0)
    simulation = Simulation(subject(), replace(SLOW, node=link, network=link))
    planned = simulation.plan.traffic["rank"].total
    parts = simulation.step().parts
    assert parts["all-to-all"] == pytest.approx(planned.total)
    assert parts["gradients"] == pytest.approx(sum(simulation.plan.gradients.values()))


@pytest.mark.parametrize("attention", ["grouped_query", "latent"])
def test_matmuls_are_those_of_the_models_flops(attention) -> None:
    model = replace(MODEL, attention=attention, latent=LatentConfig(query_rank=48), num_mtp_layers=1)
    batch = Simulation(subject(model, world=1, ep=1, node=1), SLOW).batch
    with meta_device():
        decoder = Decoder(model, lambda: LocalDispatcher(16))
    parts = [
        (model.num_layers + 1, attention_work(model, batch)),
        (1, dense_work(model, batch)),
        (model.num_moe_layers, router_work(model, batch)),
        (model.num_moe_layers, expert_work(model, batch)),
        (1, head_work(model, batch)),
    ]
    counted = sum(
        number * matmul.flops
        for number, part in parts
        for matmul in (*part.forward.matmuls, *part.backward.matmuls)
        if matmul.kind != "attention"
    )
    width = 2 * 32 if attention == "grouped_query" else 32 + 16 + 32
    scores = 6 * 5 * 4 * width * 64  # those of `train_flops_per_token` count the masked ones too
    assert counted == pytest.approx(batch.tokens * (train_flops_per_token(decoder) - scores))


def test_stages_divide_the_work_and_a_bubble_lengthens_the_step() -> None:
    whole = Simulation(subject(), SLOW).step()
    staged = Simulation(subject(), SLOW, Schedule(stages=4, bubble=0.2)).step()
    assert staged.step_s == pytest.approx((whole.step_s - whole.parts["control"]) / 4 / 0.8 + staged.parts["control"])


def test_an_exchange_that_hides_takes_no_time_unless_it_is_longer_than_the_computation() -> None:
    fast = replace(SLOW, node=LinkCost(alpha_s=0, bytes_per_s=1e12), network=LinkCost(alpha_s=0, bytes_per_s=1e12))
    assert Simulation(subject(), fast, Schedule(overlap=1)).step().parts["all-to-all"] == 0
    slow = replace(SLOW, network=LinkCost(alpha_s=0, bytes_per_s=1e6))
    assert Simulation(subject(), slow, Schedule(overlap=1)).step().parts["all-to-all"] > 0


def test_sums_of_sharded_gradients_hide_behind_the_computation_and_others_do_not() -> None:
    quick, slow = (replace(SLOW, node=LinkCost(alpha_s=0, bytes_per_s=rate)) for rate in (1e12, 1e5))
    sharded = replace(
        subject(node=8), config=replace(subject().config, parallel=ParallelConfig(ep_size=8, shard="full"))
    )
    assert Simulation(sharded, quick).step().parts["gradients"] == 0
    assert Simulation(sharded, slow).step().parts["gradients"] > 0
    assert Simulation(subject(node=8), quick).step().parts["gradients"] > 0


def test_ranks_that_share_cores_take_as_long_as_all_their_work_on_all_cores() -> None:
    crowded = replace(SLOW, cores=2)
    two, four = (Simulation(subject(world=size, ep=size, node=size), crowded) for size in (2, 4))
    assert four.step().parts["attention"] == pytest.approx(2 * two.step().parts["attention"])
    # One rank with all rows runs on one core: the others' core is of no use to it.
    alone = np.zeros((3, 4))
    alone[:, 0] = 4.0
    skewed, even = four.step(alone).parts, four.step().parts
    assert 1.5 < skewed["routed experts"] / even["routed experts"] < 2.1


def test_worlds_keep_the_tokens_of_a_rank_and_share_experts_as_far_as_they_can() -> None:
    base = subject(world=64, ep=64 // 4, node=8)
    sizes = {size: resized_subject(base, size) for size in (8, 64, 1024)}
    assert [each.config.parallel.ep_size for each in sizes.values()] == [8, 16, 16]
    assert {each.config.run.sequences_per_rank(size) for size, each in sizes.items()} == {4}


def test_worlds_keep_the_sequences_that_ranks_share() -> None:
    base = subject(world=8, ep=4, global_batch_size=4, micro_batch_size=0)  # one for two ranks
    base = replace(base, config=replace(base.config, parallel=replace(base.config.parallel, context=2)))
    for size, context in ((8, 2), (16, 2), (1, 1)):
        config = resized_subject(base, size).config
        assert (config.parallel.context, config.sequences_per_rank) == (context, 1)


def test_the_cost_of_imbalance_grows_with_the_ranks_that_share_the_experts() -> None:
    at = [by_max_vio(Simulation(resized_subject(subject(), size), PRESETS["h100"]), [2.0]) for size in (2, 4, 8, 16)]
    costs = [each.costs[0].times_balanced for each in at]
    assert costs == sorted(costs)
