"""Where the ranks of a run live and which exchange they take: for the terminal and for the run's record."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.gang.placement import node_of_ranks
from dispatch.exchange.placement import ExpertPlacement
from runtime.settings.config import TrainConfig
from workers.gang.exchange_choice import ExchangeChoice, choose_exchange

if TYPE_CHECKING:
    from cluster.gang.gang import Gang, RankPlace


def rank_map(config: TrainConfig, gang: "Gang") -> list[dict[str, Any]]:
    """One row a rank: node, process, device, network, and its experts of every MoE layer (first, last)."""
    ep_size = config.parallel.ep_size_of(gang.world_size)
    placement = ExpertPlacement(config.model.moe.num_experts, ep_size)
    return [_row(place, ep_size, placement) for place in gang.rank_map]


def exchange_of(config: TrainConfig, gang: "Gang") -> ExchangeChoice:
    """The exchange that every rank of this gang has chosen, from the same facts by the same rule."""
    return choose_exchange(
        config.parallel.at(gang.world_size),
        node_of_ranks([place.ip for place in gang.rank_map]),
        gang.world_size,
        num_experts=config.model.moe.num_experts,
        hidden=config.model.hidden,
        top_k=config.model.moe.top_k,
    )


def rank_table(ranks: Sequence[dict[str, Any]], exchange: ExchangeChoice) -> str:
    """The rank map as lines of text, the variables of the transport once where all ranks have the same."""
    rows = [
        f"  rank {row['rank']}  {row['node']} {row['interface']}  pid {row['pid']}  {row['device']}, "
        f"{row['threads']} threads  experts {row['experts'][0]} to {row['experts'][1]} "
        f"(ep {row['ep_rank']}, edp {row['edp_rank']})"
        for row in ranks
    ]
    lines = ["rank map", *rows, f"exchange: {exchange.exchange}; {exchange.reason}"]
    return "\n".join([*lines, *_transport(ranks)])


def _row(place: "RankPlace", ep_size: int, placement: ExpertPlacement) -> dict[str, Any]:
    experts = placement.owned_by(place.rank % ep_size)
    return {
        "rank": place.rank,
        "node": place.ip,
        "node_id": place.node_id,
        "pid": place.pid,
        "device": place.device,
        "gpu_ids": list(place.gpu_ids),
        "threads": place.num_threads,
        "interface": place.interface,
        "transport": dict(place.transport),
        "ep_rank": place.rank % ep_size,
        "edp_rank": place.rank // ep_size,
        "experts": [experts[0], experts[-1]],
    }


def _transport(ranks: Sequence[dict[str, Any]]) -> list[str]:
    names = sorted({name for row in ranks for name in row["transport"]})
    values = {name: [row["transport"].get(name) for row in ranks] for name in names}
    same = [f"{name}={of_ranks[0]}" for name, of_ranks in values.items() if len(set(of_ranks)) == 1]
    differ = [name for name in names if len(set(values[name])) > 1]
    return [f"transport: {' '.join(same)}"] * bool(same) + [f"differs between ranks: {', '.join(differ)}"] * bool(
        differ
    )
