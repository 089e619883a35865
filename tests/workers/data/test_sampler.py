"""Batches as a function of seed and step, whatever the ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from workers.data.mix import MixCounts, MixSchedule
from workers.data.sampler import Sampler
from workers.data.shards import Dataset, DatasetMeta, SourceMeta, SplitSize

SEQ_LEN = 4


def make_dataset(num_train: int = 41, num_val: tuple[int, ...] = (21, 9)) -> Dataset:
    """Tokens that tell where they stand: train 0, 1, 2, …; validation 1000, 1001, … and 2000, 2001, …"""
    val = tuple(np.arange(1000 * (i + 1), 1000 * (i + 1) + n, dtype=np.uint16) for i, n in enumerate(num_val))
    sources = tuple(
        SourceMeta(f"source {i}", "", SplitSize(1, 1), SplitSize(n, n), files=()) for i, n in enumerate(num_val)
    )
    return Dataset(Path(), DatasetMeta("bytes", 257, sources, ()), np.arange(num_train, dtype=np.uint16), val)


def make_sampler(*, seed: int = 0, global_batch_size: int = 6, **dataset: int) -> Sampler:
    return Sampler(make_dataset(**dataset), SEQ_LEN, global_batch_size, seed)


def global_batch(sampler: Sampler, step: int, world_size: int, num_micro: int) -> torch.Tensor:
    parts = [
        sampler.batch(step, rank, world_size, micro, num_micro)[0]
        for rank in range(world_size)
        for micro in range(num_micro)
    ]
    return torch.cat(parts)


def test_targets_are_the_next_inputs() -> None:
    input_ids, targets, _ = make_sampler().batch(0, 0, 1)
    assert input_ids.shape == targets.shape == (6, SEQ_LEN)
    assert input_ids.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, input_ids + 1)
    assert input_ids.is_contiguous()
    assert targets.is_contiguous()


@pytest.mark.parametrize(("world_size", "num_micro"), [(2, 1), (3, 1), (6, 1), (1, 3), (2, 3), (3, 2)])
def test_global_batch_is_the_same_for_any_ranks_and_micro_batches(world_size: int, num_micro: int) -> None:
    for step in (0, 1, 7):
        whole = make_sampler().batch(step, 0, 1)[0]
        assert torch.equal(global_batch(make_sampler(), step, world_size, num_micro), whole)


def test_batch_is_the_same_in_any_order_of_steps() -> None:  # a resumed run begins in the middle
    going, resumed = make_sampler(), make_sampler()
    batches = [going.batch(step, 1, 2)[0] for step in range(8)]
    for step in (5, 2, 7):
        assert torch.equal(resumed.batch(step, 1, 2)[0], batches[step])


def test_epoch_visits_every_target_once() -> None:
    sampler = make_sampler(global_batch_size=5)  # 40 targets are 10 windows, 2 steps
    for epoch in range(2):
        targets = torch.cat([sampler.batch(2 * epoch + step, 0, 1)[1] for step in range(2)])
        assert sorted(targets.flatten().tolist()) == list(range(1, 41))


def test_batch_may_reach_over_the_end_of_an_epoch() -> None:
    by_sixes, by_ones = make_sampler(global_batch_size=6), make_sampler(global_batch_size=1)
    for step in range(5):  # 30 sequences, 3 epochs of 10
        singles = torch.cat([by_ones.batch(6 * step + i, 0, 1)[0] for i in range(6)])
        assert torch.equal(by_sixes.batch(step, 0, 1)[0], singles)


def test_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return make_sampler(seed=seed, global_batch_size=10).batch(epoch, 0, 1)[0][:, 0].tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*which)) for which in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4
    # Written out, so that another version of numpy or of the sampler cannot change a resumed run's data unnoticed.
    assert order(0, 0) == [0, 8, 36, 4, 32, 20, 16, 12, 24, 28]


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"global_batch_size \(6\) must be a multiple of .*\(2 x 2\)"):
        make_sampler().batch(0, 0, 2, 0, 2)
    for step, rank, micro in ((-1, 0, 0), (0, 2, 0), (0, -1, 0), (0, 0, 1)):
        with pytest.raises(ValueError, match="there is no batch"):
            make_sampler().batch(step, rank, 2, micro, 1)


def test_text_shorter_than_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"training text has 4 tokens.*needs 5"):
        make_sampler(num_train=4)
    with pytest.raises(ValueError, match=r"held-out text of source 'source 1' has 3 tokens.*--data\.val_fraction"):
        make_sampler(num_val=(21, 3))
    assert make_sampler(num_train=5).num_windows == 1


def val_sequences(sampler: Sampler, world_size: int, batch_size: int, max_sequences: int | None) -> list[tuple]:
    """(source, first token) of the real sequences over all ranks; checks that ranks agree in shape."""
    batches = [list(sampler.val_batches(rank, world_size, batch_size, max_sequences)) for rank in range(world_size)]
    assert len({len(of_rank) for of_rank in batches}) == 1
    found = []
    for batch in (batch for of_rank in batches for batch in of_rank):
        assert batch.sequences.input_ids.shape == batch.sequences.targets.shape == (batch_size, SEQ_LEN)
        assert torch.equal(batch.sequences.targets, batch.sequences.input_ids + 1)
        assert batch.source_B.dtype == torch.int64
        assert batch.is_real_B.dtype == torch.bool
        firsts = batch.sequences.input_ids[:, 0].tolist()
        rows = zip(batch.source_B.tolist(), firsts, batch.is_real_B.tolist(), strict=True)
        found += [(source, first) for source, first, is_real in rows if is_real]
    return found


ALL_VAL = [(0, 1000), (0, 1004), (0, 1008), (0, 1012), (0, 1016), (1, 2000), (1, 2004)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_validation_reads_each_sequence_once_on_any_ranks(world_size: int, batch_size: int) -> None:
    for max_sequences in (None, 7, 100):  # more than there are means all
        assert val_sequences(make_sampler(), world_size, batch_size, max_sequences) == ALL_VAL


def test_shortened_validation_is_spread_over_sources_and_the_same_on_any_ranks() -> None:
    assert val_sequences(make_sampler(), 1, 2, 5) == [(0, 1000), (0, 1004), (0, 1012), (1, 2000)]
    assert val_sequences(make_sampler(), 3, 2, 5) == val_sequences(make_sampler(), 1, 1, 5)
    assert val_sequences(make_sampler(), 1, 1, 1) == [(0, 1000), (1, 2000)]  # each source takes part


# Mixes


def make_mixed(*weights: float, after: tuple[float, ...] = (), shift_at: int = 0, **sampler: int) -> Sampler:
    """Sources of 10, 5 and 3 windows; tokens of source i are i * 100, i * 100 + 1, …"""
    sizes = (41, 21, 13)
    train = np.concatenate([np.arange(100 * i, 100 * i + n, dtype=np.uint16) for i, n in enumerate(sizes)])
    val = tuple(np.arange(9, dtype=np.uint16) for _ in sizes)
    sources = tuple(
        SourceMeta(f"source {i}", "", SplitSize(n, n), SplitSize(9, 9), files=()) for i, n in enumerate(sizes)
    )
    dataset = Dataset(Path(), DatasetMeta("bytes", 257, sources, ()), train, val)
    settings = {"global_batch_size": 10, "seed": 0} | sampler
    return Sampler(dataset, SEQ_LEN, **settings, mix=MixSchedule(weights, after, shift_at))


def sources_of(sampler: Sampler, step: int) -> list[int]:
    """Sequences of each source in a step; checks that none reaches from one source into another."""
    input_ids, targets, _ = sampler.batch(step, 0, 1)
    assert torch.equal(targets, input_ids + 1)
    return (input_ids[:, 0] // 100).bincount(minlength=3).tolist()


def test_no_weights_mean_all_windows_in_one_order_as_without_a_mix() -> None:
    plain, mixed = make_sampler(), Sampler(make_dataset(), SEQ_LEN, 6, 0, MixSchedule())
    assert all(torch.equal(plain.batch(step, 0, 1)[0], mixed.batch(step, 0, 1)[0]) for step in range(4))


def test_shares_that_divide_the_batch_are_exact_in_every_batch() -> None:
    sampler = make_mixed(0.7, 0.2, 0.1)
    assert {tuple(sources_of(sampler, step)) for step in range(20)} == {(7, 2, 1)}
    assert sources_of(make_mixed(7, 2, 1), 0) == [7, 2, 1]  # in any unit


def test_other_shares_are_exact_within_one_sequence_and_over_the_period() -> None:
    counts = MixCounts(MixSchedule((0.55, 0.33, 0.12)), 7)
    exact = np.array([0.55, 0.33, 0.12]) * 7
    steps = np.array([counts.counts_at(step) for step in range(1000)])
    assert (steps.sum(1) == 7).all()
    assert (steps >= np.floor(exact)).all() and (steps <= np.ceil(exact)).all()
    assert (steps.sum(0) == [3850, 2310, 840]).all()
    assert np.abs(np.cumsum(steps, 0) - exact * np.arange(1, 1001)[:, None]).max() < 3.5  # nor far off in between


def test_counts_before_a_step_are_the_sum_of_all_steps_before() -> None:
    counts = MixCounts(MixSchedule((0.55, 0.33, 0.12), (0.1, 0.2, 0.7), shift_at=1205), 7)
    total = np.zeros(3, dtype=np.int64)
    for step in range(2600):  # over the shift and two periods
        assert (counts.counts_before(step) == total).all(), step
        total += counts.counts_at(step)


def test_each_source_has_epochs_of_its_own_and_loses_no_window() -> None:
    sampler = make_mixed(0.5, 0.25, 0.25, global_batch_size=4)
    firsts = torch.cat([sampler.batch(step, 0, 1)[0][:, 0] for step in range(15)])  # 30, 15, 15 sequences
    seen = np.bincount(firsts.numpy(), minlength=213)
    assert [seen[100 * i : 100 * i + 100].tolist()[: 4 * n : 4] for i, n in enumerate((10, 5, 3))] == [
        [3] * 10,
        [3] * 5,
        [5] * 3,
    ]


def test_the_mix_shifts_at_its_step_and_a_resumed_run_reads_the_same() -> None:
    going = make_mixed(0.8, 0.1, 0.1, after=(0.1, 0.1, 0.8), shift_at=4)  # the 4th step is step 3 from 0
    assert [sources_of(going, step) for step in range(6)] == [[8, 1, 1]] * 3 + [[1, 1, 8]] * 3
    batches = [going.batch(step, 0, 1)[0] for step in range(12)]
    for step in (9, 2, 4, 3, 11):  # each by a sampler that has drawn nothing before
        resumed = make_mixed(0.8, 0.1, 0.1, after=(0.1, 0.1, 0.8), shift_at=4)
        assert torch.equal(resumed.batch(step, 0, 1)[0], batches[step])


@pytest.mark.parametrize(("world_size", "num_micro"), [(2, 1), (6, 1), (1, 3), (2, 3)])
def test_mixed_batch_is_the_same_for_any_ranks_and_micro_batches(world_size: int, num_micro: int) -> None:
    def sampler() -> Sampler:
        return make_mixed(0.6, 0.3, 0.1, after=(1, 0, 1), shift_at=3, global_batch_size=12)

    for step in (0, 2, 7):
        assert torch.equal(global_batch(sampler(), step, world_size, num_micro), sampler().batch(step, 0, 1)[0])


def test_places_of_the_sources_in_a_batch_are_shuffled_by_seed_and_step() -> None:
    def places(seed: int, step: int) -> list[int]:
        return (make_mixed(0.5, 0.3, 0.2, seed=seed).batch(step, 0, 1)[0][:, 0] // 100).tolist()

    assert len({tuple(places(*which)) for which in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4
    # Written out for the same reason as above.
    assert places(0, 0) == [0, 2, 1, 2, 1, 0, 0, 0, 1, 0]
    assert make_mixed(0.5, 0.3, 0.2).batch(1, 0, 1)[0][:, 0].tolist() == [8, 204, 108, 24, 20, 104, 100, 28, 12, 200]


def test_a_source_of_weight_0_is_not_read() -> None:
    sampler = make_mixed(0.5, 0, 0.5, global_batch_size=7)
    assert all(sources_of(sampler, step)[1] == 0 for step in range(8))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ({"before": (0.5, 0.5)}, r"data.mix has 2 weights, but there are 3 sources \(source 0, source 1, source 2\)"),
        ({"before": (1, 1, 1), "after": (1,), "shift_at": 5}, r"data.mix_after has 1 weights.*--data.mix_after \[\]"),
        ({"before": (1, -1, 1)}, r"data.mix \[1, -1, 1\] must hold numbers of at least 0"),
        ({"before": (0, 0, 0)}, "every source the weight 0"),
        ({"before": (1, 1, 1), "after": (1, 1, 1)}, r"data.shift_at \(0\) belong together"),
        ({"before": (1, 1, 1), "shift_at": 5}, r"data.mix_after \[\].*belong together"),
        ({"before": (1, 1, 1), "after": (1, 1, 1), "shift_at": 1}, r"data.shift_at \(1\) must be 0 or a step above 1"),
        ({"after": (1, 1, 1), "shift_at": 5}, "needs data.mix"),
    ],
)
def test_wrong_mix_is_refused(mix: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule = MixSchedule(**mix)
        make_mixed(*schedule.before, after=schedule.after, shift_at=schedule.shift_at)
