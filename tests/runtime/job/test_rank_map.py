"""The rank map as people read it."""

from runtime.job.rank_map import rank_table
from workers.distributed.exchange_choice import ExchangeChoice


def row(rank, node, **transport):
    return {
        "rank": rank,
        "node": node,
        "interface": "eth0",
        "pid": 100 + rank,
        "device": f"cuda {rank % 2}",
        "threads": 4,
        "experts": [4 * rank, 4 * rank + 3],
        "ep_rank": rank,
        "edp_rank": 0,
        "transport": transport,
    }


def test_the_table_names_places_exchange_and_what_differs_in_the_transport():
    ranks = [
        row(0, "10.0.0.1", NCCL_DEBUG="WARN", NCCL_IB_HCA="mlx5_0"),
        row(1, "10.0.0.2", NCCL_DEBUG="WARN", NCCL_IB_HCA="mlx5_1") | {"threads": 1},
    ]
    assert rank_table(ranks, ExchangeChoice("rank", 0, "2 nodes x 1 rank")) == (
        "rank map\n"
        "  rank 0  10.0.0.1 eth0  pid 100  cuda 0, 4 threads  experts 0 to 3 (ep 0, edp 0)\n"
        "  rank 1  10.0.0.2 eth0  pid 101  cuda 1, 1 thread  experts 4 to 7 (ep 1, edp 0)\n"
        "exchange: rank; 2 nodes x 1 rank\n"
        "transport: NCCL_DEBUG=WARN\n"
        "differs between ranks: NCCL_IB_HCA"
    )
