"""Where the ranks of a run are placed, and which exchange they use: for the terminal and for the run's record."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cluster.gang.placement import RankPlace, node_of_ranks
from dispatch.exchange.placement import ExpertPlacement
from runtime.settings.config import TrainConfig
from runtime.terminal.quantities import counted
from workers.distributed.exchange_choice import ExchangeChoice, choose_exchange

if TYPE_CHECKING:
    from cluster.gang.gang import Gang


def rank_map(config: TrainConfig, gang: "Gang") -> list[dict[str, Any]]:
    """One row for each rank: node, process, device, network, first and last expert of an MoE layer, pipeline stages."""
    ep_size = config.parallel.ep_size_of(gang.world_size)
    placement = ExpertPlacement(config.model.moe.num_experts, ep_size)
    stage_size = config.parallel.pipeline.ranks_per_stage(gang.world_size)
    rows = [_row(place, ep_size, stage_size, placement) for place in gang.rank_map]
    return [row | _stages(config, row["rank"] // stage_size) for row in rows]


def exchange_of(config: TrainConfig, gang: "Gang") -> ExchangeChoice:
    """The exchange that every rank of this gang has chosen, from the same facts by the same rule."""
    return choose_exchange(
        config.parallel.resized_to(gang.world_size),
        node_of_ranks([place.ip for place in gang.rank_map]),
        gang.world_size,
        num_experts=config.model.moe.num_experts,
        hidden=config.model.hidden,
        top_k=config.model.moe.top_k,
    )


def rank_table(ranks: Sequence[dict[str, Any]], exchange: ExchangeChoice) -> str:
    """The rank map as lines of text. Transport variables are printed once if all ranks have the same values."""
    rows = [
        f"  rank {row['rank']}  {row['node']} {row['interface']}  pid {row['pid']}  {row['device']}, "
        f"{counted(row['threads'], 'thread')}  experts {row['experts'][0]} to {row['experts'][1]} "
        f"(ep {row['ep_rank']}, edp {row['edp_rank']})" + _stage_text(row)
        for row in ranks
    ]
    lines = ["rank map", *rows, f"exchange: {exchange.exchange}; {exchange.reason}"]
    return "\n".join([*lines, *_transport(ranks)])


def _stages(config: TrainConfig, pp_rank: int) -> dict[str, Any]:
    """The pipeline stages of a rank, and the first and last layer of each; {} without a pipeline."""
    pipeline = config.parallel.pipeline
    if pipeline.size == 1:
        return {}
    layers = pipeline.layers_of(pp_rank, config.model.num_layers)
    return {"stages": list(pipeline.stages_of(pp_rank)), "layers": [[part[0], part[-1]] for part in layers]}


def _stage_text(row: dict[str, Any]) -> str:
    parts = zip(row.get("stages", []), row.get("layers", []), strict=True)
    return "".join(f"  stage {stage}: layers {first} to {last}" for stage, (first, last) in parts)


def _row(place: RankPlace, ep_size: int, stage_size: int, placement: ExpertPlacement) -> dict[str, Any]:
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
        "edp_rank": place.rank % stage_size // ep_size,
        "experts": [experts[0], experts[-1]],
    }


def _transport(ranks: Sequence[dict[str, Any]]) -> list[str]:
    names = sorted({name for row in ranks for name in row["transport"]})
    values = {name: [row["transport"].get(name) for row in ranks] for name in names}
    same = [f"{name}={by_rank[0]}" for name, by_rank in values.items() if len(set(by_rank)) == 1]
    differ = [name for name in names if len(set(values[name])) > 1]
    lines = []
    if same:
        lines.append(f"transport: {' '.join(same)}")
    if differ:
        lines.append(f"differs between ranks: {', '.join(differ)}")
    return lines
