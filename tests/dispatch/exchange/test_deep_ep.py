"""The adapter for DeepEP: its planning, its autograd and its way to the experts, on a stand-in for `deep_ep.Buffer`.

DeepEP's own kernels are not tested here but by the test marked `gpu`, which runs the same checks where they are.
"""

import importlib.util
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from dispatch.config import MoEConfig, ScheduleConfig
from dispatch.exchange import deep_ep
from dispatch.exchange.all_to_all import AllToAllDispatcher
from dispatch.exchange.deep_ep import DeepEPDispatcher, check_available, check_sizes, open_buffer
from dispatch.exchange.factory import make_dispatcher
from dispatch.exchange.local import LocalDispatcher
from dispatch.layer import MoELayer
from dispatch.parity.cases import Case
from dispatch.parity.check import check
from dispatch.parity.launch import launch
from dispatch.parity.layers import layer_under_test
from tests.dispatch.exchange.deep_ep_stand_in import StandInBuffer
from tests.dispatch.order import hear_experts
from tests.ranks import run_ranks

NUM_EXPERTS, TOP_K, HIDDEN = 8, 3, 32


def _dispatcher(group, buffer, top_k=TOP_K):
    return DeepEPDispatcher(NUM_EXPERTS, group, HIDDEN, top_k, buffer)


def _integers(num_tokens, generator):
    """Rows whose sums and products with weights below are exact in bf16."""
    return torch.randint(-4, 5, (num_tokens, HIDDEN), generator=generator).to(torch.bfloat16)


def _exchanged(dispatcher, rank, round_index, device):
    """There, through experts that only weigh, and back, with all gradients; ragged, at times without a token."""
    generator = torch.Generator().manual_seed(1000 * round_index + rank)
    num_tokens = 0 if round_index % 3 == rank else int(torch.randint(1, 12, (1,), generator=generator))
    low = TOP_K if round_index % 4 == 0 else NUM_EXPERTS  # all of them on the first rank
    ids = torch.rand(num_tokens, low, generator=generator).argsort(1)[:, :TOP_K].to(device)
    x = _integers(num_tokens, generator).to(device).requires_grad_()
    weights = (2.0 ** torch.randint(-1, 2, (num_tokens, TOP_K), generator=generator)).to(device).requires_grad_()
    arrived, handle = dispatcher.dispatch(x, ids, weights)
    rows = (handle.expert_rows.copy(arrived) * handle.row_weights_R.unsqueeze(1)).bfloat16()
    y = dispatcher.combine(handle.expert_rows.sum(rows), handle)
    (y * _integers(num_tokens, generator).to(device)).sum().backward()
    reading = dispatcher.meter.take()
    assert reading.routed == reading.sent == ids.numel()
    assert reading.received == reading.returned == sum(handle.tokens_per_local_expert_L) == len(rows)
    return {"y": y.detach(), "x": x.grad, "weights": weights.grad, "counts": handle.tokens_per_local_expert_L}


def _check_exchange(group, device, buffer):
    rank = dist.get_rank(group)
    for round_index in range(20):
        mine = _exchanged(_dispatcher(group, buffer), rank, round_index, device)
        other = _exchanged(AllToAllDispatcher(NUM_EXPERTS, group), rank, round_index, device)
        for name, value in mine.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[name])), (round_index, name)


def _check_parity(group, device, buffer):
    """The kit's comparison with the slow reference, of a layer in every order of work."""
    cases = [
        Case(name="plain", hidden=HIDDEN, moe={"top_k": TOP_K, "ffn_hidden": 16, "num_shared_experts": 1}),
        Case(name="rank-without-tokens", hidden=HIDDEN, moe={"top_k": TOP_K, "ffn_hidden": 16}, tokens=(5, 0, 4, 0)),
        Case(name="all-to-one", hidden=HIDDEN, moe={"top_k": 1, "ffn_hidden": 16}, bias=((5, 50.0),)),
    ]
    schedules = {"whole": {}, "in chunks": {"num_chunks": 3}, "waiting": {"overlap": False}, "rounds": {"max_rows": 6}}
    adapters = {
        name: lambda case, weights, group, given=given: layer_under_test(
            case, weights, _dispatcher(group, buffer, case.moe["top_k"]), ScheduleConfig(**given)
        )
        for name, given in schedules.items()
    }
    rows = check(cases, adapters, group, dtype="bfloat16", device=device)
    assert [(row.case, row.layer, row.failures) for row in rows if row.failures] == []


