"""Who holds up the others, from what each says of itself."""

import pytest

from cluster.failures.stall import find_stall
from dispatch.diagnosis.activity import Activity, Collective, Splits

NAMES = {rank: f"rank {rank} (10.0.0.{rank}, pid {rank}, cpu)" for rank in range(4)}
WORLD, EP = (0, 1, 2, 3), (2, 3)


def waiting(index, waited_s=5.0, *, group="world", members=WORLD, step=7, phase="gradients", splits=None, recent=None):
    """A rank in its `index`-th collective of a group."""
    layer = "layers.1.moe" if phase in ("dispatch", "combine") else ""
    collective = Collective(
        op="op",
        group=group,
        index=index,
        members=members,
        step=step,
        layer=layer,
        phase=phase,
        waited_s=waited_s,
        splits=splits,
    )
    return doing(phase, waited_s, {group: index}, step=step, waits_in=collective, recent=recent)


def doing(phase, phase_s, started, *, step=7, waits_in=None, recent=None):
    return Activity(
        step=step, layer="", phase=phase, phase_s=phase_s, waits_in=waits_in, started=started, recent=recent or {}
    )


def stall_of(*activities, bound_s=4.0):
    answers = {rank: a if a is None else {"training": a} for rank, a in enumerate(activities)}
    return find_stall(answers, NAMES, bound_s, "the bound", {2: "; last seen 3 s ago"})


def test_below_the_bound_nobody_is_to_blame():
    assert stall_of(waiting(5, 3.9), waiting(5, 3.9), doing("experts", 9.0, {"world": 4})) is None
    assert stall_of(doing("experts", 9.0, {"world": 4})) is None


def test_the_rank_that_has_not_come_is_missing():
    stall = stall_of(waiting(5), waiting(5), doing("forward", 5.1, {"world": 4}), waiting(5))
    assert (stall.missing, stall.waiting, stall.silent) == ((2,), (0, 1, 3), ())
    assert str(stall.error).startswith(
        "step 7, gradients: no end after 5.0 s; missing: rank 2; if it only needs longer, raise the bound\n"
        "  rank 2 (10.0.0.2, pid 2, cpu): has been in step 7, forward for 5.1 s\n"
    )


def test_a_rank_that_does_not_answer_is_missing_with_what_it_said_last():
    stall = stall_of(waiting(5), waiting(5), None, waiting(5))
    assert (stall.missing, stall.silent) == ((2,), (2,))
    assert "cut off; last seen 3 s ago" in str(stall.error)


def test_the_blame_goes_past_those_who_wait_themselves():
    # 3 sleeps; 2 waits for it in their expert-parallel group; 0 and 1 wait for both, and began a little earlier.
    in_ep = waiting(9, 5.0, group="ep", members=EP, phase="combine")
    stall = stall_of(waiting(5, 5.5), waiting(5, 5.4), in_ep, doing("experts", 5.2, {"ep": 8, "world": 4}))
    assert stall.missing == (3,)
    # Without 2 and 3 in the picture of `ep`, the same wait would blame both.
    assert stall_of(waiting(5, 5.5), waiting(5, 5.4), *[doing("experts", 5.2, {"world": 4})] * 2).missing == (2, 3)


@pytest.mark.parametrize(("many_wait_s", "odd_waits_s"), [(5.0, 4.5), (5.0, 5.5), (3.9, 4.0)])
def test_of_ranks_that_wait_for_each_other_the_few_left_something_out(many_wait_s, odd_waits_s):
    norm = {"group": "ep", "members": WORLD, "phase": "gradient norm"}
    many = waiting(5, many_wait_s)  # (3.9, 4.0): only the odd one's wait is beyond the bound yet
    stall = stall_of(many, many, waiting(9, odd_waits_s, **norm), many)
    assert stall.missing == (2,)
    assert "waits itself in step 7, gradient norm, for " in str(stall.error)
    assert "it left out step 7, gradients" in str(stall.error)


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_that_wait_for_each_other_the_one_further_on_left_something_out(swapped):
    pair = [
        waiting(5, members=(0, 1), phase="bias update, reduce"),
        waiting(9, group="ep", members=(0, 1), step=8, phase="dispatch"),
    ]
    assert stall_of(*(reversed(pair) if swapped else pair)).missing == ((0,) if swapped else (1,))


def test_a_rank_that_is_elsewhere_in_the_same_group_left_something_out():
    # 2 left out its only layer: its gradients have the number that the dispatch of the others has. Its control thread,
    # which began first, waits for theirs.
    at = {place: {("world", 5): f"step 7, {place}"} for place in ("dispatch", "gradients")}
    many = {"training": waiting(5, 3.9, phase="dispatch", recent=at["dispatch"]), "control": doing("idle", 9, {})}
    odd = {
        "training": waiting(5, 3.8, phase="gradients", recent=at["gradients"]),
        "control": waiting(3, 4.1, group="control", phase="bias update, reduce"),
    }
    stall = find_stall({0: many, 1: many, 2: odd, 3: many}, NAMES, 4.0, "the bound", {})
    assert stall.missing == (2,)
    assert str(stall.error).startswith("step 7, dispatch of layers.1.moe: no end after 3.9 s; missing: rank 2; ")
    assert "it left out step 7, dispatch of layers.1.moe" in str(stall.error)


def test_when_all_have_come_the_error_says_where_each_believes_to_be():
    here, there = {("world", 5): "step 7, gradients"}, {("world", 5): "step 7, gradient norm"}
    stall = stall_of(*[waiting(5, members=(0, 1, 2), recent=place) for place in (here, here, there)])
    assert stall.missing == ()
    assert "all its ranks are in it" in str(stall.error)
    assert "    ranks 0, 1: step 7, gradients\n    rank 2: step 7, gradient norm" in str(stall.error)


def test_the_matrix_shows_what_is_sent_what_is_expected_and_where_they_differ():
    def splits(sent, expected):
        return {"splits": Splits(announced=sent, sent=sent, expected=expected), "phase": "dispatch"}

    # 0 sends 7 rows to 1, which expects 9; 3 is not in it.
    stall = stall_of(
        waiting(5, **splits([0, 7, 2, 3], [0, 4, 1, 5])),
        waiting(5, **splits([4, 0, 6, 8], [9, 0, 2, 6])),
        waiting(5, **splits([1, 2, 0, 9], [2, 6, 0, 7])),
        doing("experts", 5.0, {"world": 4}),
    )
    rows = [line.split() for line in str(stall.error).splitlines()[-5:]]
    assert rows == [
        ["rank", "0", "1", "2", "3"],
        ["0", ".", "7!9", "2", "3"],
        ["1", "4", ".", "6", "8"],
        ["2", "1", "2", ".", "9"],
        ["3", "(5)", "(6)", "(7)", "."],
    ]
