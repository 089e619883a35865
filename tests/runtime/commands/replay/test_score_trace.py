"""Scores of real runs: complete, of the right steps, and those by which the experts were chosen."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dispatch.routing.selection import biased_scores, count_by_expert, ordered_topk
from runtime.commands.replay.score_trace import read_scores
from tests.ranks import run_ranks
from tests.workers.training_gang import join_worker, make_spec
from workers.record.run_log import read_load_history, read_metrics

TOKENS = 12 * 16  # sequences x tokens of each


def _train_once(spec, rank, world_size, name, again="", resume_from=None):
    run_dir = spec.run_dir.parent / name
    worker = join_worker(replace(spec, run_dir=run_dir), rank, world_size, name + again)
    worker.train(resume_from and run_dir / "checkpoints" / f"step_{resume_from:08d}")
    return worker


def _train_variants(rank, world_size, spec):
    recomputed = replace(spec, model=replace(spec.model, recompute="full"))
    micro = replace(spec, run=replace(spec.run, micro_batch_size=2, eval_every=1))
    for name, variant in (("plain", spec), ("recomputed", recomputed), ("micro", micro)):
        _train_once(variant, rank, world_size, name)
    unrecorded = _train_once(replace(spec, record_scores_every=0), rank, world_size, "unrecorded")
    return [router.on_scores for router in unrecorded._state.routers.values()]


def _train_and_resume(rank, world_size, spec):
    """Steps whose scores are found after each start of one run."""
    longer = replace(spec, run=replace(spec.run, steps=7))
    starts = (
        (spec, None),  # 1 to 5
        (replace(longer, record_scores_every=2), 2),  # 3, 5 and 7
        (replace(longer, record_scores_every=0), 4),  # none of 5 to 7
        (longer, 6),  # 7
        (longer, 6),  # 7 again
    )
    found = []
    for number, (each, resume_from) in enumerate(starts):
        _train_once(each, rank, world_size, "resumed", str(number), resume_from)
        torch.distributed.barrier()
        found.append(read_scores(spec.run_dir.parent / "resumed").steps)
        torch.distributed.barrier()
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scores")
    spec = replace(make_spec(folder), record_scores_every=1)
    assert run_ranks(2, _train_variants, spec)[1] == [None, None]
    return folder


@pytest.mark.parametrize("name", ["plain", "recomputed", "micro"])
def test_the_scores_of_a_step_are_those_that_it_was_routed_by(runs: Path, name: str) -> None:
    history, found = read_load_history(runs / name), read_scores(runs / name)
    assert found.steps == [1, 2, 3, 4, 5]
    assert found.num_experts == (8, 8)
    num_different = 0
    for index, step in enumerate(found.steps):
        for where, scores_TE in zip(history.layout.slices, found.read(step), strict=True):
            assert scores_TE.shape == (TOKENS, 8) and scores_TE.dtype == torch.float32  # each token once
            bias_E = torch.from_numpy(history.bias[index, where].copy())
            counts_E = count_by_expert(ordered_topk(biased_scores(scores_TE, bias_E), 2), 8)
            num_different += int((counts_E - torch.from_numpy(history.counts[index, where].copy())).abs().sum())
    # 16 bits of a score turn the choice of a token that was all but undecided; here 3,840 choices were made.
    assert num_different <= 8


def test_recording_changes_nothing_of_the_training(runs: Path) -> None:
    plain, unrecorded = (read_metrics(runs / name)[0] for name in ("plain", "unrecorded"))
    for key in ("loss", "grad_norm", "bias_checksum"):
        assert [line[key] for line in plain] == [line[key] for line in unrecorded]


def test_a_recompute_records_no_token_twice(runs: Path) -> None:
    for step in (1, 5):
        plain, recomputed = (read_scores(runs / name).read(step) for name in ("plain", "recomputed"))
        assert all(torch.equal(left, right) for left, right in zip(plain, recomputed, strict=True))


def test_tokens_lie_in_the_order_of_ranks_and_micro_batches(runs: Path, tmp_path: Path) -> None:
    run_ranks(1, _train_alone, replace(make_spec(tmp_path, steps=1), record_scores_every=1))
    alone = read_scores(tmp_path / "run").read(1)[0]
    for name in ("plain", "micro"):  # on two ranks
        assert torch.allclose(read_scores(runs / name).read(1)[0], alone, atol=1e-4)


def _train_alone(rank, world_size, spec):
    _train_once(spec, rank, world_size, "run")


def test_later_starts_override_earlier_ones_for_the_steps_that_they_cover(tmp_path: Path) -> None:
    spec = replace(make_spec(tmp_path, checkpoint_every=1, keep_checkpoints=9), record_scores_every=1)
    found = run_ranks(2, _train_and_resume, spec)[0]
    assert found == [[1, 2, 3, 4, 5], [1, 2, 3, 5, 7], [1, 2, 3], [1, 2, 3, 7], [1, 2, 3, 7]]
    folders = ["from_00000001", "from_00000003", "from_00000007", "from_00000007.superseded_1"]
    assert sorted(path.name for path in (tmp_path / "resumed/scores").iterdir()) == folders


def test_a_step_that_a_rank_lacks_is_left_out(runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "micro", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    path = run / "scores/from_00000001/rank_1.bin"
    os.truncate(path, path.stat().st_size * 3 // 5 + 1)  # in the fourth step
    assert read_scores(run).steps == [1, 2, 3]


def test_without_scores_the_error_says_how_to_record_them(runs: Path) -> None:
    with pytest.raises(ValueError, match=r"no recorded scores.*trimtab train --balance\.record"):
        read_scores(runs / "unrecorded")


def _train_with_scores_in_the_way(rank, world_size, spec):
    spec.run_dir.mkdir(parents=True, exist_ok=True)
    (spec.run_dir / "scores").write_text("in the way")
    return _train_once(spec, rank, world_size, "run").progress(0)


def test_a_run_that_cannot_record_goes_on_and_says_so_once(tmp_path: Path) -> None:
    lines = run_ranks(1, _train_with_scores_in_the_way, replace(make_spec(tmp_path), record_scores_every=1))[0]
    assert sum(line.get("kind") == "train" for line in lines) == 5
    [warning] = [line["text"] for line in lines if line.get("event") == "warning"]
    assert "rank 0 cannot write" in warning and "records no scores" in warning