def _checks_with_stand_in(rank, world_size):
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    group = dist.group.WORLD
    _check_exchange(group, torch.device("cpu"), StandInBuffer(group))
    _check_parity(group, torch.device("cpu"), StandInBuffer(group))


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_adapter_is_the_exchange_of_a_row_for_each_rank(world_size):
    run_ranks(world_size, _checks_with_stand_in)


def _checks_with_deep_ep(group, device):
    buffer = open_buffer(group, HIDDEN)
    _check_exchange(group, device, buffer)
    _check_parity(group, device, buffer)


@pytest.mark.gpu
def test_deep_ep_itself_passes_the_same_checks():
    if importlib.util.find_spec("deep_ep") is None:
        pytest.skip("needs the package deep_ep, from github.com/deepseek-ai/DeepEP")
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 CUDA devices, there are {torch.cuda.device_count()}")
    launch(2, "cuda", timedelta(seconds=120), _checks_with_deep_ep)


def _order_on_ranks(rank, world_size):
    """Of a layer in two chunks: DeepEP's layouts (l), calls (s) and waits (w), its experts (e, E), and host waits."""
    buffer = StandInBuffer(dist.group.WORLD)
    config = MoEConfig(num_experts=NUM_EXPERTS, top_k=TOP_K, ffn_hidden=16)
    layer = MoELayer(HIDDEN, config, _dispatcher(dist.group.WORLD, buffer), ScheduleConfig(num_chunks=2)).bfloat16()
    hear_experts(layer, buffer.log)
    y = layer(torch.randn(20, HIDDEN, dtype=torch.bfloat16, requires_grad=True))
    buffer.log.append("|")
    waits = [buffer.num_host_waits]
    y.sum().backward()
    return "".join(buffer.log), [*waits, buffer.num_host_waits]


def test_rows_travel_while_others_are_computed_and_the_host_waits_once_a_chunk():
    [(order, waits), (other_order, _)] = run_ranks(2, _order_on_ranks)
    assert order == other_order == "lsls" + "wes" * 2 + "ww" + "|" + "ss" + "wEs" * 2 + "ww"
    assert waits == [2, 2]  # two chunks; none in backward


def _busiest_on_ranks(rank, world_size):
    dispatcher = _dispatcher(dist.group.WORLD, StandInBuffer(dist.group.WORLD))
    ids = torch.tensor([[0, 1, 2]] * 3 if rank == 0 else [[0, 1, 4]])
    return [dispatcher.max_sizes(dispatcher.plan(ids, num_chunks)) for num_chunks in (1, 2)]


def test_all_ranks_know_the_busiest_chunk():
    # Rank 0 has experts 0 to 3. Its own 3 tokens bring 9 rows, the one of rank 1 two more; of two chunks the second has
    # 2 tokens and that one.
    assert run_ranks(2, _busiest_on_ranks) == [[(11, 11, 3), (11, 8, 2)]] * 2


