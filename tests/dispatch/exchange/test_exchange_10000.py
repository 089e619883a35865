"""10,000 random ragged exchanges: no row lost, doubled or swapped, neither on arrival nor back home.

A row says its (exchange, source rank, token) and its weight says (exchange, source rank, token, expert, slot). Every
expert row is compared with its own weight, and all weights of a rank with those that were sent to it, sorted, since the
rows of one expert may arrive in any order of sources. Each expert answers with the weight in a column of its own, so
that what comes home is seen assignment by assignment. All numbers are integers in float64: sums are exact.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dispatch.exchange.all_to_all import AllToAllDispatcher
from tests.dispatch.exchange.kinds import KINDS
from tests.ranks import RankFailure, run_ranks

EXCHANGES = {2: 7600, 3: 1600, 4: 800}  # by world size, over all kinds; more ranks take longer on two cores
SIZES = [(8, 3), (11, 4), (4, 1), (8, 8), (7, 2)]  # experts, top-k; not all divide
MAX_TOKENS = 9


@dataclass(frozen=True)
class Draw:
    """Exchanges drawn at once. N exchanges, P ranks, T = MAX_TOKENS, K top-k.

    ids_NPTK: experts that each token chooses. codes_NPTK: (exchange, source rank, token, expert, slot) as one integer.
    is_token_NPT: False where the rank has no such token.
    """

    num_experts: int
    ids_NPTK: torch.Tensor
    codes_NPTK: torch.Tensor
    is_token_NPT: torch.Tensor


def _draw(world_size, num_experts, top_k, num_exchanges, seed):
    generator = torch.Generator().manual_seed(seed)
    # Every fourth (exchange, rank) has no token; in every third exchange low expert ids are preferred.
    num_tokens = torch.randint(-MAX_TOKENS // 3, MAX_TOKENS + 1, (num_exchanges, world_size, 1), generator=generator)
    keys = torch.rand(num_exchanges, world_size, MAX_TOKENS, num_experts, generator=generator)
    keys[::3] += torch.arange(num_experts) * 0.3
    ids = keys.argsort(-1)[..., :top_k]
    token = torch.arange(num_exchanges * world_size * MAX_TOKENS).view(num_exchanges, world_size, MAX_TOKENS, 1)
    codes = (token * num_experts + ids) * top_k + torch.arange(top_k)
    return Draw(num_experts, ids, codes, torch.arange(MAX_TOKENS) < num_tokens)


def _round_trip(dispatcher, draw, i):
    """One exchange and back: expert rows (token, code), the experts that they lie at, and the answers y_TE."""
    rank = dispatcher.ep_rank
    here = draw.is_token_NPT[i, rank]
    codes_TK = draw.codes_NPTK[i, rank, here]
    token_T1 = codes_TK[:, :1] // draw.codes_NPTK.shape[3] // draw.num_experts
    arrived, handle = dispatcher.dispatch(token_T1.double(), draw.ids_NPTK[i, rank, here], codes_TK.double())
    codes_R = handle.row_weights_R
    owned = dispatcher.placement.owned_by(rank)
    expert_R = torch.arange(owned.start, owned.stop).repeat_interleave(torch.tensor(handle.tokens_per_local_expert_L))
    # 1 is added, so that code 0 is an answer too.
    answers_RE = torch.zeros(len(codes_R), draw.num_experts, dtype=torch.float64)
    answers_RE.scatter_(1, expert_R.unsqueeze(1), codes_R.unsqueeze(1) + 1)
    rows_R2 = torch.cat([arrived[handle.expert_rows.source_of_copy_A], codes_R.unsqueeze(1)], 1)
    return rows_R2, expert_R, dispatcher.combine(handle.expert_rows.sum(answers_RE), handle)


def _check(draw, rank, owned, rows_R2, expert_R, y_TE):
    """All round trips of one draw on one rank."""
    token_R, codes_R = rows_R2.long().unbind(1)
    is_mine = (draw.ids_NPTK >= owned.start) & (draw.ids_NPTK < owned.stop) & draw.is_token_NPT.unsqueeze(3)
    assert torch.equal(codes_R.sort().values, draw.codes_NPTK[is_mine].sort().values), "rows are lost or doubled"
    top_k = draw.ids_NPTK.shape[3]
    assert torch.equal(codes_R // top_k // draw.num_experts, token_R), "a row has another row's weight"
    assert torch.equal(codes_R // top_k % draw.num_experts, expert_R), "a row is at another expert"
    here = draw.is_token_NPT[:, rank]
    expected_TE = torch.zeros(int(here.sum()), draw.num_experts, dtype=torch.float64)
    expected_TE.scatter_(1, draw.ids_NPTK[:, rank][here], draw.codes_NPTK[:, rank][here].double() + 1)
    assert torch.equal(y_TE, expected_TE), "an answer is lost, doubled or at another token"


def _exchanges_on_ranks(rank, world_size, kind, sizes, num_exchanges, seed):
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    for num_experts, top_k in sizes:
        dispatcher = KINDS.get(kind, kind)(num_experts, dist.group.WORLD)
        draw = _draw(world_size, num_experts, top_k, math.ceil(num_exchanges / len(sizes)), seed + top_k)
        with torch.no_grad():
            trips = [_round_trip(dispatcher, draw, i) for i in range(len(draw.ids_NPTK))]
        _check(
            draw, rank, dispatcher.placement.owned_by(rank), *(torch.cat(parts) for parts in zip(*trips, strict=True))
        )


def _launch(world_size, kind):
    try:
        share = math.ceil(EXCHANGES[world_size] / len(KINDS))
        run_ranks(world_size, _exchanges_on_ranks, kind, SIZES, share, 0)
    except RankFailure as failure:
        failure.add_note(f"{kind} on {world_size} ranks")
        raise


@pytest.mark.slow
def test_10000_exchanges_lose_double_and_swap_no_row():  # P3, P4, P17
    assert sum(EXCHANGES.values()) == 10_000
    # Ranks wait for each other most of the time: three gangs at once take half as long as one after the other.
    with ThreadPoolExecutor(3) as pool:
        launches = [pool.submit(_launch, world_size, kind) for world_size in EXCHANGES for kind in KINDS]
    for launch in launches:
        launch.result()


# An example is a launch of up to 4 processes: few of them, and none to make a failure smaller.
@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.data())
def test_any_size_of_layer_and_group_loses_no_row(data):
    world_size = data.draw(st.integers(1, 4), "ranks")
    num_experts = data.draw(st.integers(world_size, 12), "experts")
    top_k = data.draw(st.integers(1, num_experts), "top-k")
    for kind in KINDS:
        run_ranks(world_size, _exchanges_on_ranks, kind, [(num_experts, top_k)], 10, data.draw(st.integers(0, 99)))


class LosesTheLastRow(AllToAllDispatcher):
    def combine(self, sums_QH, handle):
        return super().combine(torch.cat([sums_QH[:-1], torch.zeros_like(sums_QH[-1:])]), handle)


class SwapsTwoRows(AllToAllDispatcher):
    def dispatch(self, *tensors):
        arrived, handle = super().dispatch(*tensors)
        return torch.cat([arrived[1:2], arrived[:1], arrived[2:]]), handle


class SendsToTheWrongExpert(AllToAllDispatcher):
    def dispatch(self, x_TH, topk_ids_TK, topk_weights_TK):
        return super().dispatch(x_TH, topk_ids_TK.roll(1, dims=1), topk_weights_TK)


class DoublesARow(AllToAllDispatcher):
    def dispatch(self, x_TH, topk_ids_TK, topk_weights_TK):
        again = [0, 0, *range(2, len(x_TH))][: len(x_TH)]
        return super().dispatch(x_TH[again], topk_ids_TK[again], topk_weights_TK[again])


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (LosesTheLastRow, "an answer is lost"),
        (SwapsTwoRows, "another row's weight"),
        (SendsToTheWrongExpert, "rows are lost or doubled|a row is at another expert"),
        (DoublesARow, "rows are lost or doubled"),
    ],
)
def test_the_check_sees_each_mistake(kind, complaint):
    with pytest.raises(RankFailure, match=complaint):
        run_ranks(2, _exchanges_on_ranks, kind, [(8, 3)], 20, 0)
