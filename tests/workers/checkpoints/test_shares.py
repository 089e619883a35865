"""Shares: every tensor is one rank's to save, and a block holds copies that stay as they were."""

import torch

from workers.checkpoints.shares import TensorBlock, TensorSpec, block_bytes, divide, specs_of

CPU = torch.device("cpu")


def _spec(num_floats):
    return TensorSpec((num_floats,), torch.float32)


def test_every_name_is_in_one_share_of_a_rank_that_holds_it():
    #            dense: everywhere     experts: on two ranks each    random state: on one
    dense = {f"dense.{i}": _spec(i + 1) for i in range(20)}
    held = [
        dense | {f"expert.{e}": _spec(8) for e in experts} | {f"random.{rank}": _spec(2)}
        for rank, experts in enumerate([(0, 1), (2, 3), (0, 1), (2, 3)])
    ]
    shares = divide(held)
    assert sorted(name for share in shares for name in share) == sorted(set().union(*held))
    for rank, share in enumerate(shares):
        assert all(held[rank][name] == spec for name, spec in share.items())
        assert f"random.{rank}" in share
    # 20 dense of 1..20 floats, 4 experts of 8, 4 states of 2: 250 floats, a quarter each but for the last tensor.
    sizes = [sum(spec.num_bytes for spec in share.values()) for share in shares]
    assert sum(sizes) == 1000
    assert max(sizes) - min(sizes) <= 80


def test_a_rank_without_anything_gets_an_empty_share():
    assert divide([{"x": _spec(1)}, {}]) == [{"x": _spec(1)}, {}]


def test_a_block_holds_any_dtype_and_shape_and_stays_as_it_was_filled():
    live = {
        "scalar": torch.tensor(3.5),
        "odd": torch.arange(7, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "matrix": torch.randn(3, 5, dtype=torch.float64).t(),
        "half": torch.randn(9).bfloat16(),
    }
    block = TensorBlock(specs_of(live), CPU)
    assert block.bytes.numel() == block_bytes(specs_of(live)) == 4 * 64 + 64
    expected = {name: tensor.clone() for name, tensor in live.items()}
    place = block.bytes.data_ptr()
    block.fill(live)
    for tensor in live.values():
        tensor.zero_()
    assert all(torch.equal(block.tensors[name], expected[name]) for name in live)
    block.fill(live)
    assert not any(tensor.any() for tensor in block.tensors.values())
    assert block.bytes.data_ptr() == place


def test_filling_leaves_what_is_not_given():
    block = TensorBlock({"a": _spec(1), "b": _spec(1)}, CPU)
    block.fill({"a": torch.ones(1), "other": torch.ones(1)})
    assert [block.tensors[name].item() for name in "ab"] == [1.0, 0.0]