def _bytes_on_ranks(rank, world_size):
    generator = torch.Generator().manual_seed(rank)
    ids = torch.rand(50, NUM_EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    dispatcher = _dispatcher(dist.group.WORLD, StandInBuffer(dist.group.WORLD))
    x = _integers(50, generator).requires_grad_()
    arrived, handle = dispatcher.dispatch(x, ids, torch.ones(50, TOP_K, requires_grad=True))
    dispatcher.combine(arrived * handle.row_weights_R.sum().bfloat16(), handle).sum().backward()
    reading = dispatcher.meter.take()
    return reading.sent_bytes, reading.network_bytes, (ids // 4 != rank).any(1).sum().item()


def test_rows_for_other_ranks_are_metered():
    (sent_0, network_0, rows_0), (sent_1, network_1, rows_1) = run_ranks(2, _bytes_on_ranks)
    row, weight, expert_id = 2 * HIDDEN, 4, 8
    for sent, mine, other in ((sent_0, rows_0, rows_1), (sent_1, rows_1, rows_0)):
        # There with weights and ids, and the gradients of what came home; home, and the gradients of what came.
        assert sent == mine * (2 * row + TOP_K * (weight + expert_id)) + other * (2 * row + TOP_K * weight)
    assert network_0 == network_1 == 0  # two ranks share a node


def _refused_on_ranks(rank, world_size):
    group, messages = dist.group.WORLD, []
    dispatcher = _dispatcher(group, StandInBuffer(group))
    _, foreign = LocalDispatcher(8).dispatch(torch.ones(1, HIDDEN), torch.arange(3).view(1, 3), torch.ones(1, 3))
    for refused in (
        lambda: make_dispatcher(8, group, hidden=HIDDEN, top_k=3, exchange="deep_ep"),
        lambda: make_dispatcher(8, group, hidden=HIDDEN, top_k=3, exchange="deep_ep", payload="fp8"),
        lambda: make_dispatcher(65, group, hidden=24, top_k=33, exchange="deep_ep"),
        lambda: dispatcher.dispatch(torch.ones(1, HIDDEN), torch.arange(3).view(1, 3), torch.ones(1, 3)),
        lambda: dispatcher.dispatch(torch.ones(1, 2 * HIDDEN), torch.arange(3).view(1, 3), torch.ones(1, 3)),
        lambda: dispatcher.combine(torch.ones(1, HIDDEN), foreign),
    ):
        with pytest.raises(ValueError) as caught:
            refused()
        messages.append(str(caught.value))
    return messages


def test_what_deep_ep_cannot_do_is_refused_with_a_way_out():
    missing, payload, sizes, dtype, width, foreign = run_ranks(2, _refused_on_ranks)[0]
    assert "the package deep_ep (install it from github.com/deepseek-ai/DeepEP)" in missing
    assert "payload 'fp8' is not for exchange 'deep_ep'" in payload
    assert "num_experts (65) must be a multiple of ep_size (2); top_k (33) must be at most 32; hidden (24)" in sizes
    assert "takes bfloat16 rows and float32 weights, not torch.float32 and torch.float32" in dtype
    assert width == "x has width 64, the dispatcher was made for hidden 32"
    assert "another kind of dispatcher made this handle" in foreign


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((9, 3, 64, 8), r"ep_size \(3\) must be one of 2, 4, 8"),
        ((512, 2, 64, 8), r"num_experts \(512\) must be at most 128 a rank"),
        ((8, 8, 8192, 8), r"hidden \(8192\) must be a multiple of 16 and at most 8176 with 8 ranks"),
        ((64, 16, 2064, 8), r"hidden \(2064\) must be a multiple of 256 and at most 7936 with 16 ranks"),
    ],
)
def test_sizes_without_a_kernel_are_refused(sizes, words):
    num_experts, ep_size, hidden, top_k = sizes
    with pytest.raises(ValueError, match=f"{words}.*take exchange 'auto'"):
        check_sizes(num_experts, ep_size, hidden=hidden, top_k=top_k)


def test_the_published_layer_has_kernels():
    check_sizes(256, 64, hidden=7168, top_k=8)
    check_sizes(8, 2, hidden=64, top_k=2)


@pytest.mark.parametrize(("has_cuda", "has_package"), [(True, False), (False, True), (False, False), (True, True)])
def test_what_is_missing_is_named(monkeypatch, has_cuda, has_package):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if has_package else None)
    if has_cuda and has_package:
        check_available()
        return
    with pytest.raises(ValueError, match="install that, or take exchange 'auto'") as caught:
        check_available()
    assert ("a CUDA device" in str(caught.value)) is not has_cuda
    assert ("the package deep_ep" in str(caught.value)) is not has_package


def test_memory_that_is_filled_after_rows_arrive_is_refused(monkeypatch):
    monkeypatch.setattr(deep_ep, "check_available", lambda: None)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="fill_uninitialized_memory = False"):
            open_buffer(None, HIDDEN)
    finally:
        torch.use_deterministic_algorithms(False)
