"""What ranks do together and what fails on one of them: all raise, and nothing of the cause is lost."""

import pickle
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.ranks import run_ranks
from workers.checkpoints.checkpoint_files import CheckpointCorrupt, CheckpointError, DiskRefused
from workers.distributed.agreement import PeerFailed, together

KINDS = {kind.__name__: kind for kind in (CheckpointError, DiskRefused, CheckpointCorrupt)}


def _explain(error):
    return DiskRefused(f"explained: {error}") if isinstance(error, OSError) else None


def _work(what):
    if isinstance(what, Exception):
        raise what
    return what


def _outcome(*by_rank):
    try:
        return together(
            dist.group.WORLD, "testing", lambda: _work(by_rank[dist.get_rank()]), kinds=KINDS, explain=_explain
        )
    except Exception as error:  # noqa: BLE001 - what is raised is what is tested
        return type(error).__name__, str(error), repr(error.__cause__)


def _fail_in_turn(rank, world_size):
    corrupt = CheckpointCorrupt(Path("a/step_00000002"), "f", "is missing", Path("a/step_00000001"))
    outcomes = [_outcome("zero", "one"), _outcome("zero", OSError("full")), _outcome(OSError("full"), KeyError("k"))]
    with pytest.raises(CheckpointCorrupt) as caught:
        together(
            dist.group.WORLD,
            "x",
            lambda: _work([corrupt, 1][rank]),
            kinds=KINDS,
            explain=lambda error: error,  # type: ignore[return-value]
        )
    assert (caught.value.path, caught.value.previous) == (corrupt.path, corrupt.previous)
    return outcomes


def test_a_failure_of_one_rank_is_raised_on_all_and_a_bug_as_it_is_where_it_happened():
    first, second = run_ranks(2, _fail_in_turn)
    assert (first[0], second[0]) == ("zero", "one")
    # The rank that failed has the cause, and with it the traceback.
    assert first[1] == ("DiskRefused", "explained: full", "None")
    assert second[1] == ("DiskRefused", "explained: full", "OSError('full')")
    # A bug goes before what the user can mend, and the others accuse the rank that met it.
    assert first[2] == ("PeerFailed", "testing failed on rank 1: KeyError: 'k'", repr(DiskRefused("explained: full")))
    assert second[2] == ("KeyError", "'k'", "None")
    again = pickle.loads(pickle.dumps(PeerFailed("testing", 1, "KeyError: 'k'")))
    assert (str(again), again.ranks) == ("testing failed on rank 1: KeyError: 'k'", (1,))
